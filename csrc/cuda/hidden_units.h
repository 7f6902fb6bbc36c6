// Scores of a tile that sum over hidden units, and their gradients, by one block of WARPS warps: additive, sum_a u_a
// tanh(x_ia + y_ja), and Hadamard with PRODUCTS, sum_a u_a (factor tanh(argument x_ia y_ja) + offset): tanh, or the logistic
// function with halves.
//
// Additive: tanh(x+y) = 2/d - 1 with d = 1 + e^-2x e^-2y, whose exponentials are taken once a row and once a column of a tile and
// lie in shared memory. Two hidden units share one reciprocal: w1/d1 + w2/d2 = (w1 d2 + w2 d1) / (d1 d2). 2/d - 1 has few digits
// where x + y is small: heads in which it is small throughout take tanh from sums.
// Hadamard: shared memory holds the units themselves, those of the rows times `argument`. Of 16 bits tanh is one instruction.
#pragma once

#include "mma.h"

namespace vlattn {

constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr int COLUMNS = 32;  // of the other side, in a tile
constexpr int PAIR = 2 * COLUMNS + 4;  // from a pair of units of the columns to the next, which is in other banks
constexpr int BACKWARD_ROWS = WARPS * 16;  // of a block's own side, in the backward pass
constexpr int GRAD_STRIDE = BACKWARD_ROWS + 4;
template <int MT> constexpr int ROW_STRIDE = WARPS * 16 * MT + 4;  // from a unit of the rows to the next, which is in other banks
constexpr float LARGEST = 22.0f;  // e^-2x is finite up to there, and so is its product with another
constexpr float LARGEST_SMALL = 1.0f;  // |x + y| up to there is small
constexpr float LARGEST_REST = 2.0f;  // the same where x and y cancel: their exponentials have larger errors
constexpr float LARGEST_SUM = 20.0f;  // two denominators of up to 1 + e^40 have a finite product
constexpr float LEAST = 1e-10f;  // of weights over the largest, where one divides by them
constexpr float CLAMP = 2.3538526683701998e17f;  // e^40: tanh is -1 there, far below float32's resolution

// x, of which the compiler knows nothing: what a rare branch alone needs is then not computed in advance and kept in registers.
__device__ __forceinline__ int64_t opaque(int64_t x) {
    asm volatile("" : "+l"(x));
    return x;
}

// Rows of x or y of one head.
template <class T> struct Side {
    const T* data;
    int64_t stride, count;

    __device__ float at(int64_t row, int unit) const { return row < count ? to_float(data[row * stride + unit]) : 0.0f; }
};

// Scores or what becomes of them, 16 MT rows and 32 columns a warp: [m][n] is a matrix instruction's result, from row 16 m and
// column 8 n on.
template <int MT> using Tile = float[MT][4][4];

template <int MT, class Use> __device__ __forceinline__ void each(Tile<MT>& tile, Use use) {
#pragma unroll
    for (int i = 0; i < 16 * MT; ++i) use(tile[i / 16][i / 4 % 4][i % 4]);
}
template <int MT> __device__ __forceinline__ void clear(Tile<MT>& tile) {
    each<MT>(tile, [](float& x) { x = 0.0f; });
}

// Exponentials lie in shared memory in an order in which what a lane needs for its scores are neighbours: rows g, g+8, ... of its
// warp, and columns 8 n + 2t, 8 n + 2t+1. The order of columns is its own inverse.
template <int MT> __device__ __forceinline__ int row_place(int row) {
    constexpr int OWN = 2 * MT;
    return row / (8 * OWN) * (8 * OWN) + row % 8 * OWN + row / 8 % OWN;
}
__device__ __forceinline__ int row_at(int place) { return place / 16 * 16 + place % 2 * 8 + place % 16 / 2; }  // for MT = 1
__device__ __forceinline__ int column_place(int column) { return column % 8 / 2 * 8 + column / 8 * 2 + column % 2; }

// The largest |x| of a head, and the largest difference from its first row; inf where one is above LARGEST or NaN.
struct Reach {
    float size, difference;

    __device__ static float bounded(float x) { return x <= LARGEST ? x : INFINITY; }
    __device__ Reach with(Reach more) const { return {fmaxf(size, more.size), fmaxf(difference, more.difference)}; }
};

// What a block has in shared memory.
struct Shared {
    float* rows;  // (units, stride): what is `staged`
    float* columns;  // (pairs, PAIR): of two units, COLUMNS of each
    float2* weights;  // (pairs): those of two units; additive of 16-bit types 1/w1 and w2 with the largest as 1
    float2* total;  // the largest |weight|, and the sum of those over it; of products the sum of all
    Reach *query_reach, *key_reach;  // (WARPS) each, by `stage_largest`
    void* rest;

    __host__ __device__ static size_t bytes(int A, int stride) {
        const size_t units = round_up(A, 8);
        return sizeof(float) * (units * stride + units / 2 * PAIR + units + 4 * WARPS + 4);
    }
    __device__ Shared(int A, int stride) {
        const int units = round_up(A, 8);
        rows = static_cast<float*>(shared_memory());
        columns = rows + units * stride;
        query_reach = reinterpret_cast<Reach*>(columns + units / 2 * PAIR);
        key_reach = query_reach + WARPS;
        weights = reinterpret_cast<float2*>(key_reach + WARPS);
        total = weights + units / 2;
        rest = total + 2;
    }
};

// What lies in shared memory of x: its product with a factor, or e^-2x, with x held between -LARGEST and LARGEST. Of 16-bit types
// x is much less exact than the instruction.
template <bool PRODUCTS, class T> __device__ __forceinline__ float staged(float x, float factor) {
    if (PRODUCTS) return x * factor;
    x = fminf(fmaxf(x, -LARGEST), LARGEST);
    return std::is_same_v<T, float> ? expf(-2.0f * x) : fast_exp2(-2.0f * LOG2_E * x);
}

// put(row, pair of units, staged, staged) for ROWS rows from `first` on. Outside of the matrix x is 0, or 1 for products: zero
// times infinity would be NaN.
template <int ROWS, bool PRODUCTS, class T, class Put>
__device__ __forceinline__ void stage_units(const Side<T>& side, int64_t first, int A, float factor, Put put) {
    constexpr int VECTOR = 16 / sizeof(T);
    constexpr float OUTSIDE = PRODUCTS ? 1.0f : 0.0f;
    const bool aligned = A % VECTOR == 0 && side.stride % VECTOR == 0 && reinterpret_cast<uintptr_t>(side.data) % 16 == 0;
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < unsigned(ROWS * round_up(A, VECTOR) / VECTOR); i += THREADS) {
        const int row = i % ROWS, unit = i / ROWS * VECTOR, pair = i / ROWS * (VECTOR / 2);
        float x[VECTOR];
        if (aligned && first + row < side.count) {
            const uint4 bits = *reinterpret_cast<const uint4*>(side.data + (first + row) * side.stride + unit);
            T values[VECTOR];
            memcpy(static_cast<void*>(values), &bits, sizeof(bits));
            for (int e = 0; e < VECTOR; ++e) x[e] = to_float(values[e]);
        } else {
            for (int e = 0; e < VECTOR; ++e)
                x[e] = unit + e < A && first + row < side.count ? side.at(first + row, unit + e) : OUTSIDE;
        }
#pragma unroll
        for (int e = 0; e < VECTOR; e += 2)
            put(row, pair + e / 2, staged<PRODUCTS, T>(x[e], factor), staged<PRODUCTS, T>(x[e + 1], factor));
    }
}

template <int MT, bool PRODUCTS, class T>
__device__ __forceinline__ void stage_rows(const Shared& shared, const Side<T>& side, int64_t first, const T* vector, int A,
                                           float argument) {
    stage_units<WARPS * 16 * MT, PRODUCTS>(side, first, A, argument, [&](int row, int pair, float e1, float e2) {
        float* to = shared.rows + 2 * pair * ROW_STRIDE<MT> + row_place<MT>(row);
        to[0] = e1;
        to[ROW_STRIDE<MT>] = e2;
    });
    float2 total = {0.0f, 0.0f};
    for (int unit = lane_index(); unit < A; unit += WARP) {
        const float w = to_float(vector[unit]);
        total = {fmaxf(total.x, fabsf(w)), total.y + w};
    }
    const float largest = warp_max(total.x), scale = largest > 0.0f && !PRODUCTS ? 1.0f / largest : 1.0f;
    const float sum = warp_sum(total.y) * scale;
    if (threadIdx.x == 0) *shared.total = {largest, sum};
    for (int pair = threadIdx.x; pair < round_up(A, 8) / 2; pair += THREADS) {
        const float w1 = 2 * pair < A ? to_float(vector[2 * pair]) : 0.0f;
        const float w2 = 2 * pair + 1 < A ? to_float(vector[2 * pair + 1]) : 0.0f;
        const float over = w1 * scale;
        const float2 both = {1.0f / (fabsf(over) < LEAST ? LEAST : over), w2 * scale};
        shared.weights[pair] = PRODUCTS || std::is_same_v<T, float> ? float2{w1, w2} : both;
    }
}

template <bool PRODUCTS, class T>
__device__ __forceinline__ void stage_columns(const Shared& shared, const Side<T>& side, int64_t first, int A) {
    stage_units<COLUMNS, PRODUCTS>(side, first, A, 1.0f, [&](int column, int pair, float e1, float e2) {
        float* to = shared.columns + pair * PAIR + column_place(column);
        to[0] = e1;
        to[COLUMNS] = e2;
    });
}

// The Reach of the rows that a warp sees. Of keys, only those that are `real`, where that is not null.
template <class T> __device__ __forceinline__ Reach reach_of(const Side<T>& side, int A, const uint8_t* real) {
    unsigned size = 0, difference = 0;  // the bits of |x|, whose order is that of the numbers, with NaN above all
    const T* data = side.data + warp_index() * side.stride + lane_index();
#pragma unroll 2
    for (int64_t row = warp_index(); row < side.count; row += WARPS, data += WARPS * side.stride) {
        if (real && !real[row]) continue;
#pragma unroll
        for (int unit = 0; unit < 128; unit += WARP) {
            if (unit + lane_index() >= A) continue;
            const float x = to_float(data[unit]);
            size = max(size, __float_as_uint(fabsf(x)));
            difference = max(difference, __float_as_uint(fabsf(x - to_float(side.data[unit + lane_index()]))));
        }
    }
    return {warp_max(Reach::bounded(__uint_as_float(size))), warp_max(Reach::bounded(__uint_as_float(difference)))};
}

// Puts what `largest_sum` reads, after the next barrier, into shared memory.
template <class T>
__device__ __forceinline__ void stage_largest(const Shared& shared, const Side<T>& query, const Side<T>& key, int A,
                                              const uint8_t* real) {
    Reach of_query = reach_of(query, A, nullptr);
    const Reach of_key = reach_of(key, A, real);
    float first = 0.0f;  // the largest sum of the first rows
    for (int unit = lane_index(); unit < A; unit += WARP) {
        const float x = fabsf(query.at(0, unit) + key.at(0, unit));
        first = x <= first ? first : Reach::bounded(x);
    }
    of_query.difference += warp_max(first);
    if (lane_index() == 0) shared.query_reach[warp_index()] = of_query, shared.key_reach[warp_index()] = of_key;
}

// A bound of |x + y| in a head, by which all its tiles choose: scores of the forward and of the backward pass must not differ by
// more than rounding. Queries and keys may cancel: a sum differs from that of the first rows by no more than both differences.
__device__ __forceinline__ float largest_sum(const Shared& shared) {
    Reach x = {}, y = {};
    for (int i = 0; i < WARPS; ++i) x = x.with(shared.query_reach[i]), y = y.with(shared.key_reach[i]);
    const float nearer = x.difference + y.difference;
    return nearer <= LARGEST_REST ? fminf(nearer, LARGEST_SMALL) : x.size + y.size;  // exponentials are clamped where that is inf
}

// Whether tanh is taken from sums: where all are small, or some x or y is over LARGEST, infinite or NaN.
__device__ __forceinline__ bool takes_sums(float bound) { return bound <= LARGEST_SMALL || bound == INFINITY; }

// To a few ulp. 1 - e has few digits where x is small: the polynomial of Cephes' tanhf is taken.
__device__ __forceinline__ float tanh_of(float x) {
    const float e = fast_exp2(fabsf(x) * (-2.0f * LOG2_E)), square = x * x;
    float p = fmaf(square, -5.70498872745e-3f, 2.06390887954e-2f);
    p = fmaf(square, p, -5.37397155531e-2f);
    p = fmaf(square, p, 1.33314422036e-1f);
    p = fmaf(square, p, -3.33332819422e-1f);
    return square < 0.390625f ? fmaf(p * square, x, x) : copysignf((1.0f - e) * fast_reciprocal(1.0f + e), x);
}

// The reciprocal of a product of two denominators. EXACT, for float32: with a step of Newton's. The ulp by which one instruction
// may be off would be most of the error of the scores and of their gradients.
template <bool EXACT> __device__ __forceinline__ float reciprocal_of(float x) {
    const float r = fast_reciprocal(x);
    return EXACT ? fmaf(r, fmaf(-x, r, 1.0f), r) : r;
}

// EXACT, for float32. Of 16-bit types the error of 2^-11 is a quarter of what they round.
template <bool EXACT> __device__ __forceinline__ float tanh_by(float x) { return EXACT ? tanh_of(x) : fast_tanh(x); }

// What a hidden unit of a pair is computed from: additive from products of exponentials, products that are held at CLAMP, or
// sums; Hadamard from products of units.
enum class Way { PRODUCT, CLAMPED, SUM, UNITS };

// The denominator 1 + e^-2x e^-2y. CLAMPED: since the product of two might overflow, what is added to 1 is held at CLAMP.
template <bool CLAMPED> __device__ __forceinline__ float denominator(float u, float v) {
    return CLAMPED ? 1.0f + fminf(u * v, CLAMP) : fmaf(u, v, 1.0f);
}

// Way::UNITS: adds the sums of w tanh(x y). Else: adds half the sums of w tanh(x + y) = w (2/d - 1) over pairs of hidden units
// with one reciprocal for both: w1/d1 + w2/d2 = (D w2 + d2) / (D d2) with D = d1/w1, which takes no more than d1. Where D d2
// overflows, both terms are below 1e-11 of the largest weight, and become 0. EXACT: (w1 d2 + w2 d1) / (d1 d2) with (w1+w2)/2
// taken off, since the sum of all weights may be much larger than the score.
template <Way WAY, bool EXACT, int MT>
__device__ __forceinline__ void sum_pairs(Tile<MT>& halves, const Shared& shared, int begin, int end) {
    constexpr bool CLAMPED = WAY == Way::CLAMPED;
    constexpr int OWN = 2 * MT;
    const float* rows = shared.rows + warp_index() * 16 * MT + lane_row() * OWN;
    const float* columns = shared.columns + lane_column() * 8;
#pragma unroll(WAY == Way::UNITS && EXACT ? 1 : 2)
    for (int pair = begin; pair < end; ++pair) {
        const float2 w = shared.weights[pair];
        float u1[OWN], u2[OWN];
        read(u1, rows + 2 * pair * ROW_STRIDE<MT>);
        read(u2, rows + (2 * pair + 1) * ROW_STRIDE<MT>);
        if (!EXACT && WAY == Way::PRODUCT)
            for (float& u : u1) u *= w.x;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            float v1[4], v2[4];
            read(v1, columns + pair * PAIR + 4 * k);
            read(v2, columns + pair * PAIR + COLUMNS + 4 * k);
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    float& sum = halves[i / 2][2 * k + c / 2][i % 2 * 2 + c % 2];
                    const float d2 = denominator<CLAMPED>(u2[i], v2[c]);
                    if (WAY == Way::UNITS) {
                        sum = fmaf(w.x, tanh_by<EXACT>(u1[i] * v1[c]), sum);
                        sum = fmaf(w.y, tanh_by<EXACT>(u2[i] * v2[c]), sum);
                    } else if (EXACT) {
                        const float d1 = denominator<CLAMPED>(u1[i], v1[c]), both = fmaf(w.x, d2, w.y * d1);
                        sum += fmaf(both, reciprocal_of<EXACT>(d1 * d2), -0.5f * (w.x + w.y));
                    } else {
                        const float d1 = CLAMPED ? fmaf(fminf(u1[i] * v1[c], CLAMP), w.x, w.x) : fmaf(u1[i], v1[c], w.x);
                        sum = fmaf(fmaf(d1, w.y, d2), fast_reciprocal(d1 * d2), sum);
                    }
                }
            }
        }
    }
    if (!EXACT && WAY != Way::UNITS) each<MT>(halves, [&](float& x) { x = shared.total->x * (x - 0.5f * shared.total->y); });
}

// The same from sums: slow, rare, and right for any.
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
                float(&result)[4] = halves[m][c / 2];
                result[c % 2] = fmaf(w, tanh_of(upper + y), result[c % 2]);
                result[2 + c % 2] = fmaf(w, tanh_of(lower + y), result[2 + c % 2]);
            }
        }
    }
}

// Half the unscaled scores of the warp's rows, whose first one here is `row`, with the tile's columns, here from `column` on.
// bound: of `largest_sum`, for sums; factor and offset for products.
template <int MT, bool PRODUCTS, class T>
__device__ __forceinline__ void sum_units(Tile<MT>& halves, const Shared& shared, float bound, float factor, float offset,
                                          const Side<T>& own, int64_t row, const Side<T>& other, int64_t column, const T* vector,
                                          int A) {
    constexpr bool EXACT = std::is_same_v<T, float>;
    const int pairs = (A + 1) / 2;
    const auto sum = [&](Tile<MT>& to, int begin, int end) {
        if constexpr (PRODUCTS) {
            sum_pairs<Way::UNITS, EXACT, MT>(to, shared, begin, end);
        } else if (bound <= LARGEST_SUM) {
            sum_pairs<Way::PRODUCT, EXACT, MT>(to, shared, begin, end);
        } else {
            sum_pairs<Way::CLAMPED, EXACT, MT>(to, shared, begin, end);
        }
    };
    clear<MT>(halves);
    if (!PRODUCTS && takes_sums(bound)) {
        sum_directly<MT>(halves, own, row, other, column, vector, A);
    } else if constexpr (!EXACT) {
        sum(halves, 0, pairs);
    } else {
        for (int pair = 0; pair < pairs; pair += 8) {  // sums of sums round less
            Tile<MT> part;
            clear<MT>(part);
            sum(part, pair, pair + 8 < pairs ? pair + 8 : pairs);
            for (int i = 0; i < 16; ++i) halves[0][i / 4][i % 4] += part[0][i / 4][i % 4];
        }
    }
    if (PRODUCTS) each<MT>(halves, [&](float& x) { x = 0.5f * fmaf(factor, x, offset * shared.total->y); });
}

// What a lane has of the gradients of its warp's 16 rows: two hidden units of every 64, from first_unit on.
template <int CHUNKS> struct UnitGrads {
    // sum_j g_ij (1/4 - q_ij^2), q = tanh / 2, or sum_j g_ij (1 - tanh^2) y_j; in the order of `row_place`
    float rows[CHUNKS][2][16];
    // sum_ij g_ij q_ij, or of tanh
    float vector[CHUNKS][2];
};

__device__ __forceinline__ int first_unit(int chunk) { return chunk * 64 + lane_index() * 2; }

// Adds a tile's gradient g (COLUMNS, GRAD_STRIDE), whose rows are in the order of `row_place`, by way of the hidden units: to
// `sum` for the warp's rows, and for the `columns` first columns to column_sums (columns made even, stride) in global memory,
// which holds the same sums over i, for products of what is staged of the rows. Each lane sums over its warp's rows. The warps
// take the columns by quarters, each another one, and meet in between: a number has one writer at a time, and its terms have one
// order. All threads of the block come here; a warp that is not `visible` adds nothing.
template <Way WAY, bool EXACT, int CHUNKS, class T>
__device__ __forceinline__ void through_units(UnitGrads<CHUNKS>& sum, float* column_sums, int stride, int columns, bool visible,
                                              const float* g, const Shared& shared, const Side<T>& own, int64_t warp_first,
                                              const Side<T>& other, int64_t start, int A) {
    constexpr int PART = COLUMNS / WARPS;
    constexpr bool CLAMPED = WAY == Way::CLAMPED;
    g += warp_index() * 16;
    if (WAY == Way::SUM) warp_first = opaque(warp_first);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        const int unit = first_unit(chunk);
        const bool active = visible && unit < A;
        float u[2][16] = {};
        if (active) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                if (WAY != Way::SUM) {
                    read(u[e], shared.rows + (unit + e) * ROW_STRIDE<1> + warp_index() * 16);
                } else {
                    for (int i = 0; i < 16; ++i) u[e][i] = unit + e < A ? own.at(warp_first + row_at(i), unit + e) : 0.0f;
                }
                if (WAY == Way::UNITS)
                    for (float& x : u[e]) x = x == x ? x : 1.0f;  // masked pairs may have NaN; the gradients of others are NaN
            }
        }
#pragma unroll 1
        for (int part = 0; part < WARPS; ++part) {
            if (part > 0) {
                __syncthreads();
            }
            const int begin = (warp_index() + part) % WARPS * PART;
            const int end = !active ? begin : begin + PART < columns ? begin + PART : columns;
            const float* from = shared.columns + unit / 2 * PAIR + column_place(begin);
            const float* gradient = g + begin * GRAD_STRIDE;
            float* to = column_sums + begin * stride + unit;
#pragma unroll 1
            for (int column = begin; column < end; column += 2) {  // two columns that are neighbours also among the exponentials
#pragma unroll(WAY == Way::SUM || (WAY == Way::UNITS && EXACT) ? 1 : 2)
                for (int n = 0; n < 2; ++n) {
                    float v[2], grad[16], along_rows[2] = {}, along[2] = {};
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        if (WAY != Way::SUM) {
                            v[e] = from[e * COLUMNS + n];
                        } else {
                            v[e] = unit + e < A ? other.at(start + column + n, unit + e) : 0.0f;
                        }
                        if (WAY == Way::UNITS) v[e] = v[e] == v[e] ? v[e] : 1.0f;
                    }
                    read(grad, gradient + n * GRAD_STRIDE);
#pragma unroll
                    for (int i = 0; i < 16; ++i) {
                        float q[2];
                        if constexpr (WAY == Way::SUM) {
                            for (int e = 0; e < 2; ++e) q[e] = 0.5f * tanh_of(u[e][i] + v[e]);
                        } else if constexpr (WAY == Way::UNITS) {
                            for (int e = 0; e < 2; ++e) q[e] = tanh_by<EXACT>(u[e][i] * v[e]);
                        } else {
                            const float d1 = denominator<CLAMPED>(u[0][i], v[0]);
                            const float d2 = denominator<CLAMPED>(u[1][i], v[1]);
                            const float r = reciprocal_of<EXACT>(d1 * d2);  // of two units
                            q[0] = fmaf(r, d2, -0.5f), q[1] = fmaf(r, d1, -0.5f);
                        }
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            if constexpr (WAY == Way::UNITS) {
                                const float through = grad[i] * fmaf(-q[e], q[e], 1.0f);
                                sum.rows[chunk][e][i] = fmaf(through, v[e], sum.rows[chunk][e][i]);
                                along_rows[e] = fmaf(through, u[e][i], along_rows[e]);
                            } else {
                                const float slope = fmaf(-q[e], q[e], 0.25f);
                                sum.rows[chunk][e][i] = fmaf(grad[i], slope, sum.rows[chunk][e][i]);
                                along_rows[e] = fmaf(grad[i], slope, along_rows[e]);
                            }
                            along[e] = fmaf(grad[i], q[e], along[e]);
                        }
                    }
                    const float2 before = *reinterpret_cast<const float2*>(to + n * stride);
                    *reinterpret_cast<float2*>(to + n * stride) = {before.x + along_rows[0], before.y + along_rows[1]};
                    for (int e = 0; e < 2; ++e) sum.vector[chunk][e] += along[e];
                }
                from += 8, gradient += 2 * GRAD_STRIDE, to += 2 * stride;
            }
        }
    }
}

}  // namespace vlattn
