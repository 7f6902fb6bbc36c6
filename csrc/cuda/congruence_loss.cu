// congruence_loss (CACR soft, IAIS singular and distributed) and its gradients, the whole of a sample in one block.
//
// Shapes: queries and keys of the blocks LL, LV, VL, VV (B,H,L or V,D); loss (B). L, V and D are at most 128.
// Roofline: the exponentials, one per head and pair forward and four or more backward (MUFU), and the float32 products of maps
// (FFMA). Queries and keys are read from HBM once.
// Trick: a warp holds 16 whole rows of a block, so that the sums of a softmax need no other warp. The maps are averaged over the
// heads in registers and go through a workspace small enough for the L2 cache. Barriers stand where kernels would follow each
// other. So there is one launch forward and one backward, which computes the maps again. A block has one warp per 16 tokens, so
// that short samples share a multiprocessor.
// What that costs: a sample has one multiprocessor, however few samples there are. A batch smaller than the GPU leaves the others
// idle: on an H200 one sample takes as long as 132 of them.
// Why CUDA C++: the steps of a block (maps, products of maps, divergences, gradients) have different tiles and layouts. In Triton
// each step is a kernel: short samples wait for seven launches. Not measured on a GPU.
#include <algorithm>

#include "congruence_maps.h"

namespace vlattn {
namespace {

constexpr int GROUPS = TOKENS / STRIP;  // of STRIP columns
constexpr float LOWEST = -1e30f;  // less than any logit

struct Shared {
    // for each query of a head: its largest logit; 1 / sum and log2 sum of 2^(logit - largest); the mean of the gradients at its
    // probabilities and the sum of those at their logarithms; and a bound of those at its logits
    float top[TOKENS], inverse[TOKENS], log_sum[TOKENS], delta[TOKENS], delta_log[TOKENS], most[TOKENS];
    float loss[TOKENS / STRIP];  // of each warp
    bool real[2][TOKENS];  // the tokens of text and image; false beyond the last
};
constexpr size_t SHARED_BYTES = (sizeof(Shared) + 15) / 16 * 16;

// Row and column of number e, c[e / 4][e % 4], of the eight numbers that a lane has of 16 rows and 16 columns.
__device__ __forceinline__ int row_of(int e) { return lane_row() + e % 4 / 2 * 8; }
__device__ __forceinline__ int column_of(int e) { return e / 4 * 8 + lane_column() * 2 + e % 2; }

// The power of two that brings x to [2^14, 2^15), which float16 holds; 2^126 where it would be more.
__device__ __forceinline__ float power_for(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    const int exponent = static_cast<int>(bits >> 23 & 0xff);
    bits = static_cast<uint32_t>(exponent < 15 ? 253 : 268 - exponent) << 23;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

// The work on one sample. Blocks are named by their rows and columns, 0 for text and 1 for image.
template <class T, int K> struct Sample {
    const Congruence& call;
    const int64_t b;
    Shared& shared;
    T* tile;
    const float factor;  // of products of queries and keys; above 0, so that -inf stays what it is
    float* const maps;  // (regions,S,S), S = L + V: the blocks LL, LV over VL, VV
    bool counts;  // false for a sample without text or without image tokens: it has no loss

    // call.regions of them; LOG and BY_LOG are there for iais_singular alone
    enum Region { MAP, TARGET, LOG, BY_MAP, BY_LOG };

    __device__ explicit Sample(const Congruence& call)
        : call(call),
          b(blockIdx.x),
          shared(*static_cast<Shared*>(shared_memory())),
          tile(reinterpret_cast<T*>(static_cast<char*>(shared_memory()) + SHARED_BYTES)),
          factor(fmaxf(fabsf(call.scale) * LOG2_E, TINY)),
          maps(call.maps + b * call.regions * (call.L + call.V) * (call.L + call.V)) {
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

    __device__ Matrix part(Region region, int r, int c) const {
        const int length = size(0) + size(1);
        const int index = region == BY_MAP && call.kind != Congruence::IAIS_SINGULAR ? LOG : region;
        return {maps + (index * length + r * size(0)) * length + c * size(0), length, 1};
    }

    // Bit 2n+e: whether column e of this lane's two in the n-th eight columns is a token.
    __device__ uint32_t seen(int c) const {
        uint32_t bits = 0;
        for (int i = 0; i < TOKENS / 4; ++i)
            bits |= static_cast<uint32_t>(shared.real[c][i / 2 * 8 + lane_column() * 2 + i % 2]) << i;
        return bits;
    }

    // Copies a head's rows to the tile, padded with zeros to a multiple of STRIP.
    __device__ void fill_tile(const StridedTensor& x, int64_t h, int rows) {
        __syncthreads();
        stage<T, K>(tile, x.at<T>(b, h), x.stride_n, 0, round_up(rows, STRIP), rows, call.D);
        __syncthreads();
    }

    // Dot products of 16 rows and of rows k .. k+15 of the tile, with the sign of the scale. Times `factor` they are base-2
    // logits: that is left to the step that takes off the greatest, so that both round once.
    __device__ __forceinline__ void products(float (&s)[2][4], const Rows16<T, K>& rows, int k) const {
#pragma unroll
        for (float& x : reinterpret_cast<float(&)[8]>(s)) x = 0.0f;
        product_with_rows(s, rows, tile, k);
#pragma unroll
        for (float& x : reinterpret_cast<float(&)[8]>(s)) x *= copysignf(1.0f, call.scale);
    }

    // The same where the columns are keys, -inf where there is no token.
    __device__ __forceinline__ void products_with_keys(float (&s)[2][4], const Rows16<T, K>& rows, int k, uint32_t keys) const {
        products(s, rows, k);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            if (!(keys >> (k / 4 + e / 4 * 2 + e % 2) & 1)) s[e / 4][e % 4] = -INFINITY;
        }
    }

    // For rows g and g+8: the largest logit, and the sum of 2^(logit - largest).
    __device__ __forceinline__ void statistics(const Rows16<T, K>& rows, int M, uint32_t keys, float (&top)[2],
                                               float (&sum)[2]) const {
        for (int i = 0; i < 2; ++i) {
            top[i] = LOWEST;
            sum[i] = 0.0f;
        }
#pragma unroll 1
        for (int k = 0; k < M; k += STRIP) {  // a lane's own columns first
            float s[2][4];
            products_with_keys(s, rows, k, keys);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float most = fmaxf(fmaxf(s[0][2 * i], s[0][2 * i + 1]), fmaxf(s[1][2 * i], s[1][2 * i + 1]));
                const float higher = fmaxf(top[i], most * factor);
                sum[i] *= fast_exp2(top[i] - higher);
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[i] += fast_exp2(fmaf(s[e / 2][2 * i + e % 2], factor, -higher));
                top[i] = higher;
            }
        }
        for (int i = 0; i < 2; ++i) {
            const float lane_top = top[i];
            top[i] = row_max(lane_top);
            sum[i] = row_sum(sum[i] * fast_exp2(lane_top - top[i]));
        }
    }

    // A block's attention averaged over the heads.
    __device__ void make_map(int r, int c) {
        const int N = size(r), M = size(c), first = warp_index() * STRIP;
        const StridedTensor &query = call.query[2 * r + c], &key = call.key[2 * r + c];
        const uint32_t keys = seen(c);
        float mean[GROUPS][2][4] = {};
        for (int64_t h = 0; h < call.H; ++h) {
            fill_tile(key, h, M);
            if (first >= N) continue;
            Rows16<T, K> rows;
            rows.load(query.at<T>(b, h), query.stride_n, first, N, call.D);
            float s[GROUPS][2][4], top[2] = {LOWEST, LOWEST}, sum[2] = {};
#pragma unroll
            for (int k = 0; k < GROUPS; ++k) {
                if (k * STRIP >= M) continue;
                products_with_keys(s[k], rows, k * STRIP, keys);
#pragma unroll
                for (int e = 0; e < 8; ++e) top[e % 4 / 2] = fmaxf(top[e % 4 / 2], s[k][e / 4][e % 4]);
            }
            for (int i = 0; i < 2; ++i) top[i] = row_max(top[i]) * factor;
#pragma unroll
            for (int k = 0; k < GROUPS; ++k) {
                if (k * STRIP >= M) continue;
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    float& x = s[k][e / 4][e % 4];
                    x = fast_exp2(fmaf(x, factor, -top[e % 4 / 2]));
                    sum[e % 4 / 2] += x;
                }
            }
            for (int i = 0; i < 2; ++i) sum[i] = 1.0f / (row_sum(sum[i]) * call.H);
#pragma unroll
            for (int k = 0; k < GROUPS; ++k) {
                if (k * STRIP >= M) continue;
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    float& x = mean[k][e / 4][e % 4];
                    x = fmaf(s[k][e / 4][e % 4], sum[e % 4 / 2], x);
                }
            }
        }
        const Matrix map = part(MAP, r, c);
#pragma unroll
        for (int k = 0; k < GROUPS; ++k) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const int row = first + row_of(e), column = k * STRIP + column_of(e);
                if (row < N && column < M) map(row, column) = mean[k][e / 4][e % 4];
            }
        }
    }

    // The attention within modality `a`, averaged over the heads, and the base-2 logarithm of its sum over the heads, made of
    // logarithms, so that no weight underflows. Of the sum, not of the mean: where one head has nearly all of it, this is that
    // head's logarithm to the last bit. Between the heads LOG has the greatest logarithm, MAP the sum of the powers less it: for
    // both of them, and the logits, there are no registers.
    __device__ void make_log_map(int a) {
        const int N = size(a), first = warp_index() * STRIP;
        const StridedTensor &query = call.query[3 * a], &key = call.key[3 * a];
        const uint32_t keys = seen(a);
        const Matrix map = part(MAP, a, a), log_map = part(LOG, a, a);
        for (int64_t h = 0; h < call.H; ++h) {
            fill_tile(key, h, N);
            if (first >= N) continue;
            Rows16<T, K> rows;
            rows.load(query.at<T>(b, h), query.stride_n, first, N, call.D);
            float top[2], sum[2];
            statistics(rows, N, keys, top, sum);
            const float log_sum[2] = {log2f(sum[0]), log2f(sum[1])};
#pragma unroll 1
            for (int k = 0; k < N; k += STRIP) {
                float s[2][4];
                products_with_keys(s, rows, k, keys);
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    const int row = first + row_of(e), column = k + column_of(e);
                    if (row >= N || column >= N) continue;
                    const float x = fmaf(s[e / 4][e % 4], factor, -top[e % 4 / 2]) - log_sum[e % 4 / 2];
                    const float high = h == 0 ? LOWEST : log_map(row, column), higher = fmaxf(high, x);
                    const float before = h == 0 ? 0.0f : map(row, column) * fast_exp2(high - higher);
                    const float powers = before + fast_exp2(x - higher);
                    const bool last = h == call.H - 1, real = shared.real[a][column];
                    const float log_sum_of_heads = real ? higher + log2f(powers) : 0.0f;
                    log_map(row, column) = last ? log_sum_of_heads : higher;
                    map(row, column) = last ? powers * fast_exp2(higher) / call.H : powers;
                }
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
        const bool singular = call.kind == Congruence::IAIS_SINGULAR, distributed = call.kind == Congruence::IAIS_DISTRIBUTED;
        const bool both = second && !singular;
        const Matrix own = part(singular ? LOG : MAP, a, a), by_own = part(singular ? BY_LOG : BY_MAP, a, a);
        const Matrix basis = part(MAP, a, o), back = part(MAP, o, a), target = part(TARGET, a, a), left = part(TARGET, a, o);
        if (distributed) {
            multiply(target, basis, back, n, m, n, false);
        } else {
            if (singular) pick(basis, n, m);  // it was whole before the map VV was begun, which has barriers
            multiply(left, basis, part(MAP, o, o), n, m, m, false);
            multiply(target, left, basis.transposed(), n, m, n, false);
        }
        __syncthreads();
        const float loss = divergence(call.kind, own, target, shared.real[a], n, 1.0f / real_tokens(a),
                                      static_cast<float>(call.H), gradient, by_own, both && !distributed);
        if (!gradient) return loss;
        if (distributed) {
            multiply(part(BY_MAP, a, o), target, back.transposed(), n, n, m, both);
            multiply(part(BY_MAP, o, a), basis.transposed(), target, m, n, n, both);
        } else {
            multiply(left, target, basis, n, n, m, false);
            multiply(part(BY_MAP, o, o), basis.transposed(), left, m, n, m, both);
        }
        return loss;
    }

    // From the gradients at a map and at its logarithm, where they exist, to those of its queries and keys. Gradients at logits
    // are multiplied by a power of two before they are rounded to T: with many tokens and heads they would underflow in float16.
    __device__ void block_gradients(int r, int c, bool at_map, bool at_log) {
        const int n = 2 * r + c;
        for (int64_t h = 0; h < call.H; ++h) {
            fill_tile(call.key[n], h, size(c));
            if (warp_index() * STRIP < size(r)) query_gradients(r, c, h, at_map, at_log);
            fill_tile(call.query[n], h, size(r));
            if (warp_index() * STRIP < size(c)) key_gradients(r, c, h, at_map, at_log);
        }
    }

    // The gradients of a block; null where there is none.
    struct Gradients {
        const float *by_map, *by_log, *log_map;
    };

    __device__ Gradients gradients(int r, int c, bool at_map, bool at_log) const {
        return {at_map ? part(BY_MAP, r, c).p : nullptr, at_log ? part(BY_LOG, r, c).p : nullptr, part(LOG, r, c).p};
    }

    // The gradient at a probability, and at its logarithm, which comes from the gradient at the logarithm of the sum over heads.
    struct ProbGrad {
        float by_p, by_log_p;
    };

    __device__ __forceinline__ ProbGrad grad_at(const Gradients& from, int row, int column, float log2_p) const {
        const int at = row * static_cast<int>(call.L + call.V) + column;
        const float share = from.by_log ? fast_exp2(log2_p - from.log_map[at]) : 0.0f;
        return {from.by_map ? from.by_map[at] : 0.0f, from.by_log ? share * from.by_log[at] : 0.0f};
    }

    // A saturated row has p = 1 at one key. There by_p - delta is exactly 0, and is not to be rounded together with by_log_p: by_p
    // is thousands of times larger where logits are in the thousands.
    static __device__ __forceinline__ float grad_logit(float p, const ProbGrad& of, float delta, float delta_log) {
        return fmaf(p, of.by_p - delta, fmaf(-p, delta_log, of.by_log_p));
    }

    __device__ void query_gradients(int r, int c, int64_t h, bool at_map, bool at_log) {
        const int N = size(r), M = size(c), first = warp_index() * STRIP;
        const StridedTensor &query = call.query[2 * r + c], &grad = call.grad_query[2 * r + c];
        const Gradients from = gradients(r, c, at_map, at_log);
        const uint32_t keys = seen(c);
        Rows16<T, K> rows;
        rows.load(query.at<T>(b, h), query.stride_n, first, N, call.D);
        float top[2], sum[2], delta[2] = {}, delta_log[2] = {}, mass[2] = {}, most[2] = {};
        statistics(rows, M, keys, top, sum);
        const float inverse[2] = {1.0f / sum[0], 1.0f / sum[1]}, log_sum[2] = {log2f(sum[0]), log2f(sum[1])};
        auto terms = [&](int k, float(&p)[2][4], ProbGrad(&x)[2][4]) {
            products_with_keys(p, rows, k, keys);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const int row = first + row_of(e), column = k + column_of(e);
                const float log2_power = fmaf(p[e / 4][e % 4], factor, -top[e % 4 / 2]);
                p[e / 4][e % 4] = fast_exp2(log2_power) * inverse[e % 4 / 2];
                x[e / 4][e % 4] = {0.0f, 0.0f};
                if (row < N && shared.real[c][column])
                    x[e / 4][e % 4] = grad_at(from, row, column, log2_power - log_sum[e % 4 / 2]);
            }
        };
        float p[2][4];
        ProbGrad x[2][4];
#pragma unroll 1
        for (int k = 0; k < M; k += STRIP) {
            terms(k, p, x);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const float weighed = p[e / 4][e % 4] * x[e / 4][e % 4].by_p, by_log_p = x[e / 4][e % 4].by_log_p;
                delta[e % 4 / 2] += weighed;
                delta_log[e % 4 / 2] += by_log_p;
                mass[e % 4 / 2] += p[e / 4][e % 4];
                most[e % 4 / 2] = fmaxf(most[e % 4 / 2], fabsf(weighed) + fabsf(by_log_p));
            }
        }
        float power[2];
        for (int i = 0; i < 2; ++i) {
            mass[i] = row_sum(mass[i]);  // the rounded weights do not quite add up to 1
            delta[i] = row_sum(delta[i]) / mass[i];
            delta_log[i] = row_sum(delta_log[i]) / mass[i];
            most[i] = row_max(most[i]) + fabsf(delta[i]) + fabsf(delta_log[i]);  // no gradient of a logit is greater
            power[i] = power_for(most[i]);
            if (lane_column() == 0) {
                const int row = first + lane_row() + i * 8;
                shared.top[row] = top[i];
                shared.inverse[row] = inverse[i];
                shared.log_sum[row] = log_sum[i];
                shared.delta[row] = delta[i];
                shared.delta_log[row] = delta_log[i];
                shared.most[row] = most[i];
            }
        }
        float out[K / 8][4] = {};
#pragma unroll 1
        for (int k = 0; k < M; k += STRIP) {
            terms(k, p, x);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                float& weight = p[e / 4][e % 4];
                weight = grad_logit(weight, x[e / 4][e % 4], delta[e % 4 / 2], delta_log[e % 4 / 2]) * power[e % 4 / 2];
            }
            product_with_columns<T, K>(out, p, tile, k);
        }
        write(out, power, grad, h, first, N);
    }

    __device__ void key_gradients(int r, int c, int64_t h, bool at_map, bool at_log) {
        const int N = size(r), M = size(c), first = warp_index() * STRIP;
        const StridedTensor &key = call.key[2 * r + c], &grad = call.grad_key[2 * r + c];
        const Gradients from = gradients(r, c, at_map, at_log);
        float most = 0.0f;
        for (int i = lane_index(); i < N; i += WARP) most = fmaxf(most, shared.most[i]);
        most = warp_max(most);
        const float power[2] = {power_for(most), power_for(most)};
        Rows16<T, K> rows;
        rows.load(key.at<T>(b, h), key.stride_n, first, M, call.D);
        float out[K / 8][4] = {};
#pragma unroll 1
        for (int k = 0; k < N; k += STRIP) {
            float s[2][4];
            products(s, rows, k);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                float& x = s[e / 4][e % 4];
                const int row = k + column_of(e), column = first + row_of(e);
                if (row >= N || !shared.real[c][column]) {
                    x = 0.0f;
                    continue;
                }
                const float log2_power = fmaf(x, factor, -shared.top[row]), p = fast_exp2(log2_power) * shared.inverse[row];
                const ProbGrad of = grad_at(from, row, column, log2_power - shared.log_sum[row]);
                x = grad_logit(p, of, shared.delta[row], shared.delta_log[row]) * power[0];
            }
            product_with_columns<T, K>(out, s, tile, k);
        }
        write(out, power, grad, h, first, M);
    }

    __device__ void write(const float (&out)[K / 8][4], const float (&power)[2], const StridedTensor& grad, int64_t h, int first,
                          int num_rows) {
        const float times = call.scale * call.grad_loss[b], back[2] = {1.0f / power[0], 1.0f / power[1]};
        T* to = grad.at<T>(b, h);
#pragma unroll
        for (int n = 0; n < K / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = first + row_of(i), column = n * 8 + column_of(i);
                if (row >= num_rows || column >= call.D) continue;
                to[row * grad.stride_n + column] = from_float<T>(out[n][i] * back[i / 2] * times);
            }
        }
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
    const bool singular = call.kind == Congruence::IAIS_SINGULAR, cross = call.kind == Congruence::IAIS_DISTRIBUTED;
    auto needed = [&](int a) { return a == 0 ? call.text : call.image; };
    float loss = 0.0f;
    if (sample.counts) {
#pragma unroll 1
        for (int n = 0; n < 4; ++n) {
            const int r = n / 2, c = n % 2;
            const bool own = r == c && needed(r), others = r == c ? !cross && needed(1 - r) : cross || needed(r);
            if (singular && own) {
                sample.make_log_map(r);
            } else if (own || others) {
                sample.make_map(r, c);
            }
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
            if (r != c && !cross) continue;
            const bool at_log = singular && needed(r);
            const bool at_map = r != c || (singular ? needed(1 - r) : !cross || needed(r));
            if (sample.counts && (at_map || at_log)) {
                sample.block_gradients(r, c, at_map, at_log);
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

template <class T, int K> cudaError_t run(const Congruence& call, bool backward, cudaStream_t stream) {
    const int rows = std::max(round_up(static_cast<int>(std::max(call.L, call.V)), STRIP), STRIP);
    const size_t shared = SHARED_BYTES + std::max(tile_bytes<T, K>(rows), PRODUCT_BYTES);
    const int threads = rows / STRIP * WARP;
    return launch(congruence_loss_kernel<T, K>, call.B, threads, shared, stream, call, backward);
}

cudaError_t run(const Congruence& call, bool backward, cudaStream_t stream) {
    if (std::max(call.L, call.V) > TOKENS || call.D > 128) return cudaErrorInvalidValue;
    return with_shape(call.dtype, call.D,
                      [&](auto type, auto width) { return run<decltype(type), decltype(width)::value>(call, backward, stream); });
}

cudaError_t congruence_loss(const Congruence& call, cudaStream_t stream) { return run(call, false, stream); }
cudaError_t congruence_loss_backward(const Congruence& call, cudaStream_t stream) { return run(call, true, stream); }

}  // namespace
}  // namespace vlattn

OPERATOR(congruence_loss, Congruence)
OPERATOR(congruence_loss_backward, Congruence)
