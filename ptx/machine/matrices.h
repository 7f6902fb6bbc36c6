// Elements of the matrices that products read, and where they lie in the registers of a warp.
#pragma once

#include "machine.h"

namespace ptx {

// How many elements a register of 32 bits holds, and the value of one.
struct BFloat16 {
    static constexpr int PER_REGISTER = 2;
    static float value(u32 bits, int element) {
        u32 wide = (bits >> 16 * element) << 16;
        float x;
        memcpy(&x, &wide, 4);
        return x;
    }
};
struct Float16 {
    static constexpr int PER_REGISTER = 2;
    static float value(u32 bits, int element) {
        u16 half = static_cast<u16>(bits >> 16 * element);
        _Float16 x;
        memcpy(&x, &half, 2);
        return static_cast<float>(x);
    }
    static u32 bits(float x) {
        _Float16 half = static_cast<_Float16>(x);
        u16 bits;
        memcpy(&bits, &half, 2);
        return bits;
    }
};
// Its lowest 13 bits count for nothing: the tensor cores do not read them.
struct TFloat32 {
    static constexpr int PER_REGISTER = 1;
    static float value(u32 bits, int) {
        bits &= 0xffffe000u;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
};

// Rows of A that a warp holds, 16 of them: register q has rows lane / 4 and, if q is odd, 8 further; the 4 lanes of a row hold
// neighbours, and registers 2 and 3 the second half of the columns. A has 16 rows of `columns` floats.
template <class T> void unpack_left(Warp& w, const s32* operands, int registers, float* a, int columns) {
    for (int q = 0; q < registers; ++q) {
        const u32* bits = lanes_of<u32>(w, operands[q]);
        for (int l = 0; l < LANES; ++l)
            for (int e = 0; e < T::PER_REGISTER; ++e) {
                int row = l / 4 + 8 * (q & 1), column = l % 4 * T::PER_REGISTER + e + 4 * T::PER_REGISTER * (q >> 1);
                a[row * columns + column] = T::value(bits[l], e);
            }
    }
}

// 16 rows of sums: each lane holds two neighbours in row lane / 4, two in the row 8 further, and so on every 8 columns; in
// float32 a register each, in float16 two to a register.
template <class Visit> void each_sum(int columns, Visit visit) {  // visit(which of the lane's values, lane, row, column)
    for (int value = 0; value < columns / 2; ++value)
        for (int l = 0; l < LANES; ++l) visit(value, l, l / 4 + 8 * (value >> 1 & 1), 8 * (value >> 2) + l % 4 * 2 + (value & 1));
}
void unpack_sums(Warp&, const s32* operands, bool halves, float* sums, int columns);
void pack_sums(Warp&, const s32* operands, bool halves, const float* sums, int columns);

// sums[row] += a[row] b for all rows. Products of 16-bit and tf32 values are exact in float32; a sum takes them in the order of k,
// and rounds after each. Tensor cores add several at once, cut off what is far below the largest, and document neither.
void multiply_add(float* sums, const float* a, const float* b, int rows, int depth, int columns);

// Products and copies of matrices are instructions of the whole warp.
void require_all_lanes(Warp&, u32 lanes);

}  // namespace ptx
