// congruence_loss (CACR, soft, and IAIS, distributed) and its gradients.
//
// Queries and keys of the blocks LL, LV, VL, VV (B,H,L or V,D); loss (B). L, V and D are at most 128.
//   maps: XY = mean_h softmax(scale q k^T), each row over the real tokens of Y
//   CACR, text direction: T = LV VV LV^T, p = softmax(LL), t = softmax(T), LV a constant; IAIS: p = LL, t = T = LV VL
//   loss = sum_ij (p_ij - t_ij) (log p_ij - log t_ij) / real tokens;  the image direction swaps L and V
//   dVV = LV^T dT LV, or dLV = dT VL^T and dVL = LV^T dT
//   of each head P and a map's gradient G, divided by H:  dS_ij = P_ij (G_ij - sum_j P_ij G_ij)
//   dq = scale grad_loss dS k      dk = scale grad_loss dS^T q
// A warp holds 16 whole rows, and a block 64 rows of one modality. There are four kernels: maps, with the heads in a loop; targets
// and divergences; for gradients, from those at the targets to those at the maps that targets consist of; and from there to those
// of a head, whose dS goes through shared memory for dk. Maps of one sample lie in a workspace, as means over the heads, and the
// backward pass computes them again. Products of heads run on tensor cores in 16 bits, those of maps in tf32, and in three parts
// of it where inputs are float32, whose heads have fused multiply-adds.
// Why CUDA C++: rows and columns are padded to 16, where Triton's tiles are powers of two: 100 regions take 112 rows, and not 128.
// `python -m tools.pages.kernels_page` estimates it. Not measured on a GPU.
#include <algorithm>

#include "congruence_maps.h"

namespace vlattn {
namespace {

constexpr int WARPS = 4;
constexpr int ROWS = WARPS * STRIP;  // of a block
constexpr int HEADS = 3;  // of which a block computes the gradients: more of them wait less for their first copies
// Whether a block has room for one tile of TOKENS rows at a time: every GPU since Ampere has 99 KB.
template <class T, int K> constexpr bool ONE_TILE = sizeof(T) * K > 128;
constexpr size_t TOKENS_BYTES = (sizeof(Tokens) + 15) / 16 * 16;

// A block's place: its sample, and the modality and the first row of its rows.
struct Place {
    int64_t b;
    int a, first;

    __host__ __device__ static int tiles(int rows) { return (rows + ROWS - 1) / ROWS; }
    __host__ __device__ static int tiles(const Congruence& call) { return tiles(call.size(0)) + tiles(call.size(1)); }
    __device__ Place(const Congruence& call, int64_t i) {
        b = i / tiles(call);
        const int tile = static_cast<int>(i % tiles(call)), texts = tiles(call.size(0));
        a = tile >= texts;
        first = (tile - a * texts) * ROWS;
    }
    // The first of this warp's rows.
    __device__ int row() const { return first + warp_index() * STRIP; }
};

// A block of logits as the kernels begin with it: 2^(logit - largest of the row) of a warp's 16 queries and the keys of a tile, and
// the sums of the rows.
template <class T, int K>
__device__ __forceinline__ void powers(Strip& p, float (&sum)[2], const Rows16<T, K>& queries, const T* keys, const float* bias,
                                       int columns, float scale) {
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int k = 0; k < GROUPS; ++k) {
        if (k * STRIP >= columns) break;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            float of_keys[2];
            read(of_keys, bias + k * STRIP + n * 8 + lane_column() * 2);
            for (int e = 0; e < 4; ++e) p[k][n][e] = of_keys[e % 2];
        }
        product_with_rows(p[k], queries, keys, k * STRIP);
        if (scale < 0.0f) {
#pragma unroll
            for (int e = 0; e < 8; ++e) p[k][e / 4][e % 4] = -p[k][e / 4][e % 4];
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) top[e % 4 / 2] = fmaxf(top[e % 4 / 2], p[k][e / 4][e % 4]);
    }
    const float factor = fmaxf(fabsf(scale) * LOG2_E, 1.4e-45f);  // not 0, whose product with -inf is NaN
    for (int r = 0; r < 2; ++r) top[r] = -row_max(top[r]) * factor, sum[r] = 0.0f;
    each_pair(columns, p, [&](float(&x)[4], int, int, int) {
        for (int e = 0; e < 4; ++e) x[e] = fast_exp2(fmaf(x[e], factor, top[e / 2])), sum[e / 2] += x[e];
    });
    for (int r = 0; r < 2; ++r) sum[r] = row_sum(sum[r]);
}

// How many rows are copied of a modality, by code that is unrolled: all, or only half.
__host__ __device__ constexpr int copied_rows(int rows) { return rows <= TOKENS / 2 ? TOKENS / 2 : TOKENS; }

template <class T, int K>
__device__ __forceinline__ void copy_tokens(const RowCopies<T, K, WARPS * WARP>& copies, T* tile, int rows) {
    if (copied_rows(rows) == TOKENS / 2) copies.template rows<TOKENS / 2>(tile);
    else copies.template rows<TOKENS>(tile);
}

// The mean over the heads of a block of attention: a block's rows of one modality and all keys of one.
template <class T, int K>
__global__ void __launch_bounds__(WARPS* WARP) congruence_map_kernel(const __grid_constant__ Congruence call) {
    constexpr int STAGES = ONE_TILE<T, K> ? 1 : 2;  // of copies
    const Place place(call, blockIdx.x / 2);
    const int r = place.a, c = blockIdx.x % 2, rows = call.padded(c);
    if ((r == c) != (call.kind == Congruence::CACR) && !call.has(r)) return;
    Tokens& tokens = *static_cast<Tokens*>(shared_memory());
    if (!tokens.load(call, place.b)) return;
    T* tiles = reinterpret_cast<T*>(static_cast<char*>(shared_memory()) + TOKENS_BYTES);
    const StridedTensor &query = call.query[2 * r + c], &key = call.key[2 * r + c];
    RowCopies<T, K, WARPS * WARP> queries(query, place.b, 0, place.first, call.D, tokens.real[r], tokens.none);
    RowCopies<T, K, WARPS * WARP> keys(key, place.b, 0, 0, call.D, tokens.real[c], tokens.none);
    const auto copy = [&](T* tile) {
        queries.template rows<ROWS>(tile), queries.next_head();
        copy_tokens(keys, tile + ROWS * tile_stride<T, K>(), rows), keys.next_head();
    };
    constexpr int SIZE = (ROWS + TOKENS) * tile_stride<T, K>();  // of a stage
    Strip sum = {};
    copy(tiles);
#pragma unroll 1
    for (int h = 1, heads = static_cast<int>(call.H); h <= heads; ++h) {
        T* tile = STAGES == 2 && h % 2 == 0 ? tiles + SIZE : tiles;
        wait_for_copies();
        __syncthreads();
        if (STAGES == 2 && h < heads) copy(h % 2 == 0 ? tiles : tiles + SIZE);
        if (place.row() < call.size(r)) {
            Rows16<T, K> left;
            left.load(tile, warp_index() * STRIP);
            Strip p;
            float total[2];
            powers(p, total, left, tile + ROWS * tile_stride<T, K>(), tokens.bias[c], rows, call.scale);
            for (int i = 0; i < 2; ++i) total[i] = 1.0f / total[i];
#pragma unroll
            for (int k = 0; k < GROUPS; ++k) {
                if (k * STRIP >= rows) break;
#pragma unroll
                for (int e = 0; e < 8; ++e)
                    sum[k][e / 4][e % 4] = fmaf(p[k][e / 4][e % 4], total[e % 4 / 2], sum[k][e / 4][e % 4]);
            }
        }
        if (STAGES == 2) continue;
        __syncthreads();
        if (h < heads) copy(tiles);
    }
    if (place.row() >= call.size(r)) return;
    const float inverse = 1.0f / static_cast<float>(call.H);
    each_pair(rows, sum, [&](float(&x)[4], int, int, int) {
        for (int e = 0; e < 4; ++e) x[e] *= inverse;
    });
    write(call.map(Congruence::MAP, place.b, r, c), place.row(), rows, sum);
}

// Of a block's rows of one direction, the target and the divergence from it: the loss or, BACKWARD, the gradients at the modality's
// block of the map and at the target.
template <bool PRECISE, bool BACKWARD>
__global__ void __launch_bounds__(WARPS* WARP) congruence_divergence_kernel(const __grid_constant__ Congruence call) {
    const Place place(call, blockIdx.x);
    const int a = place.a, o = 1 - a, rows = call.padded(a), inner = call.padded(o);
    Tokens& tokens = *static_cast<Tokens*>(shared_memory());
    float* tile = reinterpret_cast<float*>(static_cast<char*>(shared_memory()) + TOKENS_BYTES);
    const auto map = [&](Congruence::Region region, int r, int c) { return call.map(region, place.b, r, c); };
    const bool active = place.row() < call.size(a);
    float loss = 0.0f;
    if (tokens.load(call, place.b) && call.has(a)) {
        const Matrix across = map(Congruence::MAP, a, o);
        Strip target = {};
        if (call.kind == Congruence::CACR) {
            Strip left = {};
            {
                const Right<PRECISE, false> right(tile, map(Congruence::MAP, o, o), inner, inner);
                if (active) add_product<false>(left, across, place.row(), right, inner, inner);
            }
            const Right<PRECISE, true> right(tile, across, rows, inner);
            if (active) add_product(target, left, right, inner, rows);
        } else {
            const Right<PRECISE, false> right(tile, map(Congruence::MAP, o, a), inner, rows);
            if (active) add_product<false>(target, across, place.row(), right, inner, rows);
        }
        if (active) {
            const float weight = 1.0f / static_cast<float>(tokens.number(a));
            loss = divergence<BACKWARD>(call.kind, map(Congruence::MAP, a, a), target, tokens.real[a], place.row(), rows,
                                        BACKWARD ? weight / static_cast<float>(call.H) : weight, map(Congruence::BY_MAP, a, a));
            if (BACKWARD) write(map(Congruence::BY_TARGET, a, a), place.row(), rows, target);
        }
    }
    if (BACKWARD) return;
    loss = warp_sum(loss);
    __syncthreads();
    if (lane_index() == 0) tile[warp_index()] = loss;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int i = 1; i < WARPS; ++i) loss += tile[i];
    call.loss[blockIdx.x] = loss;
}

// From the gradients at the targets to those at the maps that targets consist of: X^T dT X at a modality's own block for CACR, and
// at a block between the modalities dT Y^T of one direction and X^T dT of the other, where Y of the first is X of the second.
template <bool PRECISE>
__global__ void __launch_bounds__(WARPS* WARP) congruence_target_kernel(const __grid_constant__ Congruence call) {
    const Place place(call, blockIdx.x);
    const int a = place.a, o = 1 - a, rows = call.padded(a), inner = call.padded(o);
    const bool cacr = call.kind == Congruence::CACR;
    Tokens& tokens = *static_cast<Tokens*>(shared_memory());
    float* tile = reinterpret_cast<float*>(static_cast<char*>(shared_memory()) + TOKENS_BYTES);
    if (!tokens.load(call, place.b) || (cacr && !call.has(o))) return;
    const auto map = [&](Congruence::Region region, int r, int c) { return call.map(region, place.b, r, c); };
    const Matrix across = map(Congruence::MAP, o, a), by_target = map(Congruence::BY_TARGET, o, o);
    const bool active = place.row() < call.size(a);
    Strip sum = {};
    if (call.has(o)) {
        const Right<PRECISE, false> right(tile, by_target, inner, inner);
        if (active) add_product<true>(sum, across, place.row(), right, inner, inner);
    }
    if (cacr) {
        const Right<PRECISE, false> right(tile, across, inner, rows);
        Strip product = {};
        if (active) add_product(product, sum, right, inner, rows);
        each_pair(rows, product, [&](float(&x)[4], int, int k, int n) {
            for (int e = 0; e < 4; ++e) sum[k][n][e] = x[e];
        });
    }
    if (!cacr && call.has(a)) {
        const Right<PRECISE, true> right(tile, across, inner, rows);
        if (active) add_product<false>(sum, map(Congruence::BY_TARGET, a, a), place.row(), right, rows, inner);
    }
    if (!active) return;
    const int columns = cacr ? rows : inner;
    const Matrix to = map(Congruence::BY_MAP, a, cacr ? a : o);
    if (cacr && call.has(a)) {
        Strip before;
        fill(before, to, place.row(), columns);
        each_pair(columns, sum, [&](float(&x)[4], int, int k, int n) {
            for (int e = 0; e < 4; ++e) x[e] += before[k][n][e];
        });
    }
    write(to, place.row(), columns, sum);
}

template <class T> __device__ void clear(const StridedTensor& grad, int64_t b, int64_t h, int rows, int columns) {
    for (int i = threadIdx.x; i < rows * columns; i += blockDim.x)
        grad.at<T>(b, h)[i / columns * grad.stride_n + i % columns] = from_float<T>(0.0f);
}

// The power of two that brings x to [2^14, 2^15), which float16 holds; 2^126 where it would be more.
__device__ __forceinline__ float power_for(float x) {
    const int exponent = static_cast<int>(__float_as_uint(x) >> 23 & 0xff);
    return __uint_as_float(static_cast<uint32_t>(exponent < 15 ? 253 : 268 - exponent) << 23);
}

// From the gradient at a block of the map to those of its queries and keys, of HEADS heads. Gradients at logits are
// multiplied by a power of two before they are rounded to float16: with many tokens and heads they would underflow.
template <class T, int K>
__global__ void __launch_bounds__(WARPS* WARP) congruence_gradient_kernel(const __grid_constant__ Congruence call, int parts) {
    constexpr bool WIDE = ONE_TILE<T, K>;
    const bool cacr = call.kind == Congruence::CACR;
    const int blocks = cacr ? 2 : 4, part = blockIdx.x % parts, i = blockIdx.x / parts % blocks, n = cacr ? 3 * i : i;
    const int64_t b = blockIdx.x / parts / blocks, first_head = part * HEADS, end_head = min(call.H, first_head + HEADS);
    const int r = n / 2, c = n % 2, rows = call.padded(r), columns = call.padded(c), stride = columns + 8;
    const StridedTensor &query = call.query[n], &key = call.key[n];
    Tokens& tokens = *static_cast<Tokens*>(shared_memory());
    T* keys = reinterpret_cast<T*>(static_cast<char*>(shared_memory()) + TOKENS_BYTES);
    T* queries = WIDE ? keys : keys + TOKENS * tile_stride<T, K>();
    T* buffer = queries + (TOKENS + warp_index() * STRIP) * tile_stride<T, K>();  // of a warp, if there is room
    T* by_logit = queries + (WIDE ? copied_rows(max(rows, columns)) : TOKENS + ROWS) * tile_stride<T, K>();
    if (!tokens.load(call, b) || (r == c && !cacr && !call.has(r))) {
        for (int64_t h = first_head; h < end_head; ++h) {
            clear<T>(call.grad_query[n], b, h, call.size(r), call.D);
            clear<T>(call.grad_key[n], b, h, call.size(c), call.D);
        }
        return;
    }
    const Matrix by_map = call.map(Congruence::BY_MAP, b, r, c);
    float power = 1.0f;
    if constexpr (std::is_same_v<T, __half>) {
        __shared__ float largest[WARPS];
        float most = 0.0f;
        for (int e = threadIdx.x; e < rows * columns; e += blockDim.x)
            most = fmaxf(most, fabsf(by_map.row(e / columns)[e % columns]));
        most = warp_max(most);
        if (lane_index() == 0) largest[warp_index()] = most;
        __syncthreads();
        for (int w = 0; w < WARPS; ++w) most = fmaxf(most, largest[w]);
        power = power_for(2.0f * most);  // no gradient of a logit is greater
    }
    const float times = call.scale * call.grad_loss[b];
    const auto store = [&](float(&out)[K / 8][4], const StridedTensor& grad, int64_t h, int first, int num_rows) {
        if (power != 1.0f) scale_rows(out, {1.0f / power, 1.0f / power});
        scale_rows(out, {times, times});
        if constexpr (WIDE) store_rows<T>(out, {1.0f, 1.0f}, grad, b, h, first, num_rows, call.D);
        else store_rows_through<T, K>(buffer, out, grad, b, h, first, num_rows, call.D);
    };
    RowCopies<T, K, WARPS * WARP> keys_to(key, b, first_head, 0, call.D, tokens.real[c], tokens.none);
    RowCopies<T, K, WARPS * WARP> queries_to(query, b, first_head, 0, call.D, tokens.real[r], tokens.none);
#pragma unroll 1
    for (int64_t h = first_head; h < end_head; ++h, keys_to.next_head(), queries_to.next_head()) {
        __syncthreads();
        copy_tokens(keys_to, keys, columns);
        if (!WIDE) copy_tokens(queries_to, queries, rows);
        wait_for_copies();
        __syncthreads();
#pragma unroll 1
        for (int first = warp_index() * STRIP; first < rows; first += ROWS) {
            Rows16<T, K> left;
            if constexpr (WIDE) left.load(query.at<T>(b, h), query.stride_n, first, call.size(r), call.D);
            else left.load(queries, first);
            Strip p, by_p;
            float sum[2], delta[2] = {}, share[2], out[K / 8][4] = {};
            powers(p, sum, left, keys, tokens.bias[c], columns, call.scale);
            fill(by_p, by_map, first, columns);
            each_pair(columns, p, [&](float(&x)[4], int, int k, int m) {
                for (int e = 0; e < 4; ++e) delta[e / 2] += x[e] * by_p[k][m][e];
            });
            for (int e = 0; e < 2; ++e) delta[e] = row_sum(delta[e]) / sum[e], share[e] = power / sum[e];
            T* to = by_logit + (first + lane_row()) * stride + lane_column() * 2;
#pragma unroll
            for (int k = 0; k < GROUPS; ++k) {
                if (k * STRIP >= columns) break;
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    float& x = p[k][e / 4][e % 4];
                    x *= share[e % 4 / 2] * (by_p[k][e / 4][e % 4] - delta[e % 4 / 2]);
                    if (WIDE && !tokens.real[r][first + lane_row() + e % 4 / 2 * 8]) x = 0.0f;  // queries of padding may be NaN
                }
                product_with_columns<T, K>(out, p[k], keys, k * STRIP);
#pragma unroll
                for (int e = 0; e < 8; e += 2)
                    store_pair(to + e % 4 / 2 * 8 * stride + k * STRIP + e / 4 * 8, p[k][e / 4][e % 4], p[k][e / 4][e % 4 + 1]);
            }
            store(out, call.grad_query[n], h, first, call.size(r));
        }
        __syncthreads();
        if constexpr (WIDE) {
            copy_tokens(queries_to, queries, rows);
            wait_for_copies();
            __syncthreads();
        }
#pragma unroll 1
        for (int first = warp_index() * STRIP; first < columns; first += ROWS) {
            float out[K / 8][4] = {};
#pragma unroll 1
            for (int k = 0; k < rows; k += STRIP) product_of_columns<T, K>(out, by_logit, stride, first, queries, k);
            store(out, call.grad_key[n], h, first, call.size(c));
        }
    }
}

cudaError_t run(const Congruence& call, bool backward, cudaStream_t stream) {
    const int text = call.padded(0), image = call.padded(1), longest = std::max(text, image), copied = copied_rows(longest);
    const int64_t tiles = Place::tiles(call);
    if (std::max(call.L, call.V) > TOKENS || call.D > 128 || (!backward && call.parts != tiles)) return cudaErrorInvalidValue;
    return with_shape(call.dtype, call.D, [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int K = decltype(width)::value;
        constexpr bool PRECISE = sizeof(T) == 4;
        cudaError_t status = cudaSuccess;
        const auto next = [&](auto kernel, int64_t blocks, size_t bytes, auto... others) {
            if (status == cudaSuccess)
                status = launch(kernel, blocks, WARPS * WARP, TOKENS_BYTES + bytes, stream, call, others...);
        };
        const size_t product = sizeof(float) * longest * (longest + 8);
        next(congruence_map_kernel<T, K>, 2 * call.B * tiles,
             tile_bytes<T, K>(ONE_TILE<T, K> ? ROWS + copied : 2 * (ROWS + TOKENS)));
        if (!backward) {
            next(congruence_divergence_kernel<PRECISE, false>, call.B * tiles, std::max(product, WARPS * sizeof(float)));
            return status;
        }
        next(congruence_divergence_kernel<PRECISE, true>, call.B * tiles, product);
        next(congruence_target_kernel<PRECISE>, call.B * tiles, product);
        const int64_t blocks = call.B * (call.kind == Congruence::CACR ? 2 : 4);
        const int parts = static_cast<int>(divide_up(std::max<int64_t>(call.H, 1), HEADS));
        next(congruence_gradient_kernel<T, K>, blocks * parts,
             tile_bytes<T, K>(ONE_TILE<T, K> ? copied : 2 * TOKENS + ROWS) + sizeof(T) * longest * (longest + 8), parts);
        return status;
    });
}

cudaError_t congruence_loss(const Congruence& call, cudaStream_t stream) { return run(call, false, stream); }
cudaError_t congruence_loss_backward(const Congruence& call, cudaStream_t stream) { return run(call, true, stream); }

}  // namespace
}  // namespace vlattn

OPERATOR(congruence_loss, Congruence)
OPERATOR(congruence_loss_backward, Congruence)
