// What the attention kernels share: the layout of tensors and masks, logits, the online softmax, and how rows are stored.
#pragma once

#include <utility>

#include "mma.h"

namespace vlattn {

constexpr float LARGEST_LOGIT = 3.4028234e38f;

// A tensor (B,H,rows,columns), strides in elements, columns contiguous; data is null where the tensor is absent.
struct StridedTensor {
    void* data;
    int64_t stride_b, stride_h, stride_n;
    FIELDS(data, stride_b, stride_h, stride_n)

    template <class T> __device__ T* at(int64_t b, int64_t h) const {
        return static_cast<T*>(data) + b * stride_b + h * stride_h;
    }
};

// Copies rows of one head after the other to a tile, asynchronously if they are aligned: the tile can be read after
// `wait_for_copies` and a barrier. A block has THREADS. The loop is unrolled, since a copy itself is one instruction.
template <class T, int K, int THREADS> class RowCopies {
    static constexpr int VECTOR = 16 / sizeof(T), VECTORS = K / VECTOR, LD = tile_stride<T, K>(), AT_ONCE = THREADS / VECTORS;
    const T* next;  // what this thread copies first
    const int64_t step, stride_h;
    const int columns;  // as many as exist from this thread's on
    const int* bytes;
    const bool aligned;

    template <int... I> __device__ void copy(uint32_t to, const T* p, uint32_t from, std::integer_sequence<int, I...>) const {
        const auto one = [&](auto offset, auto of_bytes) {
            asm volatile(
                "{ .reg .b32 size; ld.shared.b32 size, [%2 + %4]; cp.async.cg.shared.global [%0 + %3], [%1], 16, size; }" ::"r"(
                    to),
                "l"(p), "r"(from), "n"(decltype(offset)::value), "n"(decltype(of_bytes)::value)
                : "memory");
            p += step;
        };
        (one(std::integral_constant<int, I * AT_ONCE * LD * sizeof(T)>(),
             std::integral_constant<int, I * AT_ONCE * sizeof(int)>()),
         ...);
    }

   public:
    // From row `first` of head h on. bytes: 16 of each row that is copied; of others it is 0, and zeros take their place. none: as
    // many zeros, for columns that do not exist.
    __device__ RowCopies(const StridedTensor& x, int64_t b, int64_t h, int first, int num_cols, const int* bytes, const int* none)
        : next(x.at<const T>(b, h) + (first + static_cast<int>(threadIdx.x) / VECTORS) * x.stride_n +
               threadIdx.x % VECTORS * VECTOR),
          step(x.stride_n * AT_ONCE),
          stride_h(x.stride_h),
          columns(num_cols - static_cast<int>(threadIdx.x) % VECTORS * VECTOR),
          bytes((columns > 0 ? bytes : none) + first + threadIdx.x / VECTORS),
          aligned(num_cols % VECTOR == 0 && x.stride_n % VECTOR == 0 && x.stride_h % VECTOR == 0 &&
                  reinterpret_cast<uintptr_t>(x.at<T>(b, h)) % 16 == 0) {}

    // Of the next head, ROWS rows, a multiple of what the threads copy at once.
    template <int ROWS> __device__ void rows(T* tile) const {
        tile += threadIdx.x / VECTORS * LD + threadIdx.x % VECTORS * VECTOR;
        if (aligned)
            return copy(shared_address(tile), next, shared_address(bytes), std::make_integer_sequence<int, ROWS / AT_ONCE>());
        const T* p = next;
#pragma unroll 1
        for (int i = 0; i < ROWS; i += AT_ONCE, p += step)
            for (int e = 0; e < VECTOR; ++e) tile[i * LD + e] = bytes[i] && e < columns ? p[e] : from_float<T>(0.0f);
    }
    __device__ void next_head() { next += stride_h; }
};

// attn_mask, bool or float32, expanded to (B,H,N,M), strides in elements (0 where it was broadcast); key_mask (B,M), contiguous.
struct Masks {
    enum Kind : int32_t { NONE, BOOL, ADDED };
    Kind kind;
    bool causal;
    const void* pairs;
    int64_t stride_b, stride_h, stride_n, stride_m;
    const uint8_t* keys;
    int64_t num_keys;
    FIELDS(kind, causal, pairs, stride_b, stride_h, stride_n, stride_m, keys, num_keys)

    // Of a sample, which of its keys are real; null: all.
    __device__ __forceinline__ const uint8_t* real(int64_t b) const { return keys ? keys + b * num_keys : nullptr; }

    // The base-2 logit with the masks applied: -inf where query i does not see key j. Only -inf in a float mask masks a pair; a
    // finite value is data, however large, and NaN stays NaN.
    __device__ __forceinline__ float apply(float log2_logit, int64_t b, int64_t h, int64_t i, int64_t j) const {
        const float masked = -INFINITY;
        if ((causal && j > i) || (keys && !real(b)[j])) return masked;
        if (kind == NONE) return log2_logit;
        const int64_t at = b * stride_b + h * stride_h + i * stride_n + j * stride_m;
        if (kind == BOOL) return static_cast<const uint8_t*>(pairs)[at] ? log2_logit : masked;
        const float added = static_cast<const float*>(pairs)[at];
        if (added == masked) return masked;
        // a value may be finite in base e and not in base 2: it is clamped to the largest number
        log2_logit += added * LOG2_E;
        if (log2_logit < -LARGEST_LOGIT) return -LARGEST_LOGIT;
        return added > 2.35e38f && added < INFINITY && log2_logit == log2_logit ? LARGEST_LOGIT : log2_logit;
    }

    // Makes base-2 logits of a warp's scores, 16 rows and 8 NT columns: times `factor`, -inf outside of the matrix (N,M). The
    // lane's numbers are in rows `row` and row+8, columns `column`, column+1, column+8, ... KEY_MAJOR: the rows are keys.
    template <bool KEY_MAJOR, int NT>
    __device__ __forceinline__ void to_logits(float (&x)[NT][4], float factor, int64_t b, int64_t h, int64_t row, int64_t column,
                                              int64_t N, int64_t M) const {
#pragma unroll
        for (int e = 0; e < 4 * NT; ++e) x[e / 4][e % 4] *= factor;
        const int64_t rows = KEY_MAJOR ? M : N, columns = KEY_MAJOR ? N : M;
        if (!causal && !keys && kind == NONE && row + 16 <= rows && column + 8 * NT <= columns) return;
#pragma unroll
        for (int e = 0; e < 4 * NT; ++e) {
            const int64_t r = row + e % 4 / 2 * 8, c = column + e / 4 * 8 + e % 2;
            float& logit = x[e / 4][e % 4];
            logit = r < rows && c < columns ? apply(logit, b, h, KEY_MAJOR ? c : r, KEY_MAJOR ? r : c) : -INFINITY;
        }
    }
};

// Of rows g and g+8 so far: the largest base-2 logit, and this lane's sum of 2^(logit - largest).
struct OnlineSoftmax {
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};

    // What is taken off logits: finite also for a row that is masked so far.
    __device__ __forceinline__ float shift(int r) const { return largest[r] == -INFINITY ? 0.0f : largest[r]; }

    // Turns logits into powers. Earlier sums over these rows must be multiplied by `kept`.
    template <int NT> __device__ __forceinline__ void add(float (&x)[NT][4], float (&kept)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float before = largest[r];
            float here = before;
#pragma unroll
            for (int n = 0; n < NT; ++n) here = fmaxf(here, fmaxf(x[n][2 * r], x[n][2 * r + 1]));
            largest[r] = row_max(here);
            kept[r] = fast_exp2(before - shift(r));
            sum[r] *= kept[r];
#pragma unroll
            for (int c = 0; c < 2 * NT; ++c) {
                float& power = x[c / 2][2 * r + c % 2];
                power = fast_exp2(power - shift(r));
                sum[r] += power;
            }
        }
    }
};

// The natural log-sum-exp from a row's largest base-2 logit and the sum of the powers less it; -inf for a fully masked row. A NaN
// among the logits is in the sum alone: fmaxf drops it.
__device__ __forceinline__ float natural_lse(float top, float total) {
    if (total == 0.0f) return -INFINITY;
    return fabsf(top) >= LARGEST_LOGIT && total == total ? top : (top + log2f(total)) * LN_2;
}

// In base 2. It is +inf for fully masked rows and rows beyond N, which makes their probabilities 0.
__device__ __forceinline__ float lse_log2(const float* lse, int64_t q, int64_t N) {
    return q < N && lse[q] != -INFINITY ? lse[q] * LOG2_E : INFINITY;
}

// Whether rounding a natural log-sum-exp shows in exp(logit - lse), because it is so far from 0. Float masks of -1e5 or of the
// lowest number make such rows. Their probabilities come from the largest logit and the sum. The limit is lower for our own lse
// than for the caller's, which may count keys that are not here.
constexpr float OWN_LSE = 4096.0f, CALLER_LSE = 16384.0f;
__device__ __forceinline__ bool is_coarse(float lse, float limit) { return fabsf(lse) >= limit && fabsf(lse) < INFINITY; }

// This lane's share of the dot products of rows `row` and row+8 of x and y.
template <class T>
__device__ __forceinline__ void dot_rows(float (&sum)[2], const StridedTensor& x, const StridedTensor& y, int64_t b, int64_t h,
                                         int64_t row, int64_t num_rows, int num_cols) {
    for (int r = 0; r < 2; ++r, row += 8) {
        const T *left = x.at<const T>(b, h) + row * x.stride_n, *right = y.at<const T>(b, h) + row * y.stride_n;
        for (int d = lane_column(); row < num_rows && d < num_cols; d += 4) sum[r] += to_float(left[d]) * to_float(right[d]);
    }
}

// Stores this warp's rows first .. first+15 of a head, each times its factor. A factor of 0 gives zeros even for NaN.
template <class T, int NT>
__device__ __forceinline__ void store_rows(const float (&x)[NT][4], const float (&factor)[2], const StridedTensor& to, int64_t b,
                                           int64_t h, int64_t first, int64_t num_rows, int num_cols) {
    const bool whole =
        num_cols == 8 * NT && to.stride_n % 2 == 0 && reinterpret_cast<uintptr_t>(to.at<T>(b, h)) % (2 * sizeof(T)) == 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int64_t row = first + lane_row() + r * 8;
        if (row >= num_rows) continue;
        T* at = to.at<T>(b, h) + row * to.stride_n + lane_column() * 2;
        const auto times = [&](float x) { return factor[r] == 0.0f ? 0.0f : x * factor[r]; };
        if (whole) {
#pragma unroll
            for (int n = 0; n < NT; ++n) store_pair(at + n * 8, times(x[n][2 * r]), times(x[n][2 * r + 1]));
        } else {
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                for (int e = 0; e < 2; ++e)
                    if (n * 8 + lane_column() * 2 + e < num_cols) at[n * 8 + e] = from_float<T>(times(x[n][2 * r + e]));
            }
        }
    }
}

// The same by way of a warp's buffer of 16 rows of a tile, from which lanes store 16 bytes: whole sectors.
template <class T, int K>
__device__ __forceinline__ void store_rows_through(T* buffer, const float (&x)[K / 8][4], const StridedTensor& to, int64_t b,
                                                   int64_t h, int64_t first, int64_t num_rows, int num_cols) {
    constexpr int VECTOR = 16 / sizeof(T), VECTORS = K / VECTOR, LD = tile_stride<T, K>();
    T* p = to.at<T>(b, h) + first * to.stride_n;
    if (num_cols != K || to.stride_n % VECTOR != 0 || reinterpret_cast<uintptr_t>(p) % 16 != 0)
        return store_rows<T>(x, {1.0f, 1.0f}, to, b, h, first, num_rows, num_cols);
    __syncwarp();
#pragma unroll
    for (int e = 0; e < K / 2; e += 2)
        store_pair(
            buffer + (lane_row() + e % 4 / 2 * 8) * LD + e / 4 * 8 + lane_column() * 2, x[e / 4][e % 4], x[e / 4][e % 4 + 1]);
    __syncwarp();
    const int row = lane_index() / VECTORS, column = lane_index() % VECTORS * VECTOR, rows = static_cast<int>(num_rows - first);
    p += row * to.stride_n + column;
#pragma unroll
    for (int i = 0; i < 16; i += WARP / VECTORS, p += WARP / VECTORS * to.stride_n)
        if (row + i < rows) *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(buffer + (row + i) * LD + column);
}

// Multiplies a warp's 16 rows by a factor each.
template <int NT> __device__ __forceinline__ void scale_rows(float (&x)[NT][4], const float (&factor)[2]) {
#pragma unroll
    for (int e = 0; e < 4 * NT; ++e) x[e / 4][e % 4] *= factor[e % 4 / 2];
}

}  // namespace vlattn
