// Products and divergences of float32 maps by all threads of a block, for congruence_loss.cu. They are not inlined: each type and
// size would compile them again.
#pragma once

#include "attention.h"

namespace vlattn {

// The loss of each sample, and its gradients
struct Congruence {
    enum Kind : int32_t { CACR, IAIS_DISTRIBUTED };
    DType dtype;
    int64_t B, H, L, V;
    int D;
    Kind kind;
    bool text, image;  // the directions
    StridedTensor query[4], key[4];  // of the blocks LL, LV, VL, VV: (B,H,L or V,D)
    const uint8_t *text_mask, *image_mask;  // (B,L), (B,V), contiguous; null: every token is real
    float scale;
    float* loss;  // (B); forward only
    // backward
    const float* grad_loss;  // (B)
    StridedTensor grad_query[4], grad_key[4];  // absent: a block without a gradient
    float* maps;  // (B,3,L+V,L+V), for the kernel alone
    FIELDS(dtype, B, H, L, V, D, kind, text, image, query, key, text_mask, image_mask, scale, loss, grad_loss, grad_query,
           grad_key, maps)
};

constexpr int TOKENS = 128;  // of a modality, at most
constexpr int STRIP = 16;  // rows that a warp holds
constexpr int LANE_COLUMNS = TOKENS / WARP;  // of a row that a warp holds: each lane has so many
constexpr int CHUNK = 32;  // of the inner dimension of a product
constexpr int CHUNK_STRIDE = TOKENS + 4;
constexpr size_t PRODUCT_BYTES = 2 * CHUNK * CHUNK_STRIDE * sizeof(float);
constexpr float EPSILON = 1e-6f;  // in the logarithms of iais_distributed
constexpr float TINY = 1.1754944e-38f;

// A float32 matrix among a sample's maps in global memory.
struct Matrix {
    float* p;
    int row, column;  // strides

    __device__ Matrix transposed() const { return {p, column, row}; }
    __device__ float& operator()(int i, int j) const { return p[i * row + j * column]; }
};

// Rows k .. k+CHUNK-1 of m (inner,width) to a chunk, zeros outside.
static __device__ void stage_chunk(float* chunk, Matrix m, int k, int inner, int width) {
    const int warps = blockDim.x / WARP, wide = round_up(width, WARP);
    auto copy = [&](int i, int j) { chunk[i * CHUNK_STRIDE + j] = k + i < inner && j < width ? m(k + i, j) : 0.0f; };
    if (m.column == 1) {
        for (int i = warp_index(); i < CHUNK; i += warps)
            for (int j = lane_index(); j < wide; j += WARP) copy(i, j);
    } else {
        for (int j = warp_index(); j < wide; j += warps) copy(lane_index(), j);
    }
}

// c (rows,columns) = a (rows,inner) b (inner,columns), or with `add` +=; begins with a barrier. `chunks`: PRODUCT_BYTES of shared
// memory.
static __device__ __attribute__((noinline)) void product(Matrix c, Matrix a, Matrix b, int rows, int inner, int columns, bool add,
                                                         float* chunks) {
    float *left = chunks, *right = chunks + CHUNK * CHUNK_STRIDE;
    const int first = warp_index() * STRIP + lane_index() / 8 * 4, at = lane_index() % 8 * 4;
    float sum[LANE_COLUMNS][4][4] = {};  // of columns 32 n + at + j, rows first + i: [n][i][j]
    for (int k = 0; k < inner; k += CHUNK) {
        __syncthreads();
        stage_chunk(left, a.transposed(), k, inner, rows);
        stage_chunk(right, b, k, inner, columns);
        __syncthreads();
        if (warp_index() * STRIP >= rows) continue;
#pragma unroll 2
        for (int i = 0; i < CHUNK; ++i) {
            const float4 x = *reinterpret_cast<const float4*>(left + i * CHUNK_STRIDE + first);
#pragma unroll
            for (int n = 0; n < LANE_COLUMNS; ++n) {
                if (n * WARP >= columns) continue;
                const float4 y = *reinterpret_cast<const float4*>(right + i * CHUNK_STRIDE + n * WARP + at);
                const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
                for (int e = 0; e < 16; ++e) sum[n][e / 4][e % 4] = fmaf(xs[e / 4], ys[e % 4], sum[n][e / 4][e % 4]);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; ++n) {
#pragma unroll
        for (int e = 0; e < 16; ++e) {
            const int row = first + e / 4, column = n * WARP + at + e % 4;
            if (row < rows && column < columns) c(row, column) = sum[n][e / 4][e % 4] + (add ? c(row, column) : 0.0f);
        }
    }
}

using Part = float (&)[LANE_COLUMNS];  // of a row, columns lane + 32 k
using Pairs = const bool (&)[LANE_COLUMNS];

// Of a row: the loss over this lane's columns, and the gradients at p and t.
static __device__ float distributed(Part p, Part t, Pairs pair, Part by_p, Part by_t) {
    float loss = 0.0f;
#pragma unroll
    for (int k = 0; k < LANE_COLUMNS; ++k) {
        if (!pair[k]) continue;
        // t (log t - log(p + eps)) + p (log p - log(t + eps)), with log x - log(x + eps) = -log1p(eps / x) and 0 log 0 = 0
        const float safe_p = fmaxf(p[k], TINY), safe_t = fmaxf(t[k], TINY);
        const float log_p = logf(p[k] + EPSILON), log_t = logf(t[k] + EPSILON);
        loss += (t[k] - p[k]) * (log_t - log_p) - t[k] * log1pf(EPSILON / safe_t) - p[k] * log1pf(EPSILON / safe_p);
        // log p - log(t + eps) + 1 - t / (p + eps), small where p is near t
        by_p[k] = logf(safe_p) - log_t + (p[k] - t[k] + EPSILON) / (p[k] + EPSILON);
        by_t[k] = logf(safe_t) - log_p + (t[k] - p[k] + EPSILON) / (t[k] + EPSILON);
    }
    return loss;
}

// The same for softmax(t) against softmax(p). Without cancellation: with d = log p - log t, sum (p - t) d = sum t expm1(d) d has no
// negative term.
static __device__ float against_softmax(Part p, Part t, Pairs pair, Part by_p, Part by_t) {
    float power[LANE_COLUMNS], sum = 0.0f;
#pragma unroll
    for (int k = 0; k < LANE_COLUMNS; ++k) sum += power[k] = pair[k] ? expf(t[k]) : 0.0f;  // t is in [0, 1]
    sum = warp_sum(sum);
    if (sum == 0.0f) return 0.0f;  // the row of a padded token
    float correction = 0.0f;
#pragma unroll
    for (int k = 0; k < LANE_COLUMNS; ++k) {
        power[k] /= sum;
        correction += power[k] * expm1f(p[k] - t[k]);
    }
    // log p - log t is the gap minus the difference of the two log-sum-exps, which is log sum t e^gap
    const float less = log1pf(warp_sum(correction));
    float loss = 0.0f, sum_p = 0.0f, sum_t = 0.0f;
#pragma unroll
    for (int k = 0; k < LANE_COLUMNS; ++k) {
        if (!pair[k]) continue;
        const float d = p[k] - t[k] - less, difference = power[k] * expm1f(d);  // p - t
        loss += difference * d;
        p[k] = power[k] + difference;
        by_p[k] = p[k] * d + difference;  // at log p
        by_t[k] = -(power[k] * d + difference);
        sum_p += by_p[k];
        sum_t += by_t[k];
    }
    sum_p = warp_sum(sum_p);
    sum_t = warp_sum(sum_t);
#pragma unroll
    for (int k = 0; k < LANE_COLUMNS; ++k) {
        by_p[k] -= p[k] * sum_p;
        by_t[k] -= power[k] * sum_t;
    }
    return loss;
}

// One direction's symmetric divergence of `own` from the target, both (size,size), times `weight`: the loss over this lane's
// columns. With `gradient` the gradients at both, times `share`, go to `by_own` (with `add` on top of what is there) and to the
// target's place.
static __device__ __attribute__((noinline)) float divergence(Congruence::Kind kind, Matrix own, Matrix target, const bool* real,
                                                             int size, float weight, float share, bool gradient, Matrix by_own,
                                                             bool add) {
    float loss = 0.0f;
    for (int i = warp_index(); i < size; i += blockDim.x / WARP) {
        float p[LANE_COLUMNS] = {}, t[LANE_COLUMNS] = {}, by_p[LANE_COLUMNS] = {}, by_t[LANE_COLUMNS] = {};
        bool pair[LANE_COLUMNS];
#pragma unroll
        for (int k = 0; k < LANE_COLUMNS; ++k) {
            const int j = lane_index() + k * WARP;
            pair[k] = real[i] && real[j];
            if (pair[k]) p[k] = own(i, j), t[k] = target(i, j);
        }
        const bool cacr = kind == Congruence::CACR;
        loss += weight * (cacr ? against_softmax(p, t, pair, by_p, by_t) : distributed(p, t, pair, by_p, by_t));
#pragma unroll
        for (int k = 0; k < LANE_COLUMNS; ++k) {
            const int j = lane_index() + k * WARP;
            if (!gradient || j >= size) continue;
            by_own(i, j) = (add ? by_own(i, j) : 0.0f) + share * by_p[k];
            target(i, j) = share * by_t[k];
        }
    }
    return loss;
}

}  // namespace vlattn
