// congruence_loss (CACR, soft, and IAIS, distributed) and its gradients, the whole of a sample in one block.
//
// Queries and keys of the blocks LL, LV, VL, VV (B,H,L or V,D); loss (B). L, V and D are at most 128.
//   maps: XY = mean_h softmax(scale q k^T), each row over the real tokens of Y
//   CACR, text direction: T = LV VV LV^T, p = softmax(LL), t = softmax(T), LV a constant; IAIS: p = LL, t = T = LV VL
//   loss = sum_ij (p_ij - t_ij) (log p_ij - log t_ij) / real tokens;  the image direction swaps L and V
//   dVV = LV^T dT LV, or dLV = dT VL^T and dVL = LV^T dT
//   of each head P and a map's gradient G, divided by H:  dS_ij = P_ij (G_ij - sum_j P_ij G_ij)
//   dq = scale grad_loss dS k      dk = scale grad_loss dS^T q
// A warp holds 16 whole rows of a block. The maps are averaged over the heads in registers and go through a workspace small
// enough for the L2 cache. Barriers stand where kernels would follow each other: there is one launch forward, and one backward,
// which computes the maps again.
// Why CUDA C++: the steps of a block (maps, products of maps, divergences, gradients) have different tiles and layouts. In Triton
// each step is a kernel: short samples wait for seven launches. A sample has one multiprocessor here, however few samples there
// are: docs/kernels.md says what that costs. Not measured on a GPU.
#include <algorithm>

#include "congruence_maps.h"

namespace vlattn {
namespace {

constexpr int GROUPS = TOKENS / STRIP;  // of STRIP columns
constexpr float LOWEST = -1e30f;  // less than any logit

struct Shared {
    // for each query of a head: its largest logit; 1 / sum of 2^(logit - largest); the mean of the gradients at its probabilities;
    // and a bound of those at its logits
    float top[TOKENS], inverse[TOKENS], delta[TOKENS], most[TOKENS];
    float loss[TOKENS / STRIP];  // of each warp
    bool real[2][TOKENS];  // the tokens of text and image; false beyond the last
};
constexpr size_t SHARED_BYTES = (sizeof(Shared) + 15) / 16 * 16;

// Row and column of number e, c[e / 4][e % 4], of the eight numbers that a lane has of 16 rows and 16 columns.
__device__ __forceinline__ int row_of(int e) { return lane_row() + e % 4 / 2 * 8; }
__device__ __forceinline__ int column_of(int e) { return e / 4 * 8 + lane_column() * 2 + e % 2; }

// The power of two that brings x to [2^14, 2^15), which float16 holds; 2^126 where it would be more.
__device__ __forceinline__ float power_for(float x) {
    const int exponent = static_cast<int>(__float_as_uint(x) >> 23 & 0xff);
    return __uint_as_float(static_cast<uint32_t>(exponent < 15 ? 253 : 268 - exponent) << 23);
}

// The work on one sample. Blocks are named by their rows and columns, 0 for text and 1 for image.
template <class T, int K> struct Sample {
    const Congruence& call;
    const int64_t b;
    Shared& shared;
    T* tile;
    bool counts;  // false for a sample without text or without image tokens: it has no loss

    enum Region { MAP, TARGET, BY_MAP };  // of the workspace: maps, targets or their gradients, gradients of maps

    __device__ explicit Sample(const Congruence& call)
        : call(call),
          b(blockIdx.x),
          shared(*static_cast<Shared*>(shared_memory())),
          tile(reinterpret_cast<T*>(static_cast<char*>(shared_memory()) + SHARED_BYTES)) {
        for (int a = 0; a < 2; ++a) {
            const uint8_t* mask = a == 0 ? call.text_mask : call.image_mask;
            for (int i = threadIdx.x; i < TOKENS; i += blockDim.x)
                shared.real[a][i] = i < size(a) && (!mask || mask[b * size(a) + i]);
        }
        __syncthreads();
        counts = call.H > 0 && real_tokens(0) > 0.0f && real_tokens(1) > 0.0f;
    }

    __device__ int size(int a) const { return static_cast<int>(a == 0 ? call.L : call.V); }

    __device__ float real_tokens(int a) const {
        float number = 0.0f;
        for (int i = lane_index(); i < TOKENS; i += WARP) number += shared.real[a][i];
        return warp_sum(number);
    }

    // A block's place in the workspace: LL, LV over VL, VV.
    __device__ Matrix part(Region region, int r, int c) const {
        const int length = size(0) + size(1);
        return {call.maps + ((b * 3 + region) * length + r * size(0)) * length + c * size(0), length, 1};
    }

    // Copies a head's rows to the tile, padded with zeros to a multiple of STRIP.
    __device__ void fill_tile(const StridedTensor& x, int64_t h, int rows) {
        __syncthreads();
        stage<T, K>(tile, x.at<T>(b, h), x.stride_n, 0, round_up(rows, STRIP), rows, call.D);
        __syncthreads();
    }

    // Base-2 logits of 16 rows and of rows k .. k+15 of the tile.
    __device__ __forceinline__ void logits(float (&s)[2][4], const Rows16<T, K>& rows, int k) const {
#pragma unroll
        for (int e = 0; e < 8; ++e) s[e / 4][e % 4] = 0.0f;
        product_with_rows(s, rows, tile, k);
#pragma unroll
        for (int e = 0; e < 8; ++e) s[e / 4][e % 4] *= call.scale * LOG2_E;
    }

    // The probabilities of 16 queries over the tokens of `c`, whose keys are in the tile; and the queries' largest base-2 logits
    // and inverses of sums.
    __device__ __forceinline__ void softmax(float (&p)[GROUPS][2][4], float (&top)[2], float (&inverse)[2],
                                            const Rows16<T, K>& queries, int c) const {
        float sum[2] = {};
        top[0] = top[1] = LOWEST;
#pragma unroll
        for (int k = 0; k < GROUPS; ++k) {
            if (k * STRIP >= size(c)) continue;
            logits(p[k], queries, k * STRIP);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                float& x = p[k][e / 4][e % 4];
                if (!shared.real[c][k * STRIP + column_of(e)]) x = -INFINITY;
                top[e % 4 / 2] = fmaxf(top[e % 4 / 2], x);
            }
        }
        for (int i = 0; i < 2; ++i) top[i] = row_max(top[i]);
#pragma unroll
        for (int k = 0; k < GROUPS; ++k) {
            if (k * STRIP >= size(c)) continue;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                float& x = p[k][e / 4][e % 4];
                x = fast_exp2(x - top[e % 4 / 2]);
                sum[e % 4 / 2] += x;
            }
        }
        for (int i = 0; i < 2; ++i) inverse[i] = 1.0f / row_sum(sum[i]);
#pragma unroll
        for (int k = 0; k < GROUPS; ++k) {
            if (k * STRIP < size(c)) scale_rows(p[k], inverse);
        }
    }

    // A block's attention averaged over the heads.
    __device__ void make_map(int r, int c) {
        const int N = size(r), M = size(c), first = warp_index() * STRIP;
        const StridedTensor &query = call.query[2 * r + c], &key = call.key[2 * r + c];
        float sum[GROUPS][2][4] = {};
        for (int64_t h = 0; h < call.H; ++h) {
            fill_tile(key, h, M);
            if (first >= N) continue;
            Rows16<T, K> queries;
            queries.load(query.at<T>(b, h), query.stride_n, first, N, call.D);
            float p[GROUPS][2][4], top[2], inverse[2];
            softmax(p, top, inverse, queries, c);
#pragma unroll
            for (int k = 0; k < GROUPS; ++k) {
                if (k * STRIP >= M) continue;
#pragma unroll
                for (int e = 0; e < 8; ++e) sum[k][e / 4][e % 4] += p[k][e / 4][e % 4];
            }
        }
        const Matrix map = part(MAP, r, c);
#pragma unroll
        for (int k = 0; k < GROUPS; ++k) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const int row = first + row_of(e), column = k * STRIP + column_of(e);
                if (row < N && column < M) map(row, column) = sum[k][e / 4][e % 4] / call.H;
            }
        }
    }

    __device__ void multiply(Matrix c, Matrix x, Matrix y, int rows, int inner, int columns, bool add) {
        product(c, x, y, rows, inner, columns, add, reinterpret_cast<float*>(tile));
    }

    // This lane's part of the loss of the direction of `a`; with `gradient` the direction's gradients go to the maps of
    // gradients, the `second` direction's on top of the first one's where both reach a block.
    __device__ float direct(int a, bool gradient, bool second) {
        const int o = 1 - a, n = size(a), m = size(o);
        const bool cacr = call.kind == Congruence::CACR;
        const Matrix across = part(MAP, a, o), back = part(MAP, o, a), target = part(TARGET, a, a), left = part(TARGET, a, o);
        if (cacr) {
            multiply(left, across, part(MAP, o, o), n, m, m, false);
            multiply(target, left, across.transposed(), n, m, n, false);
        } else {
            multiply(target, across, back, n, m, n, false);
        }
        __syncthreads();
        const float weight = 1.0f / real_tokens(a), share = weight / static_cast<float>(call.H);
        const float loss = divergence(
            call.kind, part(MAP, a, a), target, shared.real[a], n, weight, share, gradient, part(BY_MAP, a, a), second && cacr);
        if (!gradient) return loss;
        if (cacr) {
            multiply(left, target, across, n, n, m, false);
            multiply(part(BY_MAP, o, o), across.transposed(), left, m, n, m, second);
        } else {
            multiply(part(BY_MAP, a, o), target, back.transposed(), n, n, m, second);
            multiply(part(BY_MAP, o, a), across.transposed(), target, m, n, n, second);
        }
        return loss;
    }

    // From the gradient at a map to those of its queries and keys. Gradients at logits are multiplied by a power of two before
    // they are rounded to T: with many tokens and heads they would underflow in float16.
    __device__ void block_gradients(int r, int c) {
        const int n = 2 * r + c;
        for (int64_t h = 0; h < call.H; ++h) {
            fill_tile(call.key[n], h, size(c));
            if (warp_index() * STRIP < size(r)) query_gradients(r, c, h);
            fill_tile(call.query[n], h, size(r));
            if (warp_index() * STRIP < size(c)) key_gradients(r, c, h);
        }
    }

    // The gradient at a probability.
    __device__ __forceinline__ float by_map(int r, int c, int row, int column) const {
        return row < size(r) && shared.real[c][column] ? part(BY_MAP, r, c)(row, column) : 0.0f;
    }

    __device__ void query_gradients(int r, int c, int64_t h) {
        const int N = size(r), M = size(c), first = warp_index() * STRIP;
        const StridedTensor& query = call.query[2 * r + c];
        Rows16<T, K> queries;
        queries.load(query.at<T>(b, h), query.stride_n, first, N, call.D);
        float p[GROUPS][2][4], top[2], inverse[2], power[2], mass[2] = {}, delta[2] = {}, most[2] = {};
        softmax(p, top, inverse, queries, c);
#pragma unroll
        for (int k = 0; k < GROUPS; ++k) {
            if (k * STRIP >= M) continue;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const float x = p[k][e / 4][e % 4], weighed = x * by_map(r, c, first + row_of(e), k * STRIP + column_of(e));
                mass[e % 4 / 2] += x;
                delta[e % 4 / 2] += weighed;
                most[e % 4 / 2] = fmaxf(most[e % 4 / 2], fabsf(weighed));
            }
        }
        for (int i = 0; i < 2; ++i) {
            delta[i] = row_sum(delta[i]) / row_sum(mass[i]);  // the rounded probabilities do not quite add up to 1
            most[i] = row_max(most[i]) + fabsf(delta[i]);  // no gradient of a logit is greater
            power[i] = power_for(most[i]);
            if (lane_column() != 0) continue;
            const int row = first + lane_row() + i * 8;
            shared.top[row] = top[i], shared.inverse[row] = inverse[i];
            shared.delta[row] = delta[i], shared.most[row] = most[i];
        }
        float out[K / 8][4] = {};
#pragma unroll
        for (int k = 0; k < GROUPS; ++k) {
            if (k * STRIP >= M) continue;
#pragma unroll
            for (int e = 0; e < 8; ++e)
                p[k][e / 4][e % 4] *= by_map(r, c, first + row_of(e), k * STRIP + column_of(e)) - delta[e % 4 / 2];
            scale_rows(p[k], power);
            product_with_columns<T, K>(out, p[k], tile, k * STRIP);
        }
        write(out, power, call.grad_query[2 * r + c], h, first, N);
    }

    __device__ void key_gradients(int r, int c, int64_t h) {
        const int N = size(r), M = size(c), first = warp_index() * STRIP;
        const StridedTensor& key = call.key[2 * r + c];
        float most = 0.0f;
        for (int i = lane_index(); i < N; i += WARP) most = fmaxf(most, shared.most[i]);
        most = warp_max(most);
        const float power[2] = {power_for(most), power_for(most)};
        Rows16<T, K> keys;
        keys.load(key.at<T>(b, h), key.stride_n, first, M, call.D);
        float out[K / 8][4] = {};
#pragma unroll 1
        for (int k = 0; k < N; k += STRIP) {
            float s[2][4];
            logits(s, keys, k);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                float& x = s[e / 4][e % 4];
                const int row = k + column_of(e), column = first + row_of(e);
                const float p = fast_exp2(x - shared.top[row]) * shared.inverse[row];
                const bool exists = row < N && shared.real[c][column];
                x = exists ? p * (by_map(r, c, row, column) - shared.delta[row]) * power[0] : 0.0f;
            }
            product_with_columns<T, K>(out, s, tile, k);
        }
        write(out, power, call.grad_key[2 * r + c], h, first, M);
    }

    __device__ void write(float (&out)[K / 8][4], const float (&power)[2], const StridedTensor& grad, int64_t h, int first,
                          int num_rows) {
        const float times = call.scale * call.grad_loss[b];
        scale_rows(out, {1.0f / power[0], 1.0f / power[1]});
        scale_rows(out, {times, times});
        store_rows<T>(out, {1.0f, 1.0f}, grad, b, h, first, num_rows, call.D);
    }

    __device__ void clear(const StridedTensor& grad, int rows) {
        for (int64_t h = 0; h < call.H; ++h) {
            T* to = grad.at<T>(b, h);
            for (int i = threadIdx.x; i < rows * call.D; i += blockDim.x)
                to[i / call.D * grad.stride_n + i % call.D] = from_float<T>(0.0f);
        }
    }
};

// Forward or `backward`: one kernel, since both begin alike and the maps take the most registers.
template <class T, int K>
__global__ void __launch_bounds__(TOKENS / STRIP * WARP)
    congruence_loss_kernel(const __grid_constant__ Congruence call, bool backward) {
    Sample<T, K> sample(call);
    const bool cacr = call.kind == Congruence::CACR;
    const auto needed = [&](int a) { return a == 0 ? call.text : call.image; };
    float loss = 0.0f;
    if (sample.counts) {
#pragma unroll 1
        for (int n = 0; n < 4; ++n) {
            const int r = n / 2, c = n % 2;
            if ((r == c) == cacr || needed(r)) sample.make_map(r, c);
        }
#pragma unroll 1
        for (int a = 0; a < 2; ++a) {
            if (needed(a)) loss += sample.direct(a, backward, a == 1 && call.text);
        }
    }
    if (backward) {
#pragma unroll 1
        for (int n = 0; n < 4; ++n) {
            const int r = n / 2, c = n % 2;
            if (r != c && cacr) continue;  // the cross blocks are constants
            if (sample.counts && (r != c || cacr || needed(r))) {
                sample.block_gradients(r, c);
            } else {
                sample.clear(call.grad_query[n], sample.size(r));
                sample.clear(call.grad_key[n], sample.size(c));
            }
        }
    } else {
        loss = warp_sum(loss);
        if (lane_index() == 0) sample.shared.loss[warp_index()] = loss;
        __syncthreads();
        if (threadIdx.x == 0) {
            float total = 0.0f;
            for (int i = 0; i < static_cast<int>(blockDim.x / WARP); ++i) total += sample.shared.loss[i];
            call.loss[sample.b] = total;
        }
    }
}

cudaError_t run(const Congruence& call, bool backward, cudaStream_t stream) {
    if (std::max(call.L, call.V) > TOKENS || call.D > 128) return cudaErrorInvalidValue;
    return with_shape(call.dtype, call.D, [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int K = decltype(width)::value;
        const int rows = std::max(round_up(static_cast<int>(std::max(call.L, call.V)), STRIP), STRIP);
        const size_t shared = SHARED_BYTES + std::max(tile_bytes<T, K>(rows), PRODUCT_BYTES);
        return launch(congruence_loss_kernel<T, K>, call.B, rows / STRIP * WARP, shared, stream, call, backward);
    });
}

cudaError_t congruence_loss(const Congruence& call, cudaStream_t stream) { return run(call, false, stream); }
cudaError_t congruence_loss_backward(const Congruence& call, cudaStream_t stream) { return run(call, true, stream); }

}  // namespace
}  // namespace vlattn

OPERATOR(congruence_loss, Congruence)
OPERATOR(congruence_loss_backward, Congruence)
