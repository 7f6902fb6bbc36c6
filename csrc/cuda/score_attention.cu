// score_attention with scores that sum over hidden units, exactly: forward and backward; and relevancy through them.
//
// query x (B,H,N,A), key y (B,key_heads,M,A), u (H,A), value v (B,value_heads,M,DV), out (B,H,N,DV), lse (B,H,N).
//   s_ij = scale log2(e) sum_a u_a f_ija with the masks     P_ij = norm_i 2^(s_ij - shift_i)     out_i = sum_j P_ij v_j
//   additive: f = tanh(x_ia + y_ja); products: f = factor tanh(argument x_ia y_ja) + offset, tanh or the logistic function
//   lse: shift = lse log2(e), norm = 1; where rounding it shows, max_j s_ij and 1 / sum_j 2^(s_ij - shift_i)
//   dP_ij = dout_i . v_j     delta_i = sum_j P_ij dP_ij - dlse_i     g_ij = scale P_ij (dP_ij - delta_i)     dv_j = sum_i P_ij dout_i
//   additive: q_ija = tanh(x_ia + y_ja) / 2     dx_ia = 4 u_a sum_j g_ij (1/4 - q_ija^2), dy_ja the same over i     du_a = 2 sum_ij g_ij q_ija
//   products: t_ija = tanh(argument x_ia y_ja)     dx_ia = factor u_a sum_j g_ij (1 - t_ija^2) argument y_ja     du_a = sum_ij g_ij f_ija
//   relevancy r (B,T,N) -> r_abar (B,H,T,M): sum_i r_ti P_ij or r_ti max(0, P_ij dP_ij)
// The special function unit and the instructions are the bound: additive forward half a reciprocal and 3 instructions for each pair
// and unit (hidden_units.h), backward a whole one and 12.5; products one tanh and 3, and two and 10. Scores are computed in the
// registers that the product with the values reads.
// Backward, a block has 64 keys at a time and loops over the queries. A tile's g goes through shared memory to lanes that each hold
// two hidden units of the warp's 16 keys. dy is summed in registers, dx within the lane, and then in memory in float32. No two
// blocks write the same sum: where heads are few, the keys of one are divided into ranges with sums of their own, which a last
// small kernel adds. All orders are fixed and nothing is atomic. With several ranges the sums take 0.5 GB at most.
// Why not Triton: there the layout of the scores cannot be chosen, and a loop over columns cannot index registers.
// Not measured on a GPU, but for the additive forward pass.
#include <algorithm>

#include "attention.h"
#include "hidden_units.h"

namespace vlattn {

struct ScoreAttention {
    DType dtype;
    int64_t B, H, key_heads, value_heads, N, M;
    int A, DV;  // hidden units, value size
    StridedTensor query, key, value;  // x (B,H,N,A), y (B,key_heads,M,A), (B,value_heads,M,DV)
    const void* vector;  // u (H,A), contiguous
    bool products;  // else additive
    float argument, factor, offset;  // of products
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
    // relevancy
    bool by_gradient;
    int T;
    const float* relevancy;  // (B,T,N), contiguous; null: not a call of relevancy
    float* r_abar;  // (B,H,T,M)
    float* row_sums;  // (B,H,N), of P or max(0, P dP); null: not needed
    // for the kernels alone
    float* rows;  // (3,B,H,N): RowData of each row
    float* sums;  // (B,H,ranges,N,A), N and A made even: of the query's gradient; zeros
    float* parts;  // (B,key heads of grad_key,M,A), where query heads share a key
    FIELDS(dtype, B, H, key_heads, value_heads, N, M, A, DV, query, key, value, vector, products, argument, factor, offset, masks,
           scale, out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value, wide_grad_key, wide_grad_value, ranges,
           grad_vector, by_gradient, T, relevancy, r_abar, row_sums, rows, sums, parts)
};

namespace {

// What a block has of a head.
template <class T> struct Head {
    Side<T> query, key;
    const T *value, *vector;

    __device__ Head(const ScoreAttention& call, int64_t b, int64_t h) {
        query = {call.query.at<const T>(b, h), call.query.stride_n, call.N};
        key = {call.key.at<const T>(b, h / (call.H / call.key_heads)), call.key.stride_n, call.M};
        value = call.value.at<const T>(b, h / (call.H / call.value_heads));
        vector = static_cast<const T*>(call.vector) + h * call.A;
    }
};

// Tiles of 16 rows per warp in passes that add no gradients: as many as registers allow.
template <class T, int SIZE> constexpr int UNIT_TILES = SIZE == 64 && !std::is_same_v<T, float> ? 2 : 1;

constexpr int MAX_CARRIED = 4;  // rows of r that a block carries

// From half the unscaled scores to base-2 logits.
__device__ __forceinline__ float logit_factor(const ScoreAttention& call) { return 2.0f * call.scale * LOG2_E; }

template <class T, int SIZE, bool PRODUCTS>
__global__ void __launch_bounds__(THREADS, 3) units_forward_kernel(ScoreAttention call) {
    constexpr int MT = UNIT_TILES<T, SIZE>, ROWS = WARPS * 16 * MT;
    const int64_t num_q = divide_up(call.N, ROWS), i_bh = blockIdx.x / num_q, b = i_bh / call.H, h = i_bh % call.H;
    const int64_t first = blockIdx.x % num_q * ROWS, warp_first = first + warp_index() * 16 * MT, row = warp_first + lane_row();
    const int t2 = lane_column() * 2;
    const Head<T> head(call, b, h);
    const Shared shared(call.A, ROW_STRIDE<MT>);
    T* value_tile = static_cast<T*>(shared.rest);
    float out[MT][SIZE / 8][4] = {};
    OnlineSoftmax softmax[MT];
    stage_rows<MT, PRODUCTS>(shared, head.query, first, head.vector, call.A, call.argument);
    if (!PRODUCTS) stage_largest(shared, head.query, head.key, call.A, call.masks.real(b));
    const int64_t end = call.masks.causal && first + ROWS < call.M ? first + ROWS : call.M;
    for (int64_t start = 0; start < end; start += COLUMNS) {
        stage_columns<PRODUCTS>(shared, head.key, start, call.A);
        stage<T, SIZE>(value_tile, head.value, call.value.stride_n, start, COLUMNS, call.M, call.DV);
        __syncthreads();
        if (warp_first < call.N && !(call.masks.causal && start >= warp_first + 16 * MT)) {
            Tile<MT> p;
            const float bound = PRODUCTS ? 0.0f : largest_sum(shared);
            sum_units<MT, PRODUCTS>(
                p, shared, bound, call.factor, call.offset, head.query, row, head.key, start + t2, head.vector, call.A);
#pragma unroll
            for (int m = 0; m < MT; ++m)
                call.masks.to_logits<false>(p[m], logit_factor(call), b, h, row + 16 * m, start + t2, call.N, call.M);
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                float kept[2];
                softmax[m].add(p[m], kept);
                scale_rows(out[m], kept);
                product_with_columns<T, SIZE>(out[m], p[m], value_tile, 0);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) {
        float factor[2];
        for (int i = 0; i < 2; ++i) {
            const int64_t q = row + 16 * m + 8 * i;
            const float total = row_sum(softmax[m].sum[i]);
            factor[i] = total == 0.0f ? 0.0f : 1.0f / total;
            if (t2 == 0 && q < call.N) call.lse[i_bh * call.N + q] = natural_lse(softmax[m].largest[i], total);
        }
        store_rows<T>(out[m], factor, call.out, b, h, warp_first + 16 * m, call.N, call.DV);
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

__device__ __forceinline__ float relu(float x) { return x < 0.0f ? 0.0f : x; }  // a maximum would drop NaN

// SHIFT, NORM and DELTA of each row: P = norm 2^(logit - shift), delta = sum(P dP) - grad_lse. They come from lse and out. Where the
// rounding of these shows, in float32 and where a float mask takes lse far from 0, they come from the scores once more. For
// relevancy they do where there is no lse; and row_sums.
enum RowData { SHIFT, NORM, DELTA, CARRIED };  // CARRIED and on: rows of r
template <class T, int SIZE, bool PRODUCTS>
__global__ void __launch_bounds__(THREADS, SIZE == 64 ? 3 : 2) units_rows_kernel(ScoreAttention call) {
    constexpr int MT = UNIT_TILES<T, SIZE>, ROWS = WARPS * 16 * MT;
    const int64_t blocks = divide_up(call.N, ROWS), i_bh = blockIdx.x / blocks, b = i_bh / call.H, h = i_bh % call.H;
    const int64_t first = blockIdx.x % blocks * ROWS, warp_first = first + warp_index() * 16 * MT, row = warp_first + lane_row();
    const int t2 = lane_column() * 2;
    const bool carries = call.relevancy, with_dp = call.grad_out.data;
    const float* lse = call.lse + i_bh * call.N;
    const auto shows = [&](int64_t q) {
        if (carries && !call.lse) return true;
        const bool coarse = call.masks.kind == Masks::ADDED && is_coarse(lse[q], carries ? CALLER_LSE : OWN_LSE);
        return coarse || (!carries && std::is_same_v<T, float>);
    };
    bool any = call.row_sums;
    for (int64_t q = first; q < first + ROWS && q < call.N; ++q) any = any || shows(q);
    OnlineSoftmax softmax[MT];
    float mean[MT][2] = {};
    if (any) {
        const Head<T> head(call, b, h);
        const Shared shared(call.A, ROW_STRIDE<MT>);
        T* value_tile = static_cast<T*>(shared.rest);
        stage_rows<MT, PRODUCTS>(shared, head.query, first, head.vector, call.A, call.argument);
        if (!PRODUCTS) stage_largest(shared, head.query, head.key, call.A, call.masks.real(b));
        Rows16<T, SIZE> left[MT];
        for (int m = 0; m < MT; ++m)
            left[m].load(
                call.grad_out.at<const T>(b, h), call.grad_out.stride_n, warp_first + 16 * m, with_dp ? call.N : 0, call.DV);
        const int64_t end = call.masks.causal && first + ROWS < call.M ? first + ROWS : call.M;
        for (int64_t start = 0; start < end; start += COLUMNS) {
            stage_columns<PRODUCTS>(shared, head.key, start, call.A);
            stage<T, SIZE>(value_tile, head.value, call.value.stride_n, start, COLUMNS, with_dp ? call.M : 0, call.DV);
            __syncthreads();
            if (warp_first < call.N && !(call.masks.causal && start >= warp_first + 16 * MT)) {
                Tile<MT> p;
                const float bound = PRODUCTS ? 0.0f : largest_sum(shared);
                sum_units<MT, PRODUCTS>(
                    p, shared, bound, call.factor, call.offset, head.query, row, head.key, start + t2, head.vector, call.A);
#pragma unroll
                for (int m = 0; m < MT; ++m) {
                    float products[4][4] = {}, kept[2];
                    call.masks.to_logits<false>(p[m], logit_factor(call), b, h, row + 16 * m, start + t2, call.N, call.M);
                    softmax[m].add(p[m], kept);
                    if (with_dp) product_with_rows<T, SIZE>(products, left[m], value_tile, 0);
                    for (int i = 0; i < 2; ++i) mean[m][i] *= kept[i];
#pragma unroll
                    for (int e = 0; e < 16; ++e) {
                        const float product = p[m][e / 4][e % 4] * products[e / 4][e % 4];
                        mean[m][e % 4 / 2] += carries ? relu(product) : product;
                    }
                }
            }
            __syncthreads();
        }
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) {
        float dot[2] = {};
        if (!carries && !std::is_same_v<T, float>) dot_rows<T>(dot, call.grad_out, call.out, b, h, row + 16 * m, call.N, call.DV);
        for (int i = 0; i < 2; ++i) {
            const int64_t q = row + 16 * m + 8 * i, size = call.B * call.H * call.N;
            const float total = row_sum(softmax[m].sum[i]), by_scores = row_sum(mean[m][i]), by_out = row_sum(dot[i]);
            if (t2 != 0 || q >= call.N) continue;
            const bool own = shows(q);
            const float norm = own && total != 0.0f ? 1.0f / total : 1.0f;  // NaN stays
            const float largest = softmax[m].shift(i);
            const float shift = !own ? lse_log2(lse, q, call.N) : total == 0.0f ? INFINITY : largest;
            float* to = call.rows + i_bh * call.N + q;
            to[SHIFT * size] = shift, to[NORM * size] = norm;
            if (call.row_sums)
                call.row_sums[i_bh * call.N + q] = (call.by_gradient ? by_scores : total) * norm * fast_exp2(largest - shift);
            to[DELTA * size] = (own ? by_scores * norm : by_out) - (call.grad_lse ? call.grad_lse[i_bh * call.N + q] : 0.0f);
        }
    }
}

// Copies what a pass over keys reads of COLUMNS queries from `start` on, for those beyond N as of a fully masked row; of DELTA and
// before, or of SHIFT, NORM and rows of r.
__device__ __forceinline__ void stage_row_data(float* to, const ScoreAttention& call, int64_t b, int64_t i_bh, int64_t start) {
    for (int i = threadIdx.x; i < (CARRIED + call.T) * COLUMNS; i += THREADS) {
        const int what = i / COLUMNS;
        const int64_t q = start + i % COLUMNS;
        const float* from = what < CARRIED ? call.rows + (what * call.B * call.H + i_bh) * call.N
                                           : call.relevancy + (b * call.T + what - CARRIED) * call.N;
        to[i] = q < call.N ? from[q] : what == SHIFT ? INFINITY : 0.0f;
    }
}

// P of a tile of keys as rows and queries as columns, and with_dp dP. row_data: of `stage_row_data`.
template <bool PRODUCTS, class T, int SIZE, int MT>
__device__ __forceinline__ void key_tile(Tile<MT>& p, Tile<MT>& dp, const ScoreAttention& call, const Shared& shared,
                                         const Head<T>& head, float bound, int64_t b, int64_t h, int64_t warp_first,
                                         int64_t start, const float* row_data, const T* grad_tile, bool with_dp) {
    const int t2 = lane_column() * 2;
    const int64_t row = warp_first + lane_row();
    clear<MT>(dp);
    sum_units<MT, PRODUCTS>(
        p, shared, bound, call.factor, call.offset, head.key, row, head.query, start + t2, head.vector, call.A);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
        call.masks.to_logits<true>(p[m], logit_factor(call), b, h, opaque(row) + 16 * m, start + t2, call.N, call.M);
        Rows16<T, SIZE> left;  // read again in each tile: there are no registers to keep it in
        if (with_dp) left.load(head.value, call.value.stride_n, opaque(warp_first) + 16 * m, call.M, call.DV);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            if (with_dp) product_with_rows<T, SIZE>(reinterpret_cast<float(&)[1][4]>(dp[m][n]), left, grad_tile, 8 * n);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float* of_row = row_data + 8 * n + t2 + e % 2;
                float& x = p[m][n][e];
                x = fast_exp2(x - of_row[SHIFT * COLUMNS]) * of_row[NORM * COLUMNS];
            }
        }
    }
}

// The pass over the pairs. A block has every `ranges`-th 64 keys of a head, one after the other, and loops over the queries of the
// heads that share them.
template <class T, int SIZE, bool PRODUCTS>
__global__ void __launch_bounds__(THREADS, SIZE == 64 ? 3 : 2) units_backward_kernel(ScoreAttention call) {
    constexpr int ROWS = BACKWARD_ROWS, CHUNKS = SIZE / 64;
    constexpr bool EXACT = std::is_same_v<T, float>;
    const int64_t heads = shared_heads(call), group = call.H / heads, i_range = blockIdx.x % call.ranges;
    const int64_t i_head = blockIdx.x / call.ranges % heads, b = blockIdx.x / call.ranges / heads;
    const int t2 = lane_column() * 2, stride = static_cast<int>(even(call.A));
    const float of_keys = PRODUCTS ? call.factor * call.argument : 4.0f;
    const Shared shared(call.A, ROW_STRIDE<1>);
    float* g_tile = static_cast<float*>(shared.rest);  // (COLUMNS, GRAD_STRIDE)
    float* row_data = g_tile + COLUMNS * GRAD_STRIDE;  // (3,COLUMNS)
    T* grad_tile = reinterpret_cast<T*>(row_data + 3 * COLUMNS);
    for (int64_t first = i_range * ROWS; first < call.M; first += call.ranges * ROWS) {
        const int64_t warp_first = first + warp_index() * 16;
        float grad_value[SIZE / 8][4] = {};
        for (int64_t h = i_head * group; h < (i_head + 1) * group; ++h) {
            const int64_t i_bh = b * call.H + h;
            const Head<T> head(call, b, h);
            const T* grad_out = call.grad_out.at<const T>(b, h);
            float* query_sums = call.sums + (i_bh * call.ranges + i_range) * even(call.N) * stride;
            UnitGrads<CHUNKS> sum = {};
            float sum_of_g = 0.0f;
            stage_rows<1, PRODUCTS>(shared, head.key, first, head.vector, call.A, call.argument);
            if (!PRODUCTS) stage_largest(shared, head.query, head.key, call.A, call.masks.real(b));
            for (int64_t start = call.masks.causal ? first : 0; start < call.N; start += COLUMNS) {
                stage_columns<PRODUCTS>(shared, head.query, start, call.A);
                stage<T, SIZE>(grad_tile, grad_out, call.grad_out.stride_n, start, COLUMNS, call.N, call.DV);
                stage_row_data(row_data, call, b, i_bh, start);
                __syncthreads();
                const float bound = PRODUCTS ? 0.0f : largest_sum(shared);
                const bool visible = warp_first < call.M && !(call.masks.causal && start + COLUMNS <= warp_first);
                if (visible) {
                    Tile<1> p, g;
                    key_tile<PRODUCTS, T, SIZE, 1>(
                        p, g, call, shared, head, bound, b, h, warp_first, start, row_data, grad_tile, true);
#pragma unroll
                    for (int e = 0; e < 16; ++e) {
                        float& gradient = g[0][e / 4][e % 4];
                        gradient -= row_data[DELTA * COLUMNS + e / 4 * 8 + t2 + e % 2];
                        gradient *= p[0][e / 4][e % 4] * call.scale;
                        if (PRODUCTS && start + e / 4 * 8 + t2 + e % 2 < call.N) sum_of_g += gradient;
                    }
                    product_with_columns<T, SIZE>(grad_value, p[0], grad_tile, 0);
#pragma unroll
                    for (int c = 0; c < 8; ++c) {  // there rows g and g+8 are neighbours
                        const float(&from)[4] = g[0][c / 2];
                        float* to =
                            g_tile + (c / 2 * 8 + t2 + c % 2) * GRAD_STRIDE + row_place<1>(warp_index() * 16 + lane_row());
                        *reinterpret_cast<float2*>(to) = {from[c % 2], from[2 + c % 2]};
                    }
                }
                __syncwarp();  // the gradient of a warp's rows is read by itself alone
                const int columns = start + COLUMNS < call.N ? COLUMNS : static_cast<int>(call.N - start);
                const auto through = [&](auto way) {
                    through_units<decltype(way)::value, EXACT>(sum, query_sums + start * stride, stride, columns, visible, g_tile,
                                                               shared, head.key, warp_first, head.query, start, call.A);
                };
                if constexpr (PRODUCTS) {
                    through(std::integral_constant<Way, Way::UNITS>());
                } else if (takes_sums(bound)) {
                    through(std::integral_constant<Way, Way::SUM>());
                } else if (bound <= LARGEST_SUM) {
                    through(std::integral_constant<Way, Way::PRODUCT>());
                } else {
                    through(std::integral_constant<Way, Way::CLAMPED>());
                }
                __syncthreads();
            }
            if (PRODUCTS) sum_of_g = warp_sum(sum_of_g) * call.offset;
#pragma unroll
            for (int i = 0; i < 2 * CHUNKS; ++i) {
                const int unit = first_unit(i / 2) + i % 2;
                if (warp_first >= call.M || unit >= call.A) continue;
                float* grad_vector = call.grad_vector + (i_bh * divide_up(call.M, 16) + warp_first / 16) * call.A;
                grad_vector[unit] =
                    PRODUCTS ? fmaf(call.factor, sum.vector[i / 2][i % 2], sum_of_g) : 2.0f * sum.vector[i / 2][i % 2];
                const float factor = of_keys * to_float(head.vector[unit]);
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
        if (call.wide_grad_value) {
            store_rows<float>(grad_value, {1.0f, 1.0f}, call.grad_value, b, i_head, warp_first, call.M, call.DV);
        } else {
            store_rows<T>(grad_value, {1.0f, 1.0f}, call.grad_value, b, i_head, warp_first, call.M, call.DV);
        }
    }
}

// The gradient of the query: the sums of the ranges, one after the other, times the weight of the unit.
template <class T> __global__ void __launch_bounds__(THREADS) units_query_kernel(ScoreAttention call) {
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
        write<T>(call.grad_query, false, b, h, first + row, unit, (call.products ? call.factor : 4.0f) * weight * sum);
    }
}

// The rows of r that are carried through a head's map to the keys of a block, by a loop over the queries.
template <class T, int SIZE, bool PRODUCTS> __global__ void __launch_bounds__(THREADS, 3) units_step_kernel(ScoreAttention call) {
    constexpr int MT = UNIT_TILES<T, SIZE>, ROWS = WARPS * 16 * MT;
    const int64_t blocks = divide_up(call.M, ROWS), i_bh = blockIdx.x / blocks, b = i_bh / call.H, h = i_bh % call.H;
    const int64_t first = blockIdx.x % blocks * ROWS, warp_first = first + warp_index() * 16 * MT;
    const int t2 = lane_column() * 2;
    const Head<T> head(call, b, h);
    const Shared shared(call.A, ROW_STRIDE<MT>);
    float* row_data = static_cast<float*>(shared.rest);  // (CARRIED + MAX_CARRIED,COLUMNS)
    T* grad_tile = reinterpret_cast<T*>(row_data + (CARRIED + MAX_CARRIED) * COLUMNS);
    float sums[MAX_CARRIED][MT][2] = {};
    stage_rows<MT, PRODUCTS>(shared, head.key, first, head.vector, call.A, call.argument);
    if (!PRODUCTS) stage_largest(shared, head.query, head.key, call.A, call.masks.real(b));
    for (int64_t start = call.masks.causal ? first : 0; start < call.N; start += COLUMNS) {
        stage_columns<PRODUCTS>(shared, head.query, start, call.A);
        if (call.by_gradient)
            stage<T, SIZE>(grad_tile, call.grad_out.at<const T>(b, h), call.grad_out.stride_n, start, COLUMNS, call.N, call.DV);
        stage_row_data(row_data, call, b, i_bh, start);
        __syncthreads();
        if (warp_first < call.M && !(call.masks.causal && start + COLUMNS <= warp_first)) {
            Tile<MT> p, dp;
            const float bound = PRODUCTS ? 0.0f : largest_sum(shared);
            key_tile<PRODUCTS, T, SIZE, MT>(
                p, dp, call, shared, head, bound, b, h, warp_first, start, row_data, grad_tile, call.by_gradient);
#pragma unroll
            for (int e = 0; e < 16 * MT; ++e) {
                float& x = p[e / 16][e / 4 % 4][e % 4];
                if (call.by_gradient) x = relu(x * dp[e / 16][e / 4 % 4][e % 4]);
                if (start + e / 4 % 4 * 8 + t2 + e % 2 >= call.N) x = 0.0f;  // zeros times an infinite value are NaN
            }
#pragma unroll
            for (int t = 0; t < MAX_CARRIED; ++t) {
                if (t >= call.T) break;
#pragma unroll
                for (int e = 0; e < 16 * MT; ++e) {
                    const float r = row_data[(CARRIED + t) * COLUMNS + e / 4 % 4 * 8 + t2 + e % 2];
                    float& sum = sums[t][e / 16][e % 4 / 2];
                    sum = fmaf(p[e / 16][e / 4 % 4][e % 4], r, sum);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int t = 0; t < MAX_CARRIED; ++t) {
        for (int i = 0; i < 2 * MT; ++i) {
            const int64_t key = warp_first + lane_row() + 8 * i;
            const float sum = row_sum(sums[t][i / 2][i % 2]);
            if (t < call.T && t2 == 0 && key < call.M) call.r_abar[(i_bh * call.T + t) * call.M + key] = sum;
        }
    }
}

bool too_large(const ScoreAttention& call) { return std::max(call.A, call.DV) > 128; }

// Calls use(T(), width, products) with constants.
template <class Use> cudaError_t with_units(const ScoreAttention& call, int64_t size, Use use) {
    return with_shape(call.dtype, size, [&](auto type, auto width) {
        return call.products ? use(type, width, std::true_type()) : use(type, width, std::false_type());
    });
}

template <class T, int SIZE, bool PRODUCTS> cudaError_t rows(const ScoreAttention& call, cudaStream_t stream) {
    constexpr int TILES = UNIT_TILES<T, SIZE>;
    const size_t shared = Shared::bytes(call.A, ROW_STRIDE<TILES>) + tile_bytes<T, SIZE>(COLUMNS);
    const int64_t blocks = divide_up(call.N, WARPS * 16 * TILES) * call.B * call.H;
    return launch(units_rows_kernel<T, SIZE, PRODUCTS>, blocks, THREADS, shared, stream, call);
}

template <class T, int SIZE, bool PRODUCTS> cudaError_t backward(const ScoreAttention& call, cudaStream_t stream) {
    const size_t shared =
        Shared::bytes(call.A, ROW_STRIDE<1>) + tile_bytes<T, SIZE>(COLUMNS) + sizeof(float) * COLUMNS * (GRAD_STRIDE + CARRIED);
    const int64_t blocks_q = divide_up(call.N, BACKWARD_ROWS) * call.B * call.H;
    const int64_t blocks_kv = call.B * shared_heads(call) * call.ranges;
    cudaError_t status = rows<T, SIZE, PRODUCTS>(call, stream);
    if (status == cudaSuccess)
        status = launch(units_backward_kernel<T, SIZE, PRODUCTS>, blocks_kv, THREADS, shared, stream, call);
    if (status == cudaSuccess) status = launch(units_query_kernel<T>, blocks_q, THREADS, size_t{0}, stream, call);
    return status;
}

cudaError_t score_attention(const ScoreAttention& call, cudaStream_t stream) {
    if (too_large(call)) return cudaErrorInvalidValue;
    return with_units(call, call.DV, [&](auto type, auto width, auto products) {
        using T = decltype(type);
        constexpr int SIZE = decltype(width)::value, TILES = UNIT_TILES<T, SIZE>;
        const size_t shared = Shared::bytes(call.A, ROW_STRIDE<TILES>) + tile_bytes<T, SIZE>(COLUMNS);
        const int64_t blocks = divide_up(call.N, WARPS * 16 * TILES) * call.B * call.H;
        return launch(units_forward_kernel<T, SIZE, decltype(products)::value>, blocks, THREADS, shared, stream, call);
    });
}

cudaError_t score_attention_backward(const ScoreAttention& call, cudaStream_t stream) {
    if (too_large(call) || call.ranges < 1) return cudaErrorInvalidValue;
    return with_units(call, std::max(call.A, call.DV), [&](auto type, auto width, auto products) {
        return backward<decltype(type), decltype(width)::value, decltype(products)::value>(call, stream);
    });
}

// SHIFT and NORM, and row_sums where they are asked for.
cudaError_t score_attention_rows(const ScoreAttention& call, cudaStream_t stream) {
    if (too_large(call)) return cudaErrorInvalidValue;
    return with_units(call, call.DV, [&](auto type, auto width, auto products) {
        return rows<decltype(type), decltype(width)::value, decltype(products)::value>(call, stream);
    });
}

// r_abar from these.
cudaError_t score_attention_step(const ScoreAttention& call, cudaStream_t stream) {
    if (too_large(call) || call.T > MAX_CARRIED) return cudaErrorInvalidValue;
    return with_units(call, call.DV, [&](auto type, auto width, auto products) {
        using T = decltype(type);
        constexpr int SIZE = decltype(width)::value, TILES = UNIT_TILES<T, SIZE>;
        const size_t shared = Shared::bytes(call.A, ROW_STRIDE<TILES>) + sizeof(float) * (CARRIED + MAX_CARRIED) * COLUMNS +
                              tile_bytes<T, SIZE>(COLUMNS);
        const int64_t blocks = divide_up(call.M, WARPS * 16 * TILES) * call.B * call.H;
        return launch(units_step_kernel<T, SIZE, decltype(products)::value>, blocks, THREADS, shared, stream, call);
    });
}

}  // namespace
}  // namespace vlattn

OPERATOR(score_attention, ScoreAttention)
OPERATOR(score_attention_backward, ScoreAttention)
OPERATOR(score_attention_rows, ScoreAttention)
OPERATOR(score_attention_step, ScoreAttention)
