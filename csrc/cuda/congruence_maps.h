// Maps of float32 in global memory for congruence_loss.cu: their products on tensor cores in tf32, and divergences of their rows.
#pragma once

#include "attention.h"

namespace vlattn {

constexpr int TOKENS = 128;  // of a modality, at most
constexpr int STRIP = 16;  // rows that a warp holds
constexpr int GROUPS = TOKENS / STRIP;  // of STRIP columns
constexpr float EPSILON = 1e-6f;  // in the logarithms of iais_distributed
constexpr float TINY = 1.1754944e-38f;

// A warp's 16 rows of a map: of STRIP columns k, c[k][n] is a result of a matrix instruction.
using Strip = float[GROUPS][2][4];

// A map, or a block of one: rows and columns are padded to multiples of STRIP, so that no access asks where it ends.
struct Matrix {
    float* p;
    int stride;

    __device__ float* row(int i) const { return p + i * stride; }
};

// The loss of each sample, and its gradients
struct Congruence {
    enum Kind : int32_t { CACR, IAIS_DISTRIBUTED };
    enum Region { MAP, BY_MAP, BY_TARGET };  // maps, the gradients at them, and those at the targets
    DType dtype;
    int64_t B, H, L, V;
    int D;
    Kind kind;
    bool text, image;  // the directions
    StridedTensor query[4], key[4];  // of the blocks LL, LV, VL, VV: (B,H,L or V,D)
    const uint8_t *text_mask, *image_mask;  // (B,L), (B,V), contiguous; null: every token is real
    float scale;
    float* loss;  // (B,parts), to be added up: forward only
    int64_t parts;
    // backward
    const float* grad_loss;  // (B)
    StridedTensor grad_query[4], grad_key[4];  // absent: a block without a gradient
    float* maps;  // (1 or backward 3, B, S, S) with S = L and V padded: for the kernels alone
    FIELDS(dtype, B, H, L, V, D, kind, text, image, query, key, text_mask, image_mask, scale, loss, parts, grad_loss, grad_query,
           grad_key, maps)

    // Text is 0 and image 1, also in names of blocks: those of the rows and of the columns.
    __host__ __device__ int size(int a) const { return static_cast<int>(a == 0 ? L : V); }
    __host__ __device__ int padded(int a) const { return round_up(size(a), STRIP); }
    __host__ __device__ bool has(int a) const { return a == 0 ? text : image; }  // the direction

    __device__ Matrix map(Region region, int64_t b, int r, int c) const {
        const int length = padded(0) + padded(1);
        return {maps + ((region * B + b) * length + r * padded(0)) * length + c * padded(0), length};
    }
};

// Which tokens of a sample are real, in shared memory.
struct Tokens {
    int real[2][TOKENS];  // 16 for a real one, as RowCopies takes it; 0 for padding and beyond the last
    int none[TOKENS];  // zeros
    float bias[2][TOKENS];  // at which products with these keys begin: 0, or what the scale makes -inf

    // Returns whether the sample has a loss: text tokens, image tokens and heads.
    __device__ bool load(const Congruence& call, int64_t b) {
        for (int a = 0; a < 2; ++a) {
            const uint8_t* mask = a == 0 ? call.text_mask : call.image_mask;
            for (int i = threadIdx.x; i < TOKENS; i += blockDim.x) {
                none[i] = 0;
                real[a][i] = i < call.size(a) && (!mask || mask[b * call.size(a) + i]) ? 16 : 0;
                bias[a][i] = real[a][i] ? 0.0f : call.scale < 0.0f ? INFINITY : -INFINITY;
            }
        }
        __syncthreads();
        return call.H > 0 && number(0) > 0 && number(1) > 0;
    }

    __device__ int number(int a) const {
        int number = 0;
        for (int i = lane_index(); i < TOKENS; i += WARP) number += __popc(__ballot_sync(ALL_LANES, real[a][i]));
        return number;
    }
};

// Calls f with each result of a strip, the column of its first number, and its place k, n in the strip.
template <class F> __device__ __forceinline__ void each_pair(int columns, Strip& strip, F f) {
#pragma unroll
    for (int k = 0; k < GROUPS; ++k) {
        if (k * STRIP >= columns) break;
#pragma unroll
        for (int n = 0; n < 2; ++n) f(strip[k][n], k * STRIP + n * 8 + lane_column() * 2, k, n);
    }
}

// A warp's rows first .. first+15 of a matrix.
__device__ __forceinline__ void fill(Strip& strip, Matrix m, int first, int columns) {
    const float* row[2] = {m.row(first + lane_row()), m.row(first + lane_row() + 8)};
    each_pair(columns, strip, [&](float(&x)[4], int column, int, int) {
        for (int r = 0; r < 2; ++r) {
            float two[2];
            read(two, row[r] + column);
            x[2 * r] = two[0], x[2 * r + 1] = two[1];
        }
    });
}
__device__ __forceinline__ void write(Matrix m, int first, int columns, Strip& strip) {
    float* row[2] = {m.row(first + lane_row()), m.row(first + lane_row() + 8)};
    each_pair(columns, strip, [&](float(&x)[4], int column, int, int) {
        for (int r = 0; r < 2; ++r) store_pair(row[r] + column, x[2 * r], x[2 * r + 1]);
    });
}

// What a sum takes of a number: in tf32, which has the digits of 16-bit inputs, its nearest; PRECISE keeps all of it.
template <bool PRECISE> __device__ __forceinline__ float taken(float x) { return PRECISE ? x : round_tf32(x); }

// c (16,8) += a (16,8) b (8,8). PRECISE: as exact as float32, by three products of halves of the digits.
template <bool PRECISE> __device__ __forceinline__ void multiply(float (&c)[4], const float (&a)[4], float b0, float b1) {
    if constexpr (PRECISE) {
        float large[4], small[4];
        for (int i = 0; i < 4; ++i) large[i] = round_tf32(a[i]), small[i] = round_tf32(a[i] - large[i]);
        const float large0 = round_tf32(b0), large1 = round_tf32(b1);
        mma_tf32(c, small, large0, large1);
        mma_tf32(c, large, round_tf32(b0 - large0), round_tf32(b1 - large1));
        mma_tf32(c, large, large0, large1);
    } else {
        mma_tf32(c, a, b0, b1);
    }
}

// The right operand of products: a tile in shared memory of a matrix as it lies or, TURNED, transposed.
template <bool PRECISE, bool TURNED> struct Right {
    float* tile;
    int stride;  // what the lanes of a warp read together lies in different banks

    // Has all threads of the block copy a matrix; begins and ends with a barrier.
    __device__ Right(float* tile, Matrix m, int rows, int columns) : tile(tile), stride(columns + (TURNED ? 8 : 4)) {
        __syncthreads();
        const int vectors = columns / 4;
        for (int i = threadIdx.x; i < rows * vectors; i += blockDim.x) {
            const int row = i / vectors, column = i % vectors * 4;
            float4 x = *reinterpret_cast<const float4*>(m.row(row) + column);
            x.x = taken<PRECISE>(x.x), x.y = taken<PRECISE>(x.y), x.z = taken<PRECISE>(x.z), x.w = taken<PRECISE>(x.w);
            *reinterpret_cast<float4*>(tile + row * stride + column) = x;
        }
        __syncthreads();
    }

    // sum += a (16,8) times the operand's rows k .. k+7 and its first `columns` columns.
    __device__ __forceinline__ void multiply_into(Strip& sum, const float (&a)[4], int k, int columns) const {
        const float* at =
            TURNED ? tile + lane_row() * stride + k + lane_column() * 2 : tile + (k + lane_column() * 2) * stride + lane_row();
#pragma unroll
        for (int n = 0; n < GROUPS; ++n) {
            if (n * STRIP >= columns) break;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float b[2] = {at[0], at[TURNED ? 1 : stride]};
                if constexpr (TURNED) read(b, at);
                multiply<PRECISE>(sum[n][i], a, b[0], b[1]);
                at += TURNED ? 8 * stride : 8;
            }
        }
    }
};

// sum += a warp's rows of a matrix, or TURNED of its transpose, first .. first+15, times the operand's `inner` rows.
template <bool TURNED, bool PRECISE, bool RIGHT>
__device__ __forceinline__ void add_product(Strip& sum, Matrix left, int first, const Right<PRECISE, RIGHT>& right, int inner,
                                            int columns) {
#pragma unroll 1
    for (int k = 0; k < inner; k += 8) {
        const int at = k + lane_column() * 2, row = first + lane_row();
        float a[4];
        for (int i = 0; i < 2; ++i) {
            float x[2];
            if constexpr (TURNED) {
                for (int j = 0; j < 2; ++j) x[j] = left.row(at + j)[row + i * 8];
            } else {
                read(x, left.row(row + i * 8) + at);
            }
            a[i] = taken<PRECISE>(x[0]), a[i + 2] = taken<PRECISE>(x[1]);
        }
        right.multiply_into(sum, a, k, columns);
    }
}

// The same with rows that the warp holds.
template <bool PRECISE, bool RIGHT>
__device__ __forceinline__ void add_product(Strip& sum, const Strip& left, const Right<PRECISE, RIGHT>& right, int inner,
                                            int columns) {
#pragma unroll
    for (int k = 0; k < 2 * GROUPS; ++k) {
        if (k * 8 >= inner) break;
        const float(&x)[4] = left[k / 2][k % 2];
        const float a[4] = {taken<PRECISE>(x[0]), taken<PRECISE>(x[2]), taken<PRECISE>(x[1]), taken<PRECISE>(x[3])};
        right.multiply_into(sum, a, k * 8, columns);
    }
}

// Calls f with the place k, n, e in a strip of this lane's numbers of row g + 8 r, and the column of each.
template <class F> __device__ __forceinline__ void each_column(int columns, int r, F f) {
#pragma unroll
    for (int k = 0; k < GROUPS; ++k) {
        if (k * STRIP >= columns) break;
#pragma unroll
        for (int e = 0; e < 4; ++e) f(k, e / 2, 2 * r + e % 2, k * STRIP + e / 2 * 8 + lane_column() * 2 + e % 2);
    }
}

// Of a number p of a row and one t of its target: their part of the loss, and the gradients at both.
__device__ __forceinline__ float distributed(float p, float t, float& by_p, float& by_t) {
    // t (log t - log(p + eps)) + p (log p - log(t + eps)), with log x - log(x + eps) = -log1p(eps / x) and 0 log 0 = 0
    const float safe_p = fmaxf(p, TINY), safe_t = fmaxf(t, TINY);
    const float log_p = logf(p + EPSILON), log_t = logf(t + EPSILON);
    // log p - log(t + eps) + 1 - t / (p + eps), small where p is near t
    by_p = logf(safe_p) - log_t + (p - t + EPSILON) / (p + EPSILON);
    by_t = logf(safe_t) - log_p + (t - p + EPSILON) / (t + EPSILON);
    return (t - p) * (log_t - log_p) - t * log1pf(EPSILON / safe_t) - p * log1pf(EPSILON / safe_p);
}

// e^x - 1 to a few ulp for x in [-1, 1], by the power series: there is nothing to reduce.
__device__ __forceinline__ float exp_minus_1(float x) {
    constexpr float INVERSE_FACTORIALS[] = {
        1.0f / 3628800, 1.0f / 362880, 1.0f / 40320, 1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f};
    float y = 0.0f;
#pragma unroll
    for (float c : INVERSE_FACTORIALS) y = fmaf(y, x, c);
    return x * y;
}

// A warp's rows of one direction's divergence: the loss over this lane's numbers of `target`, of which `own` has the modality's own
// rows. BACKWARD: the gradients at both, times `share`, go to `by_own` and take the target's place. Padding has none.
template <bool BACKWARD>
__device__ __forceinline__ float divergence(Congruence::Kind kind, Matrix own, Strip& target, const int* real, int first,
                                            int columns, float share, Matrix by_own) {
    float loss = 0.0f;
    Strip gap, change;
    fill(gap, own, first, columns);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float weight = real[first + lane_row() + r * 8] ? share : 0.0f;
        const auto weighed = [weight](float x) { return weight == 0.0f ? 0.0f : weight * x; };
        if (kind == Congruence::IAIS_DISTRIBUTED) {
            each_column(columns, r, [&](int k, int n, int e, int column) {
                float &p = gap[k][n][e], &t = target[k][n][e], by_p = 0.0f, by_t = 0.0f;
                if (real[column]) loss += weighed(distributed(p, t, by_p, by_t));
                p = weighed(by_p), t = weighed(by_t);
            });
            continue;
        }
        // Of the softmax of both. Without cancellation: with d = log p - log t, sum (p - t) d = sum t expm1(d) d has no negative
        // term, and d is the gap less the difference of the two log-sum-exps, which is log sum t e^gap.
        float sum = 0.0f, correction = 0.0f, row_loss = 0.0f, sum_p = 0.0f, sum_t = 0.0f;
        each_column(columns, r, [&](int k, int n, int e, int column) {
            float &t = target[k][n][e], &d = gap[k][n][e], &difference = change[k][n][e];
            d -= t;
            difference = exp_minus_1(d);  // maps are in [0, 1]
            t = real[column] ? fast_exp2(t * LOG2_E) : 0.0f;  // 0 is padding from here on
            sum += t;
            correction = fmaf(t, difference, correction);
        });
        const float inverse = 1.0f / row_sum(sum), less = log1pf(row_sum(correction) * inverse);
        const float factor = expf(-less), shift = expm1f(-less);
        each_column(columns, r, [&](int k, int n, int e, int) {
            float &t = target[k][n][e], &d = gap[k][n][e], &difference = change[k][n][e];
            d -= less;
            t *= inverse;
            difference = t * fmaf(difference, factor, shift);  // p - t
            const float product = difference * d;
            row_loss += product;
            sum_t -= fmaf(t, d, difference);
            sum_p += product;  // at log p it is this and what sum_t lacks
        });
        loss += weighed(row_loss);
        if (!BACKWARD) continue;
        sum_t = row_sum(sum_t), sum_p = row_sum(sum_p) - sum_t;
        each_column(columns, r, [&](int k, int n, int e, int) {
            float &t = target[k][n][e], &d = gap[k][n][e], &difference = change[k][n][e];
            const float by_p = fmaf(t + difference, d - sum_p, difference);
            t = weighed(-fmaf(t, d + sum_t, difference));
            d = weighed(by_p);
        });
    }
    if (BACKWARD) write(by_own, first, columns, gap);
    return loss;
}

}  // namespace vlattn
