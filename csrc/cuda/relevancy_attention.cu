// Attention over short sequences, and its gradients together with r Abar; Abar = mean_h relu(A * dA) or mean_h A.
//
// Shapes: query (B,H,N,D), key (B,key_heads,M,D), value (B,key_heads,M,DV), r (B,T,N) -> r_abar (B,T,M); N, M <= 256.
// Roofline: for 16-bit types memory and the tensor cores about equally at N = M = 200 and D = 64 (7 products of 2 N M D
// operations against 8 tensors of N D numbers in the backward pass). Memory below that. For few samples, the launch itself. In
// float32 the multiply-adds: 32 of them take six loads, of four numbers each.
// Trick: all keys of a head, and later all queries, fit into shared memory. One block takes a sample through both passes of the
// gradient: first with queries as rows (dQ and the statistics of each row), then with keys as rows (dK, dV). r Abar, a sum over
// queries and heads, is computed by the lanes that own the keys, so only T numbers per key and head go to memory and back.
// Both tiles are copied asynchronously, 64 rows as a group, and worked on as they come: each chunk but the first comes while the one
// before it is computed. All of them have places of their own, so that this takes no shared memory.
// What masks and edges cost is kept off the whole tiles before them: there the scale and the subtraction of the largest logit are
// one instruction, and no pair is looked at. Which keys are seen is a bit of each, in shared memory.
// Why CUDA C++: one block goes through both layouts of the work, head after head, with barriers between them. Our Triton kernels
// need a launch for each layout and one more to add the partial sums of r Abar of the key heads. Few samples are cut into ranges
// of heads to fill the GPU. Only then r Abar has partial sums here, which a second kernel adds in order, and row sums over all
// heads, if they are needed, take a launch of their own. No atomics. Not measured on a GPU.
#include <algorithm>

#include "attention.h"
#include "mma.h"

namespace vlattn {

// A weight of each row (B,N), strides in elements; null: 1.
struct RowWeight {
    const float* data;
    int64_t stride_b, stride_n;
    FIELDS(data, stride_b, stride_n)
};

struct Relevancy {
    DType dtype;
    int64_t B, H, key_heads, N, M, T;
    int D, DV, parts;  // parts: ranges of key heads into which a backward pass cuts a sample
    StridedTensor query, key, value;  // (B,H,N,D), (B,key_heads,M,D), (B,key_heads,M,DV); value absent where nothing needs it
    Masks masks;
    float scale;
    StridedTensor out;  // (B,H,N,DV)
    float* lse;  // (B,H,N), natural; null in a backward pass: recomputed
    // backward
    bool by_gradient, row_normalize;
    StridedTensor grad_out;  // (B,H,N,DV)
    StridedTensor grad_query, grad_key, grad_value;  // absent: not needed
    const float* relevancy;  // r (B,T,N), contiguous; null: only gradients are needed
    RowWeight residual_weight, attention_weight;  // a, b
    bool residual;  // r_abar = r * a + (r * b) Abar, or without the first term
    float* r_abar;  // (B,T,M)
    float *rows, *partial;  // (4,B,H,N) and (parts-1,B,T,M), for the kernels alone
    FIELDS(dtype, B, H, key_heads, N, M, T, D, DV, parts, query, key, value, masks, scale, out, lse, by_gradient, row_normalize,
           grad_out, grad_query, grad_key, grad_value, relevancy, residual_weight, attention_weight, residual, r_abar, rows,
           partial)
};

namespace {

constexpr int SLAB = 16;  // rows of a warp at a time, and columns of a step with masks or at an edge
constexpr int MAX_WARPS = 8, MAX_ROWS = 256;
constexpr size_t KEY_BYTES = MAX_ROWS / 8;  // a bit of each key
enum Passes { QUERY_ROWS = 1, KEY_ROWS = 2 };

// Rows of r in one sweep: as many as fit into registers and 99 KB of shared memory.
template <class T, int WIDTH> constexpr int CARRIED = sizeof(T) * WIDTH <= 128 ? 8 : 4;

// Rows of both tiles that are copied as one group, a multiple of a step's. Wide float32 rows are copied all at once: their products
// take longer than their copies, and the loop over chunks would take the registers of a second block.
template <class T, int WIDTH> constexpr int CHUNK = sizeof(T) * WIDTH <= 256 ? 64 : MAX_ROWS;

// ---- what the passes share

// The two tiles of a block. They are copied in the background, chunk after chunk, and while one is worked on the next ones come.
template <class T, int WIDTH> struct Tiles {
    T *first, *second;
    int rows = 0, arrived = 0;

    // For `most` rows each, in whole slabs, at the beginning of shared memory.
    __device__ explicit Tiles(int64_t most)
        : first(static_cast<T*>(shared_memory())),
          second(first + round_up(static_cast<int>(most), SLAB) * tile_stride<T, WIDTH>()) {}

    __device__ void* end() const { return second + (second - first); }

    // Begins to copy a head's rows, padded with zeros to whole slabs, by all threads; without `both` only those of x. The caller
    // has the barrier before it.
    __device__ __forceinline__ void copy(const StridedTensor& x, int x_columns, const StridedTensor& y, int y_columns, bool both,
                                         int b, int h, int64_t num_rows) {
        rows = round_up(static_cast<int>(num_rows), SLAB);
        arrived = 0;
        for (int at = 0; at < rows; at += CHUNK<T, WIDTH>) {
            const int some = rows - at < CHUNK<T, WIDTH> ? rows - at : CHUNK<T, WIDTH>, to = at * tile_stride<T, WIDTH>();
            stage_async<T, WIDTH>(first + to, x.at<T>(b, h), x.stride_n, at, some, num_rows, x_columns);
            if (both) stage_async<T, WIDTH>(second + to, y.at<T>(b, h), y.stride_n, at, some, num_rows, y_columns);
            commit_copies();
        }
    }

    // How many rows are there, one chunk more than the last time, with a barrier, while not all are. All warps take the same turns.
    __device__ __forceinline__ int next() {
        static_assert(MAX_ROWS <= 4 * CHUNK<T, WIDTH>, "a line for each group");
        if (arrived < rows) {
            const int groups_after = (rows - arrived - 1) / CHUNK<T, WIDTH>;
            if (groups_after == 0) wait_for_copies<0>();
            if (groups_after == 1) wait_for_copies<1>();
            if (groups_after == 2) wait_for_copies<2>();
            if (groups_after == 3) wait_for_copies<3>();
            __syncthreads();
            arrived = arrived + CHUNK<T, WIDTH> < rows ? arrived + CHUNK<T, WIDTH> : rows;
        }
        return arrived;
    }

    // step(std::false_type(), k) for whole tiles of STEP rows before `whole`, where there are any, with STEP above 0; then
    // step(std::true_type(), k) for slabs before `end`.
    template <int STEP, class Step> __device__ __forceinline__ void sweep(int whole, int end, Step step) {
        int k = 0;
        do {
            const int to = next(), last_whole = whole < to ? whole : to, last = end < to ? end : to;
            if constexpr (STEP > 0) {
#pragma unroll 1
                for (; k < last_whole; k += STEP) step(std::false_type(), k);
            }
#pragma unroll 1
            for (; k < last; k += SLAB) step(std::true_type(), k);
            k = to;
        } while (CHUNK<T, WIDTH> < MAX_ROWS && k < rows);
    }
};

// Dot products of 16 rows with rows first .. first + 8 NT - 1 of a tile.
template <class T, int WIDTH, int NT>
__device__ __forceinline__ void products(float (&x)[NT][4], const Rows16<T, WIDTH>& left, const T* tile, int first) {
#pragma unroll
    for (int i = 0; i < 4 * NT; ++i) x[i / 4][i % 4] = 0.0f;
    product_with_rows<T, WIDTH>(x, left, tile, first);
}

// Row and column of number e in half `half` of a lane's 16 x 16 products.
__device__ __forceinline__ int row_of(int e) { return lane_row() + e / 2 * 8; }
__device__ __forceinline__ int column_of(int half, int e) { return half * 8 + lane_column() * 2 + e % 2; }

// Bit j % 32 of word j / 32: whether there is a key j and key_mask lets it be seen. By all threads; the caller has the barriers.
__device__ __forceinline__ void stage_keys(uint32_t* bits, const Relevancy& call, int b) {
    const uint8_t* mask = call.masks.keys ? call.masks.keys + b * call.M : nullptr;
    for (int j = threadIdx.x; j < MAX_ROWS; j += blockDim.x) {
        const uint32_t word = __ballot_sync(ALL_LANES, j < call.M && (!mask || mask[j]));
        if (lane_index() == 0) bits[j / WARP] = word;
    }
}

// How many keys, in whole slabs, are seen before the first that is not.
__device__ __forceinline__ int whole_keys(const uint32_t* bits) {
    int whole = 0;
    while (whole < MAX_ROWS && bits[whole / WARP] == 0xffffffffu) whole += WARP;
    return whole < MAX_ROWS && (bits[whole / WARP] & 0xffffu) == 0xffffu ? whole + SLAB : whole;
}

// Products are made for a scale of at least 0, so that the greatest product is the greatest logit: one operand takes the sign.
__device__ __forceinline__ float log2_scale(const Relevancy& call) { return fabsf(call.scale) * LOG2_E; }
template <class T, int WIDTH>
__device__ __forceinline__ void load_signed(Rows16<T, WIDTH>& x, const StridedTensor& from, const Relevancy& call, int b, int h,
                                            int first, int64_t num_rows) {
    x.load(from.at<const T>(b, h), from.stride_n, first, num_rows, call.D);
    if (call.scale < 0.0f) x.negate();
}

// Base-2 logits from products at an edge or under masks: -inf where a pair is masked or does not exist. PAIRS: there is an
// attn_mask. Without KEYS_ARE_ROWS `bits` has the keys; with it keys that are not seen are left to the caller.
template <bool PAIRS, bool KEYS_ARE_ROWS>
__device__ __forceinline__ void to_logits(float (&x)[2][4], const Relevancy& call, const uint32_t* bits, int b, int h, int row,
                                          int column) {
    const float scale = log2_scale(call);
    const int N = static_cast<int>(call.N), M = static_cast<int>(call.M);
    const uint32_t seen = KEYS_ARE_ROWS ? 0 : bits[column / WARP] >> column % WARP;
    const int64_t head = b * call.masks.stride_b + h * call.masks.stride_h;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const int first = row + row_of(n % 4), apart = column_of(n / 4, n % 4), second = column + apart;
        const int i = KEYS_ARE_ROWS ? second : first, j = KEYS_ARE_ROWS ? first : second;
        bool visible = KEYS_ARE_ROWS ? i < N : seen >> apart & 1;
        if (call.masks.causal) visible = visible && j <= i;
        float& y = x[n / 4][n % 4];
        y = visible ? y * scale : -INFINITY;
        if (PAIRS && visible && i < N && j < M)
            y = call.masks.with_pair(y, head + i * call.masks.stride_n + j * call.masks.stride_m);
    }
}

// Online softmax of rows g and g+8: the largest logit so far and this lane's sum of 2^(logit - largest). With has_lse the
// log-sum-exp stands in place of the largest logit.
struct Softmax {
    bool has_lse = false;
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};

    // What is subtracted from logits. It is finite, or +inf for a fully masked row with has_lse: its probabilities are 0.
    __device__ __forceinline__ float shift(int r) const { return top[r] == -INFINITY ? 0.0f : top[r]; }

    // Turns products into powers, or with LOGITS logits. Earlier sums must be multiplied by `shrink`.
    template <bool LOGITS, int NT> __device__ __forceinline__ void add(float (&x)[NT][4], float scale, float (&shrink)[2]) {
        float off[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            shrink[r] = 1.0f;
            if (!has_lse) {
                const float before = top[r];
                float here = fmaxf(x[0][2 * r], x[0][2 * r + 1]);
#pragma unroll
                for (int n = 1; n < NT; ++n) here = fmaxf(here, fmaxf(x[n][2 * r], x[n][2 * r + 1]));
                here = row_max(here);
                top[r] = fmaxf(before, LOGITS ? here : here * scale);
                shrink[r] = fast_exp2(before - shift(r));
                total[r] *= shrink[r];
            }
            off[r] = shift(r);
        }
#pragma unroll
        for (int i = 0; i < 4 * NT; ++i) {
            float& y = x[i / 4][i % 4];
            y = power<LOGITS>(y, scale, off[i % 4 / 2]);
            total[i % 4 / 2] += y;
        }
    }

    // 2^(logit - shift)
    template <bool LOGIT> static __device__ __forceinline__ float power(float x, float scale, float shift) {
        return fast_exp2(LOGIT ? x - shift : fmaf(x, scale, -shift));
    }
};

// Stores rows first .. first+15 of a head, each times its factor. A factor of 0 gives zeros even for NaN.
template <class T, int WIDTH>
__device__ __forceinline__ void store(const float (&x)[WIDTH / 8][4], const float (&factor)[2], const StridedTensor& to, int b,
                                      int h, int first, int64_t num_rows, int num_cols) {
    T* p = to.at<T>(b, h);
    const bool pairs = num_cols % 2 == 0 && to.stride_n % 2 == 0 && reinterpret_cast<uintptr_t>(p) % (2 * sizeof(T)) == 0;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = first + lane_row() + 8 * r, col = n * 8 + lane_column() * 2;
            if (row >= num_rows || col >= num_cols) continue;
            struct alignas(2 * sizeof(T)) Pair {
                T x, y;
            } pair = {from_float<T>(factor[r] == 0.0f ? 0.0f : x[n][2 * r] * factor[r]),
                      from_float<T>(factor[r] == 0.0f ? 0.0f : x[n][2 * r + 1] * factor[r])};
            T* at = p + row * to.stride_n + col;
            if (pairs) {
                *reinterpret_cast<Pair*>(at) = pair;
            } else {
                at[0] = pair.x;
                if (col + 1 < num_cols) at[1] = pair.y;
            }
        }
    }
}

// The first of the 16 rows of this warp, and the distance to its next ones.
__device__ __forceinline__ int first_row() { return warp_index() * SLAB; }
__device__ __forceinline__ int next_rows() { return blockDim.x / WARP * SLAB; }

// No query of these 16 sees a key from here on.
__device__ __forceinline__ int key_end(const Relevancy& call, int first) {
    const int end = static_cast<int>(call.M);
    return call.masks.causal && first + SLAB < end ? first + SLAB : end;
}

// And every one of them sees all keys up to here, of which there are `seen` without a hole.
__device__ __forceinline__ int whole_end(const Relevancy& call, int seen, int first) {
    return call.masks.causal && first < seen ? first : seen;
}

// ---- forward: one block per head

// Whole tiles have no masks, and of 16-bit types two slabs of keys at a time, which share the work on `out`.
template <class T, int WIDTH, bool PAIRS>
__global__ void __launch_bounds__(MAX_WARPS* WARP) relevancy_forward_kernel(const __grid_constant__ Relevancy call) {
    constexpr int WHOLE = sizeof(T) == 2 ? 4 : 2;  // by eight keys
    const int heads = static_cast<int>(call.H), b = blockIdx.x / heads, h = blockIdx.x % heads;
    const int key_head = h / (heads / static_cast<int>(call.key_heads));
    Tiles<T, WIDTH> tiles(call.M);  // keys and values
    uint32_t* bits = static_cast<uint32_t*>(tiles.end());
    tiles.copy(call.key, call.D, call.value, call.DV, true, b, key_head, call.M);
    stage_keys(bits, call, b);
    __syncthreads();
    const int seen = PAIRS ? 0 : whole_keys(bits);
    const float scale = log2_scale(call);
    for (int first = first_row(); first < call.N; first += next_rows()) {
        Rows16<T, WIDTH> query;
        load_signed<T, WIDTH>(query, call.query, call, b, h, first, call.N);
        float out[WIDTH / 8][4] = {};
        Softmax softmax;
        const auto step = [&](auto edge, int k) {
            constexpr bool EDGE = decltype(edge)::value;
            constexpr int NT = EDGE ? 2 : WHOLE;
            float p[NT][4], shrink[2];
            products<T, WIDTH>(p, query, tiles.first, k);
            if constexpr (EDGE) to_logits<PAIRS, false>(p, call, bits, b, h, first, k);
            softmax.add<EDGE>(p, scale, shrink);
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) out[n][e] *= shrink[e / 2];
            }
#pragma unroll
            for (int n = 0; n < NT; n += 2)
                product_with_columns<T, WIDTH>(out, reinterpret_cast<float(&)[2][4]>(p[n]), tiles.second, k + n * 8);
        };
        const int whole = whole_end(call, seen, first) / (8 * WHOLE) * (8 * WHOLE);
        tiles.template sweep<PAIRS ? 0 : 8 * WHOLE>(whole, key_end(call, first), step);
        float factor[2];
        for (int r = 0; r < 2; ++r) {
            const float total = row_sum(softmax.total[r]);
            factor[r] = total == 0.0f ? 0.0f : 1.0f / total;
            const int row = first + row_of(2 * r);
            if (lane_column() == 0 && row < call.N)
                call.lse[(b * call.H + h) * call.N + row] = natural_lse(softmax.shift(r), total);
        }
        store<T, WIDTH>(out, factor, call.out, b, h, first, call.N, call.DV);
    }
}

// ---- backward: one block per sample, or per range of its heads

// Of each row (B,H,N): SHIFT and WEIGHT, with which P = 2^(logit - SHIFT) * WEIGHT, DELTA = sum(P dP), and SUM, the row sum of
// this head's A or relu(A * dA). `partial` has sums of r Abar, (B,T,M), for all ranges of heads but the first.
enum RowData { SHIFT, WEIGHT, DELTA, SUM };
__device__ __forceinline__ float* row_data(const Relevancy& call, RowData what) {
    return call.rows + what * call.B * call.H * call.N;
}

// An empty tensor has no data either: with head_dim 0 only the values have a gradient.
__device__ __forceinline__ bool with_gradients(const Relevancy& call) { return call.grad_query.data || call.grad_value.data; }
__host__ __device__ inline bool with_sums(const Relevancy& call) { return call.row_normalize && call.T > 0; }

// Whether `of_row` holds for one of the 16 rows of a warp.
__device__ __forceinline__ bool any_row(const bool (&of_row)[2]) {
    int any = of_row[0] || of_row[1];
    for (int lanes = 4; lanes < WARP; lanes *= 2) any |= __shfl_xor_sync(ALL_LANES, any, lanes);
    return any != 0;
}

// sum(grad_out * out) of rows g and g+8, in 16-bit types as the operands of products have them.
template <class T, int WIDTH>
__device__ __forceinline__ void dot_rows(float (&sum)[2], const Rows16<T, WIDTH>& x, const Rows16<T, WIDTH>& y) {
    if constexpr (sizeof(T) == 2) {
        sum[0] = sum[1] = 0.0f;
#pragma unroll
        for (int s = 0; s < WIDTH / 16; ++s) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                T a[2], b[2];
                memcpy(static_cast<void*>(a), &x.a[s][i], sizeof(a));
                memcpy(static_cast<void*>(b), &y.a[s][i], sizeof(b));
                sum[i % 2] = fmaf(to_float(a[0]), to_float(b[0]), sum[i % 2]);
                sum[i % 2] = fmaf(to_float(a[1]), to_float(b[1]), sum[i % 2]);
            }
        }
        for (float& x : sum) x = row_sum(x);
    }
}

// Queries as rows: their statistics, and dQ.
template <class T, int WIDTH, bool PAIRS>
__device__ void query_rows(const Relevancy& call, int b, int key_head, Tiles<T, WIDTH>& tiles, const uint32_t* bits) {
    const bool gradients = with_gradients(call), sums = with_sums(call), dp_of_sums = sums && call.by_gradient;
    const bool own_lse = gradients || call.out.data;  // otherwise it is the caller's and may count keys that are not here
    const bool may_be_coarse = own_lse || call.masks.kind == Masks::ADDED;
    if (!call.lse || may_be_coarse || sums) {  // otherwise lse has all that is needed
        __syncthreads();
        tiles.copy(call.key, call.D, call.value, call.DV, gradients || dp_of_sums, b, key_head, call.M);
        const bool all_sweep = !call.lse || gradients || sums;  // otherwise only warps with a coarse row do
        while (!all_sweep && tiles.arrived < tiles.rows) tiles.next();
    }
    const int group = static_cast<int>(call.H / call.key_heads), seen = PAIRS ? 0 : whole_keys(bits);
    const float log2_of_scale = log2_scale(call);
    for (int h = key_head * group; h < (key_head + 1) * group; ++h) {
        for (int round = 0; round < call.N; round += next_rows()) {
            const int first = round + first_row();
            const int64_t at = (static_cast<int64_t>(b) * call.H + h) * call.N + first;
            Rows16<T, WIDTH> query, grad;
            load_signed<T, WIDTH>(query, call.query, call, b, h, first, call.N);
            const int64_t grad_end = gradients || dp_of_sums ? call.N : 0;
            grad.load(call.grad_out.at<const T>(b, h), call.grad_out.stride_n, first, grad_end, call.DV);
            Softmax rows;
            float shift[2], weight[2] = {1.0f, 1.0f}, delta[2] = {0.0f, 0.0f}, scale[2];
            bool coarse[2] = {};
            if (call.lse) {
                for (int r = 0; r < 2; ++r) {
                    const float lse = first + row_of(2 * r) < call.N ? call.lse[at + row_of(2 * r)] : -INFINITY;
                    coarse[r] = may_be_coarse && is_coarse(lse, own_lse ? OWN_LSE : CALLER_LSE);
                    rows.top[r] = shift[r] = lse == -INFINITY ? INFINITY : lse * LOG2_E;
                }
                rows.has_lse = !any_row(coarse) && (!own_lse || sizeof(T) == 2);  // in float32 the rounding of lse always shows
                if (!rows.has_lse) rows.top[0] = rows.top[1] = -INFINITY;
            }
            if (gradients && rows.has_lse) {
                Rows16<T, WIDTH> out;
                out.load(call.out.at<const T>(b, h), call.out.stride_n, first, call.N, call.DV);
                dot_rows<T, WIDTH>(delta, grad, out);
            }
            float grad_query[WIDTH / 8][4] = {};
            // the first sweep over the keys computes missing statistics of the rows, the second dQ
            for (int sweep = sums || !rows.has_lse ? 0 : 1; sweep < (gradients ? 2 : 1); ++sweep) {
                const bool with_dp = sweep == 1 || dp_of_sums || (gradients && !rows.has_lse);
                float moment[2] = {0.0f, 0.0f}, positive[2] = {0.0f, 0.0f};  // sums of P dP and of relu(P dP)
                const auto step = [&](auto edge, int k) {
                    constexpr bool EDGE = decltype(edge)::value;
                    float p[2][4], dp[2][4] = {}, shrink[2];
                    products<T, WIDTH>(p, query, tiles.first, k);
                    if constexpr (EDGE) to_logits<PAIRS, false>(p, call, bits, b, h, first, k);
                    if (with_dp) products<T, WIDTH>(dp, grad, tiles.second, k);
                    if (sweep == 0) {
                        rows.add<EDGE>(p, log2_of_scale, shrink);
                        for (int r = 0; r < 2; ++r) moment[r] *= shrink[r], positive[r] *= shrink[r];
#pragma unroll
                        for (int i = 0; i < 8; ++i) {
                            const float product = p[i / 4][i % 4] * dp[i / 4][i % 4];
                            moment[i % 4 / 2] += product;
                            positive[i % 4 / 2] += product < 0.0f ? 0.0f : product;  // a maximum would drop NaN
                        }
                    } else {
#pragma unroll
                        for (int i = 0; i < 8; ++i) {
                            const int r = i % 4 / 2;
                            float& x = p[i / 4][i % 4];
                            x = Softmax::power<EDGE>(x, log2_of_scale, shift[r]) * weight[r] * (dp[i / 4][i % 4] - delta[r]);
                        }
                        product_with_columns<T, WIDTH>(grad_query, p, tiles.first, k);
                    }
                };
                const bool exist = first < call.N;  // a warp without queries waits with the others
                tiles.template sweep<PAIRS ? 0 : SLAB>(
                    exist ? whole_end(call, seen, first) : 0, exist ? key_end(call, first) : 0, step);
                for (int r = 0; r < 2 && sweep == 0; ++r) {
                    const float total = row_sum(rows.total[r]), mean = row_sum(moment[r]);
                    float factor = weight[r];
                    if (!rows.has_lse && call.lse && !own_lse && !coarse[r]) {
                        factor = fast_exp2(rows.shift(r) - shift[r]);  // a row beside a coarse one: lse says all of it
                    } else if (!rows.has_lse) {
                        shift[r] = total == 0.0f ? INFINITY : rows.shift(r);
                        factor = weight[r] = total == 0.0f ? 1.0f : 1.0f / total;
                        delta[r] = mean * weight[r];
                    }
                    const float sum = (call.by_gradient ? row_sum(positive[r]) : total) * factor;
                    if (lane_column() == 0 && first + row_of(2 * r) < call.N) row_data(call, SUM)[at + row_of(2 * r)] = sum;
                }
            }
            for (int r = 0; r < 2; ++r) scale[r] = shift[r] == INFINITY ? 0.0f : call.scale;
            if (gradients) store<T, WIDTH>(grad_query, scale, call.grad_query, b, h, first, call.N, call.D);
            for (int r = 0; r < 2; ++r) {
                if (lane_column() != 0 || first + row_of(2 * r) >= call.N) continue;
                row_data(call, SHIFT)[at + row_of(2 * r)] = shift[r];
                row_data(call, WEIGHT)[at + row_of(2 * r)] = weight[r];
                row_data(call, DELTA)[at + row_of(2 * r)] = delta[r];
            }
        }
    }
}

// Copies to shared memory what the pass over keys reads of each query of a head: SHIFT, WEIGHT, DELTA, then rows of r from
// `first` on. r is divided by the number of heads, or by the row sum of Abar. Each has `length` numbers, N padded to whole slabs.
__device__ void stage_columns(float* columns, int length, const Relevancy& call, int b, int h, int first, int num_rows) {
    for (int i = threadIdx.x; i < length; i += blockDim.x) {
        const bool exists = i < call.N;
        const int64_t at = (static_cast<int64_t>(b) * call.H + h) * call.N + i;
        columns[SHIFT * length + i] = exists ? row_data(call, SHIFT)[at] : INFINITY;
        columns[WEIGHT * length + i] = exists ? row_data(call, WEIGHT)[at] : 1.0f;
        columns[DELTA * length + i] = exists ? row_data(call, DELTA)[at] : 0.0f;
        float factor = 1.0f / static_cast<float>(call.H);
        if (exists && with_sums(call)) {
            float sum = 0.0f;
            for (int64_t head = 0; head < call.H; ++head) sum += row_data(call, SUM)[(b * call.H + head) * call.N + i];
            factor = sum < 1.17549435e-38f ? 0.0f : 1.0f / sum;  // the reciprocal of a subnormal number overflows
        }
        if (exists && call.attention_weight.data)
            factor *= call.attention_weight.data[b * call.attention_weight.stride_b + i * call.attention_weight.stride_n];
        for (int t = 0; t < num_rows; ++t)
            columns[(3 + t) * length + i] = exists ? call.relevancy[(b * call.T + first + t) * call.N + i] * factor : 0.0f;
    }
}

// Keys as rows: with `gradients` dK and dV of one key head, and its share of r Abar for rows of r from `carried` on, added to
// `r_abar` (T,M).
template <class T, int WIDTH, bool PAIRS>
__device__ void key_rows(const Relevancy& call, bool gradients, int b, int key_head, Tiles<T, WIDTH>& tiles, float* columns,
                         int carried, float* r_abar) {
    const int group = static_cast<int>(call.H / call.key_heads), length = round_up(static_cast<int>(call.N), SLAB);
    const int left = static_cast<int>(call.T) - carried, num_rows = left < CARRIED<T, WIDTH> ? left : CARRIED<T, WIDTH>;
    const bool with_dp = gradients || call.by_gradient, causal = call.masks.causal;
    const int N = static_cast<int>(call.N), whole_queries = N / SLAB * SLAB;
    const float log2_of_scale = log2_scale(call);
    for (int round = 0; round < call.M; round += next_rows()) {
        const int first = round + first_row();
        Rows16<T, WIDTH> key, value;
        load_signed<T, WIDTH>(key, call.key, call, b, key_head, first, call.M);
        value.load(call.value.at<const T>(b, key_head), call.value.stride_n, first, with_dp ? call.M : 0, call.DV);
        float grad_key[WIDTH / 8][4] = {}, grad_value[WIDTH / 8][4] = {}, sums[CARRIED<T, WIDTH>][2] = {};
        for (int h = key_head * group; h < (key_head + 1) * group; ++h) {
            if (round == 0 || group > 1) {
                __syncthreads();
                tiles.copy(call.query, call.D, call.grad_out, call.DV, with_dp, b, h, call.N);
                stage_columns(columns, length, call, b, h, carried, num_rows);  // there with the first chunk
            }
            // keys that are not seen have rows of their own, which are not stored
            const auto step = [&](auto edge, int q) {
                constexpr bool EDGE = decltype(edge)::value;
                float p[2][4], dp[2][4] = {};
                products<T, WIDTH>(p, key, tiles.first, q);
                if constexpr (EDGE) to_logits<PAIRS, true>(p, call, nullptr, b, h, first, q);
                if (with_dp) products<T, WIDTH>(dp, value, tiles.second, q);
                const float* at = columns + q + lane_column() * 2;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 shift = *reinterpret_cast<const float2*>(at + SHIFT * length + half * 8);
                    const float2 weight = *reinterpret_cast<const float2*>(at + WEIGHT * length + half * 8);
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float& x = p[half][e];
                        x = Softmax::power<EDGE>(x, log2_of_scale, e % 2 ? shift.y : shift.x) * (e % 2 ? weight.y : weight.x);
                    }
                }
                if (gradients) product_with_columns<T, WIDTH>(grad_value, p, tiles.second, q);
                if (num_rows > 0) {
                    float share[2][4];
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        const float x = p[i / 4][i % 4], product = x * dp[i / 4][i % 4];
                        share[i / 4][i % 4] = !call.by_gradient ? x : product < 0.0f ? 0.0f : product;
                    }
#pragma unroll
                    for (int t = 0; t < CARRIED<T, WIDTH>; ++t) {
                        if (t >= num_rows) break;
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            const float2 r = *reinterpret_cast<const float2*>(at + (3 + t) * length + half * 8);
#pragma unroll
                            for (int e = 0; e < 4; ++e) sums[t][e / 2] = fmaf(share[half][e], e % 2 ? r.y : r.x, sums[t][e / 2]);
                        }
                    }
                }
                if (!gradients) return;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 delta = *reinterpret_cast<const float2*>(at + DELTA * length + half * 8);
#pragma unroll
                    for (int e = 0; e < 4; ++e) p[half][e] *= dp[half][e] - (e % 2 ? delta.y : delta.x);
                }
                product_with_columns<T, WIDTH>(grad_key, p, tiles.first, q);
            };
            // under a causal mask earlier queries see none of these keys, and those of the first slab some
            const int begin = causal ? first : 0, whole = causal ? first + SLAB : 0;
            const int whole_end = PAIRS || whole_queries < whole ? whole : whole_queries;
            const int num_queries = first < call.M ? N : 0;  // a warp without keys waits with the others
            int from = 0;
            do {
                const int to = tiles.next(), end = num_queries < to ? num_queries : to;
                if constexpr (!PAIRS) {
                    const int last_whole = whole_end < end ? whole_end : end;
#pragma unroll 1
                    for (int q = whole < from ? from : whole; q < last_whole; q += SLAB) step(std::false_type(), q);
                }
                // with an attn_mask there is nothing else; without it the few slabs at edges come last
                int q = PAIRS && begin < from ? from : PAIRS || to == tiles.rows ? begin : end;
#pragma unroll 1
                for (; q < end; q += SLAB) {
                    if (q == whole) q = whole_end;
                    if (q < end) step(std::true_type(), q);
                }
                from = to;
            } while (CHUNK<T, WIDTH> < MAX_ROWS && from < tiles.rows);
        }
        float scale[2], one[2];
        for (int r = 0; r < 2; ++r) {
            const int row = first + row_of(2 * r);
            const bool seen = row < call.M && (!call.masks.keys || call.masks.keys[b * call.M + row]);
            scale[r] = seen ? call.scale : 0.0f;
            one[r] = seen ? 1.0f : 0.0f;
#pragma unroll
            for (int t = 0; t < CARRIED<T, WIDTH>; ++t) {
                const float sum = row_sum(sums[t][r]);
                if (t < num_rows && lane_column() == t % 4 && seen) r_abar[(carried + t) * call.M + row] += sum;
            }
        }
        if (gradients) {
            store<T, WIDTH>(grad_key, scale, call.grad_key, b, key_head, first, call.M, call.D);
            store<T, WIDTH>(grad_value, one, call.grad_value, b, key_head, first, call.M, call.DV);
        }
    }
}

template <class T, int WIDTH, bool PAIRS>
__global__ void __launch_bounds__(MAX_WARPS* WARP) relevancy_backward_kernel(const __grid_constant__ Relevancy call, int passes) {
    const int parts = call.parts, b = blockIdx.x / parts, part = blockIdx.x % parts, key_heads = static_cast<int>(call.key_heads);
    const int begin = part * key_heads / parts, end = (part + 1) * key_heads / parts;
    const int64_t rows = call.N > call.M ? call.N : call.M, size = call.T * call.M;
    Tiles<T, WIDTH> tiles(rows);
    uint32_t* bits = static_cast<uint32_t*>(tiles.end());
    float* columns = reinterpret_cast<float*>(bits + MAX_ROWS / WARP);
    float* r_abar = (part == 0 ? call.r_abar : call.partial + (part - 1) * call.B * size) + b * size;
    if (passes & KEY_ROWS) {
        for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
            float kept = 0.0f;
            if (call.residual && part == 0) {
                const RowWeight& weight = call.residual_weight;
                kept = call.relevancy[b * call.T * call.N + i];
                if (weight.data) kept *= weight.data[b * weight.stride_b + i % call.M * weight.stride_n];
            }
            r_abar[i] = kept;
        }
    }
    stage_keys(bits, call, b);
    __syncthreads();
    // row sums need all heads first; without them a head's keys follow its queries, while both are in the cache
    const int together = with_sums(call) ? end - begin : 1;
    for (int head = begin; head < end; head += together) {
        for (int i = head; passes & QUERY_ROWS && call.N > 0 && i < head + together; ++i)
            query_rows<T, WIDTH, PAIRS>(call, b, i, tiles, bits);
        for (int i = head; passes & KEY_ROWS && i < head + together; ++i) {
            bool gradients = with_gradients(call);
            for (int t = 0; gradients || t < call.T; t += CARRIED<T, WIDTH>, gradients = false)
                key_rows<T, WIDTH, PAIRS>(call, gradients, b, i, tiles, columns, t, r_abar);
        }
    }
}

__global__ void add_parts_kernel(Relevancy call) {
    const int64_t size = call.B * call.T * call.M, i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size) return;
    float sum = call.r_abar[i];
    for (int part = 1; part < call.parts; ++part) sum += call.partial[(part - 1) * size + i];
    call.r_abar[i] = sum;
}

// ---- launches

// The fewest warps that need no more rounds over these rows than MAX_WARPS.
int threads_for(int64_t rows) {
    const int64_t slabs = std::max<int64_t>(1, divide_up(rows, SLAB));
    return static_cast<int>(divide_up(slabs, divide_up(slabs, MAX_WARPS))) * WARP;
}

// Calls use(T(), width, pairs) with the tiles' width, and whether there is an attn_mask, as constants. Causality and the key mask
// take no instruction in whole tiles, and are no constants.
template <class Use> cudaError_t with_pairs(const Relevancy& call, Use use) {
    return with_shape(call.dtype, std::max(call.D, call.DV), [&](auto type, auto width) {
        return call.masks.kind == Masks::NONE ? use(type, width, std::false_type()) : use(type, width, std::true_type());
    });
}

bool too_large(const Relevancy& call) { return std::max(call.D, call.DV) > 128 || std::max(call.N, call.M) > MAX_ROWS; }

cudaError_t relevancy_attention(const Relevancy& call, cudaStream_t stream) {
    if (too_large(call)) return cudaErrorInvalidValue;
    return with_pairs(call, [&](auto type, auto width, auto pairs) {
        using T = decltype(type);
        constexpr int WIDTH = decltype(width)::value;
        constexpr bool PAIRS = decltype(pairs)::value;
        const size_t shared = 2 * tile_bytes<T, WIDTH>(round_up(static_cast<int>(call.M), SLAB)) + KEY_BYTES;
        const int64_t blocks = call.N > 0 ? call.B * call.H : 0;
        return launch(relevancy_forward_kernel<T, WIDTH, PAIRS>, blocks, threads_for(call.N), shared, stream, call);
    });
}

// Gradients and r Abar, or r Abar alone.
cudaError_t relevancy_step(const Relevancy& call, cudaStream_t stream) {
    if (too_large(call) || call.parts < 1) return cudaErrorInvalidValue;
    const int parts = call.parts;
    const int first_pass = call.H > 0 ? QUERY_ROWS : 0;  // it copies keys, for which the first query of a head waits
    const int64_t longest = std::max(call.N, call.M);
    const cudaError_t status = with_pairs(call, [&](auto type, auto width, auto pairs) {
        using T = decltype(type);
        constexpr int WIDTH = decltype(width)::value;
        constexpr bool PAIRS = decltype(pairs)::value;
        const size_t of_queries = sizeof(float) * (3 + std::min<int64_t>(call.T, CARRIED<T, WIDTH>));
        const size_t shared = 2 * tile_bytes<T, WIDTH>(round_up(static_cast<int>(longest), SLAB)) + KEY_BYTES +
                              of_queries * round_up(static_cast<int>(call.N), SLAB);
        const auto run = [&](int passes) {
            return launch(
                relevancy_backward_kernel<T, WIDTH, PAIRS>, call.B * parts, threads_for(longest), shared, stream, call, passes);
        };
        if (parts == 1 || !with_sums(call)) return run(first_pass | KEY_ROWS);
        const cudaError_t first = run(first_pass);  // row sums of all ranges of heads are divisors
        return first == cudaSuccess ? run(KEY_ROWS) : first;
    });
    if (status != cudaSuccess || parts == 1) return status;
    return launch(add_parts_kernel, divide_up(call.B * call.T * call.M, 256), 256, size_t{0}, stream, call);
}
cudaError_t relevancy_attention_backward(const Relevancy& call, cudaStream_t stream) { return relevancy_step(call, stream); }

}  // namespace
}  // namespace vlattn

OPERATOR(relevancy_attention, Relevancy)
OPERATOR(relevancy_attention_backward, Relevancy)
OPERATOR(relevancy_step, Relevancy)
