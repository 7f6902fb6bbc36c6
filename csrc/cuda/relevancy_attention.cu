// Attention over short sequences, and its gradients together with r Abar; Abar = mean_h max(0, A * dA) or mean_h A.
//
// query q (B,H,N,D), key k (B,key_heads,M,D), value v (B,key_heads,M,DV), r (B,T,N) -> r_abar (B,T,M); N, M <= 256, T <= 4.
//   s_ij = scale log2(e) q_i . k_j with the masks     A_ij = weight_i 2^(s_ij - shift_i)     out_i = sum_j A_ij v_j
//   shift_i = lse_i log2(e), weight_i = 1; where lse is absent or coarse, max_j s_ij and 1 / sum_j 2^(s_ij - shift_i)
//   dA_ij = dout_i . v_j      delta_i = sum_j A_ij dA_ij = dout_i . out_i      dS_ij = A_ij (dA_ij - delta_i)
//   dq_i = scale sum_j dS_ij k_j      dk_j = scale sum_i dS_ij q_i      dv_j = sum_i A_ij dout_i
//   r_abar_tj = a_j r_tj + sum_h sum_i (b_i / H) r_ti (A_ij or max(0, A_ij dA_ij))
// A block has a head in the forward pass. In the backward pass it has a key head: queries are rows first (shift, weight, delta,
// dq), and then keys (dk, dv, r_abar). All rows of the other side lie in shared memory; a warp has 16 rows at a time. Python adds
// the key heads' r_abar, in order. For row_normalize it asks for row sums first, and divides r by them.
// Why CUDA C++: one block goes through both layouts of the work, with a barrier between them. Our Triton kernels need a launch for
// each layout and one more for the sum over heads. The mma.sync here takes more instructions than Triton's wgmma: docs/kernels.md
// says for how few samples the launch is worth more. Not measured on a GPU.
#include <algorithm>

#include "relevancy.h"

namespace vlattn {

namespace {

constexpr int MAX_ROWS = 256, MAX_CARRIED = 4;  // N and M, T
constexpr int SLAB = 16, MAX_WARPS = 8;
enum RowData { SHIFT, WEIGHT, DELTA, CARRIED };  // of each query; CARRIED and on: rows of r times b / H

// What a block has in shared memory: two tiles, and RowData of a head's queries.
template <class T, int WIDTH> struct Shared {
    T *first, *second;
    float* columns;
    int length;  // of a row of `columns`: N padded to whole slabs

    __host__ __device__ static int padded(int64_t rows) { return round_up(static_cast<int>(rows), SLAB); }
    __host__ __device__ static int rows(const Relevancy& call) { return padded(call.N > call.M ? call.N : call.M); }
    __host__ static size_t bytes(const Relevancy& call) {
        return 2 * tile_bytes<T, WIDTH>(rows(call)) + sizeof(float) * (CARRIED + call.T) * padded(call.N);
    }
    __device__ explicit Shared(const Relevancy& call)
        : first(static_cast<T*>(shared_memory())),
          second(first + rows(call) * tile_stride<T, WIDTH>()),
          columns(reinterpret_cast<float*>(second + rows(call) * tile_stride<T, WIDTH>())),
          length(padded(call.N)) {}

    // Copies a head's rows to both tiles, zeros to whole slabs. The barrier after it is the caller's.
    __device__ void copy(const StridedTensor& x, int x_columns, const StridedTensor& y, int y_columns, int b, int h,
                         int64_t num_rows) const {
        __syncthreads();
        stage<T, WIDTH>(first, x.at<T>(b, h), x.stride_n, 0, padded(num_rows), num_rows, x_columns);
        stage<T, WIDTH>(second, y.at<T>(b, h), y.stride_n, 0, padded(num_rows), num_rows, y.data ? y_columns : 0);
    }

    // What the pass over keys reads of each query, for rows beyond N as of a fully masked row. The barrier after it is the caller's.
    __device__ void copy_columns(const Relevancy& call, int b, int h) const {
        const int64_t size = call.B * call.H * call.N, head = (static_cast<int64_t>(b) * call.H + h) * call.N;
        for (int i = threadIdx.x; i < length; i += blockDim.x) {
            const bool exists = i < call.N;
            columns[SHIFT * length + i] = exists ? call.rows[SHIFT * size + head + i] : INFINITY;
            columns[WEIGHT * length + i] = exists ? call.rows[WEIGHT * size + head + i] : 1.0f;
            columns[DELTA * length + i] = exists ? call.rows[DELTA * size + head + i] : 0.0f;
            const float weight = exists ? call.attention_weight.at(b, i) / static_cast<float>(call.H) : 0.0f;
            for (int t = 0; t < call.T; ++t)
                columns[(CARRIED + t) * length + i] = exists ? call.relevancy[(b * call.T + t) * call.N + i] * weight : 0.0f;
        }
    }
};

__device__ __forceinline__ float relu(float x) { return x < 0.0f ? 0.0f : x; }  // a maximum would drop NaN

// The first of this warp's 16 rows, and the distance to its next ones.
__device__ __forceinline__ int first_row() { return warp_index() * SLAB; }
__device__ __forceinline__ int next_rows() { return blockDim.x / WARP * SLAB; }

// Dot products of a warp's 16 rows with rows k .. k+15 of a tile.
template <class T, int WIDTH>
__device__ __forceinline__ void products(float (&x)[2][4], const Rows16<T, WIDTH>& left, const T* tile, int k) {
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e / 4][e % 4] = 0.0f;
    product_with_rows<T, WIDTH>(x, left, tile, k);
}

// s_ij of the same.
template <bool KEY_MAJOR, class T, int WIDTH>
__device__ __forceinline__ void logits(float (&s)[2][4], const Relevancy& call, const Rows16<T, WIDTH>& left, const T* tile,
                                       int b, int h, int first, int k) {
    products<T, WIDTH>(s, left, tile, k);
    call.masks.to_logits<KEY_MAJOR>(s, call.scale * LOG2_E, b, h, first + lane_row(), k + 2 * lane_column(), call.N, call.M);
}

// No query of these 16 sees a key from here on.
__device__ __forceinline__ int key_end(const Relevancy& call, int first) {
    const int end = static_cast<int>(call.M);
    return call.masks.causal && first + SLAB < end ? first + SLAB : end;
}

template <class T, int WIDTH>
__global__ void __launch_bounds__(MAX_WARPS* WARP) relevancy_forward_kernel(const __grid_constant__ Relevancy call) {
    const int heads = static_cast<int>(call.H), b = blockIdx.x / heads, h = blockIdx.x % heads;
    const int key_head = h / (heads / static_cast<int>(call.key_heads));
    const Shared<T, WIDTH> shared(call);
    shared.copy(call.key, call.D, call.value, call.DV, b, key_head, call.M);
    __syncthreads();
    for (int first = first_row(); first < call.N; first += next_rows()) {
        Rows16<T, WIDTH> query;
        query.load(call.query.at<const T>(b, h), call.query.stride_n, first, call.N, call.D);
        float out[WIDTH / 8][4] = {};
        OnlineSoftmax softmax;
#pragma unroll 1
        for (int k = 0; k < key_end(call, first); k += SLAB) {
            float p[2][4], kept[2];
            logits<false>(p, call, query, shared.first, b, h, first, k);
            softmax.add(p, kept);
            scale_rows(out, kept);
            product_with_columns<T, WIDTH>(out, p, shared.second, k);
        }
        float factor[2];
        for (int r = 0; r < 2; ++r) {
            const float total = row_sum(softmax.sum[r]);
            factor[r] = total == 0.0f ? 0.0f : 1.0f / total;
            const int row = first + lane_row() + 8 * r;
            if (lane_column() == 0 && row < call.N)
                call.lse[(b * call.H + h) * call.N + row] = natural_lse(softmax.shift(r), total);
        }
        store_rows<T>(out, factor, call.out, b, h, first, call.N, call.DV);
    }
}

// Queries as rows: SHIFT, WEIGHT and DELTA of each, and with `gradients` dq. The tiles hold keys and values.
template <class T, int WIDTH>
__device__ void query_rows(const Relevancy& call, bool gradients, int b, int h, const Shared<T, WIDTH>& shared) {
    const bool summed = !call.lse || call.masks.kind == Masks::ADDED || call.row_sums;  // otherwise lse says all
    const bool with_da = gradients || (call.row_sums && call.by_gradient);
    for (int first = first_row(); first < call.N; first += next_rows()) {
        const int64_t head = (static_cast<int64_t>(b) * call.H + h) * call.N;
        Rows16<T, WIDTH> query, grad;
        query.load(call.query.at<const T>(b, h), call.query.stride_n, first, call.N, call.D);
        grad.load(call.grad_out.at<const T>(b, h), call.grad_out.stride_n, first, with_da ? call.N : 0, call.DV);
        OnlineSoftmax softmax;
        float shift[2], weight[2] = {1.0f, 1.0f}, delta[2] = {0.0f, 0.0f}, positive[2] = {0.0f, 0.0f};
#pragma unroll 1
        for (int k = 0; summed && k < key_end(call, first); k += SLAB) {
            float p[2][4], da[2][4] = {}, kept[2];
            logits<false>(p, call, query, shared.first, b, h, first, k);
            softmax.add(p, kept);
            if (with_da) products<T, WIDTH>(da, grad, shared.second, k);
            for (int r = 0; r < 2; ++r) delta[r] *= kept[r], positive[r] *= kept[r];
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const float product = p[e / 4][e % 4] * da[e / 4][e % 4];
                delta[e % 4 / 2] += product;
                positive[e % 4 / 2] += relu(product);
            }
        }
        if (gradients && !summed) dot_rows<T>(delta, call.grad_out, call.out, b, h, first + lane_row(), call.N, call.DV);
        for (int r = 0; r < 2; ++r) {
            const int row = first + lane_row() + 8 * r;
            const float total = row_sum(softmax.sum[r]), sum = call.by_gradient ? row_sum(positive[r]) : total;
            if (call.lse && !(summed && row < call.N && is_coarse(call.lse[head + row], CALLER_LSE))) {
                shift[r] = lse_log2(call.lse + head, row, call.N);
            } else {
                shift[r] = total == 0.0f ? INFINITY : softmax.shift(r);
                weight[r] = total == 0.0f ? 1.0f : 1.0f / total;
            }
            delta[r] = row_sum(delta[r]) * weight[r];
            if (lane_column() != 0 || row >= call.N) continue;
            float* to = call.rows + head + row;
            if (call.row_sums) call.row_sums[head + row] = sum * weight[r] * fast_exp2(softmax.shift(r) - shift[r]);
            const int64_t size = call.B * call.H * call.N;
            to[SHIFT * size] = shift[r], to[WEIGHT * size] = weight[r], to[DELTA * size] = delta[r];
        }
        if (!gradients) continue;
        float grad_query[WIDTH / 8][4] = {};
#pragma unroll 1
        for (int k = 0; k < key_end(call, first); k += SLAB) {
            float p[2][4], da[2][4];
            logits<false>(p, call, query, shared.first, b, h, first, k);
            products<T, WIDTH>(da, grad, shared.second, k);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const int r = e % 4 / 2;
                float& x = p[e / 4][e % 4];
                x = fast_exp2(x - shift[r]) * weight[r] * (da[e / 4][e % 4] - delta[r]);
            }
            product_with_columns<T, WIDTH>(grad_query, p, shared.first, k);
        }
        const float factor[2] = {shift[0] == INFINITY ? 0.0f : call.scale, shift[1] == INFINITY ? 0.0f : call.scale};
        store_rows<T>(grad_query, factor, call.grad_query, b, h, first, call.N, call.D);
    }
}

// Keys as rows: r_abar, and with `gradients` dk and dv, of one key head.
template <class T, int WIDTH>
__device__ void key_rows(const Relevancy& call, bool gradients, int b, int key_head, const Shared<T, WIDTH>& shared) {
    const int group = static_cast<int>(call.H / call.key_heads), N = static_cast<int>(call.N);
    const bool with_da = gradients || call.by_gradient;
    for (int round = 0; round < call.M; round += next_rows()) {
        const int first = round + first_row();
        Rows16<T, WIDTH> key, value;
        key.load(call.key.at<const T>(b, key_head), call.key.stride_n, first, call.M, call.D);
        value.load(call.value.at<const T>(b, key_head), call.value.stride_n, first, with_da ? call.M : 0, call.DV);
        float grad_key[WIDTH / 8][4] = {}, grad_value[WIDTH / 8][4] = {}, sums[MAX_CARRIED][2] = {};
        for (int h = key_head * group; h < (key_head + 1) * group; ++h) {
            if (round == 0 || group > 1) {
                shared.copy(call.query, call.D, call.grad_out, call.DV, b, h, call.N);
                shared.copy_columns(call, b, h);
                __syncthreads();
            }
#pragma unroll 1
            for (int q = call.masks.causal ? first : 0; first < call.M && q < N; q += SLAB) {
                float p[2][4], da[2][4] = {};
                logits<true>(p, call, key, shared.first, b, h, first, q);
                if (with_da) products<T, WIDTH>(da, value, shared.second, q);
                const float* at = shared.columns + q + 2 * lane_column();
                const auto of_query = [&](int what, int e) { return at[what * shared.length + e / 4 * 8 + e % 2]; };
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    float& x = p[e / 4][e % 4];
                    x = fast_exp2(x - of_query(SHIFT, e)) * of_query(WEIGHT, e);
                }
                if (gradients) product_with_columns<T, WIDTH>(grad_value, p, shared.second, q);
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    float& x = p[e / 4][e % 4];
                    const float share = call.by_gradient ? relu(x * da[e / 4][e % 4]) : x;
#pragma unroll
                    for (int t = 0; t < MAX_CARRIED; ++t) {
                        if (t < call.T) sums[t][e % 4 / 2] = fmaf(share, of_query(CARRIED + t, e), sums[t][e % 4 / 2]);
                    }
                    x *= da[e / 4][e % 4] - of_query(DELTA, e);
                }
                if (gradients) product_with_columns<T, WIDTH>(grad_key, p, shared.first, q);
            }
        }
        float scale[2], one[2];
        for (int r = 0; r < 2; ++r) {
            const int row = first + lane_row() + 8 * r;
            const bool exists = row < call.M, seen = exists && !(call.masks.keys && !call.masks.real(b)[row]);
            scale[r] = seen ? call.scale : 0.0f, one[r] = seen ? 1.0f : 0.0f;
#pragma unroll
            for (int t = 0; t < MAX_CARRIED; ++t) {
                const float sum = row_sum(sums[t][r]);
                if (t >= call.T || lane_column() != t || !exists) continue;
                const bool residual = call.residual && key_head == 0;
                call.r_abar[((b * call.key_heads + key_head) * call.T + t) * call.M + row] =
                    (seen ? sum : 0.0f) +
                    (residual ? call.relevancy[(b * call.T + t) * call.N + row] * call.residual_weight.at(b, row) : 0.0f);
            }
        }
        if (!gradients) continue;
        store_rows<T>(grad_key, scale, call.grad_key, b, key_head, first, call.M, call.D);
        store_rows<T>(grad_value, one, call.grad_value, b, key_head, first, call.M, call.DV);
    }
}

template <class T, int WIDTH>
__global__ void __launch_bounds__(MAX_WARPS* WARP) relevancy_backward_kernel(const __grid_constant__ Relevancy call) {
    const int key_heads = static_cast<int>(call.key_heads), b = blockIdx.x / key_heads, key_head = blockIdx.x % key_heads;
    const int group = static_cast<int>(call.H) / key_heads;
    const bool gradients = call.grad_query.data || call.grad_value.data;  // with head_dim 0 only the values have one
    const Shared<T, WIDTH> shared(call);
    shared.copy(call.key, call.D, call.value, call.DV, b, key_head, call.M);
    __syncthreads();
    for (int h = key_head * group; h < (key_head + 1) * group; ++h) query_rows(call, gradients, b, h, shared);
    if (gradients || call.T > 0) key_rows(call, gradients, b, key_head, shared);
}

// The fewest warps that need no more rounds over these rows than MAX_WARPS.
int threads_for(int64_t rows) {
    const int64_t slabs = std::max<int64_t>(1, divide_up(rows, SLAB));
    return static_cast<int>(divide_up(slabs, divide_up(slabs, MAX_WARPS))) * WARP;
}

cudaError_t run(const Relevancy& call, bool backward, cudaStream_t stream) {
    if (std::max(call.D, call.DV) > 128 || std::max(call.N, call.M) > MAX_ROWS || call.T > MAX_CARRIED)
        return cudaErrorInvalidValue;
    return with_shape(call.dtype, std::max(call.D, call.DV), [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int WIDTH = decltype(width)::value;
        const auto kernel = backward ? relevancy_backward_kernel<T, WIDTH> : relevancy_forward_kernel<T, WIDTH>;
        const int64_t blocks = call.B * (backward ? call.key_heads : call.N > 0 ? call.H : 0);
        const int threads = threads_for(backward ? std::max(call.N, call.M) : call.N);
        return launch(kernel, blocks, threads, Shared<T, WIDTH>::bytes(call), stream, call);
    });
}

cudaError_t relevancy_attention(const Relevancy& call, cudaStream_t stream) { return run(call, false, stream); }
cudaError_t relevancy_attention_backward(const Relevancy& call, cudaStream_t stream) { return run(call, true, stream); }
cudaError_t relevancy_step(const Relevancy& call, cudaStream_t stream) { return run(call, true, stream); }

}  // namespace
}  // namespace vlattn

OPERATOR(relevancy_attention, Relevancy)
OPERATOR(relevancy_attention_backward, Relevancy)
OPERATOR(relevancy_step, Relevancy)
