// Elements of the matrices that products read, and where they lie in the registers of a warp.
#pragma once

#include "machine.h"

namespace ptx {

// Elements of a register of 32 bits: how many it holds, as which bits, and the value of one.
template <class T, class Bits> struct Element {
    using Stored = Bits;
    static constexpr int PER_REGISTER = 4 / sizeof(Bits);
    static float value(u32 bits, int element) { return T::widened(static_cast<Bits>(bits >> 16 * element)); }
    template <int count, class Number> static void widen(Number* to, const Bits* from) {
        for (int n = 0; n < count; ++n) to[n] = T::widened(from[n]);
    }
};
struct BFloat16 : Element<BFloat16, u16> {
    static float widened(u16 bits) {
        u32 wide = static_cast<u32>(bits) << 16;
        float x;
        memcpy(&x, &wide, 4);
        return x;
    }
};
struct Float16 : Element<Float16, u16> {
    static float widened(u16 bits) {
        _Float16 x;
        memcpy(&x, &bits, 2);
        return static_cast<float>(x);
    }
    template <int count> static void widen(float* to, const u16* from) {  // compilers do not find the instruction by themselves
        static_assert(count == 8);
        _Float16 __attribute__((vector_size(16))) halves;
        memcpy(&halves, from, 16);
        typedef float Row __attribute__((vector_size(32)));
        const auto wide = __builtin_convertvector(halves, Row);
        memcpy(to, &wide, 32);
    }
    static u16 narrowed(float x) {
        _Float16 half = static_cast<_Float16>(x);
        u16 bits;
        memcpy(&bits, &half, 2);
        return bits;
    }
};
// Its lowest 13 bits count for nothing: the tensor cores do not read them.
struct TFloat32 : Element<TFloat32, u32> {
    static float widened(u32 bits) {
        bits &= 0xffffe000u;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
};

// Integers of 8 bits, as numbers of 32: sums wrap around.
template <class Bits> struct Byte {
    using Stored = Bits;
    static constexpr int PER_REGISTER = 4;
    static u32 widened(Bits bits) { return static_cast<u32>(bits); }
    template <int count> static void widen(u32* to, const Bits* from) {
        for (int n = 0; n < count; ++n) to[n] = widened(from[n]);
    }
};

// Products are computed in tiles of 16 rows and 8 columns, whose sums stay in the processor's registers.
constexpr int TILE_ROWS = 16, TILE_COLUMNS = 8;
using TileRow = float __attribute__((vector_size(4 * TILE_COLUMNS)));
using IntegerRow = u32 __attribute__((vector_size(4 * TILE_COLUMNS)));

// sums[row] += a[row] b. Rows of a have `depth` floats, rows of b lie `step` apart. Products of 16-bit and tf32 values are exact
// in float32; a sum takes them in the order of k, and rounds after each. Tensor cores add several at once, cut off what is far
// below the largest, and document neither.
template <int depth, class Row, class Number> void multiply_add(Row* sums, const Number* a, const Number* b, int step) {
    Row total[TILE_ROWS];
    for (int row = 0; row < TILE_ROWS; ++row) total[row] = sums[row];
    for (int k = 0; k < depth; ++k) {
        Row right;
        memcpy(&right, b + k * step, sizeof right);
#pragma GCC unroll 16
        for (int row = 0; row < TILE_ROWS; ++row) total[row] += a[row * depth + k] * right;
    }
    for (int row = 0; row < TILE_ROWS; ++row) sums[row] = total[row];
}

// The 32 lanes of registers that hold 16 rows: the 4 lanes from 4 * row on hold neighbours in the row, and the next register
// the row 8 further. A has 16 rows of `depth` numbers; registers 2 and 3 hold the second half of its columns.
template <class T, int depth, class Number> void unpack_left(Warp& w, const s32* operands, Number* a) {
    constexpr int NEIGHBOURS = 4 * T::PER_REGISTER;
    for (int q = 0; q < 2 * depth / NEIGHBOURS; ++q) {
        const auto* stored = lanes_of<typename T::Stored>(w, operands[q]);
        Number* corner = a + q % 2 * 8 * depth + q / 2 * NEIGHBOURS;
        for (int row = 0; row < 8; ++row) T::template widen<NEIGHBOURS>(corner + row * depth, stored + row * NEIGHBOURS);
    }
}

// Sums of 32 bits: each lane holds two neighbours, a register each, and a row takes first the even columns, then the odd.
// Sums in float16: two to a register.
template <bool halves> constexpr int place_of_column(int column) {
    return halves ? column : column / 8 * 8 + column % 2 * 4 + column % 8 / 2;
}
template <bool halves, class Row> void unpack_sums(Warp& w, const s32* operands, Row* sums) {
    for (int row = 0; row < TILE_ROWS; ++row)
        if constexpr (halves) {
            const u16* stored = lanes_of<u16>(w, operands[row / 8]) + row % 8 * TILE_COLUMNS;
            for (int column = 0; column < TILE_COLUMNS; ++column) sums[row][column] = Float16::widened(stored[column]);
        } else
            for (int odd : {0, 1})
                memcpy(reinterpret_cast<u32*>(sums + row) + 4 * odd, lanes_of<u32>(w, operands[row / 8 * 2 + odd]) + row % 8 * 4,
                       16);
}
template <bool halves, class Row> void pack_sums(Warp& w, const s32* operands, const Row* sums) {
    for (int row = 0; row < TILE_ROWS; ++row)
        if constexpr (halves) {
            u16* stored = lanes_of<u16>(w, operands[row / 8]) + row % 8 * TILE_COLUMNS;
            for (int column = 0; column < TILE_COLUMNS; ++column) stored[column] = Float16::narrowed(sums[row][column]);
        } else
            for (int odd : {0, 1})
                memcpy(lanes_of<u32>(w, operands[row / 8 * 2 + odd]) + row % 8 * 4,
                       reinterpret_cast<const u32*>(sums + row) + 4 * odd, 16);
}

// Products and copies of matrices are instructions of the whole warp.
void require_all_lanes(Warp&, u32 lanes);

}  // namespace ptx
