// Products of tiles: C (+)= A B in float32.
//
// B and C are rows of vectors; an element of A is broadcast. So A is read as it lies in memory: keys and values need no copy.
#pragma once
#include "vectors.h"

namespace ISA {
namespace {

// The block of C that stays in registers: MOST_ROWS rows, and up to four vectors of columns where there are 32 registers.
#if VL == 16 || defined(__aarch64__)
static const Size MOST_COLUMNS = 4;
#else
static const Size MOST_COLUMNS = 2;
#endif
static const Size MOST_ROWS = 6, DEPTH = 128;  // DEPTH rows of B at a time stay in the first cache

// One block of C. TRANSPOSED: A is given as (depth, rows).
template <int ROWS, int COLUMNS, bool TRANSPOSED>
INLINE void block(Size depth, const float* __restrict__ A, Size lda, const float* __restrict__ B, Size ldb, float* __restrict__ C,
                  Size ldc, bool add) {
    Vector c[ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < COLUMNS; ++n) c[r][n] = Vector{};
    for (Size k = 0; k < depth; ++k) {
        Vector b[COLUMNS];
#pragma GCC unroll 8
        for (int n = 0; n < COLUMNS; ++n) b[n] = load(B + k * ldb + n * VL);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const Vector a = splat(TRANSPOSED ? A[k * lda + r] : A[r * lda + k]);
#pragma GCC unroll 8
            for (int n = 0; n < COLUMNS; ++n) c[r][n] += a * b[n];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < COLUMNS; ++n) {
            float* to = C + r * ldc + n * VL;
            // a sum of sums of at most DEPTH terms: one long sum has two to three times the error
            store(to, add ? load(to) + c[r][n] : c[r][n]);
        }
}

template <int COLUMNS, bool TRANSPOSED>
static void panel(Size rows, Size depth, const float* A, Size lda, const float* B, Size ldb, float* C, Size ldc, bool add) {
    const Size step = TRANSPOSED ? 1 : lda;
    Size r = 0;
    for (; r + MOST_ROWS <= rows; r += MOST_ROWS) block<MOST_ROWS, COLUMNS, TRANSPOSED>(depth, A + r * step, lda, B, ldb, C + r * ldc, ldc, add);
    A += r * step, C += r * ldc;
    switch (rows - r) {
        case 1: return block<1, COLUMNS, TRANSPOSED>(depth, A, lda, B, ldb, C, ldc, add);
        case 2: return block<2, COLUMNS, TRANSPOSED>(depth, A, lda, B, ldb, C, ldc, add);
        case 3: return block<3, COLUMNS, TRANSPOSED>(depth, A, lda, B, ldb, C, ldc, add);
        case 4: return block<4, COLUMNS, TRANSPOSED>(depth, A, lda, B, ldb, C, ldc, add);
        case 5: return block<5, COLUMNS, TRANSPOSED>(depth, A, lda, B, ldb, C, ldc, add);
    }
}

// C (rows, columns) = A B, or += with `add`; A (rows, depth), B (depth, columns). TRANSPOSED: A is given as (depth, rows).
// `columns` is a multiple of VL; rows and depth are any. Nothing outside the matrices is read.
template <bool TRANSPOSED>
static void product(Size rows, Size columns, Size depth, const float* A, Size lda, const float* B, Size ldb, float* C, Size ldc, bool add) {
    if (depth == 0 && !add)
        for (Size r = 0; r < rows; ++r) memset(C + r * ldc, 0, columns * sizeof(float));
    for (Size k = 0; k < depth; k += DEPTH) {
        const Size some = depth - k < DEPTH ? depth - k : DEPTH;
        const float* a = A + (TRANSPOSED ? k * lda : k);
        for (Size n = 0; n < columns;) {
            const float* b = B + k * ldb + n;
            Size vectors = (columns - n) / VL;
            if (vectors > MOST_COLUMNS) vectors = vectors == MOST_COLUMNS + 1 ? MOST_COLUMNS - 1 : MOST_COLUMNS;  // no thin rest
            switch (vectors) {
                case 1: panel<1, TRANSPOSED>(rows, some, a, lda, b, ldb, C + n, ldc, add || k > 0); break;
                case 2: panel<2, TRANSPOSED>(rows, some, a, lda, b, ldb, C + n, ldc, add || k > 0); break;
#if VL == 16 || defined(__aarch64__)
                case 3: panel<3, TRANSPOSED>(rows, some, a, lda, b, ldb, C + n, ldc, add || k > 0); break;
                case 4: panel<4, TRANSPOSED>(rows, some, a, lda, b, ldb, C + n, ldc, add || k > 0); break;
#endif
            }
            n += vectors * VL;
        }
    }
}

}  // namespace
}  // namespace ISA
