// score_attention with exact additive scores, s_ij = scale sum_a u_a tanh(x_ia + y_ja): forward and backward.
//
// Shapes: query x (B,H,N,A), key y (B,key_heads,M,A), vector u (H,A), value (B,value_heads,M,DV), out (B,H,N,DV), lse (B,H,N).
// Roofline: the special function unit, 16 results per clock and SM. Per pair and hidden unit the forward pass takes half a result
// (the shared reciprocal of additive_scores.h). Instruction issue is a close second. The backward pass computes the scores twice,
// in float32 three times, and takes another half result and 5 to 6 instructions per pair and hidden unit in each pass.
// Trick: scores are computed in the registers that the tensor cores' product with the values reads, 16 or 32 rows per warp.
// In float32 a first sweep of the query-major pass sums P and P dP, which undoes the rounding of lse and out.
// Backward: query-major for the query, key-major for the rest, no atomics. The gradient of a tile of scores goes through shared
// memory to threads that each hold 8 rows and 4 hidden units of the result, so that threads need no reduction.
// Why not Triton: there the layout of the scores cannot be chosen, and a loop over columns cannot index registers.
// Not measured on a GPU.
#include <algorithm>

#include "additive_scores.h"
#include "score_attention.h"

namespace vlattn {
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

template <class T>
__device__ __forceinline__ Side<T> side(const Rows& x, int64_t b, int64_t h, int64_t count) {
    return {x.at<const T>(b, h), x.row, count};
}

// Tiles of 16 rows per warp in the forward pass: as many as registers allow.
template <class T, int SIZE>
constexpr int FORWARD_TILES = SIZE == 64 && !std::is_same_v<T, float> ? 2 : 1;

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
    const Shared shared(call.A, ROWS);
    T* value_tile = static_cast<T*>(shared.rest);
    const float scale = 2.0f * call.scale * LOG2_E;
    float out[MT][SIZE / 8][4] = {}, largest[MT][2], sum[MT][2] = {};
    for (auto& m : largest) m[0] = m[1] = -INFINITY;
    stage_rows<MT, ROWS>(shared, query, first, vector, call.A);
    const float* lse = call.lse + i_bh * call.N;
    bool visit = !ROWS_ONLY;
    for (int64_t q = first; ROWS_ONLY && q < first + ROWS && q < call.N; ++q) visit = visit || is_coarse(lse[q], OWN_LSE);
    const int64_t end = !visit ? 0 : call.masks.causal && first + ROWS < call.M ? first + ROWS : call.M;
    for (int64_t start = 0; start < end; start += COLUMNS) {
        stage_columns(shared, key, start, call.A);
        if (!ROWS_ONLY) stage<T, SIZE>(value_tile, value, call.value.row, start, COLUMNS, call.M, call.DV);
        __syncthreads();
        if (warp_first < call.N && !(call.masks.causal && start >= warp_first + 16 * MT)) {
            Tile<MT> p;
            sum_units<MT>(p, shared, largest_magnitude(shared), query, row, key, start + t2, vector, call.A);
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
            T* to = call.out.at<T>(b, h) + q * call.out.row;
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

template <class T>
__device__ __forceinline__ void write(const Rows& to, bool wide, int64_t b, int64_t h, int64_t row, int col, float x) {
    if (wide) {
        to.at<float>(b, h)[row * to.row + col] = x;
    } else {
        to.at<T>(b, h)[row * to.row + col] = from_float<T>(x);
    }
}

// KEY_MAJOR: a block has keys and loops over the queries of the heads that share them. Otherwise it has queries of one head,
// loops over the keys, and stores each query's delta = sum(dO * O) - grad_lse for the other pass.
template <class T, int SIZE, bool KEY_MAJOR>
__global__ void __launch_bounds__(THREADS, SIZE == 64 && !KEY_MAJOR ? 3 : 2)
    additive_backward_kernel(ScoreAttention call, float* p_delta, float* p_parts) {
    constexpr int ROWS = BACKWARD_ROWS, CHUNKS = SIZE / 64;
    constexpr bool EXACT = std::is_same_v<T, float>;
    const bool shifted = call.masks.kind == Masks::ADDED, normed = EXACT || shifted;
    const int64_t heads = !KEY_MAJOR ? call.H : call.key_heads > call.value_heads ? call.key_heads : call.value_heads;
    const int64_t group = call.H / heads, own_count = KEY_MAJOR ? call.M : call.N, other_count = KEY_MAJOR ? call.N : call.M;
    const int64_t blocks = divide_up(own_count, ROWS), i_block = blockIdx.x % blocks;
    const int64_t i_head = blockIdx.x / blocks % heads, b = blockIdx.x / blocks / heads;
    const int64_t first = i_block * ROWS, warp_first = first + warp_index() * 16, row = warp_first + lane_row();
    const int t2 = lane_column() * 2;
    const Shared shared(call.A, ROWS);
    float* g_tile = static_cast<float*>(shared.rest);  // (COLUMNS, GRAD_STRIDE)
    float* column_lse = g_tile + COLUMNS * GRAD_STRIDE;  // (COLUMNS), KEY_MAJOR
    float *column_delta = column_lse + COLUMNS, *column_norm = column_delta + COLUMNS;
    T* other_tile = reinterpret_cast<T*>(column_norm + COLUMNS);  // values or grad_out
    UnitGrads<CHUNKS> sum;
    float grad_value[KEY_MAJOR ? SIZE / 8 : 1][4] = {};
    for (int64_t h = i_head * group; h < (i_head + 1) * group; ++h) {
        const Side<T> query = side<T>(call.query, b, h, call.N);
        const Side<T> key = side<T>(call.key, b, h / (call.H / call.key_heads), call.M);
        const Side<T> own = KEY_MAJOR ? key : query, other = KEY_MAJOR ? query : key;
        const T *value = call.value.at<const T>(b, h / (call.H / call.value_heads)), *grad_out = call.grad_out.at<const T>(b, h);
        const T *own_rows = KEY_MAJOR ? value : grad_out, *other_rows = KEY_MAJOR ? grad_out : value;
        const int64_t own_stride = KEY_MAJOR ? call.value.row : call.grad_out.row;
        const int64_t other_stride = KEY_MAJOR ? call.grad_out.row : call.value.row;
        const T* vector = static_cast<const T*>(call.vector) + h * call.A;
        const float* lse = call.lse + (b * call.H + h) * call.N;
        float *delta = p_delta + (b * call.H + h) * call.N, *norm = delta + call.B * call.H * call.N;
        const float* shift = norm + call.B * call.H * call.N;
        sum = {};
        stage_rows<1, ROWS>(shared, own, first, vector, call.A);
        float row_lse[2] = {}, row_delta[2] = {}, row_norm[2] = {1.0f, 1.0f}, total[2] = {}, mean[2] = {};
        if (!KEY_MAJOR) {
            const T* out = call.out.at<const T>(b, h);
            for (int i = 0; i < 2; ++i) {
                const int64_t q = row + 8 * i;
                row_lse[i] = !shifted ? lse_log2(lse, q, call.N) : q < call.N ? shift[q] : INFINITY;
                if (!EXACT && shifted && q < call.N) row_norm[i] = norm[q];
                for (int d = lane_column(); !EXACT && q < call.N && d < call.DV; d += 4)
                    mean[i] += to_float(grad_out[q * call.grad_out.row + d]) * to_float(out[q * call.out.row + d]);
            }
        }
        const int64_t begin = KEY_MAJOR && call.masks.causal ? first : 0;
        const int64_t end = !KEY_MAJOR && call.masks.causal && first + ROWS < call.M ? first + ROWS : other_count;
        for (int sweep = EXACT && !KEY_MAJOR ? 0 : 1; sweep < 2; ++sweep) {
            if (!KEY_MAJOR && sweep == 1) {
                for (int i = 0; i < 2; ++i) {
                    const int64_t q = row + 8 * i;
                    const float all = row_sum(total[i]);
                    if (EXACT && all > 0.0f) row_norm[i] = 1.0f / all;
                    row_delta[i] = row_sum(mean[i]) * (EXACT ? row_norm[i] : 1.0f);
                    if (q >= call.N) continue;
                    if (call.grad_lse) row_delta[i] -= call.grad_lse[(b * call.H + h) * call.N + q];
                    if (t2 == 0) {
                        delta[q] = row_delta[i];
                        if (EXACT) norm[q] = row_norm[i];
                    }
                }
            }
            for (int64_t start = begin; start < end; start += COLUMNS) {
                stage_columns(shared, other, start, call.A);
                stage<T, SIZE>(other_tile, other_rows, other_stride, start, COLUMNS, other_count, call.DV);
                if (KEY_MAJOR && threadIdx.x < COLUMNS) {
                    const int64_t q = start + threadIdx.x;
                    column_lse[threadIdx.x] = !shifted ? lse_log2(lse, q, call.N) : q < call.N ? shift[q] : INFINITY;
                    column_delta[threadIdx.x] = q < call.N ? delta[q] : 0.0f;
                    if (normed) column_norm[threadIdx.x] = q < call.N ? norm[q] : 1.0f;
                }
                __syncthreads();
                const float bound = largest_magnitude(shared);
                Tile<1> p, g;
                clear<1>(g);
                const bool seen = KEY_MAJOR ? start + COLUMNS > warp_first : start < warp_first + 16;
                if (warp_first < own_count && (seen || !call.masks.causal)) {
                    sum_units<1>(p, shared, bound, own, row, other, start + t2, vector, call.A);
                    mask<KEY_MAJOR, 1>(p, 2.0f * call.scale * LOG2_E, call, b, h, opaque(row), start + t2);
                    Rows16<T, SIZE> left;  // read again in each tile: there are no registers to keep it in
                    left.load(own_rows, own_stride, opaque(warp_first), own_count, call.DV);
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        float(&products)[4] = g[0][n / 2][n % 2];
                        product_with_rows<T, SIZE>(reinterpret_cast<float(&)[1][4]>(products), left, other_tile, 8 * n);
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            const int column = 8 * n + t2 + e % 2;
                            const float log_sum = KEY_MAJOR ? column_lse[column] : row_lse[e / 2];
                            const float delta = KEY_MAJOR ? column_delta[column] : row_delta[e / 2];
                            float& x = p[0][n / 2][n % 2][e];
                            x = fast_exp2(x - log_sum);
                            if (EXACT && sweep == 0) {
                                total[e / 2] += x;
                                mean[e / 2] += x * products[e];
                            }
                            if (normed) x *= KEY_MAJOR ? column_norm[column] : row_norm[e / 2];
                            products[e] = x * (products[e] - delta) * call.scale;
                        }
                    }
                    if constexpr (KEY_MAJOR) {
                        product_with_columns<T, SIZE>(grad_value, p[0][0], other_tile, 0);
                        product_with_columns<T, SIZE>(grad_value, p[0][1], other_tile, 16);
                    }
                }
                if (sweep == 0) {
                    __syncthreads();
                    continue;
                }
#pragma unroll
                for (int c = 0; c < 8; ++c) {  // there rows g and g+8 are neighbours
                    const float(&from)[4] = g[0][c / 4][c / 2 % 2];
                    float* to = g_tile + (c / 2 * 8 + t2 + c % 2) * GRAD_STRIDE + row_place<1>(warp_index() * 16 + lane_row());
                    *reinterpret_cast<float2*>(to) = {from[c % 2], from[2 + c % 2]};
                }
                __syncthreads();
                if (bound <= LARGEST_SUM) {
                    through_pairs<EXACT, KEY_MAJOR, false>(sum, g_tile, shared, call.A);
                } else if (bound < INFINITY) {
                    through_pairs<EXACT, KEY_MAJOR, true>(sum, g_tile, shared, call.A);
                } else {
                    through_directly<KEY_MAJOR>(sum, g_tile, own, first, other, start, call.A);
                }
                __syncthreads();
            }
        }
        __syncthreads();  // the exponentials of the rows are no longer read: sums go there
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int unit = first_unit(chunk) + j;
                if constexpr (KEY_MAJOR) {
                    float total = 2.0f * sum.vector[chunk][j];
                    for (int lanes = 1; lanes < 8; lanes *= 2) total += __shfl_xor_sync(ALL_LANES, total, lanes);
                    if (unit < call.A && threadIdx.x % 8 == 0)
                        call.grad_vector[((b * call.H + h) * blocks + i_block) * call.A + unit] = total;
                }
                if (unit >= call.A) continue;
                float* to = shared.rows + unit * ROWS + threadIdx.x % 8 * 4;
#pragma unroll
                for (int i = 0; i < 8; ++i) to[i / 4 * 32 + i % 4] = sum.rows[chunk][j][i];
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS * round_up(call.A, 8); i += THREADS) {
            const int unit = i / (8 * ROWS) * 8 + i % 8, own_row = i / 8 % ROWS;
            const int64_t at = first + own_row;
            if (unit >= call.A || at >= own_count) continue;
            float x = 4.0f * to_float(vector[unit]) * shared.rows[unit * ROWS + row_place<1>(own_row)];
            if (!KEY_MAJOR) {
                write<T>(call.grad_query, false, b, h, at, unit, x);
                continue;
            }
            if (group > 1) {  // each head has a weight of its own: their sum cannot stay in registers
                float* part = p_parts + ((b * heads + i_head) * call.M + at) * call.A + unit;
                if (h > i_head * group) x += *part;
                *part = x;
            }
            if (h + 1 == (i_head + 1) * group) write<T>(call.grad_key, call.wide_grad_key, b, i_head, at, unit, x);
        }
        __syncthreads();
    }
    if constexpr (KEY_MAJOR) {
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

template <class T, int SIZE, bool ROWS_ONLY>
cudaError_t forward(const ScoreAttention& call, float* norm, cudaStream_t stream) {
    constexpr int ROWS = WARPS * 16 * FORWARD_TILES<T, SIZE>;
    const size_t shared = Shared::bytes(call.A, ROWS) + tile_bytes<T, SIZE>(COLUMNS);
    const int64_t blocks = divide_up(call.N, ROWS) * call.B * call.H;
    return launch(additive_forward_kernel<T, SIZE, ROWS_ONLY>, blocks, THREADS, shared, stream, call, norm);
}

template <class T, int SIZE>
cudaError_t backward(const ScoreAttention& call, cudaStream_t stream) {
    const int64_t heads = std::max(call.key_heads, call.value_heads);
    const size_t g_bytes = sizeof(float) * COLUMNS * (GRAD_STRIDE + 3);
    const size_t shared = Shared::bytes(call.A, BACKWARD_ROWS) + g_bytes + tile_bytes<T, SIZE>(COLUMNS);
    float *delta = call.rows, *parts = call.parts;
    if (call.masks.kind == Masks::ADDED) {
        const cudaError_t status = forward<T, SIZE, true>(call, delta + call.B * call.H * call.N, stream);
        if (status != cudaSuccess) return status;
    }
    const int64_t blocks_q = divide_up(call.N, BACKWARD_ROWS) * call.B * call.H;
    const int64_t blocks_kv = call.blocks * call.B * heads;
    cudaError_t status = launch(additive_backward_kernel<T, SIZE, false>, blocks_q, THREADS, shared, stream, call, delta, parts);
    if (status != cudaSuccess) return status;
    return launch(additive_backward_kernel<T, SIZE, true>, blocks_kv, THREADS, shared, stream, call, delta, parts);
}

bool too_large(const ScoreAttention& call) { return std::max(call.A, call.DV) > 128; }

cudaError_t score_attention(const ScoreAttention& call, cudaStream_t stream) {
    if (too_large(call)) return cudaErrorInvalidValue;
    return with_type(call.dtype, [&](auto type) {
        using T = decltype(type);
        return call.DV <= 64 ? forward<T, 64, false>(call, nullptr, stream) : forward<T, 128, false>(call, nullptr, stream);
    });
}

cudaError_t score_attention_backward(const ScoreAttention& call, cudaStream_t stream) {
    if (too_large(call) || call.blocks != divide_up(call.M, BACKWARD_ROWS)) return cudaErrorInvalidValue;
    return with_type(call.dtype, [&](auto type) {
        using T = decltype(type);
        return std::max(call.A, call.DV) <= 64 ? backward<T, 64>(call, stream) : backward<T, 128>(call, stream);
    });
}

}  // namespace
}  // namespace vlattn

OPERATOR(score_attention, ScoreAttention)
OPERATOR(score_attention_backward, ScoreAttention)
