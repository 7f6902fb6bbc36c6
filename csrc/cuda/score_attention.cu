// score_attention with exact additive scores, s_ij = scale sum_a u_a tanh(x_ia + y_ja): forward and backward.
//
// Shapes: query x (B,H,N,A), key y (B,key_heads,M,A), vector u (H,A), value (B,value_heads,M,DV), out (B,H,N,DV), lse (B,H,N).
// Roofline: instructions, and the special function unit, 16 results per clock and SM. Per pair and hidden unit the forward pass
// takes half a result (the shared reciprocal of additive_scores.h) and 4 instructions. The backward pass takes a whole result and
// 12.5 instructions: 4 for the score, 7.5 for all gradients, the rest for the tile. In float32 it computes the scores once more.
// Trick: scores are computed in the registers that the tensor cores' product with the values reads, 16 or 32 rows per warp.
// Backward: one pass over the pairs. A block has 64 keys at a time and loops over the queries. A tile's gradient goes through
// shared memory to lanes that each hold two hidden units of the warp's 16 keys. From one reciprocal come both of a pair's gradients:
// that of the key is summed over queries in registers, that of the query over keys within the lane, and then in memory, in float32.
// No two blocks write the same sum: where heads are few, the keys of one are divided into ranges, which have sums of their own, and
// a last small kernel adds those. All orders are fixed and nothing is atomic. The sums take as much as twice a 16-bit query; with
// several ranges 0.5 GB at most.
// In float32 a pass over the rows sums P and P dP first, which undoes the rounding of lse and out.
// Why not Triton: there the layout of the scores cannot be chosen, and a loop over columns cannot index registers.
// Not measured on a GPU.
#include <algorithm>

#include "additive_scores.h"
#include "attention.h"

namespace vlattn {

struct ScoreAttention {
    DType dtype;
    int64_t B, H, key_heads, value_heads, N, M;
    int A, DV;  // hidden units, value size
    StridedTensor query, key, value;  // x (B,H,N,A), y (B,key_heads,M,A), (B,value_heads,M,DV)
    const void* vector;  // u (H,A), contiguous
    Masks masks;
    float scale;
    StridedTensor out;  // (B,H,N,DV)
    float* lse;  // (B,H,N), natural
    // backward
    StridedTensor grad_out;  // (B,H,N,DV)
    const float* grad_lse;  // (B,H,N), contiguous; null: zero
    StridedTensor grad_query, grad_key, grad_value;  // heads: H, and as many key heads as max(key_heads, value_heads) for both
    bool wide_grad_key, wide_grad_value;  // grad_key, grad_value in float32, to be summed over heads outside
    int64_t ranges;  // into how many the keys of a head are divided
    float* grad_vector;  // (B,H,ceil(M / 16),A), to be summed over the first and third
    // for the kernels alone
    float* rows;  // (3,B,H,N): delta, norm and shift of each row
    float* sums;  // (B,H,ranges,N,A), N and A made even: of the query's gradient; zeros
    float* parts;  // (B,key heads of grad_key,M,A), where query heads share a key
    FIELDS(dtype, B, H, key_heads, value_heads, N, M, A, DV, query, key, value, vector, masks, scale, out, lse, grad_out,
           grad_lse, grad_query, grad_key, grad_value, wide_grad_key, wide_grad_value, ranges, grad_vector, rows, sums, parts)
};

namespace {

// x times `factor` with the masks applied: base-2 logits, -inf outside of the matrix. KEY_MAJOR: the rows of the tile are keys.
template <bool KEY_MAJOR, int MT>
__device__ __forceinline__ void mask(Tile<MT>& x, float factor, const ScoreAttention& call, int64_t b, int64_t h, int64_t row,
                                     int64_t column) {
    each<MT>(x, [&](float& logit) { logit *= factor; });
    const int64_t rows = KEY_MAJOR ? call.M : call.N, columns = KEY_MAJOR ? call.N : call.M;
    const Masks& masks = call.masks;
    if (!masks.causal && !masks.keys && masks.kind == Masks::NONE && row + 16 * MT <= rows && column + COLUMNS <= columns) return;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        const int64_t j = column + c / 2 * 8 + c % 2;
#pragma unroll
        for (int r = 0; r < 2 * MT; ++r) {
            const int64_t i = row + 8 * r;
            float& logit = x[r / 2][c / 4][c / 2 % 2][r % 2 * 2 + c % 2];
            logit = i < rows && j < columns ? masks.apply(logit, b, h, KEY_MAJOR ? j : i, KEY_MAJOR ? i : j) : -INFINITY;
        }
    }
}

template <class T> __device__ __forceinline__ Side<T> side(const StridedTensor& x, int64_t b, int64_t h, int64_t count) {
    return {x.at<const T>(b, h), x.stride_n, count};
}

// Tiles of 16 rows per warp in the forward pass: as many as registers allow.
template <class T, int SIZE> constexpr int FORWARD_TILES = SIZE == 64 && !std::is_same_v<T, float> ? 2 : 1;

// In base 2. It is +inf for fully masked rows and rows beyond N, which makes their probabilities 0.
__device__ __forceinline__ float lse_log2(const float* lse, int64_t q, int64_t N) {
    return q < N && lse[q] != -INFINITY ? lse[q] * LOG2_E : INFINITY;
}

// The forward pass. With ROWS_ONLY, two arrays (B,H,N) for the backward pass under a float mask, norm and shift, with
// P = norm 2^(logit - shift). They are 1 and the lse. Where lse is coarse they are 1 / sum and the largest logit. Only blocks
// with such a row read the keys.
template <class T, int SIZE, bool ROWS_ONLY>
__global__ void __launch_bounds__(THREADS, 3) additive_forward_kernel(ScoreAttention call, float* p_norm) {
    constexpr int MT = FORWARD_TILES<T, SIZE>, ROWS = WARPS * 16 * MT;
    const int64_t num_q = divide_up(call.N, ROWS), i_bh = blockIdx.x / num_q, b = i_bh / call.H, h = i_bh % call.H;
    const int64_t first = blockIdx.x % num_q * ROWS, warp_first = first + warp_index() * 16 * MT, row = warp_first + lane_row();
    const int t2 = lane_column() * 2;
    const Side<T> query = side<T>(call.query, b, h, call.N);
    const Side<T> key = side<T>(call.key, b, h / (call.H / call.key_heads), call.M);
    const T* value = call.value.at<const T>(b, h / (call.H / call.value_heads));
    const T* vector = static_cast<const T*>(call.vector) + h * call.A;
    const Shared shared(call.A, ROW_STRIDE<MT>);
    T* value_tile = static_cast<T*>(shared.rest);
    const float scale = 2.0f * call.scale * LOG2_E;
    float out[MT][SIZE / 8][4] = {}, largest[MT][2], sum[MT][2] = {};
    for (auto& m : largest) m[0] = m[1] = -INFINITY;
    stage_rows<MT>(shared, query, first, vector, call.A);
    const float* lse = call.lse + i_bh * call.N;
    bool visit = !ROWS_ONLY;
    for (int64_t q = first; ROWS_ONLY && q < first + ROWS && q < call.N; ++q) visit = visit || is_coarse(lse[q], OWN_LSE);
    if (visit) stage_largest(shared, query, key, call.A, call.masks.real(b));
    const int64_t end = !visit ? 0 : call.masks.causal && first + ROWS < call.M ? first + ROWS : call.M;
    for (int64_t start = 0; start < end; start += COLUMNS) {
        stage_columns(shared, key, start, call.A);
        if (!ROWS_ONLY) stage<T, SIZE>(value_tile, value, call.value.stride_n, start, COLUMNS, call.M, call.DV);
        __syncthreads();
        if (warp_first < call.N && !(call.masks.causal && start >= warp_first + 16 * MT)) {
            Tile<MT> p;
            sum_units<MT>(p, shared, largest_sum(shared), query, row, key, start + t2, vector, call.A);
            mask<false, MT>(p, scale, call, b, h, row, start + t2);
#pragma unroll
            for (int m = 0; m < MT; ++m) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float above = largest[m][i];
#pragma unroll
                    for (int c = 0; c < 8; ++c) above = fmaxf(above, p[m][c / 4][c / 2 % 2][2 * i + c % 2]);
                    above = row_max(above);
                    const float safe = above == -INFINITY ? 0.0f : above, kept = fast_exp2(largest[m][i] - safe);
                    largest[m][i] = above;
                    sum[m][i] *= kept;
#pragma unroll
                    for (int c = 0; c < 8; ++c) {
                        float& x = p[m][c / 4][c / 2 % 2][2 * i + c % 2];
                        x = fast_exp2(x - safe);
                        sum[m][i] += x;
                    }
#pragma unroll
                    for (int n = 0; n < SIZE / 8; ++n) {
                        out[m][n][2 * i] *= kept;
                        out[m][n][2 * i + 1] *= kept;
                    }
                }
                if constexpr (!ROWS_ONLY) {
                    product_with_columns<T, SIZE>(out[m], p[m][0], value_tile, 0);
                    product_with_columns<T, SIZE>(out[m], p[m][1], value_tile, 16);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int64_t q = row + 16 * m + 8 * i;
            const float total = row_sum(sum[m][i]), inverse = total == 0.0f ? 1.0f : 1.0f / total;
            if (q >= call.N) continue;
            if constexpr (ROWS_ONLY) {
                if (t2 != 0) continue;
                float *norm = p_norm + i_bh * call.N + q, *shift = norm + call.B * call.H * call.N;
                *norm = is_coarse(lse[q], OWN_LSE) ? inverse : 1.0f;
                *shift = !is_coarse(lse[q], OWN_LSE) ? lse_log2(lse, q, call.N) : total == 0.0f ? INFINITY : largest[m][i];
                continue;
            }
            T* to = call.out.at<T>(b, h) + q * call.out.stride_n;
#pragma unroll
            for (int n = 0; n < SIZE / 8; ++n) {
                const int col = n * 8 + t2;
                if (col < call.DV) to[col] = from_float<T>(out[m][n][2 * i] * inverse);
                if (col + 1 < call.DV) to[col + 1] = from_float<T>(out[m][n][2 * i + 1] * inverse);
            }
            if (t2 == 0) call.lse[i_bh * call.N + q] = natural_lse(largest[m][i], total);
        }
    }
}

// Sums for the query are added to by twos, of queries and of units.
__host__ __device__ __forceinline__ int64_t even(int64_t count) { return count + count % 2; }

// Of keys, in the gradients of both keys and values.
__host__ __device__ __forceinline__ int64_t shared_heads(const ScoreAttention& call) {
    return call.key_heads > call.value_heads ? call.key_heads : call.value_heads;
}

template <class T>
__device__ __forceinline__ void write(const StridedTensor& to, bool wide, int64_t b, int64_t h, int64_t row, int col, float x) {
    if (wide) {
        to.at<float>(b, h)[row * to.stride_n + col] = x;
    } else {
        to.at<T>(b, h)[row * to.stride_n + col] = from_float<T>(x);
    }
}

// Of each row delta = sum(dO * O) - grad_lse. In float32 that sum is P dP over the sum of P, and norm is the inverse of the latter.
template <class T, int SIZE>
__global__ void __launch_bounds__(THREADS, SIZE == 64 ? 3 : 2) additive_backward_rows_kernel(ScoreAttention call) {
    const int64_t blocks = divide_up(call.N, BACKWARD_ROWS), i_bh = blockIdx.x / blocks, b = i_bh / call.H, h = i_bh % call.H;
    const int64_t first = blockIdx.x % blocks * BACKWARD_ROWS, warp_first = first + warp_index() * 16,
                  row = warp_first + lane_row();
    const T* grad_out = call.grad_out.at<const T>(b, h);
    float *delta = call.rows + i_bh * call.N, *norm = delta + call.B * call.H * call.N;
    float mean[2] = {};
    if constexpr (!std::is_same_v<T, float>) {
        const T* out = call.out.at<const T>(b, h);
        for (int i = 0; i < 2; ++i) {
            const int64_t q = row + 8 * i;
            for (int d = lane_column(); q < call.N && d < call.DV; d += 4)
                mean[i] += to_float(grad_out[q * call.grad_out.stride_n + d]) * to_float(out[q * call.out.stride_n + d]);
        }
    } else {
        const int t2 = lane_column() * 2;
        const bool shifted = call.masks.kind == Masks::ADDED;
        const Side<T> query = side<T>(call.query, b, h, call.N);
        const Side<T> key = side<T>(call.key, b, h / (call.H / call.key_heads), call.M);
        const T* value = call.value.at<const T>(b, h / (call.H / call.value_heads));
        const T* vector = static_cast<const T*>(call.vector) + h * call.A;
        const float *lse = call.lse + i_bh * call.N, *shift = norm + call.B * call.H * call.N;
        const Shared shared(call.A, ROW_STRIDE<1>);
        T* value_tile = static_cast<T*>(shared.rest);
        float row_lse[2], total[2] = {};
        for (int i = 0; i < 2; ++i) {
            const int64_t q = row + 8 * i;
            row_lse[i] = !shifted ? lse_log2(lse, q, call.N) : q < call.N ? shift[q] : INFINITY;
        }
        stage_rows<1>(shared, query, first, vector, call.A);
        stage_largest(shared, query, key, call.A, call.masks.real(b));
        Rows16<T, SIZE> left;
        left.load(grad_out, call.grad_out.stride_n, warp_first, call.N, call.DV);
        const int64_t end = call.masks.causal && first + BACKWARD_ROWS < call.M ? first + BACKWARD_ROWS : call.M;
        for (int64_t start = 0; start < end; start += COLUMNS) {
            stage_columns(shared, key, start, call.A);
            stage<T, SIZE>(value_tile, value, call.value.stride_n, start, COLUMNS, call.M, call.DV);
            __syncthreads();
            if (warp_first < call.N && !(call.masks.causal && start >= warp_first + 16)) {
                Tile<1> p;
                sum_units<1>(p, shared, largest_sum(shared), query, row, key, start + t2, vector, call.A);
                mask<false, 1>(p, 2.0f * call.scale * LOG2_E, call, b, h, row, start + t2);
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    float products[1][4] = {};
                    product_with_rows<T, SIZE>(products, left, value_tile, 8 * n);
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const float x = fast_exp2(p[0][n / 2][n % 2][e] - row_lse[e / 2]);
                        total[e / 2] += x;
                        mean[e / 2] += x * products[0][e];
                    }
                }
            }
            __syncthreads();
        }
        for (int i = 0; i < 2; ++i) {
            const float all = row_sum(total[i]), inverse = all > 0.0f ? 1.0f / all : 1.0f;
            const int64_t q = row + 8 * i;
            mean[i] *= inverse;
            if (t2 == 0 && q < call.N) norm[q] = inverse;
        }
    }
    for (int i = 0; i < 2; ++i) {
        const int64_t q = row + 8 * i;
        const float all = row_sum(mean[i]);
        if (lane_column() == 0 && q < call.N) delta[q] = call.grad_lse ? all - call.grad_lse[i_bh * call.N + q] : all;
    }
}

// The pass over the pairs. A block has every `ranges`-th 64 keys of a head, one after the other, and loops over the queries of the
// heads that share them.
template <class T, int SIZE>
__global__ void __launch_bounds__(THREADS, SIZE == 64 ? 3 : 2) additive_backward_kernel(ScoreAttention call) {
    constexpr int ROWS = BACKWARD_ROWS, CHUNKS = SIZE / 64;
    constexpr bool EXACT = std::is_same_v<T, float>;
    const bool shifted = call.masks.kind == Masks::ADDED, normed = EXACT || shifted;
    const int64_t heads = shared_heads(call), group = call.H / heads, i_range = blockIdx.x % call.ranges;
    const int64_t i_head = blockIdx.x / call.ranges % heads, b = blockIdx.x / call.ranges / heads;
    const int t2 = lane_column() * 2, stride = static_cast<int>(even(call.A));
    const Shared shared(call.A, ROW_STRIDE<1>);
    float* g_tile = static_cast<float*>(shared.rest);  // (COLUMNS, GRAD_STRIDE)
    float* column_lse = g_tile + COLUMNS * GRAD_STRIDE;  // (COLUMNS)
    float *column_delta = column_lse + COLUMNS, *column_norm = column_delta + COLUMNS;
    T* grad_tile = reinterpret_cast<T*>(column_norm + COLUMNS);
    for (int64_t first = i_range * ROWS; first < call.M; first += call.ranges * ROWS) {
        const int64_t warp_first = first + warp_index() * 16, row = warp_first + lane_row();
        float grad_value[SIZE / 8][4] = {};
        for (int64_t h = i_head * group; h < (i_head + 1) * group; ++h) {
            const int64_t i_bh = b * call.H + h;
            const Side<T> query = side<T>(call.query, b, h, call.N);
            const Side<T> key = side<T>(call.key, b, h / (call.H / call.key_heads), call.M);
            const T *value = call.value.at<const T>(b, h / (call.H / call.value_heads)),
                    *grad_out = call.grad_out.at<const T>(b, h);
            const T* vector = static_cast<const T*>(call.vector) + h * call.A;
            const float* lse = call.lse + i_bh * call.N;
            const float *delta = call.rows + i_bh * call.N, *norm = delta + call.B * call.H * call.N;
            const float* shift = norm + call.B * call.H * call.N;
            float* query_sums = call.sums + (i_bh * call.ranges + i_range) * even(call.N) * stride;
            UnitGrads<CHUNKS> sum = {};
            stage_rows<1>(shared, key, first, vector, call.A);
            stage_largest(shared, query, key, call.A, call.masks.real(b));
            for (int64_t start = call.masks.causal ? first : 0; start < call.N; start += COLUMNS) {
                stage_columns(shared, query, start, call.A);
                stage<T, SIZE>(grad_tile, grad_out, call.grad_out.stride_n, start, COLUMNS, call.N, call.DV);
                if (threadIdx.x < COLUMNS) {
                    const int64_t q = start + threadIdx.x;
                    column_lse[threadIdx.x] = !shifted ? lse_log2(lse, q, call.N) : q < call.N ? shift[q] : INFINITY;
                    column_delta[threadIdx.x] = q < call.N ? delta[q] : 0.0f;
                    if (normed) column_norm[threadIdx.x] = q < call.N ? norm[q] : 1.0f;
                }
                __syncthreads();
                const float bound = largest_sum(shared);
                const bool visible = warp_first < call.M && !(call.masks.causal && start + COLUMNS <= warp_first);
                if (visible) {
                    Tile<1> p, g;
                    clear<1>(g);
                    sum_units<1>(p, shared, bound, key, row, query, start + t2, vector, call.A);
                    mask<true, 1>(p, 2.0f * call.scale * LOG2_E, call, b, h, opaque(row), start + t2);
                    Rows16<T, SIZE> left;  // read again in each tile: there are no registers to keep it in
                    left.load(value, call.value.stride_n, opaque(warp_first), call.M, call.DV);
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        float(&products)[4] = g[0][n / 2][n % 2];
                        product_with_rows<T, SIZE>(reinterpret_cast<float(&)[1][4]>(products), left, grad_tile, 8 * n);
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            const int column = 8 * n + t2 + e % 2;
                            float& x = p[0][n / 2][n % 2][e];
                            x = fast_exp2(x - column_lse[column]);
                            if (normed) x *= column_norm[column];
                            products[e] = x * (products[e] - column_delta[column]) * call.scale;
                        }
                    }
                    product_with_columns<T, SIZE>(grad_value, p[0][0], grad_tile, 0);
                    product_with_columns<T, SIZE>(grad_value, p[0][1], grad_tile, 16);
#pragma unroll
                    for (int c = 0; c < 8; ++c) {  // there rows g and g+8 are neighbours
                        const float(&from)[4] = g[0][c / 4][c / 2 % 2];
                        float* to =
                            g_tile + (c / 2 * 8 + t2 + c % 2) * GRAD_STRIDE + row_place<1>(warp_index() * 16 + lane_row());
                        *reinterpret_cast<float2*>(to) = {from[c % 2], from[2 + c % 2]};
                    }
                }
                __syncwarp();  // the gradient of a warp's rows is read by itself alone
                const int columns = start + COLUMNS < call.N ? COLUMNS : static_cast<int>(call.N - start);
                const auto through = [&](auto way) {
                    through_units<decltype(way)::value, EXACT>(sum, query_sums + start * stride, stride, columns, visible, g_tile,
                                                               shared, key, warp_first, query, start, call.A);
                };
                if (takes_sums(bound)) {
                    through(std::integral_constant<Way, Way::SUM>());
                } else if (bound <= LARGEST_SUM) {
                    through(std::integral_constant<Way, Way::PRODUCT>());
                } else {
                    through(std::integral_constant<Way, Way::CLAMPED>());
                }
                __syncthreads();
            }
#pragma unroll
            for (int i = 0; i < 2 * CHUNKS; ++i) {
                const int unit = first_unit(i / 2) + i % 2;
                if (warp_first >= call.M || unit >= call.A) continue;
                float* grad_vector = call.grad_vector + (i_bh * divide_up(call.M, 16) + warp_first / 16) * call.A;
                grad_vector[unit] = 2.0f * sum.vector[i / 2][i % 2];
                const float factor = 4.0f * to_float(vector[unit]);
#pragma unroll
                for (int place = 0; place < 16; ++place) {
                    const int64_t at = warp_first + row_at(place);
                    if (at >= call.M) continue;
                    float x = factor * sum.rows[i / 2][i % 2][place];
                    if (group > 1) {  // each head has a weight of its own: their sum cannot stay in registers
                        float* part = call.parts + ((b * heads + i_head) * call.M + at) * call.A + unit;
                        if (h > i_head * group) x += *part;
                        *part = x;
                    }
                    if (h + 1 == (i_head + 1) * group) write<T>(call.grad_key, call.wide_grad_key, b, i_head, at, unit, x);
                }
            }
        }
#pragma unroll
        for (int n = 0; n < SIZE / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int64_t at = row + e / 2 * 8;
                const int col = n * 8 + t2 + e % 2;
                if (at < call.M && col < call.DV)
                    write<T>(call.grad_value, call.wide_grad_value, b, i_head, at, col, grad_value[n][e]);
            }
        }
    }
}

// The gradient of the query: the sums of the ranges, one after the other, times the weight of the unit.
template <class T> __global__ void __launch_bounds__(THREADS) additive_backward_query_kernel(ScoreAttention call) {
    const int64_t blocks = divide_up(call.N, BACKWARD_ROWS), i_bh = blockIdx.x / blocks, b = i_bh / call.H, h = i_bh % call.H;
    const int64_t first = blockIdx.x % blocks * BACKWARD_ROWS;
    const int rows = call.N - first < BACKWARD_ROWS ? static_cast<int>(call.N - first) : BACKWARD_ROWS;
    const int stride = static_cast<int>(even(call.A));
    const float* sums = call.sums + (i_bh * call.ranges * even(call.N) + first) * stride;
    for (int i = threadIdx.x; i < rows * call.A; i += THREADS) {
        const int row = i / call.A, unit = i % call.A;
        float sum = 0.0f;
        for (int64_t range = 0; range < call.ranges; ++range) sum += sums[(range * even(call.N) + row) * stride + unit];
        const float weight = to_float(static_cast<const T*>(call.vector)[h * call.A + unit]);
        write<T>(call.grad_query, false, b, h, first + row, unit, 4.0f * weight * sum);
    }
}

template <class T, int SIZE, bool ROWS_ONLY> cudaError_t forward(const ScoreAttention& call, float* norm, cudaStream_t stream) {
    constexpr int ROWS = WARPS * 16 * FORWARD_TILES<T, SIZE>;
    const size_t shared = Shared::bytes(call.A, ROW_STRIDE<FORWARD_TILES<T, SIZE>>) + tile_bytes<T, SIZE>(COLUMNS);
    const int64_t blocks = divide_up(call.N, ROWS) * call.B * call.H;
    return launch(additive_forward_kernel<T, SIZE, ROWS_ONLY>, blocks, THREADS, shared, stream, call, norm);
}

template <class T, int SIZE> cudaError_t backward(const ScoreAttention& call, cudaStream_t stream) {
    const size_t exponentials = Shared::bytes(call.A, ROW_STRIDE<1>), tile = tile_bytes<T, SIZE>(COLUMNS);
    const size_t gradient = sizeof(float) * COLUMNS * (GRAD_STRIDE + 3);
    const int64_t blocks_q = divide_up(call.N, BACKWARD_ROWS) * call.B * call.H;
    cudaError_t status = cudaSuccess;
    if (call.masks.kind == Masks::ADDED) status = forward<T, SIZE, true>(call, call.rows + call.B * call.H * call.N, stream);
    if (status != cudaSuccess) return status;
    const size_t of_rows = std::is_same_v<T, float> ? exponentials + tile : 0;
    status = launch(additive_backward_rows_kernel<T, SIZE>, blocks_q, THREADS, of_rows, stream, call);
    if (status != cudaSuccess) return status;
    const int64_t blocks_kv = call.B * shared_heads(call) * call.ranges;
    status = launch(additive_backward_kernel<T, SIZE>, blocks_kv, THREADS, exponentials + gradient + tile, stream, call);
    if (status != cudaSuccess) return status;
    return launch(additive_backward_query_kernel<T>, blocks_q, THREADS, size_t{0}, stream, call);
}

bool too_large(const ScoreAttention& call) { return std::max(call.A, call.DV) > 128; }

cudaError_t score_attention(const ScoreAttention& call, cudaStream_t stream) {
    if (too_large(call)) return cudaErrorInvalidValue;
    return with_shape(call.dtype, call.DV, [&](auto type, auto width) {
        return forward<decltype(type), decltype(width)::value, false>(call, nullptr, stream);
    });
}

cudaError_t score_attention_backward(const ScoreAttention& call, cudaStream_t stream) {
    if (too_large(call) || call.ranges < 1) return cudaErrorInvalidValue;
    return with_shape(call.dtype, std::max(call.A, call.DV),
                      [&](auto type, auto width) { return backward<decltype(type), decltype(width)::value>(call, stream); });
}

}  // namespace
}  // namespace vlattn

OPERATOR(score_attention, ScoreAttention)
OPERATOR(score_attention_backward, ScoreAttention)
