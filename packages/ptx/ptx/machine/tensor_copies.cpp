// cp.async.bulk.tensor: boxes of tensors to shared memory and back.
//
// A tensor map, which lies in a parameter, says where the tensor lies and what the box is. A copy ends at a random time. No warp makes
// it: its accesses are those of an agent, numbered behind the warps, which knows what the ordering warp knew. Who waits for the
// mbarrier (loads) or for the group (stores) knows the agent's accesses that have ended.
#include <memory>

#include "async_copies.h"
#include "memory.h"

namespace ptx {

namespace {

constexpr u64 MAGIC = 0x70616d726f736e74ull;  // of TensorMap, beside a real one of CUDA's driver
constexpr int MOST_DIMENSIONS = 5, PIECE = 16;

// What Python makes of a tensor and a box (ptx/running/tensor_maps.py). Dimensions count from the innermost one.
struct TensorMap {
    u64 magic, address, sizes[MOST_DIMENSIONS], strides[MOST_DIMENSIONS - 1];  // in elements; in bytes, from the second on
    u32 box[MOST_DIMENSIONS];
    u8 rank, element, swizzle, fill;  // bytes of an element and of a swizzled row (0: none); which byte stands outside the tensor
    u64 unused[2];

    u32 row_bytes() const { return box[0] * element; }
    u32 bytes() const {
        u32 product = element;
        for (int d = 0; d < rank; ++d) product *= box[d];
        return product;
    }
};
static_assert(sizeof(TensorMap) == 128);

// A box of a tensor, and its place in shared memory.
struct Box {
    TensorMap map;
    s64 start[MOST_DIMENSIONS];
    u32 place;

    // visit(offset in the box, address, bytes): a part of a row of the box that lies within the tensor
    template <class Visit> void each_row(Visit visit) const {
        const s64 first = std::max<s64>(start[0], 0), last = std::min<s64>(start[0] + map.box[0], (s64)map.sizes[0]);
        if (first >= last) return;
        const u32 rows = map.bytes() / map.row_bytes();
        for (u32 row = 0; row < rows; ++row) {
            u64 address = map.address + first * map.element;
            bool inside = true;
            u32 rest = row;
            for (int d = 1; d < map.rank; ++d) {
                const s64 at = start[d] + rest % map.box[d];
                rest /= map.box[d];
                inside &= at >= 0 && at < (s64)map.sizes[d];
                address += (u64)at * map.strides[d - 1];
            }
            if (inside)
                visit(row * map.row_bytes() + (u32)(first - start[0]) * map.element, address, (int)(last - first) * map.element);
        }
    }
    // The box's bytes as they lie in shared memory: pieces of a swizzled row are exchanged by bits of their address.
    std::vector<u8> exchanged(const std::vector<u8>& data) const {
        if (!map.swizzle) return data;
        std::vector<u8> result(data.size());
        for (u32 offset = 0; offset < data.size(); offset += PIECE) {
            const u32 address = place + offset, turned = address ^ (address >> 7 & (map.swizzle / PIECE - 1)) << 4;
            memcpy(&result[turned - place], &data[offset], PIECE);
        }
        return result;
    }
};

// Who makes a copy.
struct Agent {
    Warp::Scheduling scheduling;
    Warp warp;

    Agent(Block& block, const Instruction& instruction, const Knowledge& knowledge, u32 clock)
        : warp{nullptr, nullptr, &block, (int)block.warps.size(), &instruction, &scheduling} {
        scheduling.knowledge = knowledge;
        scheduling.knowledge.known.back() = clock;
    }
};

// The ordering warp's knowledge for an agent. What the warp does from now on is later.
Knowledge handed_on(Warp& w) {
    const Knowledge knowledge = w.scheduling->knowledge;
    advance(w);
    return knowledge;
}

Box box_of(Warp& w, int lane, u64 map_address, const s32* coordinates, int count, u64 shared_address) {
    Box box;
    memcpy(&box.map, access(w, GENERIC, map_address, sizeof box.map, lane, Access::READ, nullptr, Proxy::GENERIC, 64),
           sizeof box.map);
    if (box.map.magic != MAGIC) fail(w, "no tensor map lies at address " + hex(map_address));
    if (box.map.rank != count)
        fail(w, "a copy in " + std::to_string(count) + " dimensions of a tensor that has " + std::to_string(box.map.rank));
    for (int d = 0; d < count; ++d) box.start[d] = lanes_of<s32>(w, coordinates[d])[lane];
    if (resolve(w, shared_address >= LOCAL_WINDOW ? GENERIC : SHARED, shared_address) != SHARED || shared_address % 128)
        fail(w, "a box of a tensor must lie at a multiple of 128 in shared memory; its address is " + hex(shared_address));
    box.place = (u32)shared_address;
    return box;
}

void count_box(Warp& w, const Box& box) {
    if (!w.block->machine->options.counts) return;
    auto count = [&](Space space, u64 address, int bytes) {
        u64 addresses[LANES];
        int lanes = 0;
        auto flush = [&](int size) {
            if (lanes) count_access(w, space, addresses, size, (u32)((1ull << lanes) - 1));
            lanes = 0;
        };
        for (; bytes >= PIECE; bytes -= PIECE, address += PIECE) {
            addresses[lanes++] = address;
            if (lanes == LANES) flush(PIECE);
        }
        flush(PIECE);
        if (bytes) addresses[lanes++] = address, flush(bytes);
    };
    count(SHARED, box.place, (int)box.map.bytes());
    box.each_row([&](u32, u64 address, int bytes) { count(GLOBAL, address, bytes); });
}

// ---- to shared memory: number of coordinates, destination, map, coordinates, mbarrier

void load(Warp& w, const Instruction& i, u32 lanes) {
    const s32* o = i.operands;
    const int count = o[0];
    u64 destinations[LANES], maps[LANES], mbarriers[LANES];
    addresses_of(w, o + 1, destinations);
    addresses_of(w, o + 4, maps);
    addresses_of(w, o + 7 + count, mbarriers);
    for (int l = 0; l < LANES; ++l) {
        if (!(lanes >> l & 1)) continue;
        const Box box = box_of(w, l, maps[l], o + 7, count, destinations[l]);
        u64 at = mbarriers[l];
        resolve(w, at >= LOCAL_WINDOW ? GENERIC : SHARED, at);
        Mbarrier& barrier = mbarrier_at(w, at);
        barrier.copies = (s64)barrier.phase;
        begin_copy(w, box.place, (int)box.map.bytes(), l, Proxy::ASYNC);
        count_box(w, box);
        later(*w.block, [&block = *w.block, &i, box, at = (u32)at, l, knowledge = handed_on(w)] {
            const u32 clock = next_copy(block);
            Agent agent(block, i, knowledge, clock);
            std::vector<u8> data(box.map.bytes(), box.map.fill);
            box.each_row([&](u32 offset, u64 address, int bytes) {
                memcpy(&data[offset], access_global(agent.warp, address, bytes, l, true, false, false, nullptr), bytes);
            });
            land_bulk_copy(block, box.place, (int)data.size(), clock, box.exchanged(data).data());
            complete_transaction(block, at, (u32)data.size());
        });
    }
}

}  // namespace

// ---- from shared memory: number of coordinates, map, coordinates, source

struct BulkStore {
    Block& block;
    const Instruction& instruction;
    Box box;
    int lane;
    u32 group;
    Knowledge knowledge;
    std::vector<u8> data;
    u32 read = 0, written = 0;  // clocks of the ends, 0 before them
    bool waited = false;

    void end_read() {
        if (read) return;
        const u8* from = shared_memory(block) + box.place;
        data = box.exchanged({from, from + box.map.bytes()});
        end_storing(block, box.place, (int)data.size());
        read = block.copy_clock;
    }
    void end_write() {
        end_read();
        if (written) return;
        written = next_copy(block);
        Agent agent(block, instruction, knowledge, written);
        box.each_row([&](u32 offset, u64 address, int bytes) {
            memcpy(access_global(agent.warp, address, bytes, lane, false, true, false, &data[offset]), &data[offset], bytes);
        });
    }
};

namespace {

void store(Warp& w, const Instruction& i, u32 lanes) {
    const s32* o = i.operands;
    const int count = o[0];
    u64 maps[LANES], sources[LANES];
    addresses_of(w, o + 1, maps);
    addresses_of(w, o + 4 + count, sources);
    AsyncCopies& copies = *w.scheduling->copies;
    for (int l = 0; l < LANES; ++l) {
        if (!(lanes >> l & 1)) continue;
        const Box box = box_of(w, l, maps[l], o + 4, count, sources[l]);
        begin_storing(w, box.place, (int)box.map.bytes());
        count_box(w, box);
        auto one = std::make_shared<BulkStore>(BulkStore{*w.block, i, box, l, copies.bulk_committed[l], handed_on(w), {}});
        copies.stores.push_back(one);
        later(*w.block, [one] {
            one->end_read();
            later(one->block, [one] { one->end_write(); });
        });
    }
}

void commit_group(Warp& w, const Instruction&, u32 lanes) {
    for (int l = 0; l < LANES; ++l) w.scheduling->copies->bulk_committed[l] += lanes >> l & 1;
}

// All but the last groups: what they read may be written anew, and, unless `reads`, what they write may be read.
template <bool reads> void wait_group(Warp& w, const Instruction& i, u32 lanes) {
    AsyncCopies& copies = *w.scheduling->copies;
    const u32 keep = (u32)i.operands[0];
    u32& known = w.scheduling->knowledge.known.back();
    auto& stores = copies.stores;
    for (auto& one : stores) {
        if (!(lanes >> one->lane & 1) || one->group + keep >= copies.bulk_committed[one->lane]) continue;
        one->waited = true;
        reads ? one->end_read() : one->end_write();
        known = std::max(known, reads ? one->read : one->written);
    }
    stores.erase(
        std::remove_if(stores.begin(), stores.end(), [](auto& one) { return one->waited && one->written; }), stores.end());
}

void check_stores(Warp& w) {
    for (auto& one : w.scheduling->copies->stores) {
        if (one->waited) continue;
        report(w, "copies in flight at the end, which no instruction waits for",
               "a store of a box at shared address " + std::to_string(one->box.place));
        break;
    }
    w.scheduling->copies->stores.clear();
}

const int registered = [] {
    add_at_exit(check_stores);
    add_handler("cp.async.bulk.tensor.load", load);
    add_handler("cp.async.bulk.tensor.store", store);
    add_handler("cp.async.bulk.commit_group", commit_group);
    add_handler("cp.async.bulk.wait_group", wait_group<false>);
    add_handler("cp.async.bulk.wait_group.read", wait_group<true>);
    return 0;
}();

}  // namespace

}  // namespace ptx
