// Products of tiles by one warp: the tensor cores' mma.sync for the 16-bit types, fused multiply-adds for float32, with the same
// distribution over the lanes. The two instructions have a scalar stand-in for the host here.
//
// Lanes: g = lane / 4, t = lane % 4. A result of 16 rows and 8 columns lies in float c[4] of each lane: c[0] and c[1] in row g,
// columns 2t and 2t+1; c[2] and c[3] in row g+8.
#pragma once

#include <cstring>
#include <type_traits>

#include "device.h"

namespace vlattn {

__device__ __forceinline__ int warp_index() { return threadIdx.x / WARP; }
__device__ __forceinline__ int lane_index() { return threadIdx.x % WARP; }
__device__ __forceinline__ int lane_row() { return lane_index() / 4; }   // g
__device__ __forceinline__ int lane_column() { return lane_index() % 4; }  // t

__device__ __forceinline__ float warp_sum(float x) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lanes));
    return x;
}

// Over the four lanes that hold one row of a result.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// COUNT numbers, two or a multiple of four, at an address that is aligned to as many of them.
template <int COUNT> __device__ __forceinline__ void read(float (&x)[COUNT], const float* p) {
    if constexpr (COUNT == 2) {
        const float2 v = *reinterpret_cast<const float2*>(p);
        x[0] = v.x, x[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            const float4 v = *reinterpret_cast<const float4*>(p + i);
            x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
        }
    }
}

// A tile in shared memory has K columns, a power of two that is at least 16, and rows so far apart that what the lanes of a
// warp read together lies in different banks.
template <class T, int K> __host__ __device__ constexpr int tile_stride() { return K + 16 / static_cast<int>(sizeof(T)); }
template <class T, int K> __host__ __device__ constexpr size_t tile_bytes(int rows) {
    return sizeof(T) * tile_stride<T, K>() * static_cast<size_t>(rows);
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copies 16 bytes to shared memory, or writes zeros there. The copy runs beside other instructions until `wait_for_copies`.
__device__ __forceinline__ void copy_16_bytes(uint32_t to, const void* from, bool exists) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Rows first .. first+rows-1 of a matrix (num_rows, num_cols) in global memory, its columns contiguous, to a tile, by all
// threads of the block; zeros outside of the matrix. The caller has the barriers.
template <class T, int K>
__device__ void stage(T* tile, const T* p, int64_t stride, int64_t first, int rows, int64_t num_rows, int num_cols) {
    constexpr int VECTOR = 16 / sizeof(T), VECTORS = K / VECTOR;
    const bool aligned = num_cols % VECTOR == 0 && stride % VECTOR == 0 && reinterpret_cast<uintptr_t>(p) % 16 == 0;
    for (int i = threadIdx.x; i < rows * VECTORS; i += blockDim.x) {
        const int row = i / VECTORS, col = i % VECTORS * VECTOR;
        uint4 bits = {0, 0, 0, 0};
        if (first + row < num_rows && col < num_cols) {
            const T* from = p + (first + row) * stride + col;
            if (aligned) {
                bits = *reinterpret_cast<const uint4*>(from);
            } else {
                T values[VECTOR];
                for (int e = 0; e < VECTOR; ++e) values[e] = col + e < num_cols ? from[e] : from_float<T>(0.0f);
                memcpy(&bits, values, sizeof(bits));
            }
        }
        *reinterpret_cast<uint4*>(tile + row * tile_stride<T, K>() + col) = bits;
    }
}

// Two 16-bit numbers as a matrix instruction takes them, the first in the low half.
template <class T> __device__ __forceinline__ uint32_t pack(T low, T high) {
    const T both[2] = {low, high};
    uint32_t bits;
    memcpy(&bits, both, sizeof(bits));
    return bits;
}

// Rounds both first.
template <class T> __device__ __forceinline__ uint32_t rounded_pair(float low, float high) {
    uint32_t bits;
    if constexpr (std::is_same_v<T, __half>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    }
    return bits;
}

// Stores two numbers side by side, at an address that is aligned to both.
template <class T> __device__ __forceinline__ void store_pair(T* to, float first, float second) {
    if constexpr (std::is_same_v<T, float>) {
        *reinterpret_cast<float2*>(to) = {first, second};
    } else {
        *reinterpret_cast<uint32_t*>(to) = rounded_pair<T>(first, second);
    }
}

// c (16,8) += a (16,16) b (16,8). a[0], a[1]: rows g, g+8 at columns 2t, 2t+1; a[2], a[3]: at columns 2t+8, 2t+9. b[0]: rows
// 2t, 2t+1 of column g; b[1]: rows 2t+8, 2t+9. All lanes run it together: volatile, so that the compiler does not move it, as it
// may a computation, to where only some of them come by.
template <class T> __device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, __half>) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        static_assert(std::is_same_v<T, __nv_bfloat16>, "16-bit types");
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// The nearest number of tf32, of 10 mantissa bits: the matrix instruction would cut the others off.
__device__ __forceinline__ float round_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
}

// c (16,8) += a (16,8) b (8,8) of tf32. a[0], a[1]: rows g, g+8 at one column; a[2], a[3]: at another. b: at these rows, of column
// g. Which columns a lane has is free, since a sum has no order: those are 2t and 2t+1 here, as a result has them.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
                   "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane i gives the `shared_address` of row i % 8 of matrix i / 8 (8 numbers,
// 16-byte aligned) and gets of each matrix columns 2t, 2t+1 of row g; TRANSPOSED: rows 2t, 2t+1 of column g.
template <bool TRANSPOSED> __device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t from) {
    if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(from)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(from)
                     : "memory");
    }
}

// Sixteen rows of a matrix in global memory as the left operand of products over its columns, of which at most K exist. Of
// 16-bit types they lie in registers; of float32, which would need too many, the addresses of rows g and g+8 do.
template <class T, int K> struct Rows16 {
    uint32_t a[K / 16][4];

    // Of rows first .. first+15 of a tile.
    __device__ __forceinline__ void load(const T* tile, int first) {
        const uint32_t row = shared_address(tile + (first + lane_index() % 16) * tile_stride<T, K>() + lane_index() / 16 * 8);
#pragma unroll
        for (int i = 0; i < K / 16; ++i) load_matrices<false>(a[i], row + i * 32);
    }

    __device__ void load(const T* p, int64_t stride, int64_t first, int64_t num_rows, int num_cols) {
        const bool pairs = num_cols % 2 == 0 && stride % 2 == 0 && reinterpret_cast<uintptr_t>(p) % 4 == 0;
#pragma unroll
        for (int i = 0; i < K / 4; ++i) {
            const int64_t row = first + lane_row() + i % 2 * 8;
            const int col = i / 4 * 16 + i % 4 / 2 * 8 + lane_column() * 2;
            const T* from = p + row * stride + col;
            uint32_t& to = a[i / 4][i % 4];
            to = 0;
            if (row >= num_rows || col >= num_cols) continue;
            to = pairs ? *reinterpret_cast<const uint32_t*>(from)
                       : pack(from[0], col + 1 < num_cols ? from[1] : from_float<T>(0.0f));
        }
    }
};

template <int K> struct Rows16<float, K> {
    const float* row[2];  // null: a row of zeros
    int num_cols;
    bool vectors;  // whether they can be read by fours

    __device__ __forceinline__ void load(const float* tile, int first) {
        for (int i = 0; i < 2; ++i) row[i] = tile + (first + lane_row() + i * 8) * tile_stride<float, K>();
        num_cols = K, vectors = true;
    }

    __device__ void load(const float* p, int64_t stride, int64_t first, int64_t num_rows, int columns) {
        for (int i = 0; i < 2; ++i) {
            const int64_t at = first + lane_row() + i * 8;
            row[i] = at < num_rows ? p + at * stride : nullptr;
        }
        num_cols = columns;
        vectors = columns % 4 == 0 && stride % 4 == 0 && reinterpret_cast<uintptr_t>(p) % 16 == 0;
    }

    // Columns k .. k+3 of row g + 8 i.
    __device__ __forceinline__ void read(float (&x)[4], int i, int k) const {
        if (vectors && row[i]) return vlattn::read(x, row[i] + k);
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = row[i] && k + e < num_cols ? row[i][k + e] : 0.0f;
    }
};

// c (16,8 NT) += left (16,K) tile^T: the dot products of 16 rows with rows n .. n + 8 NT - 1 of a tile.
template <class T, int K, int NT>
__device__ __forceinline__ void product_with_rows(float (&c)[NT][4], const Rows16<T, K>& left, const T* tile, int n) {
    constexpr int LD = tile_stride<T, K>();
    if constexpr (std::is_same_v<T, float>) {
        const float* columns = tile + (n + lane_column() * 2) * LD;
#pragma unroll 1
        for (int k = 0; k < left.num_cols; k += 4) {
            float upper[4], lower[4];
            left.read(upper, 0, k), left.read(lower, 1, k);
#pragma unroll
            for (int i = 0; i < 2 * NT; ++i) {
                float x[4];
                read(x, columns + (i / 2 * 8 + i % 2) * LD + k);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    c[i / 2][i % 2] = fmaf(upper[e], x[e], c[i / 2][i % 2]);
                    c[i / 2][2 + i % 2] = fmaf(lower[e], x[e], c[i / 2][2 + i % 2]);
                }
            }
        }
    } else {
        static_assert(K % 32 == 0, "two steps share a load");
        const uint32_t row = shared_address(tile + lane_index() % 8 * LD + lane_index() / 8 * 8);
#pragma unroll
        for (int s = 0; s < K / 16; s += 2) {
            uint32_t b[NT][4];
#pragma unroll
            for (int i = 0; i < NT; ++i) load_matrices<false>(b[i], row + ((n + i * 8) * LD + s * 16) * sizeof(T));
#pragma unroll
            for (int i = 0; i < NT; ++i) mma_16x8x16<T>(c[i], left.a[s], {b[i][0], b[i][1]});
#pragma unroll
            for (int i = 0; i < NT; ++i) mma_16x8x16<T>(c[i], left.a[s + 1], {b[i][2], b[i][3]});
        }
    }
}

// out (16,N) += left (16,16) of 16 bits times rows k .. k+15 of a tile.
template <class T, int N, int LD = tile_stride<T, N>()>
__device__ __forceinline__ void product_with_columns(float (&out)[N / 8][4], const uint32_t (&left)[4], const T* tile, int k) {
    const uint32_t row =
        shared_address(tile + lane_index() % 16 * LD + lane_index() / 16 * 8) + k * LD * static_cast<int>(sizeof(T));
#pragma unroll
    for (int n = 0; n < N / 8; n += 2) {
        uint32_t x[4];
        load_matrices<true>(x, row + n * 8 * sizeof(T));
        mma_16x8x16<T>(out[n], left, {x[0], x[1]});
        mma_16x8x16<T>(out[n + 1], left, {x[2], x[3]});
    }
}

// out (16,N) += left (16,8 NT) times rows k .. k + 8 NT - 1 of a tile; the left operand is results side by side, rounded to T.
template <class T, int N, int LD = tile_stride<T, N>(), int NT>
__device__ __forceinline__ void product_with_columns(float (&out)[N / 8][4], const float (&left)[NT][4], const T* tile, int k) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
        for (int i = 0; i < 8 * NT; ++i) {
            const int source = lane_row() * 4 + i % 8 / 2;
            const float upper = __shfl_sync(ALL_LANES, left[i / 8][i % 2], source);
            const float lower = __shfl_sync(ALL_LANES, left[i / 8][2 + i % 2], source);
            const float* row = tile + (k + i) * LD + lane_column() * 2;
#pragma unroll
            for (int n = 0; n < N / 8; ++n) {
                out[n][0] = fmaf(upper, row[n * 8], out[n][0]);
                out[n][1] = fmaf(upper, row[n * 8 + 1], out[n][1]);
                out[n][2] = fmaf(lower, row[n * 8], out[n][2]);
                out[n][3] = fmaf(lower, row[n * 8 + 1], out[n][3]);
            }
        }
    } else {
#pragma unroll
        for (int m = 0; m < NT; m += 2) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = rounded_pair<T>(left[m + i / 2][i % 2 * 2], left[m + i / 2][i % 2 * 2 + 1]);
            product_with_columns<T, N, LD>(out, a, tile, k + m * 8);
        }
    }
}

// The same with the transpose of a tile of left operands, whose rows k .. k+15 meet those of `tile`: out (16,N) += left^T tile for
// its columns first .. first+15. `stride`: of the left tile, a multiple of eight that is odd in eights.
template <class T, int N, int LD = tile_stride<T, N>()>
__device__ __forceinline__ void product_of_columns(float (&out)[N / 8][4], const T* left, int stride, int first, const T* tile,
                                                   int k) {
    if constexpr (std::is_same_v<T, float>) {
        float x[2][4];
#pragma unroll
        for (int e = 0; e < 8; ++e)
            x[e / 4][e % 4] = left[(k + e / 4 * 8 + lane_column() * 2 + e % 2) * stride + first + lane_row() + e % 4 / 2 * 8];
        product_with_columns<T, N, LD>(out, x, tile, k);
    } else {
        uint32_t a[4];
        const int lane = lane_index();
        load_matrices<true>(a, shared_address(left + (lane / 16 * 8 + lane % 8) * stride + first + lane / 8 % 2 * 8) +
                                   k * stride * static_cast<int>(sizeof(T)));
        product_with_columns<T, N, LD>(out, a, tile, k);
    }
}

}  // namespace vlattn
