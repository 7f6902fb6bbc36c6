// Blocks, warps and groups of lanes: what the scheduler keeps of them, and what handlers ask of it.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace ptx {

using Clocks =
    std::vector<u32>;  // how much of the work of each warp of a block is known; the last number is for copies in flight

// What is known of other blocks: the clocks of each, `width` of them, in the order of their numbers.
struct Orders {
    size_t width = 0;
    std::vector<u32> blocks, clocks;

    const u32* of(u32 block) const {
        const auto place = std::lower_bound(blocks.begin(), blocks.end(), block);
        return place != blocks.end() && *place == block ? &clocks[(place - blocks.begin()) * width] : nullptr;
    }
    // At least these clocks are known of a block.
    void add(u32 block, const u32* more) {
        const size_t at = std::lower_bound(blocks.begin(), blocks.end(), block) - blocks.begin();
        if (at == blocks.size() || blocks[at] != block) {
            blocks.insert(blocks.begin() + at, block);
            clocks.insert(clocks.begin() + at * width, more, more + width);
        } else
            for (size_t v = 0; v < width; ++v) clocks[at * width + v] = std::max(clocks[at * width + v], more[v]);
    }
    bool covers(const Orders& b) const {
        for (size_t n = 0; n < b.blocks.size(); ++n) {
            const u32* here = of(b.blocks[n]);
            if (!here) return false;
            for (size_t v = 0; v < width; ++v)
                if (here[v] < b.clocks[n * width + v]) return false;
        }
        return true;
    }
};

// What a warp knows of the accesses of others, and what of that a proxy fence followed. Barriers hand it on.
struct Knowledge {
    Clocks known, fenced;
    std::shared_ptr<const Orders> orders;
};

struct SharedShadow;  // memory.h
struct GlobalShadow;
struct Range;
struct AsyncCopies;  // async_copies.h

// ---- lanes of a warp

// Lanes that parted at a branch meet again at the instruction `reconverge`.
struct Split {
    int parent;  // the split around it, or -1
    int reconverge;
    u32 remaining;  // lanes that will come
    u32 waiting;    // lanes that are there
};

enum class State : u8 { RUNS, AT_BARRIER, FOR_LANES, RETRIES };

// Lanes of a warp that run together.
struct Group {
    u32 lanes;
    int pc;
    int split;  // where it meets the lanes it parted from, or -1
    State state = State::RUNS;
    int barrier = -1;
    u64 seen_events = 0;  // RETRIES: how much had happened in the block when it last tried
    int at = 0;           // the instruction at which it waits
};

struct Warp::Scheduling {
    std::vector<Group> groups;
    std::vector<Split> splits;
    u32 running = 0;  // lanes that have not ended
    bool again = false;

    Knowledge knowledge;
    // Up to which of its warp's clocks a lane knows what another lane did: at least lanes_known; beyond, by pairs.
    u32 lanes_known = 0;
    std::unique_ptr<u32[]> pairs_known;  // (32, 32), made where part of a warp meets

    std::vector<u8> local, local_written;  // (lane, byte)
    int last_range = 0;
    std::unique_ptr<AsyncCopies> copies;
    std::shared_ptr<void> products;  // matrix products in flight (wgmma.cpp)
    u32 at_cluster = 0, cluster_phase[LANES] = {};  // lanes that arrived at barrier.cluster, and in which phase
    // A fence before relaxed accesses releases, one after them acquires: for all blocks, or [1] for the block alone.
    std::shared_ptr<const Orders> to_release[2], to_acquire[2];

    u32 clock(const Warp& w) const { return knowledge.known[w.number]; }
};

// ---- blocks

struct Barrier {
    u32 lanes = 0;    // that arrived
    u32 threads = 0;  // the same, with the lanes of whole warps that have ended
    u32 needed = 0;   // 0: all threads
    int events = 0;
    Knowledge knowledge;
    u32 ones = 0, voters = 0;  // of BARRIER_REDUCE
};

struct Block;

// Blocks that reach each other's shared memory. Outside of clusters each block is one by itself.
struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;  // by rank
    // barrier.cluster: lanes that arrived, how many phases are complete, what the arriving ones released and the complete phase did
    u32 arrived = 0, phase = 0;
    std::shared_ptr<const Orders> arriving, complete;
};

struct Block {
    Machine* machine;
    Cluster* cluster;
    u32 rank = 0;  // in its cluster
    std::vector<Warp> warps;
    std::vector<Warp::Scheduling> schedulings;
    std::vector<u8> register_file, shared;
    std::unique_ptr<SharedShadow> shadow;
    std::map<u32, Barrier> barriers;
    std::map<u32, struct Mbarrier> mbarriers;  // by shared address (async_copies.h)
    std::vector<std::function<void()>> background;  // what happens at some later time
    std::shared_ptr<void> tensor_memory;  // of tcgen05
    u64 events = 0;  // counts what lanes may wait for
    u32 copy_clock = 0;  // of copies that no warp's lane makes (bulk copies)
    u32 place[3];
    u32 number = 0;  // place[0] + grid[0] * (place[1] + grid[1] * place[2])
    int alive = 0;  // warps that run
    std::unordered_map<u64, u32> sectors;  // of global memory that it touched: the bytes, one a bit
};

// ---- a launch

struct Counts {
    u64 wavefronts = 0, least_wavefronts = 0, sectors = 0, least_sectors = 0;
};

struct Finding {
    std::string kind, text;
    int instruction;
    u64 count;
};

struct Program {
    std::vector<Instruction> code;
    std::vector<s32> operands;
    std::vector<u8> constants;
    struct Special {
        std::string name;
        s32 slot;
        int bytes;
    };
    std::vector<Special> specials;
    int registers = 0;  // bytes of a warp's file
    std::string error;
    std::vector<u64> hits;
};

struct Options {
    u64 seed = 0, noise = 0, limit = 0, sample = 0;
    bool races = true, counts = false, in_order = false;
    int resident = 1;  // blocks at once
};

struct Machine {
    Program* program;
    Options options;
    const u8* parameters;
    u64 parameter_bytes;
    u32 grid[3], block[3], cluster[3] = {1, 1, 1};
    u32 cluster_size() const { return cluster[0] * cluster[1] * cluster[2]; }
    u32 shared = 0, dynamic_shared = 0, local = 0;
    std::vector<Range> ranges;
    std::unique_ptr<GlobalShadow> shadow;
    u64 random = 1;
    u64 executed = 0, ticks = 0;
    std::vector<u64> executed_by_kind, lanes_by_kind;
    Counts total;
    u64 sectors_once = 0, least_once = 0;  // if a block had each of its sectors once
    std::vector<Counts> by_instruction;
    std::map<std::pair<std::string, int>, Finding> findings;

    Machine();
    ~Machine();
    u64 draw();  // random bits
    u64 below(u64 bound) { return draw() % bound; }
};

constexpr int KINDS = 17;
extern const char* const KIND_NAMES[KINDS];

Handler handler_by_name(const std::string& name);  // or null
std::string all_handlers();

void run_grid(Machine&);
void check_cluster_barrier(Block&);  // completes the phase if all lanes of the cluster that run have arrived

// ---- what handlers ask of the scheduler

// These lanes wait until something has happened in the block, and run this instruction again. For handlers of RETRIES.
void try_again(Warp&);
// Something that lanes may wait for has happened.
inline void tell(Block& block) { ++block.events; }
// `action` runs at a random later time, at the latest when no lane of the block can go on, or at the block's end.
void later(Block&, std::function<void()> action);
// Called for each warp that ends.
void add_at_exit(void (*check)(Warp&));

// Happens-before within a block.
void join(Knowledge&, const Knowledge&);
void join(std::shared_ptr<const Orders>&, const std::shared_ptr<const Orders>&);
void advance(Warp&);  // what the warp does from now on is later than what it released
void release_to(Warp&, Knowledge&);  // what the warp did until now is known to whoever acquires it
void acquire_from(Warp&, const Knowledge&);  // the warp knows what was released there
void meet_lanes(Warp&, u32 lanes);  // these lanes know each other's accesses until now
bool lanes_ordered(const Warp&, int lane, int earlier, u32 clock);  // does `lane` know what `earlier` did at this clock?

// The finding's text may still be written if it is the first of its kind at this instruction; else null.
std::string* first_finding(Warp&, const char* kind);
std::string name_of(const Warp&);  // "block 0,0,0 warp 1"

}  // namespace ptx
