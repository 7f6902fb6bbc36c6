// The gradients of attention over long sequences together with r Abar, Abar = mean_h max(0, A * dA), on sm_90.
//
// query q (B,H,N,D), key k (B,key_heads,N,D), value v (B,key_heads,N,DV), r (B,T,N), T <= 1 -> r_abar (B,T,N); 16 bits,
// D, DV <= 128, multiples of 8, rows at multiples of 16 bytes. No mask but the causal one.
//   A_ij = 2^(scale log2(e) q_i . k_j - shift_i), shift_i = lse_i log2(e)      dA_ij = dout_i . v_j
//   delta_i = dout_i . out_i      dS_ij = A_ij (dA_ij - delta_i)
//   dq_i = scale sum_j dS_ij k_j      dk_j = scale sum_i dS_ij q_i      dv_j = sum_i A_ij dout_i
//   r_abar_j = a_j r_j + sum_h sum_i (b_i / H) r_i max(0, A_ij dA_ij)
// A block has 128 keys of a key head and goes through the queries, 64 at a time. Each of its two warp groups has the 64 keys of
// one half, whose A and dA are rows [key, query] of the products K Q^T and V dO^T; dk and dv stay in registers. A and dS enter
// dv += A dO and dk += dS Q from registers, too. dS lies in shared memory as well: dq of a tile is its product with all 128 keys,
// of which each warp group has half of the features.
// dq is a sum over blocks. They take turns: a number for each tile of queries says how many have added to it, and the order is
// that of the keys, so that results have the same bits in each run. The first block writes its sum, those between add with
// instructions that do not wait, and the last one reads the sum and writes dq. A block only waits for blocks that began before it,
// as `turns` counts them: it cannot wait for ever. With the causal mask the last keys come first, whose queries are the fewest:
// block n then comes to tile i when block n+1 has left it.
// Why CUDA C++: five products a pair, where our Triton kernels take seven, in two kernels; Triton has no turns. Not measured on a
// GPU. The estimate is in docs/developers/kernels.md.
#include <algorithm>

#include "attention.h"
#include "wgmma.h"

namespace vlattn {

// A weight of each row (B,N), strides in elements; null: 1.
struct RowWeight {
    const float* data;
    int64_t stride_b, stride_n;
    FIELDS(data, stride_b, stride_n)

    __device__ float at(int64_t b, int64_t n) const { return data ? data[b * stride_b + n * stride_n] : 1.0f; }
};

struct Relevancy {
    DType dtype;
    int64_t B, H, key_heads, N, M, T;
    int D, DV;
    StridedTensor query, key, value;  // (B,H,N,D), (B,key_heads,M,D), (B,key_heads,M,DV)
    Masks masks;
    float scale;
    StridedTensor out;  // (B,H,N,DV)
    const float* lse;  // (B,H,N), natural
    StridedTensor grad_out;  // (B,H,N,DV)
    StridedTensor grad_query, grad_key, grad_value;
    const float* relevancy;  // r (B,T,N), contiguous; null: only gradients are needed
    RowWeight residual_weight, attention_weight;  // a, b
    float* r_abar;  // (B,key_heads,T,M): the share of each key head, and the first term in that of the first
    // for the kernels alone
    float* rows;  // (ROW_DATA,B,H,padded N)
    float* sums;  // of dq
    uint32_t* turns;  // whose turn it is to add
    FIELDS(dtype, B, H, key_heads, N, M, T, D, DV, query, key, value, masks, scale, out, lse, grad_out, grad_query, grad_key,
           grad_value, relevancy, residual_weight, attention_weight, r_abar, rows, sums, turns)
};

namespace {

constexpr int KEYS = 128, QUERIES = 64, FEATURES = 128, THREADS = 2 * WARP_GROUP;
constexpr int STAGES = 3;  // tiles of queries: products may read the one before while the one after is copied
enum RowData { SHIFT, DELTA, CARRIED, ROW_DATA };  // of each query; CARRIED: r b / H

constexpr uint32_t KEY_BYTES = KEYS * FEATURES * 2, QUERY_BYTES = QUERIES * FEATURES * 2, ROW_BYTES = 4 * ROW_DATA * QUERIES;
// The places of a block's tiles in shared memory. GRADIENTS is dS [key, query], NUMBER the block's.
constexpr uint32_t KEY = 0, VALUE = KEY + KEY_BYTES, QUERY = VALUE + KEY_BYTES, GRAD_OUT = QUERY + STAGES * QUERY_BYTES,
                   GRADIENTS = GRAD_OUT + STAGES * QUERY_BYTES, ROWS = GRADIENTS + KEYS * QUERIES * 2,
                   NUMBER = ROWS + STAGES * ROW_BYTES, SHARED_BYTES = NUMBER + 16;

__host__ __device__ int tiles_of(int64_t rows) { return static_cast<int>(divide_up(rows, QUERIES)); }
__host__ __device__ int64_t padded(const Relevancy& call) { return static_cast<int64_t>(tiles_of(call.N)) * QUERIES; }

// RowData of all queries, (ROW_DATA,B,H,padded N), for rows beyond N as of a fully masked row; and no turns yet. A warp has two
// rows.
template <class T> __global__ void __launch_bounds__(THREADS) relevancy_rows_kernel(const __grid_constant__ Relevancy call) {
    constexpr int LANES = 16, COLUMNS = 8;
    const int64_t length = padded(call), size = call.B * call.H * length;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
    const int64_t numbers = call.B * call.H * tiles_of(call.N) + 1,
                  thread = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (thread < numbers) call.turns[thread] = 0;
    const int64_t head = at / length, row = at % length, b = head / call.H, h = head % call.H;
    const int column = threadIdx.x % LANES * COLUMNS;
    const bool exists = at < size && row < call.N;
    float delta = 0.0f;
    if (exists && column < call.DV) {
        const T *from = call.grad_out.at<T>(b, h) + row * call.grad_out.stride_n,
                *out = call.out.at<T>(b, h) + row * call.out.stride_n;
        const uint4 bits[2] = {*reinterpret_cast<const uint4*>(from + column), *reinterpret_cast<const uint4*>(out + column)};
        T x[COLUMNS], y[COLUMNS];
        memcpy(static_cast<void*>(x), bits, sizeof(x));
        memcpy(static_cast<void*>(y), bits + 1, sizeof(y));
#pragma unroll
        for (int e = 0; e < COLUMNS; ++e) delta = fmaf(to_float(x[e]), to_float(y[e]), delta);
    }
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) delta += __shfl_xor_sync(ALL_LANES, delta, lanes);
    if (column > 0 || at >= size) return;
    call.rows[SHIFT * size + at] = exists ? lse_log2(call.lse + head * call.N, row, call.N) : INFINITY;
    call.rows[DELTA * size + at] = exists ? delta : 0.0f;
    const bool carried = exists && call.T > 0;
    call.rows[CARRIED * size + at] =
        carried ? call.relevancy[b * call.N + row] * call.attention_weight.at(b, row) / static_cast<float>(call.H) : 0.0f;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// max(0, x), which stays NaN where x is.
__device__ __forceinline__ float relu(float x) {
    float y;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint32_t turn_of(const uint32_t* turn) {
    uint32_t number;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(number) : "l"(turn) : "memory");
    return number;
}
__device__ __forceinline__ void set_turn(uint32_t* turn, uint32_t number) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(turn), "r"(number) : "memory");
}
__device__ __forceinline__ void add(float* to, const float (&x)[4]) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
}

// Which keys a block has, and which tiles of queries see them.
struct Keys {
    int b, key_head;
    int block, blocks;  // of keys
    int first, tiles;  // of queries: those that see these keys, and the end

    __device__ Keys(const Relevancy& call, int number) {
        blocks = static_cast<int>(divide_up(call.N, KEYS));
        tiles = tiles_of(call.N);
        const int64_t of_a_head = call.H / call.key_heads * call.N * FEATURES * 8;  // q, dout, and dq in float32
        const int heads = static_cast<int>(call.B * call.key_heads);
        constexpr int64_t IN_L2 = 32 << 20;  // bytes of heads whose blocks run at the same time
        int together = static_cast<int>(IN_L2 / of_a_head);
        together = together < 1 ? 1 : together;
        const int before = number / (together * blocks) * together;  // heads
        const int here = min(together, heads - before), rest = number - before * blocks, head = before + rest % here;
        block = call.masks.causal ? blocks - 1 - rest / here : rest / here;
        first = call.masks.causal ? block * (KEYS / QUERIES) : 0;
        b = head / static_cast<int>(call.key_heads), key_head = head % static_cast<int>(call.key_heads);
    }
    // How many blocks add to dq of this tile before this one does, and whether none does after it.
    __device__ uint32_t turn(bool causal, int tile) const {
        return causal ? min(blocks - 1, tile * QUERIES / KEYS) - block : block;
    }
    __device__ bool is_last(bool causal) const { return block == (causal ? 0 : blocks - 1); }
};

// A tile of queries of a head, and where what belongs to it lies.
struct Step {
    int h, tile, stage;

    __device__ void advance(const Keys& keys) {
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        if (++tile == keys.tiles) tile = keys.first, ++h;
    }
};

template <class T>
__device__ __forceinline__ void copy_queries(const Relevancy& call, const Keys& keys, const Step& step, uint32_t shared) {
    const int first = step.tile * QUERIES, last = static_cast<int>(call.N) - 1;
    copy_rows<T, QUERIES>(shared + QUERY + step.stage * QUERY_BYTES, call.query.at<const T>(keys.b, step.h), call.query.stride_n,
                          first, last, call.D);
    copy_rows<T, QUERIES>(shared + GRAD_OUT + step.stage * QUERY_BYTES, call.grad_out.at<const T>(keys.b, step.h),
                          call.grad_out.stride_n, first, last, call.DV);
    constexpr int PIECES = QUERIES / 4;
    if (threadIdx.x >= ROW_DATA * PIECES) return;
    const int what = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    const int64_t at = ((what * call.B + keys.b) * call.H + step.h) * padded(call) + first + 4 * piece;
    copy_16_bytes(shared + ROWS + step.stage * ROW_BYTES + threadIdx.x * 16, call.rows + at, true);
}

// Numbers of queries 8 n + 2t, 8 n + 2t+1 of a tile.
__device__ __forceinline__ float2 of_queries(const float* rows, RowData what, int n) {
    return *reinterpret_cast<const float2*>(rows + what * QUERIES + 8 * n + 2 * lane_column());
}

// Adds this warp group's half of dq of a tile, 64 rows and 64 features, to those of the blocks before, once its product has ended.
// `group`: which half.
template <class T>
__device__ __forceinline__ void add_grad_query(const Relevancy& call, const Keys& keys, const Step& step, int group,
                                               float (&x)[8][4]) {
    const bool causal = call.masks.causal, is_first = keys.turn(causal, step.tile) == 0;
    constexpr int HALF = FEATURES / 2, SUMS = QUERIES * FEATURES, PIECE = 4 * WARP_GROUP;
    const int thread = threadIdx.x % WARP_GROUP;
    const int64_t tile = (keys.b * call.H + step.h) * keys.tiles + step.tile;
    float* sums = call.sums + tile * SUMS + group * (SUMS / 2) + thread * 4;
    if (!keys.is_last(causal)) {
        wait_for_products<1>();
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            if (is_first) *reinterpret_cast<float4*>(sums + n * PIECE) = make_float4(x[n][0], x[n][1], x[n][2], x[n][3]);
            else add(sums + n * PIECE, x[n]);
        }
        return;
    }
    float4 before[8];
#pragma unroll
    for (int n = 0; n < 8; ++n)  // read while the product runs
        before[n] = is_first ? float4{} : __ldcg(reinterpret_cast<const float4*>(sums + n * PIECE));
    wait_for_products<1>();
#pragma unroll
    for (int n = 0; n < 8; ++n) x[n][0] += before[n].x, x[n][1] += before[n].y, x[n][2] += before[n].z, x[n][3] += before[n].w;
#pragma unroll
    for (int e = 0; e < 16; ++e) {
        const int n = e / 2, r = e % 2, column = group * HALF + 8 * n + 2 * lane_column();
        const int64_t row = step.tile * QUERIES + thread / WARP * 16 + lane_row() + 8 * r;
        if (row >= call.N || column >= call.D) continue;
        const uint32_t both = rounded_pair<T>(x[n][2 * r] * call.scale, x[n][2 * r + 1] * call.scale);
        *reinterpret_cast<uint32_t*>(call.grad_query.at<T>(keys.b, step.h) + row * call.grad_query.stride_n + column) = both;
    }
}

// Stores dk or dv of this warp's 16 keys, the first at `first`.
template <class T>
__device__ __forceinline__ void store_keys(const float (&x)[16][4], float factor, const StridedTensor& to, const Keys& keys,
                                           int first, int64_t num_rows, int num_cols) {
#pragma unroll
    for (int e = 0; e < 32; ++e) {
        const int n = e / 2, r = e % 2, row = first + lane_row() + 8 * r, column = 8 * n + 2 * lane_column();
        if (row >= num_rows || column >= num_cols) continue;
        const uint32_t both = rounded_pair<T>(x[n][2 * r] * factor, x[n][2 * r + 1] * factor);
        *reinterpret_cast<uint32_t*>(to.at<T>(keys.b, keys.key_head) + row * to.stride_n + column) = both;
    }
}

#endif

template <class T> __global__ void __launch_bounds__(THREADS, 1) relevancy_long_kernel(const __grid_constant__ Relevancy call) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) unsigned char tiles[];
    int& number = *reinterpret_cast<int*>(tiles + NUMBER);
    if (threadIdx.x == 0) number = static_cast<int>(atomicAdd(call.turns, 1));  // blocks may begin in any order
    __syncthreads();
    const Keys keys(call, number);
    const bool causal = call.masks.causal;
    const uint32_t shared = shared_address(tiles);
    const int group =
        __shfl_sync(ALL_LANES, static_cast<int>(threadIdx.x / WARP_GROUP), 0);  // the same in a warp, for the compiler
    const int N = static_cast<int>(call.N), heads = static_cast<int>(call.H / call.key_heads);
    const int first_key = keys.block * KEYS, first_row = threadIdx.x / WARP * 16;  // of the block, and of this warp in it
    const auto turn = [&](int h, int tile) { return call.turns + 1 + (keys.b * call.H + h) * keys.tiles + tile; };
    const auto pass_turn = [&](int h, int tile) { set_turn(turn(h, tile), keys.turn(causal, tile) + 1); };
    copy_rows<T, KEYS>(shared + KEY, call.key.at<const T>(keys.b, keys.key_head), call.key.stride_n, first_key, N - 1, call.D);
    copy_rows<T, KEYS>(
        shared + VALUE, call.value.at<const T>(keys.b, keys.key_head), call.value.stride_n, first_key, N - 1, call.DV);
    copy_queries<T>(call, keys, {keys.key_head * heads, keys.first, 0}, shared);

    float grad_key[16][4] = {}, grad_value[16][4] = {}, r_abar[2] = {0.0f, 0.0f};
    const float scale = call.scale * LOG2_E;
    const int first_head = keys.key_head * heads, end = first_head + heads;
#pragma unroll 1
    for (Step step = {first_head, keys.first, 0}; step.h < end; step.advance(keys)) {
        wait_for_copies();
        show_to_products();
        __syncthreads();  // the tile is here, and dq of the tile before is added
        Step next = step;
        next.advance(keys);
        if (next.h < end) copy_queries<T>(call, keys, next, shared);

        const uint64_t query = matrix_at(shared + QUERY + step.stage * QUERY_BYTES, QUERIES * TILE_ROW);
        const uint64_t grad_out = matrix_at(shared + GRAD_OUT + step.stage * QUERY_BYTES, QUERIES * TILE_ROW);
        const uint64_t key = matrix_at(shared + KEY + group * (64 * TILE_ROW)),
                       value = matrix_at(shared + VALUE + group * (64 * TILE_ROW));
        float p[8][4], dp[8][4];
        begin_products();
#pragma unroll
        for (int k = 0; k < FEATURES / 16; ++k) {
            const int of_keys = k / 4 * (KEYS * TILE_ROW) + k % 4 * 32, of_queries = k / 4 * (QUERIES * TILE_ROW) + k % 4 * 32;
            product<T, false, false>(p, matrix_after(key, of_keys), matrix_after(query, of_queries), k > 0);
        }
        end_group();
#pragma unroll
        for (int k = 0; k < FEATURES / 16; ++k) {
            const int of_keys = k / 4 * (KEYS * TILE_ROW) + k % 4 * 32, of_queries = k / 4 * (QUERIES * TILE_ROW) + k % 4 * 32;
            product<T, false, false>(dp, matrix_after(value, of_keys), matrix_after(grad_out, of_queries), k > 0);
        }
        end_group();

        if (threadIdx.x == 0) {  // while these products run
            if (step.tile > keys.first) pass_turn(step.h, step.tile - 1);
            else if (step.h > first_head) pass_turn(step.h - 1, keys.tiles - 1);
            while (turn_of(turn(step.h, step.tile)) != keys.turn(causal, step.tile)) continue;
        }

        const float* rows = reinterpret_cast<const float*>(tiles + ROWS + step.stage * ROW_BYTES);
        const int first_query = step.tile * QUERIES;
        // a tile at the edge has pairs that do not exist, or that the causal mask hides
        const bool edge = first_key + KEYS > N || (causal && first_query < first_key + KEYS);
        wait_for_products<1>();
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            const float2 shift = of_queries(rows, SHIFT, n);
#pragma unroll
            for (int c = 0; c < 4; ++c) p[n][c] = fast_exp2(fmaf(p[n][c], scale, c % 2 ? -shift.y : -shift.x));
        }
        wait_for_products<0>();
        if (edge) {
            int seen_from[2];  // by which query on, of this lane's keys
            for (int r = 0; r < 2; ++r) {
                const int j = first_key + first_row + lane_row() + 8 * r;
                seen_from[r] = j >= N ? first_query + QUERIES : causal ? j : 0;
            }
#pragma unroll
            for (int e = 0; e < 32; ++e) {
                const int i = first_query + e / 4 * 8 + 2 * lane_column() + e % 2;
                if (i < seen_from[e % 4 / 2]) p[e / 4][e % 4] = dp[e / 4][e % 4] = 0.0f;
            }
        }
        uint32_t left_p[4][4], left_ds[4][4];
        unsigned char* const to = tiles + GRADIENTS + (first_row + lane_row()) * TILE_ROW + 4 * lane_column();
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            const float2 delta = of_queries(rows, DELTA, n), carried = of_queries(rows, CARRIED, n);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const float product = p[n][c] * dp[n][c];
                r_abar[c / 2] = fmaf(relu(product), c % 2 ? carried.y : carried.x, r_abar[c / 2]);
                dp[n][c] = fmaf(-p[n][c], c % 2 ? delta.y : delta.x, product);
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                left_p[n / 2][n % 2 * 2 + r] = rounded_pair<T>(p[n][2 * r], p[n][2 * r + 1]);
                const uint32_t both = rounded_pair<T>(dp[n][2 * r], dp[n][2 * r + 1]);
                left_ds[n / 2][n % 2 * 2 + r] = both;
                *reinterpret_cast<uint32_t*>(to + 8 * r * TILE_ROW + (n ^ lane_row()) * 16) = both;
            }
        }
        show_to_products();
        computed(left_p);
        computed(left_ds);
        begin_products();
#pragma unroll
        for (int k = 0; k < 4; ++k) product<T>(grad_value, left_p[k], matrix_after(grad_out, k * 16 * TILE_ROW));
        end_group();
        __syncthreads();  // dS is complete, and it is this block's turn

        float grad_query[8][4];
        begin_products();
#pragma unroll
        for (int k = 0; k < KEYS / 16; ++k) {
            const uint64_t ds = matrix_at(shared + GRADIENTS), half = matrix_at(shared + KEY + group * (KEYS * TILE_ROW));
            product<T, true, true>(grad_query, matrix_after(ds, k * 16 * TILE_ROW), matrix_after(half, k * 16 * TILE_ROW), k > 0);
        }
        end_group();
#pragma unroll
        for (int k = 0; k < 4; ++k) product<T>(grad_key, left_ds[k], matrix_after(query, k * 16 * TILE_ROW));
        end_group();
        add_grad_query<T>(call, keys, step, group, grad_query);
    }
    wait_for_products<0>();
    __syncthreads();
    if (threadIdx.x == 0) pass_turn(end - 1, keys.tiles - 1);

    const int first = first_key + first_row;
    store_keys<T>(grad_key, call.scale, call.grad_key, keys, first, N, call.D);
    store_keys<T>(grad_value, 1.0f, call.grad_value, keys, first, N, call.DV);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = row_sum(r_abar[r]);
        const int row = first + lane_row() + 8 * r;
        if (call.T == 0 || lane_column() != 0 || row >= N) continue;
        const bool residual = keys.key_head == 0;
        call.r_abar[(keys.b * call.key_heads + keys.key_head) * call.N + row] =
            sum + (residual ? call.relevancy[keys.b * call.N + row] * call.residual_weight.at(keys.b, row) : 0.0f);
    }
#else
    asm volatile("trap;");  // the limits of the backend keep calls away
#endif
}

cudaError_t relevancy_attention_long(const Relevancy& call, cudaStream_t stream) {
    if (call.dtype == DType::FLOAT32 || std::max(call.D, call.DV) > FEATURES || call.D % 8 || call.DV % 8 || call.N != call.M ||
        call.T > 1)
        return cudaErrorInvalidValue;
    return with_shape(call.dtype, FEATURES, [&](auto type, auto) {
        using T = decltype(type);
        if constexpr (std::is_same_v<T, float>) {
            return cudaErrorInvalidValue;
        } else {
            constexpr int ROWS_OF_A_BLOCK = THREADS / 16;
            const int64_t rows = divide_up(call.B * call.H * padded(call), ROWS_OF_A_BLOCK);
            const cudaError_t status = launch(relevancy_rows_kernel<T>, rows, THREADS, 0, stream, call);
            if (status != cudaSuccess) return status;
            const int64_t blocks = call.B * call.key_heads * divide_up(call.N, KEYS);
            return launch(relevancy_long_kernel<T>, blocks, THREADS, SHARED_BYTES, stream, call);
        }
    });
}

}  // namespace
}  // namespace vlattn

OPERATOR(relevancy_attention_long, Relevancy)
