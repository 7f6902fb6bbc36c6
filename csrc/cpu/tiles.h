// Registers of AMX tiles: eight tiles of 16 rows of 64 bytes, and the product of pairs of bfloat16 numbers on them.
//
// A thread holds tiles between the constructor and the destructor of a TileState, which `run` makes for its tasks (threads.h). All
// tiles always have their whole size: what is smaller is filled up with zeros (products.h). VLATTN_TILES puts a stand-in in the
// instructions' place, with which tests run everything else on any processor.
#pragma once
#include "vectors.h"

#if defined(__AMX_BF16__) || defined(__AMXBF16__) || defined(VLATTN_TILES)  // the second is that of older clangs
#define TILES true  // whether products of pairs take tiles
#else
#define TILES false
#endif

namespace ISA {
namespace {

static const Size TILE_SIDE = 16;  // rows of a tile, and its numbers of 32 bits in a row

#if defined(VLATTN_TILES)
// What calls have done since the library was loaded: products, loads, stores of tiles, and bytes of keys, values and
// rows that were packed for them (tools/tiles.py)
extern "C" uint64_t vlattn_tile_counts[4];
static void count_in(int n, Size more) { __atomic_fetch_add(vlattn_tile_counts + n, (uint64_t)more, __ATOMIC_RELAXED); }
static void count_packed(Size bytes) { count_in(3, bytes); }

struct Registers {
    uint32_t tile[8][TILE_SIDE][TILE_SIDE];
    bool ready;
};
static thread_local Registers registers;

static uint32_t (&tile_of(int n))[TILE_SIDE][TILE_SIDE] {
    if (!registers.ready) abort();  // the processor stops here, too
    return registers.tile[n];
}
static void load_tile_register(int n, const void* from, Size bytes) {
    count_in(1, 1);
    for (Size r = 0; r < TILE_SIDE; ++r) memcpy(tile_of(n)[r], (const char*)from + r * bytes, sizeof(uint32_t) * TILE_SIDE);
}
static void store_tile_register(int n, void* to, Size bytes) {
    count_in(2, 1);
    for (Size r = 0; r < TILE_SIDE; ++r) memcpy((char*)to + r * bytes, tile_of(n)[r], sizeof(uint32_t) * TILE_SIDE);
}
static void clear_tile_register(int n) { memset(tile_of(n), 0, sizeof registers.tile[n]); }
// c += a b: the sums of the pairs' first numbers, and those of their second ones, each from 0
static void multiply_tile_registers(int c, int a, int b) {
    count_in(0, 1);
    for (Size r = 0; r < TILE_SIDE; ++r)
        for (Size n = 0; n < TILE_SIDE; n += VL) {
            Vector first = {}, second = {};
            for (Size k = 0; k < TILE_SIDE; ++k) {
                const Words x = tile_of(a)[r][k] + Words{}, y = (Words)load((const float*)tile_of(b)[k] + n);
                first += bfloat16_lanes(x << 16) * bfloat16_lanes(y << 16);
                second += bfloat16_lanes(x) * bfloat16_lanes(y);
            }
            float* sum = (float*)tile_of(c)[r] + n;
            store(sum, load(sum) + (first + second));
        }
}
struct TileState {
    TileState() { registers.ready = true; }
    ~TileState() { registers.ready = false; }
};
#elif TILES
// Macros, since a register's number must be a literal for GCC, whose intrinsics do not say that they read memory.
#define load_tile_register(n, from, bytes) \
    do {                                   \
        __asm__ volatile("" ::: "memory"); \
        _tile_loadd(n, (from), (bytes));   \
    } while (0)
#define store_tile_register(n, to, bytes)  \
    do {                                   \
        _tile_stored(n, (to), (bytes));    \
        __asm__ volatile("" ::: "memory"); \
    } while (0)
#define clear_tile_register(n) _tile_zero(n)
#define multiply_tile_registers(c, a, b) _tile_dpbf16ps(c, a, b)
struct TileState {
    TileState() {
        static const struct alignas(64) {
            uint8_t palette, start_row, unused[14];
            uint16_t bytes[16];
            uint8_t rows[16];
        } whole = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
        static_assert(sizeof whole == 64, "as LDTILECFG reads it");
        _tile_loadconfig(&whole);
    }
    ~TileState() { _tile_release(); }
};
#else
struct TileState {
    TileState() {}
    ~TileState() {}
};
#endif
#if !defined(VLATTN_TILES)
INLINE void count_packed(Size) {}
#endif

}  // namespace
}  // namespace ISA
