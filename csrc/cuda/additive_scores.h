// Additive scores of a tile, sum_a u_a tanh(x_ia + y_ja), and their gradients, by one block of WARPS warps.
//
// tanh(x+y) = 2/d - 1 with d = 1 + e^-2x e^-2y, whose exponentials are taken once a row and once a column of a tile and lie in
// shared memory. Two hidden units share one reciprocal: w1/d1 + w2/d2 = (w1 d2 + w2 d1) / (d1 d2).
#pragma once

#include "mma.h"

namespace vlattn {

constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr int COLUMNS = 32;                // of the other side, in a tile
constexpr int PAIR = 2 * COLUMNS + 4;      // apart are two pairs of units of the columns, and in other banks
constexpr int BACKWARD_ROWS = WARPS * 16;  // of a block's own side, in the backward pass
constexpr int GRAD_STRIDE = BACKWARD_ROWS + 4;
constexpr float LARGEST = 22.0f;           // e^-2x is finite up to there, and so is its product with another
constexpr float LARGEST_SUM = 20.0f;       // two denominators of up to 1 + e^40 have a finite product
constexpr float CLAMP = 2.3538526683701998e17f;  // e^40: tanh is -1 there, far below float32's resolution

// x, of which the compiler knows nothing: what a rare branch alone needs is then not computed in advance and kept in registers.
__device__ __forceinline__ int64_t opaque(int64_t x) {
#ifndef VLATTN_HOST
    asm volatile("" : "+l"(x));
#endif
    return x;
}

// Rows of x or y of one head.
template <class T>
struct Side {
    const T* data;
    int64_t stride, count;

    __device__ float at(int64_t row, int unit) const { return row < count ? to_float(data[row * stride + unit]) : 0.0f; }
};

// Scores or what becomes of them, 16 MT rows and 32 columns a warp: [m][k][j] is a matrix instruction's result, from row 16 m and
// column 16 k + 8 j on.
template <int MT>
using Tile = float[MT][2][2][4];

template <int MT, class Use>
__device__ __forceinline__ void each(Tile<MT>& tile, Use use) {
#pragma unroll
    for (int i = 0; i < 16 * MT; ++i) use(tile[i / 16][i / 8 % 2][i / 4 % 2][i % 4]);
}
template <int MT>
__device__ __forceinline__ void clear(Tile<MT>& tile) {
    each<MT>(tile, [](float& x) { x = 0.0f; });
}

// Exponentials lie in shared memory in an order in which what a lane needs for its scores are neighbours: rows g, g+8, ... of its
// warp, and columns 8 n + 2t, 8 n + 2t+1. The order of columns is its own inverse.
template <int MT>
__device__ __forceinline__ int row_place(int row) {
    constexpr int OWN = 2 * MT;
    return row / (8 * OWN) * (8 * OWN) + row % 8 * OWN + row / 8 % OWN;
}
__device__ __forceinline__ int row_at(int place) { return place / 16 * 16 + place % 2 * 8 + place % 16 / 2; }  // for MT = 1
__device__ __forceinline__ int column_place(int column) { return column % 8 / 2 * 8 + column / 8 * 2 + column % 2; }

// What a block has in shared memory.
struct Shared {
    float* rows;  // (units, ROWS): e^-2x; at the end of the backward pass the sums of UnitGrads
    float* columns;  // (pairs, PAIR): e^-2y of two units, COLUMNS of each
    float2* weights;  // (pairs): those of two units
    float *row_largest, *column_largest;  // (WARPS) each
    void* rest;

    __host__ __device__ static size_t bytes(int A, int rows) {
        const size_t units = round_up(A, 8);
        return sizeof(float) * (units * rows + units / 2 * PAIR + units + 2 * WARPS);
    }
    __device__ Shared(int A, int num_rows) {
        const int units = round_up(A, 8);
        rows = static_cast<float*>(shared_memory());
        columns = rows + units * num_rows;
        row_largest = columns + units / 2 * PAIR;
        column_largest = row_largest + WARPS;
        weights = reinterpret_cast<float2*>(column_largest + WARPS);
        rest = weights + units / 2;
    }
};

// put(row, pair of units, e^-2x, e^-2x) for ROWS rows from `first` on, x = 0 outside of the matrix. The warp's largest |x| goes
// to `largest_magnitude`; it is inf where one is above LARGEST or NaN.
template <int ROWS, class T, class Put>
__device__ __forceinline__ void exponentials(const Side<T>& side, int64_t first, int A, float* largest_magnitude, Put put) {
    constexpr int VECTOR = 16 / sizeof(T);
    const bool aligned = A % VECTOR == 0 && side.stride % VECTOR == 0 && reinterpret_cast<uintptr_t>(side.data) % 16 == 0;
    float bound = 0.0f;
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * round_up(A, VECTOR) / VECTOR; i += THREADS) {
        const int row = i % ROWS, unit = i / ROWS * VECTOR;
        float x[VECTOR];
        if (aligned && first + row < side.count) {
            const uint4 bits = *reinterpret_cast<const uint4*>(side.data + (first + row) * side.stride + unit);
            T values[VECTOR];
            memcpy(static_cast<void*>(values), &bits, sizeof(bits));
            for (int e = 0; e < VECTOR; ++e) x[e] = to_float(values[e]);
        } else {
            for (int e = 0; e < VECTOR; ++e) x[e] = unit + e < A ? side.at(first + row, unit + e) : 0.0f;
        }
#pragma unroll
        for (int e = 0; e < VECTOR; e += 2) {
            for (int j = 0; j < 2; ++j) bound = fmaxf(bound, fabsf(x[e + j]) <= LARGEST ? fabsf(x[e + j]) : INFINITY);
            put(row, (unit + e) / 2, expf(-2.0f * fminf(fmaxf(x[e], -LARGEST), LARGEST)),
                expf(-2.0f * fminf(fmaxf(x[e + 1], -LARGEST), LARGEST)));
        }
    }
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) bound = fmaxf(bound, __shfl_xor_sync(ALL_LANES, bound, lanes));
    if (lane_index() == 0) largest_magnitude[warp_index()] = bound;
}

template <int MT, int ROWS, class T>
__device__ __forceinline__ void stage_rows(const Shared& shared, const Side<T>& side, int64_t first, const T* vector, int A) {
    exponentials<ROWS>(side, first, A, shared.row_largest, [&](int row, int pair, float e1, float e2) {
        float* to = shared.rows + 2 * pair * ROWS + row_place<MT>(row);
        to[0] = e1;
        to[ROWS] = e2;
    });
    for (int pair = threadIdx.x; pair < round_up(A, 8) / 2; pair += THREADS) {
        const float w1 = 2 * pair < A ? to_float(vector[2 * pair]) : 0.0f;
        const float w2 = 2 * pair + 1 < A ? to_float(vector[2 * pair + 1]) : 0.0f;
        shared.weights[pair] = {w1, w2};
    }
}

template <class T>
__device__ __forceinline__ void stage_columns(const Shared& shared, const Side<T>& side, int64_t first, int A) {
    exponentials<COLUMNS>(side, first, A, shared.column_largest, [&](int column, int pair, float e1, float e2) {
        float* to = shared.columns + pair * PAIR + column_place(column);
        to[0] = e1;
        to[COLUMNS] = e2;
    });
}

// A bound of |x + y| in the staged tile.
__device__ __forceinline__ float largest_magnitude(const Shared& shared) {
    float row = 0.0f, column = 0.0f;
    for (int i = 0; i < WARPS; ++i) {
        row = fmaxf(row, shared.row_largest[i]);
        column = fmaxf(column, shared.column_largest[i]);
    }
    return row + column;
}

template <int COUNT>
__device__ __forceinline__ void load(float (&x)[COUNT], const float* p) {
    if constexpr (COUNT == 2) {
        const float2 v = *reinterpret_cast<const float2*>(p);
        x[0] = v.x, x[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            const float4 v = *reinterpret_cast<const float4*>(p + i);
            x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
        }
    }
}

// The error is at most about 2^-23, not relative to small x.
__device__ __forceinline__ float tanh_of(float x) {
    const float e = fast_exp2(fabsf(x) * (-2.0f * LOG2_E));
    return copysignf((1.0f - e) * fast_reciprocal(1.0f + e), x);
}

// The reciprocal of a product of two denominators. EXACT, for float32: with a step of Newton's. The ulp by which one instruction
// may be off would be most of the error of the scores and of their gradients.
template <bool EXACT>
__device__ __forceinline__ float reciprocal_of(float x) {
    const float r = fast_reciprocal(x);
    return EXACT ? fmaf(r, fmaf(-x, r, 1.0f), r) : r;
}

// The denominator 1 + e^-2x e^-2y. CLAMPED: since the product of two might overflow, what is added to 1 is held at CLAMP.
template <bool CLAMPED>
__device__ __forceinline__ float denominator(float u, float v) {
    return CLAMPED ? 1.0f + fminf(u * v, CLAMP) : fmaf(u, v, 1.0f);
}

// Adds half the sums of w tanh(x + y) = w (2/d - 1) over pairs of hidden units, whose w1/d1 + w2/d2 have one reciprocal. EXACT:
// with (w1+w2)/2 taken off each, since the sum of all weights may be much larger than the score.
template <bool CLAMPED, bool EXACT, int MT>
__device__ __forceinline__ void sum_pairs(Tile<MT>& halves, const Shared& shared, int begin, int end) {
    constexpr int OWN = 2 * MT, ROWS = WARPS * 16 * MT;
    const float* rows = shared.rows + warp_index() * 16 * MT + lane_row() * OWN;
    const float* columns = shared.columns + lane_column() * 8;
    float weights = 0.0f;
#pragma unroll 1
    for (int pair = begin; pair < end; ++pair) {
        const float2 w = shared.weights[pair];
        weights += w.x + w.y;
        float u1[OWN], u2[OWN];
        load(u1, rows + 2 * pair * ROWS);
        load(u2, rows + (2 * pair + 1) * ROWS);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            float v1[4], v2[4];
            load(v1, columns + pair * PAIR + 4 * k);
            load(v2, columns + pair * PAIR + COLUMNS + 4 * k);
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const float d1 = denominator<CLAMPED>(u1[i], v1[c]), d2 = denominator<CLAMPED>(u2[i], v2[c]);
                    float& sum = halves[i / 2][k][c / 2][i % 2 * 2 + c % 2];
                    const float both = fmaf(w.x, d2, w.y * d1), reciprocal = reciprocal_of<EXACT>(d1 * d2);
                    sum = EXACT ? sum + fmaf(both, reciprocal, -0.5f * (w.x + w.y)) : fmaf(both, reciprocal, sum);
                }
            }
        }
    }
    if (!EXACT) each<MT>(halves, [&](float& x) { x -= 0.5f * weights; });
}

// The same where a value is over LARGEST, infinite or NaN: slow, rare, and right for any.
template <int MT, class T>
__device__ __forceinline__ void sum_directly(Tile<MT>& halves, const Side<T>& own, int64_t row, const Side<T>& other,
                                             int64_t column, const T* vector, int A) {
    row = opaque(row);
#pragma unroll 1
    for (int a = 0; a < A; ++a) {
        const float w = 0.5f * to_float(vector[a]);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            const float upper = own.at(row + 16 * m, a), lower = own.at(row + 16 * m + 8, a);
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                const float y = other.at(column + c / 2 * 8 + c % 2, a);
                float(&result)[4] = halves[m][c / 4][c / 2 % 2];
                result[c % 2] = fmaf(w, tanh_of(upper + y), result[c % 2]);
                result[2 + c % 2] = fmaf(w, tanh_of(lower + y), result[2 + c % 2]);
            }
        }
    }
}

// Half the unscaled scores of the warp's rows, whose first one here is `row`, with the tile's columns, here from `column` on.
template <int MT, class T>
__device__ __forceinline__ void sum_units(Tile<MT>& halves, const Shared& shared, float bound, const Side<T>& own, int64_t row,
                                          const Side<T>& other, int64_t column, const T* vector, int A) {
    constexpr bool EXACT = std::is_same_v<T, float>;
    const int pairs = (A + 1) / 2;
    const auto sum = [&](Tile<MT>& to, int begin, int end) {
        if (bound <= LARGEST_SUM) {
            sum_pairs<false, EXACT, MT>(to, shared, begin, end);
        } else {
            sum_pairs<true, EXACT, MT>(to, shared, begin, end);
        }
    };
    clear<MT>(halves);
    if (bound == INFINITY) {
        sum_directly<MT>(halves, own, row, other, column, vector, A);
    } else if constexpr (!EXACT) {
        sum(halves, 0, pairs);
    } else {
        for (int pair = 0; pair < pairs; pair += 8) {  // sums of sums round less
            Tile<MT> part;
            clear<MT>(part);
            sum(part, pair, pair + 8 < pairs ? pair + 8 : pairs);
            for (int i = 0; i < 16; ++i) halves[0][i / 8][i / 4 % 2][i % 4] += part[0][i / 8][i / 4 % 2][i % 4];
        }
    }
}

// The hidden units' share of a gradient that a thread has: 8 rows, in the order of the exponentials 4 r .. 4 r + 3 and 32 more,
// r = thread % 8; and of every 64 units 4, from 4 (thread / 8) on.
template <int CHUNKS>
struct UnitGrads {
    float rows[CHUNKS][4][8];  // sum_j g_ij (1/4 - q_ij^2), q = tanh / 2
    float vector[CHUNKS][4];  // sum_ij g_ij q_ij
};

__device__ __forceinline__ int first_unit(int chunk) { return chunk * 64 + static_cast<int>(threadIdx.x) / 8 * 4; }
__device__ __forceinline__ int grad_row(int i) { return row_at(i / 4 * 32 + static_cast<int>(threadIdx.x) % 8 * 4 + i % 4); }

// Adds a tile's gradient g (COLUMNS, GRAD_STRIDE), its rows in the order of the exponentials. Two units share one reciprocal.
template <bool EXACT, bool VECTOR, bool CLAMPED, int CHUNKS>
__device__ __forceinline__ void through_pairs(UnitGrads<CHUNKS>& sum, const float* g, const Shared& shared, int A) {
    const int place = threadIdx.x % 8 * 4;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        const int unit = first_unit(chunk);
        if (unit >= A) break;
        float u[4][8];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float* from = shared.rows + (unit + j) * BACKWARD_ROWS + place;
            load(reinterpret_cast<float(&)[4]>(u[j][0]), from);
            load(reinterpret_cast<float(&)[4]>(u[j][4]), from + 32);
        }
#pragma unroll 1
        for (int column = 0; column < COLUMNS; ++column) {
            const float *from = g + column * GRAD_STRIDE + place, *columns = shared.columns + column_place(column);
            float grad[8], v[4];
            load(reinterpret_cast<float(&)[4]>(grad[0]), from);
            load(reinterpret_cast<float(&)[4]>(grad[4]), from + 32);
#pragma unroll
            for (int j = 0; j < 4; ++j) v[j] = columns[(unit + j) / 2 * PAIR + j % 2 * COLUMNS];
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                float along1 = 0.0f, along2 = 0.0f;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float d1 = denominator<CLAMPED>(u[j][i], v[j]), d2 = denominator<CLAMPED>(u[j + 1][i], v[j + 1]);
                    const float r = reciprocal_of<EXACT>(d1 * d2), q1 = fmaf(r, d2, -0.5f), q2 = fmaf(r, d1, -0.5f);
                    sum.rows[chunk][j][i] = fmaf(grad[i], fmaf(-q1, q1, 0.25f), sum.rows[chunk][j][i]);
                    sum.rows[chunk][j + 1][i] = fmaf(grad[i], fmaf(-q2, q2, 0.25f), sum.rows[chunk][j + 1][i]);
                    along1 = fmaf(grad[i], q1, along1);
                    along2 = fmaf(grad[i], q2, along2);
                }
                if (VECTOR) {
                    sum.vector[chunk][j] += along1;
                    sum.vector[chunk][j + 1] += along2;
                }
            }
        }
    }
}

// The same where a value is over LARGEST, infinite or NaN.
template <bool VECTOR, int CHUNKS, class T>
__device__ __forceinline__ void through_directly(UnitGrads<CHUNKS>& sum, const float* g, const Side<T>& own, int64_t first,
                                                 const Side<T>& other, int64_t start, int A) {
    const int place = threadIdx.x % 8 * 4;
    first = opaque(first);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll 1
        for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int unit = first_unit(chunk) + j;
                if (unit >= A) break;
                const float y = other.at(start + c, unit);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float q = 0.5f * tanh_of(own.at(first + grad_row(i), unit) + y);
                    const float grad = g[c * GRAD_STRIDE + i / 4 * 32 + place + i % 4];
                    sum.rows[chunk][j][i] = fmaf(grad, fmaf(-q, q, 0.25f), sum.rows[chunk][j][i]);
                    if (VECTOR) sum.vector[chunk][j] = fmaf(grad, q, sum.vector[chunk][j]);
                }
            }
        }
    }
}

}  // namespace vlattn
