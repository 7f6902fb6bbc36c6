// Attention over short sequences, and its gradients together with r Abar; Abar = mean_h max(0, A * dA) or mean_h A.
//
// query q (B,H,N,D), key k (B,key_heads,M,D), value v (B,key_heads,M,DV), r (B,T,N) -> r_abar (B,T,M); N, M <= 256, T <= 4.
//   s_ij = scale log2(e) q_i . k_j with the masks     A_ij = weight_i 2^(s_ij - shift_i)     out_i = sum_j A_ij v_j
//   shift_i = lse_i log2(e), weight_i = 1; where lse is absent or coarse, max_j s_ij and 1 / sum_j 2^(s_ij - shift_i)
//   dA_ij = dout_i . v_j      delta_i = sum_j A_ij dA_ij = dout_i . out_i      dS_ij = A_ij (dA_ij - delta_i)
//   dq_i = scale sum_j dS_ij k_j      dk_j = scale sum_i dS_ij q_i      dv_j = sum_i A_ij dout_i
//   r_abar_tj = a_j r_tj + sum_h sum_i (b_i / H) r_ti (A_ij or max(0, A_ij dA_ij))
// A block has a head in the forward pass, and a warp 16 queries. In the backward pass a block has a key head and a warp 16 of its
// keys, which meet 32 queries at a time: P and dS stay in registers for dv and dk, and dS goes through shared memory for dq. A block
// has at most 160 keys of 64 features or 128 of 128; it goes over the queries again for the others. Python adds the key heads'
// r_abar, in order. For row_normalize it asks for row sums first, and divides r by them.
// Why CUDA C++: keys are padded to 16, where Triton's tiles are powers of two: 160 tokens take 160 rows, and not 256. There are two
// launches, and not four. `python -m tools.pages.kernels_page` estimates it. Not measured on a GPU.
#include <algorithm>

#include "relevancy.h"

namespace vlattn {

namespace {

constexpr int MAX_ROWS = 256, MAX_CARRIED = 4;  // N and M, T
constexpr int SLAB = 16;
constexpr int STEP = 32;  // queries that the keys of a block meet at a time
template <int WIDTH> constexpr int MAX_WARPS = WIDTH == 64 ? 10 : 8;  // as many as leave a thread its registers
enum RowData { SHIFT, WEIGHT, DELTA, CARRIED };  // of each query; CARRIED and on: rows of r times b / H

__host__ __device__ int padded(int64_t rows, int to = SLAB) { return round_up(static_cast<int>(rows), to); }

// What a block has in shared memory: all keys of a head, and with them either all values or, while queries go by, those of two
// steps, the gradients at the outputs, and the gradients at the logits of one step, a row for each key.
template <class T, int WIDTH> struct Shared {
    static constexpr int STAGES = sizeof(T) == 2 ? 2 : 1, LD = tile_stride<T, WIDTH>();
    static constexpr int BY_LOGIT = STEP + 16 / static_cast<int>(sizeof(T));  // the stride
    T *keys, *values, *steps, *by_logit;
    float* columns;  // RowData of a head's queries
    int length;  // of a row of `columns`: whole steps

    __host__ __device__ static int second(const Relevancy& call) {
        const int by_step = 2 * STAGES * STEP * LD + padded(call.M) * BY_LOGIT, by_values = padded(call.M) * LD;
        return by_step > by_values ? by_step : by_values;
    }
    __host__ static size_t forward_bytes(const Relevancy& call) { return 2 * tile_bytes<T, WIDTH>(padded(call.M)); }
    __host__ static size_t backward_bytes(const Relevancy& call) {
        return tile_bytes<T, WIDTH>(padded(call.M)) + sizeof(T) * second(call) +
               sizeof(float) * (CARRIED + call.T) * padded(call.N, STEP);
    }
    __device__ explicit Shared(const Relevancy& call)
        : keys(static_cast<T*>(shared_memory())),
          values(keys + padded(call.M) * LD),
          steps(values),
          by_logit(steps + 2 * STAGES * STEP * LD),
          columns(reinterpret_cast<float*>(values + second(call))),
          length(padded(call.N, STEP)) {}

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

// Copies a head's rows to tiles, some and then the next ones, asynchronously if they are aligned, with zeros beyond the last.
template <class T, int WIDTH> class HeadCopies {
    static constexpr int VECTOR = 16 / sizeof(T), VECTORS = WIDTH / VECTOR, LD = tile_stride<T, WIDTH>();
    const T* next;  // what this thread copies first
    const int64_t stride;
    int rows;  // that are left
    const int columns;  // from this thread's on
    const bool aligned;

    __device__ static int thread_row() { return threadIdx.x / VECTORS; }
    __device__ static int thread_column() { return threadIdx.x % VECTORS * VECTOR; }

   public:
    __device__ HeadCopies(const StridedTensor& x, int64_t b, int64_t h, int64_t num_rows, int num_cols, int first = 0)
        : next(x.at<const T>(b, h) + (first + thread_row()) * x.stride_n + thread_column()),
          stride(x.stride_n),
          rows(static_cast<int>(num_rows) - first),
          columns((x.data ? num_cols : 0) - thread_column()),
          aligned((num_cols % VECTOR | x.stride_n % VECTOR | reinterpret_cast<uintptr_t>(x.at<T>(b, h)) % 16) == 0) {}

    __device__ void operator()(T* tile, int count) {
        const int at_once = blockDim.x / VECTORS;
        const T* p = next;
        tile += thread_row() * LD + thread_column();
        for (int row = thread_row(); row < count; row += at_once, p += at_once * stride, tile += at_once * LD) {
            if (aligned) copy_16_bytes(shared_address(tile), p, row < rows && columns > 0);
            else
                for (int e = 0; e < VECTOR; ++e) tile[e] = row < rows && e < columns ? p[e] : from_float<T>(0.0f);
        }
        next += count * stride, rows -= count;
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
__global__ void __launch_bounds__(MAX_WARPS<WIDTH>* WARP) relevancy_forward_kernel(const __grid_constant__ Relevancy call) {
    const int heads = static_cast<int>(call.H), b = blockIdx.x / heads, h = blockIdx.x % heads;
    const int key_head = h / (heads / static_cast<int>(call.key_heads));
    const Shared<T, WIDTH> shared(call);
    HeadCopies<T, WIDTH>(call.key, b, key_head, call.M, call.D)(shared.keys, padded(call.M));
    HeadCopies<T, WIDTH>(call.value, b, key_head, call.M, call.DV)(shared.values, padded(call.M));
    wait_for_copies();
    __syncthreads();
    for (int first = first_row(); first < call.N; first += next_rows()) {
        Rows16<T, WIDTH> query;
        query.load(call.query.at<const T>(b, h), call.query.stride_n, first, call.N, call.D);
        float out[WIDTH / 8][4] = {};
        OnlineSoftmax softmax;
#pragma unroll 1
        for (int k = 0; k < key_end(call, first); k += SLAB) {
            float p[2][4], kept[2];
            logits<false>(p, call, query, shared.keys, b, h, first, k);
            softmax.add(p, kept);
            scale_rows(out, kept);
            product_with_columns<T, WIDTH>(out, p, shared.values, k);
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

// SHIFT, WEIGHT and DELTA of queries whose lse says all. Several lanes read a row, 16 bytes each.
template <class T, int WIDTH> __device__ void known_rows(const Relevancy& call, bool gradients, int b, int h) {
    constexpr int VECTOR = 16 / sizeof(T), LANES = WIDTH / VECTOR;
    const StridedTensor &x = call.grad_out, &y = call.out;
    const T *left = x.at<const T>(b, h), *right = y.at<const T>(b, h);
    const bool aligned = (call.DV % VECTOR | x.stride_n % VECTOR | y.stride_n % VECTOR | reinterpret_cast<uintptr_t>(left) % 16 |
                          reinterpret_cast<uintptr_t>(right) % 16) == 0;
    const int column = threadIdx.x % LANES * VECTOR, columns = gradients ? call.DV - column : 0;
    const int64_t size = call.B * call.H * call.N, head = (static_cast<int64_t>(b) * call.H + h) * call.N;
    for (int row = threadIdx.x / LANES; row < padded(call.N, WARP); row += blockDim.x / LANES) {  // whole warps
        float sum = 0.0f;
        if (row < call.N && columns > 0) {
            T some[VECTOR], others[VECTOR];
            const T *of_left = left + row * x.stride_n + column, *of_right = right + row * y.stride_n + column;
            if (aligned) {
                const uint4 bits[2] = {*reinterpret_cast<const uint4*>(of_left), *reinterpret_cast<const uint4*>(of_right)};
                memcpy(some, &bits[0], 16), memcpy(others, &bits[1], 16);
            } else {
                for (int e = 0; e < VECTOR; ++e) some[e] = others[e] = from_float<T>(0.0f);
                for (int e = 0; e < VECTOR && e < columns; ++e) some[e] = of_left[e], others[e] = of_right[e];
            }
            for (int e = 0; e < VECTOR; ++e) sum = fmaf(to_float(some[e]), to_float(others[e]), sum);
        }
        for (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
        if (column != 0 || row >= call.N) continue;
        float* to = call.rows + head + row;
        to[SHIFT * size] = lse_log2(call.lse + head, row, call.N), to[WEIGHT * size] = 1.0f, to[DELTA * size] = sum;
    }
}

// The same of queries as rows, by a pass over the keys. The tiles hold keys and values. Adds up row_sums, too.
template <class T, int WIDTH>
__device__ void summed_rows(const Relevancy& call, bool gradients, int b, int h, const Shared<T, WIDTH>& shared) {
    const bool with_da = gradients || (call.row_sums && call.by_gradient);
    for (int first = first_row(); first < call.N; first += next_rows()) {
        const int64_t head = (static_cast<int64_t>(b) * call.H + h) * call.N;
        Rows16<T, WIDTH> query, grad;
        query.load(call.query.at<const T>(b, h), call.query.stride_n, first, call.N, call.D);
        grad.load(call.grad_out.at<const T>(b, h), call.grad_out.stride_n, first, with_da ? call.N : 0, call.DV);
        OnlineSoftmax softmax;
        float shift[2], weight[2] = {1.0f, 1.0f}, delta[2] = {0.0f, 0.0f}, positive[2] = {0.0f, 0.0f};
#pragma unroll 1
        for (int k = 0; k < key_end(call, first); k += SLAB) {
            float p[2][4], da[2][4] = {}, kept[2];
            logits<false>(p, call, query, shared.keys, b, h, first, k);
            softmax.add(p, kept);
            if (with_da) products<T, WIDTH>(da, grad, shared.values, k);
            for (int r = 0; r < 2; ++r) delta[r] *= kept[r], positive[r] *= kept[r];
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const float product = p[e / 4][e % 4] * da[e / 4][e % 4];
                delta[e % 4 / 2] += product;
                positive[e % 4 / 2] += relu(product);
            }
        }
        for (int r = 0; r < 2; ++r) {
            const int row = first + lane_row() + 8 * r;
            const float total = row_sum(softmax.sum[r]), sum = call.by_gradient ? row_sum(positive[r]) : total;
            if (call.lse && !(row < call.N && is_coarse(call.lse[head + row], CALLER_LSE))) {
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
    }
}

// dq of a step's queries from the gradients at their logits, 16 queries and 16 columns a warp at a time. Keys of later rounds are
// added to what earlier ones have left.
template <class T, int WIDTH>
__device__ __forceinline__ void add_grad_query(const Relevancy& call, int b, int h, int q, int round, int end,
                                               const Shared<T, WIDTH>& shared) {
    constexpr int SLABS = STEP / SLAB;
    const StridedTensor& to = call.grad_query;
#pragma unroll 1
    for (int unit = warp_index(); unit < SLABS * WIDTH / SLAB; unit += blockDim.x / WARP) {
        const int slab = unit % SLABS * SLAB, column = unit / SLABS * SLAB;
        if (q + slab >= call.N) continue;
        float sum[2][4] = {};
#pragma unroll 2
        for (int k = round; k < end; k += SLAB)
            product_of_columns<T, SLAB, Shared<T, WIDTH>::LD>(sum, shared.by_logit - round * Shared<T, WIDTH>::BY_LOGIT,
                                                              Shared<T, WIDTH>::BY_LOGIT, slab, shared.keys + column, k);
        float factor[2];
        for (int r = 0; r < 2; ++r) {
            const int row = q + slab + lane_row() + 8 * r;
            factor[r] = shared.columns[SHIFT * shared.length + row] == INFINITY ? 0.0f : call.scale;
            if (round == 0 || row >= call.N) continue;
            const T* before = to.at<const T>(b, h) + row * to.stride_n + column + lane_column() * 2;
            for (int e = 0; e < 4; ++e)
                if (column + lane_column() * 2 + e / 2 * 8 + e % 2 < call.D && call.scale != 0.0f)
                    sum[e / 2][2 * r + e % 2] += to_float(before[e / 2 * 8 + e % 2]) / call.scale;
        }
        const StridedTensor part = {to.at<T>(0, 0) + column, to.stride_b, to.stride_h, to.stride_n};
        store_rows<T>(sum, factor, part, b, h, q + slab, call.N, min(call.D - column, SLAB));
    }
}

// Keys as rows: r_abar, and with `gradients` dq, dk and dv, of one key head. The first tile holds the keys.
template <class T, int WIDTH>
__device__ void key_rows(const Relevancy& call, bool gradients, bool summed, int b, int key_head,
                         const Shared<T, WIDTH>& shared) {
    constexpr int STAGES = Shared<T, WIDTH>::STAGES, HALF = STEP * Shared<T, WIDTH>::LD;
    const int group = static_cast<int>(call.H / call.key_heads), N = static_cast<int>(call.N), M = static_cast<int>(call.M);
    const bool with_da = gradients || call.by_gradient,
               unmasked = !call.masks.causal && !call.masks.keys && call.masks.kind == Masks::NONE;
    const float scale_log2 = call.scale * LOG2_E;
    for (int round = 0; round < M; round += next_rows()) {
        const int first = round + first_row(), end = min(padded(M), round + next_rows());
        __syncthreads();
        if (with_da) HeadCopies<T, WIDTH>(call.value, b, key_head, M, call.DV, round)(shared.values, end - round);
        wait_for_copies();
        __syncthreads();
        Rows16<T, WIDTH> key, value;
        if constexpr (sizeof(T) == 2) {
            if (first < M) key.load(shared.keys, first);
            if (first < M && with_da) value.load(shared.values, first_row());
        } else {
            key.load(call.key.at<const T>(b, key_head), call.key.stride_n, first, M, call.D);
            value.load(call.value.at<const T>(b, key_head), call.value.stride_n, first, with_da ? M : 0, call.DV);
        }
        float grad_key[WIDTH / 8][4] = {}, grad_value[WIDTH / 8][4] = {}, sums[MAX_CARRIED][2] = {};
        for (int h = key_head * group; h < (key_head + 1) * group; ++h) {
            HeadCopies<T, WIDTH> to_queries(call.query, b, h, N, call.D), to_grads(call.grad_out, b, h, N, call.DV);
            const auto copy_step = [&](int q) {
                T* to = shared.steps + q / STEP % STAGES * 2 * HALF;
                to_queries(to, STEP);
                if (with_da) to_grads(to + HALF, STEP);
            };
            __syncthreads();
            shared.copy_columns(call, b, h);
            if (N > 0) copy_step(0);
#pragma unroll 1
            for (int q = 0; q < N; q += STEP) {
                wait_for_copies();
                __syncthreads();
                if (STAGES == 2 && q + STEP < N) copy_step(q + STEP);
                const T *queries = shared.steps + q / STEP % STAGES * 2 * HALF, *grads = queries + HALF;
#pragma unroll 1
                for (int i = 0; i < STEP && q + i < N && first < M; i += SLAB) {
                    float p[2][4], da[2][4] = {};
                    products<T, WIDTH>(p, key, queries, i);
                    const float* at = shared.columns + q + i + 2 * lane_column();
                    const auto of_queries = [&](float(&x)[2][2], int what) {
                        for (int n = 0; n < 2; ++n) read(x[n], at + what * shared.length + n * 8);
                    };
                    float column[2][2];
                    of_queries(column, SHIFT);
                    if (unmasked) {  // queries beyond the last have a shift of inf
#pragma unroll
                        for (int e = 0; e < 8; ++e)
                            p[e / 4][e % 4] = fast_exp2(fmaf(p[e / 4][e % 4], scale_log2, -column[e / 4][e % 2]));
                    } else {
                        call.masks.to_logits<true>(p, scale_log2, b, h, first + lane_row(), q + i + 2 * lane_column(), N, M);
#pragma unroll
                        for (int e = 0; e < 8; ++e) p[e / 4][e % 4] = fast_exp2(p[e / 4][e % 4] - column[e / 4][e % 2]);
                    }
                    if (summed) {
                        of_queries(column, WEIGHT);
#pragma unroll
                        for (int e = 0; e < 8; ++e) p[e / 4][e % 4] *= column[e / 4][e % 2];
                    }
                    if (with_da) products<T, WIDTH>(da, value, grads, i);
                    if (gradients) product_with_columns<T, WIDTH>(grad_value, p, grads, i);
#pragma unroll
                    for (int t = 0; t < MAX_CARRIED; ++t) {
                        if (t >= call.T) break;
                        of_queries(column, CARRIED + t);
#pragma unroll
                        for (int e = 0; e < 8; ++e) {
                            const float x = p[e / 4][e % 4], share = call.by_gradient ? relu(x * da[e / 4][e % 4]) : x;
                            sums[t][e % 4 / 2] = fmaf(share, column[e / 4][e % 2], sums[t][e % 4 / 2]);
                        }
                    }
                    if (!gradients) continue;
                    of_queries(column, DELTA);
#pragma unroll
                    for (int e = 0; e < 8; ++e) p[e / 4][e % 4] *= da[e / 4][e % 4] - column[e / 4][e % 2];
                    if (first + SLAB > M) {  // keys beyond the last may have any power
#pragma unroll
                        for (int e = 0; e < 8; ++e)
                            if (first + lane_row() + e % 4 / 2 * 8 >= M) p[e / 4][e % 4] = 0.0f;
                    }
                    product_with_columns<T, WIDTH>(grad_key, p, queries, i);
                    T* to = shared.by_logit + (first_row() + lane_row()) * Shared<T, WIDTH>::BY_LOGIT + i + 2 * lane_column();
#pragma unroll
                    for (int e = 0; e < 8; e += 2)
                        store_pair(
                            to + e % 4 / 2 * 8 * Shared<T, WIDTH>::BY_LOGIT + e / 4 * 8, p[e / 4][e % 4], p[e / 4][e % 4 + 1]);
                }
                if (gradients) {
                    __syncthreads();
                    add_grad_query(call, b, h, q, round, end, shared);
                }
                if (STAGES == 2) continue;
                __syncthreads();
                if (q + STEP < N) copy_step(q + STEP);
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
__global__ void __launch_bounds__(MAX_WARPS<WIDTH>* WARP) relevancy_backward_kernel(const __grid_constant__ Relevancy call) {
    const int key_heads = static_cast<int>(call.key_heads), b = blockIdx.x / key_heads, key_head = blockIdx.x % key_heads;
    const int group = static_cast<int>(call.H) / key_heads;
    const bool gradients = call.grad_query.data || call.grad_value.data;  // with head_dim 0 only the values have one
    const bool summed = !call.lse || call.masks.kind == Masks::ADDED || call.row_sums;  // otherwise lse says all
    const Shared<T, WIDTH> shared(call);
    HeadCopies<T, WIDTH>(call.key, b, key_head, call.M, call.D)(shared.keys, padded(call.M));
    if (summed) HeadCopies<T, WIDTH>(call.value, b, key_head, call.M, call.DV)(shared.values, padded(call.M));
    wait_for_copies();
    __syncthreads();
    for (int h = key_head * group; h < (key_head + 1) * group; ++h) {
        if (summed) summed_rows(call, gradients, b, h, shared);
        else known_rows<T, WIDTH>(call, gradients, b, h);
    }
    if (gradients || call.T > 0) key_rows(call, gradients, summed, b, key_head, shared);
}

// The fewest warps that need no more rounds over these rows than `most`.
int threads_for(int64_t rows, int most) {
    const int64_t slabs = std::max<int64_t>(1, divide_up(rows, SLAB));
    return static_cast<int>(divide_up(slabs, divide_up(slabs, most))) * WARP;
}

cudaError_t run(const Relevancy& call, bool backward, cudaStream_t stream) {
    if (std::max(call.D, call.DV) > 128 || std::max(call.N, call.M) > MAX_ROWS || call.T > MAX_CARRIED)
        return cudaErrorInvalidValue;
    return with_shape(call.dtype, std::max(call.D, call.DV), [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int WIDTH = decltype(width)::value;
        const auto kernel = backward ? relevancy_backward_kernel<T, WIDTH> : relevancy_forward_kernel<T, WIDTH>;
        const int64_t blocks = call.B * (backward ? call.key_heads : call.N > 0 ? call.H : 0);
        const int threads = threads_for(backward ? call.M : call.N, MAX_WARPS<WIDTH>);
        const size_t bytes = backward ? Shared<T, WIDTH>::backward_bytes(call) : Shared<T, WIDTH>::forward_bytes(call);
        return launch(kernel, blocks, threads, bytes, stream, call);
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
