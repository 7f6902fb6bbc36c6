// Products of tiles by a warp group of sm_90, four warps: the tensor cores' wgmma, which runs beside other instructions and reads
// its right operand from shared memory. Only for 16-bit types, and in kernels that are compiled for sm_90a.
//
// A tile in shared memory has rows of 64 numbers, 128 bytes, at a multiple of 1,024. Its pieces of 16 bytes are exchanged: piece p
// of row r lies at place p ^ r % 8, so that a column of pieces lies in all banks. A matrix of 128 columns is two tiles.
// A result of 64 rows has rows 16 w .. 16 w + 15 in warp w of the group, in each as mma.h has them: c[n][0] and c[n][1] in row g,
// columns 8 n + 2t and 8 n + 2t+1; c[n][2] and c[n][3] in row g+8.
#pragma once

#include "mma.h"

namespace vlattn {

constexpr int WARP_GROUP = 4 * WARP;
constexpr int TILE_ROW = 128;  // bytes

// Copies ROWS rows of a matrix (.., columns), the first at `first`, to tiles in shared memory, two side by side, by 256 threads.
// Rows beyond `last` are copies of it: a row of zeros would make NaN of an infinite number. Missing columns are zeros.
template <class T, int ROWS>
__device__ __forceinline__ void copy_rows(uint32_t tiles, const T* matrix, int64_t stride, int first, int last, int columns) {
    const int piece = threadIdx.x % 16, row = threadIdx.x / 16;
    const uint32_t to = tiles + piece / 8 * (ROWS * TILE_ROW) + row * TILE_ROW + (piece ^ row) % 8 * 16;
#pragma unroll
    for (int r = 0; r < ROWS; r += 16)
        copy_16_bytes(to + r * TILE_ROW, matrix + min(first + row + r, last) * stride + piece * 8, piece * 8 < columns);
}

// What threads have written to shared memory so far becomes visible to products, after a barrier.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A matrix in shared memory as a product takes it: of 64 columns, or of two tiles side by side, `to_second` bytes apart.
__device__ __forceinline__ uint64_t matrix_at(uint32_t address, int to_second = 0) {
    constexpr uint64_t EIGHT_ROWS = 8 * TILE_ROW, EXCHANGED = 1;  // pieces among 128 bytes
    return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(to_second >> 4) << 16 | EIGHT_ROWS >> 4 << 32 | EXCHANGED << 62;
}
__device__ __forceinline__ uint64_t matrix_after(uint64_t matrix, int bytes) { return matrix + (bytes >> 4); }

// The compiler computes these numbers here, and not behind `begin_products`.
template <int COUNT> __device__ __forceinline__ void computed(uint32_t (&x)[COUNT][4]) {
#pragma unroll
    for (int i = 0; i < 4 * COUNT; ++i) asm volatile("" : "+r"(x[i / 4][i % 4]));
}

// Registers that other instructions have written may enter products.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Products since the last one are a group.
__device__ __forceinline__ void end_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all groups but the last COUNT.
template <int COUNT> __device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(COUNT) : "memory");
}

#define SUMS(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define SUMS_32(c) SUMS(c, 0), SUMS(c, 1), SUMS(c, 2), SUMS(c, 3), SUMS(c, 4), SUMS(c, 5), SUMS(c, 6), SUMS(c, 7)
#define SUMS_64(c) \
    SUMS_32(c), SUMS(c, 8), SUMS(c, 9), SUMS(c, 10), SUMS(c, 11), SUMS(c, 12), SUMS(c, 13), SUMS(c, 14), SUMS(c, 15)
#define NAMES_32 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_64                                                                                                        \
    NAMES_32                                                                                                            \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59," \
    "%60,%61,%62,%63"

// c (64,64) = or += a (64,16) b (16,64), both in shared memory. Rows of the tile of `a` are those of a, or COLUMNS of it; rows of
// the tile of b are columns of b, or ROWS.
template <class T, bool COLUMNS, bool ROWS>
__device__ __forceinline__ void product(float (&c)[8][4], uint64_t a, uint64_t b, bool adds) {
#define PRODUCT(TYPES)                                                                                                           \
    asm volatile("{.reg .pred adds; setp.ne.b32 adds, %34, 0;\n wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES " {" NAMES_32 \
                 "}, %32, %33, adds, 1, 1, %35, %36;}"                                                                           \
                 : SUMS_32(c)                                                                                                    \
                 : "l"(a), "l"(b), "r"(static_cast<int>(adds)), "n"(COLUMNS), "n"(ROWS))
    if constexpr (std::is_same_v<T, __half>) PRODUCT("f16.f16");
    else PRODUCT("bf16.bf16");
#undef PRODUCT
}

// c (64,128) += a (64,16) b (16,128), a in registers as in mma_16x8x16, b in shared memory, whose tile has the rows of b.
template <class T> __device__ __forceinline__ void product(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
#define PRODUCT(TYPES)                                                                                                          \
    asm volatile("{.reg .pred adds; setp.ne.b32 adds, 1, 0;\n wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES " {" NAMES_64 \
                 "}, {%64,%65,%66,%67}, %68, adds, 1, 1, 1;}"                                                                   \
                 : SUMS_64(c)                                                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
    if constexpr (std::is_same_v<T, __half>) PRODUCT("f16.f16");
    else PRODUCT("bf16.bf16");
#undef PRODUCT
}

#undef SUMS
#undef SUMS_32
#undef SUMS_64
#undef NAMES_32
#undef NAMES_64

}  // namespace vlattn
