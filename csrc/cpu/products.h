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

// What becomes of a finished block of C, whose first element lies at (row, column): it is stored.
struct Store {
    template <int ROWS, int COLUMNS>
    METHOD void operator()(Vector (&c)[ROWS][COLUMNS], Size, Size, float* C, Size ldc) const {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int n = 0; n < COLUMNS; ++n) store(C + r * ldc + n * VL, c[r][n]);
    }
};

// One panel of C: what stays the same from block to block
template <class Finish>
struct Panel {
    Size depth;
    const float* __restrict__ A;
    Size lda;
    const float* __restrict__ B;
    Size ldb;
    float* __restrict__ C;
    Size ldc;
    bool add;
    Size column;
    const Finish& finish;
};

// One block of C. TRANSPOSED: A is given as (depth, rows).
template <int ROWS, int COLUMNS, bool TRANSPOSED, class Finish>
INLINE void block(const Panel<Finish>& p, Size row) {
    const float* __restrict__ A = p.A + row * (TRANSPOSED ? 1 : p.lda);
    const float* __restrict__ B = p.B;
    float* C = p.C + row * p.ldc;
    Vector c[ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < COLUMNS; ++n) c[r][n] = Vector{};
    for (Size k = 0; k < p.depth; ++k) {
        Vector b[COLUMNS];
#pragma GCC unroll 8
        for (int n = 0; n < COLUMNS; ++n) b[n] = load(B + k * p.ldb + n * VL);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const Vector a = splat(TRANSPOSED ? A[k * p.lda + r] : A[r * p.lda + k]);
#pragma GCC unroll 8
            for (int n = 0; n < COLUMNS; ++n) c[r][n] += a * b[n];
        }
    }
    // a sum of sums of at most DEPTH terms: one long sum has two to three times the error
    if (p.add)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int n = 0; n < COLUMNS; ++n) c[r][n] = load(C + r * p.ldc + n * VL) + c[r][n];
    p.finish(c, row, p.column, C, p.ldc);
}

template <int COLUMNS, bool TRANSPOSED, class Finish>
static void panel(Size rows, const Panel<Finish>& p) {
    Size r = 0;
    for (; r + MOST_ROWS <= rows; r += MOST_ROWS) block<MOST_ROWS, COLUMNS, TRANSPOSED>(p, r);
    switch (rows - r) {
        case 1:
            return block<1, COLUMNS, TRANSPOSED>(p, r);
        case 2:
            return block<2, COLUMNS, TRANSPOSED>(p, r);
        case 3:
            return block<3, COLUMNS, TRANSPOSED>(p, r);
        case 4:
            return block<4, COLUMNS, TRANSPOSED>(p, r);
        case 5:
            return block<5, COLUMNS, TRANSPOSED>(p, r);
    }
}

// `depth` at most DEPTH
template <bool TRANSPOSED, class Finish>
static void product_of_some(Size rows, Size columns, Size depth, const float* A, Size lda, const float* B, Size ldb, float* C,
                            Size ldc, bool add, const Finish& finish) {
    for (Size n = 0; n < columns;) {
        const Panel<Finish> p = {depth, A, lda, B + n, ldb, C + n, ldc, add, n, finish};
        Size vectors = (columns - n) / VL;
        if (vectors > MOST_COLUMNS) vectors = vectors == MOST_COLUMNS + 1 ? MOST_COLUMNS - 1 : MOST_COLUMNS;  // no thin rest
        switch (vectors) {
            case 1:
                panel<1, TRANSPOSED>(rows, p);
                break;
            case 2:
                panel<2, TRANSPOSED>(rows, p);
                break;
#if VL == 16 || defined(__aarch64__)
            case 3:
                panel<3, TRANSPOSED>(rows, p);
                break;
            case 4:
                panel<4, TRANSPOSED>(rows, p);
                break;
#endif
        }
        n += vectors * VL;
    }
}

// C (rows, columns) = A B, or += with `add`; A (rows, depth), B (depth, columns). TRANSPOSED: A is given as (depth, rows).
// `columns` is a multiple of VL; rows and depth are any. Nothing outside the matrices is read. `finish` gets the blocks of C
// while they are in registers.
template <bool TRANSPOSED, class Finish = Store>
static void product(Size rows, Size columns, Size depth, const float* A, Size lda, const float* B, Size ldb, float* C, Size ldc,
                    bool add, const Finish& finish = {}) {
    for (; depth > DEPTH; depth -= DEPTH, A += DEPTH * (TRANSPOSED ? lda : 1), B += DEPTH * ldb, add = true)
        product_of_some<TRANSPOSED>(rows, columns, DEPTH, A, lda, B, ldb, C, ldc, add, Store{});
    product_of_some<TRANSPOSED>(rows, columns, depth, A, lda, B, ldb, C, ldc, add, finish);
}

}  // namespace
}  // namespace ISA
