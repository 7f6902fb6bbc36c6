// Memory of a launch: ranges, and shadows that know who wrote and who read.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "scheduler.h"

namespace ptx {

constexpr u64 LOCAL_WINDOW = 1ull << 60, SHARED_WINDOW = 1ull << 61, PARAMETER_WINDOW = 1ull << 62;  // of generic addresses
constexpr u64 WINDOW_SIZE = 1ull << 32;
constexpr u32 SHARED_BASE = 1024;  // shared memory begins here, so that address 0 is invalid
constexpr u32 RANK_SHIFT = 24, RANKS = 255;  // the bits of a shared address that have the block's rank in its cluster, plus one
constexpr int CLOCK_BITS = 20;  // of a warp's clock in shadows

// Global memory that a program may touch: an argument. Ranges may overlap (views of one storage).
struct Range {
    u64 begin, end;
    bool writable;
    std::string name;
    u8* initialised;  // a byte for each byte from `begin` on, 0 where nothing was written; null: all are initialised
};

// Who accessed memory: the warp's clock at that time, its number in the block, the lane.
struct Stamp {
    u32 lane : 5, warp : 6, atomic : 1, clock : CLOCK_BITS;
    bool operator==(const Stamp& b) const { return memcmp(this, &b, sizeof b) == 0; }
};

// The lanes that read bytes of shared memory last; mask: which of 4 bytes.
struct Reads {
    u32 mask : 4, lane : 7, atomic : 1, clock : CLOCK_BITS;
    enum { SEVERAL = 32, WHOLE_WARP = 33 };  // for `lane`
};

// Who wrote 4 bytes of shared memory. It is small, so that it stays in the cache.
struct SharedWord {
    Stamp writer;
    u8 written : 4;  // a bit for each byte that a warp wrote,
    u8 in_flight : 4;  // that a copy in flight will write
    u8 mixed : 1;  // the bytes have several writers: SharedShadow::byte_writers
    u8 replicated : 1;  // several warps wrote the same at the same time: SharedShadow::also
    u8 stored : 1;  // a bulk copy in flight reads it
    u16 reading;  // matrix products and bulk copies in flight that read it
};

struct SharedShadow {
    size_t readers;  // warps, and bulk copies
    std::vector<SharedWord> word;
    std::vector<Stamp> byte_writers;  // (word, 4)
    std::vector<u32> also;  // warps that wrote the same as the writer
    std::vector<Reads> reads;  // (word, reader)
    size_t used = 0;  // words that may have been touched
    // Each barrier of all warps begins an epoch: all know what was done in earlier ones, but for bulk copies (~0).
    std::vector<u32> touched;  // the epoch of a word's last access
    u32 epoch = 1;
    void touch(u32 k, u32 when) { touched[k] = std::max(touched[k], when); }
    SharedShadow(u32 bytes, int warps);
    void clear();
    Reads* reads_of(u32 k) { return reads.data() + k * readers; }
};

// memcmp, which the compiler writes out for the usual sizes.
inline bool differ(const u8* a, const u8* b, int size) {
    switch (size) {
        case 4: return memcmp(a, b, 4);
        case 8: return memcmp(a, b, 8);
        case 16: return memcmp(a, b, 16);
        default: return memcmp(a, b, size);
    }
}

// Which of the 4 bytes from `word` on are accessed.
inline u32 mask_of(u64 word, u64 address, int size) {
    const u32 from = word < address ? (u32)(address - word) : 0, to = (u32)std::min<u64>(address + size - word, 4);
    return ((1u << to) - 1) & ~((1u << from) - 1);
}

// ---- accesses after which the caller copies (global_memory.cpp, shared_memory.cpp)

u8* access_global(Warp&, u64 address, int size, int lane, bool reads, bool writes, bool strong, const u8* data);
u8* access_shared(Warp&, u64 address, int size, int lane, bool reads, bool writes, bool strong, const u8* data, Proxy);

// The same for all lanes of a plain access, in the usual case: aligned, within one argument whose bytes are all initialised, or
// within shared memory. A read says where the bytes of address 0 would lie; a write copies. False: nothing was checked, nothing
// was written, and `access` shall look at each lane.
bool read_global(Warp&, const u64 addresses[LANES], int size, u32 lanes, u64& base);
bool read_shared(Warp&, const u64 addresses[LANES], int size, u32 lanes, u64& base);
constexpr int LARGEST = 32;  // bytes of one access
bool write_global(Warp&, const u64 addresses[LANES], int size, u32 lanes, const u8 data[LANES][LARGEST]);
bool write_shared(Warp&, const u64 addresses[LANES], int size, u32 lanes, const u8 data[LANES][LARGEST]);

// The first and the last address of some lanes, and the bits that any of them has.
struct Extent {
    u64 low = ~0ull, high = 0, bits = 0;
    Extent(const u64 addresses[LANES], u32 lanes) {
        if (lanes == ALL)
            for (int l = 0; l < LANES; ++l) {
                low = std::min(low, addresses[l]);
                high = std::max(high, addresses[l]);
                bits |= addresses[l];
            }
        for (int l = 0; l < LANES && lanes != ALL; ++l) {
            const bool here = lanes >> l & 1;
            low = here && addresses[l] < low ? addresses[l] : low;
            high = here && addresses[l] > high ? addresses[l] : high;
            bits |= here ? addresses[l] : 0;
        }
    }
};

// ---- asynchronous accesses of shared memory, for copies and matrix products

// A copy to these bytes has begun: until it lands, nothing may touch them. Lane -1: the whole warp.
void begin_copy(Warp&, u32 address, int size, int lane, Proxy);
// It lands: the bytes are written as if by `lane` of the warp at `clock`, or,
void land_copy(Warp&, u32 address, int size, int lane, u32 clock, const u8* data);
// by no warp (bulk copies) at the clock of `next_copy`: who waits for the mbarrier whose transaction completes next knows them.
void land_bulk_copy(Block&, u32 address, int size, u32 clock, const u8* data);
u32 next_copy(Block&);
// A matrix product reads these bytes until end_reading: nothing may write them.
void begin_reading(Warp&, u32 address, int size);
void end_reading(Warp&, u32 address, int size);
void end_reading(Block&, u32 address, int size);  // by no warp: who waits for the mbarrier that hears of it next knows it
// The same of a bulk copy from shared memory.
void begin_storing(Warp&, u32 address, int size);
void end_storing(Block&, u32 address, int size);

// ---- order between blocks and warps through memory: atomics, fences, acquire and release

enum Order : s32 { RELAXED, ACQUIRE, RELEASE, ACQUIRE_RELEASE };
// After an access with an order, or a relaxed one, which a fence before or after it may order.
void synchronise(Warp&, Space, u64 address, Order, bool reads, bool writes);
void fence(Warp&, bool block_only);
// What the warp knows now is visible to asynchronous accesses.
void fence_proxy(Warp&);

std::shared_ptr<const Orders> released_by(Warp&);  // what the warp knows now, for other blocks
void acquire(Warp&, const std::shared_ptr<const Orders>&);  // the warp knows what was released

// ---- clusters

// The block whose shared memory has an address, which becomes that within the block.
Block& other_block(Warp&, u64& address);
inline Block& owner_of(Warp& w, u64& address) { return address >> RANK_SHIFT ? other_block(w, address) : *w.block; }
// Whether other blocks access the same shared memory at the same time.
void check_cluster(Warp&, Block& owner, u32 address, int size, int lane, bool writes, bool strong, const u8* data);

// The space that a generic address means, and its address there.
inline Space resolve(const Warp&, Space space, u64& address) {
    if (space != GENERIC) return space;
    if (address >= SHARED_WINDOW && address < SHARED_WINDOW + WINDOW_SIZE) return address -= SHARED_WINDOW, SHARED;
    if (address >= LOCAL_WINDOW && address < LOCAL_WINDOW + WINDOW_SIZE) return address -= LOCAL_WINDOW, LOCAL;
    if (address >= PARAMETER_WINDOW && address < PARAMETER_WINDOW + WINDOW_SIZE) return address -= PARAMETER_WINDOW, PARAMETER;
    return GLOBAL;
}

}  // namespace ptx
