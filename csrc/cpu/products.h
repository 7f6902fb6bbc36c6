// Products of tiles: C (+)= A B in float32.
//
// B and C are rows of vectors; an element of A is broadcast. So A is read as it lies in memory: keys and values need no copy.
// An element of A and B is a float32, or a Pair of bfloat16 numbers that follow one another along the depth; C is float32.
#pragma once
#include "tiles.h"

namespace ISA {
namespace {

// Prefetches `bytes` to the second cache, or with NEAR = 3 to the first.
template <int NEAR = 2> INLINE void fetch(const void* data, Size bytes) {
    for (Size n = 0; n < bytes; n += 64) __builtin_prefetch((const char*)data + n, 0, NEAR);
}

// The block of C that stays in registers: MOST_ROWS rows, and up to four vectors of columns where there are 32 registers.
#if VL == 16 || defined(__aarch64__)
static const Size MOST_COLUMNS = 4;
#else
static const Size MOST_COLUMNS = 2;
#endif
static const Size MOST_ROWS = 6, DEPTH = 128;  // DEPTH rows of B at a time stay in the first cache

INLINE void add_product(Vector& c, Vector a, Vector b) { c += a * b; }

// ---- pairs of bfloat16 numbers

struct Pair {
    uint16_t first, second;
};
typedef uint32_t UnalignedPairs __attribute__((vector_size(VL * 4), aligned(2), may_alias));
INLINE Words load(const Pair* p) { return *(const UnalignedPairs*)p; }
INLINE void store(Pair* p, Words x) { *(UnalignedPairs*)p = x; }
INLINE Words splat(Pair x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits + Words{};
}
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) || TILES || defined(VLATTN_PAIRS)
#define PAIRS true  // whether bfloat16 calls multiply pairs
#else
#define PAIRS false
#endif
extern "C" double vlattn_rate_of_pairs();
// Whether products of pairs that no tile takes are faster than those of float32 numbers. Sets without tiles are chosen by the same
// rate, as a whole (library.cpp).
INLINE bool pairs_are_fast() { return !TILES || vlattn_rate_of_pairs() > 1; }
// Each lane of c += a.second b.second + a.first b.first
INLINE void add_product(Vector& c, Words a, Words b) {
#if defined(__AVX512BF16__)
    c = _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    c = vbfdotq_f32(c, vreinterpretq_bf16_u32(a), vreinterpretq_bf16_u32(b));
#else  // a stand-in for tests (library.cmake)
    c += bfloat16_lanes(a) * bfloat16_lanes(b);
    c += bfloat16_lanes(a << 16) * bfloat16_lanes(b << 16);
#endif
}

// Stores a finished block of C, whose first element lies at (row, column).
struct Store {
    template <int ROWS, int COLUMNS> METHOD void operator()(Vector (&c)[ROWS][COLUMNS], Size, Size, float* C, Size ldc) const {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int n = 0; n < COLUMNS; ++n) store(C + r * ldc + n * VL, c[r][n]);
    }
};

// Finish of a product of keys and query rows: stores it and updates `top`, the largest logit of each row in a block of keys.
struct StoreAndTop {
    float* top;
    template <int ROWS, int COLUMNS>
    METHOD void operator()(Vector (&c)[ROWS][COLUMNS], Size row, Size column, float* C, Size ldc) const {
        for (int n = 0; n < COLUMNS; ++n) {
            Vector x = load(top + column + n * VL);
            for (int r = 0; r < ROWS; ++r) x = maximum(x, c[r][n]);
            store(top + column + n * VL, x);
        }
        Store{}(c, row, column, C, ldc);
    }
};
// `Finish` of products that are still to be multiplied by the scale
template <class Finish> struct Scaled {
    float scale;
    Finish finish;
    template <int ROWS, int COLUMNS>
    METHOD void operator()(Vector (&c)[ROWS][COLUMNS], Size row, Size column, float* C, Size ldc) const {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int n = 0; n < COLUMNS; ++n) c[r][n] *= scale;
        finish(c, row, column, C, ldc);
    }
};
template <class Finish> static Scaled<Finish> scaled(float scale, const Finish& finish) { return {scale, finish}; }

// One panel of C: what stays the same from block to block
template <class Element, class Finish> struct Panel {
    Size depth;
    const Element* __restrict__ A;
    Size lda;
    const Element* __restrict__ B;
    Size ldb;
    float* __restrict__ C;
    Size ldc;
    bool add;
    Size column;
    const Finish& finish;
    Size ahead;
};

// One block of C. TRANSPOSED: A is given as (depth, rows).
template <int ROWS, int COLUMNS, bool TRANSPOSED, class Element, class Finish>
INLINE void block(const Panel<Element, Finish>& p, Size row) {
    const Element* __restrict__ A = p.A + row * (TRANSPOSED ? 1 : p.lda);
    const Element* __restrict__ B = p.B;
    float* C = p.C + row * p.ldc;
    Vector c[ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < COLUMNS; ++n) c[r][n] = Vector{};
    for (Size k = 0; k < p.depth; ++k) {
        decltype(load(B)) b[COLUMNS];
#pragma GCC unroll 8
        for (int n = 0; n < COLUMNS; ++n) b[n] = load(B + k * p.ldb + n * VL);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const auto a = splat(TRANSPOSED ? A[k * p.lda + r] : A[r * p.lda + k]);
#pragma GCC unroll 8
            for (int n = 0; n < COLUMNS; ++n) add_product(c[r][n], a, b[n]);
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

template <int COLUMNS, bool TRANSPOSED, class Element, class Finish>
static void panel(Size rows, const Panel<Element, Finish>& p) {
    Size r = 0;
    for (; r + MOST_ROWS <= rows; r += MOST_ROWS) {
        for (Size n = r; p.ahead && n < r + MOST_ROWS; ++n) fetch(p.A + (n + p.ahead) * p.lda, p.depth * sizeof(Element));
        block<MOST_ROWS, COLUMNS, TRANSPOSED>(p, r);
    }
    switch (rows - r) {
        case 1: return block<1, COLUMNS, TRANSPOSED>(p, r);
        case 2: return block<2, COLUMNS, TRANSPOSED>(p, r);
        case 3: return block<3, COLUMNS, TRANSPOSED>(p, r);
        case 4: return block<4, COLUMNS, TRANSPOSED>(p, r);
        case 5: return block<5, COLUMNS, TRANSPOSED>(p, r);
    }
}

#if TILES
// ---- products of pairs by tiles. Rows of pairs are rows of a tile of A, and pairs of two rows of B are rows of a tile of B.

// to (TILE_SIDE, COLUMNS TILE_SIDE) = `rows` rows of at most so many pairs, and zeros
template <int COLUMNS> static void fill_up(const Pair* from, Size ld, Size rows, Size columns, Pair* to) {
    for (Size r = 0; r < TILE_SIDE; ++r)
        for (Size n = 0; n < COLUMNS * TILE_SIDE; n += VL) {
            const Size some = r >= rows || n >= columns ? 0 : columns - n < VL ? columns - n : VL;
#if VL == 16
            const Words x = (Words)_mm512_maskz_loadu_epi32((1u << some) - 1, from + r * ld + n);
#else
            Words x = {};
            if (some > 0) memcpy(&x, from + r * ld + n, some * sizeof(Pair));
#endif
            store(to + r * COLUMNS * TILE_SIDE + n, x);
        }
}

// ROWS rows from (row, 0) of a block's sums (*, COLUMNS) into C
template <int ROWS, int COLUMNS, class Finish>
INLINE void finish_rows_of_tiles(const Panel<Pair, Finish>& p, const float* sums, Size row) {
    float* C = p.C + row * p.ldc;
    Vector c[ROWS][COLUMNS / VL];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < COLUMNS / VL; ++n) {
            c[r][n] = load(sums + r * COLUMNS + n * VL);
            if (p.add) c[r][n] = load(C + r * p.ldc + n * VL) + c[r][n];
        }
    p.finish(c, row, p.column, C, p.ldc);
}

// Up to ROWS by COLUMNS tiles of C, of which the last rows may be missing. `last` (TILE_SIDE, COLUMNS TILE_SIDE): the rows of B
// behind the last whole tile of them, and zeros
template <int ROWS, int COLUMNS, class Finish>
static void block_of_tiles(const Panel<Pair, Finish>& p, Size row, Size rows, const Pair* last) {
    const Size bytes = sizeof(Pair), width = COLUMNS * TILE_SIDE;
    alignas(64) Pair filled[ROWS][TILE_SIDE * TILE_SIDE];
    alignas(64) float sums[ROWS * TILE_SIDE * width];
    const auto tile_of_rows = [&](int i, Size k, Size& ld) {
        const Pair* from = p.A + (row + i * TILE_SIDE) * p.lda + k;
        const Size some = rows - i * TILE_SIDE, pairs = p.depth - k;
        ld = p.lda;
        if (some >= TILE_SIDE && pairs >= TILE_SIDE) return from;
        fill_up<1>(from, ld, some, pairs, filled[i]);
        ld = TILE_SIDE;
        return (const Pair*)filled[i];
    };
    clear_tile_register(0);
    if (COLUMNS == 2) clear_tile_register(1);
    if (ROWS == 2) clear_tile_register(2);
    if (ROWS == 2 && COLUMNS == 2) clear_tile_register(3);
    for (Size k = 0; k < p.depth; k += TILE_SIDE) {
        const bool whole = p.depth - k >= TILE_SIDE;
        const Pair* B = whole ? p.B + k * p.ldb : last;
        const Size ldb = whole ? p.ldb : width;
        Size lda;
        const Pair* A = tile_of_rows(0, k, lda);
        load_tile_register(4, A, lda * bytes);
        load_tile_register(6, B, ldb * bytes);
        multiply_tile_registers(0, 4, 6);
        if (COLUMNS == 2) {
            load_tile_register(7, B + TILE_SIDE, ldb * bytes);
            multiply_tile_registers(1, 4, 7);
        }
        if (ROWS == 2) {
            A = tile_of_rows(ROWS - 1, k, lda);
            load_tile_register(5, A, lda * bytes);
            multiply_tile_registers(2, 5, 6);
        }
        if (ROWS == 2 && COLUMNS == 2) multiply_tile_registers(3, 5, 7);
    }
    store_tile_register(0, sums, width * bytes);
    if (COLUMNS == 2) store_tile_register(1, sums + TILE_SIDE, width * bytes);
    if (ROWS == 2) store_tile_register(2, sums + TILE_SIDE * width, width * bytes);
    if (ROWS == 2 && COLUMNS == 2) store_tile_register(3, sums + TILE_SIDE * width + TILE_SIDE, width * bytes);
    Size r = 0;
    for (; r + 4 <= rows; r += 4) finish_rows_of_tiles<4, COLUMNS * TILE_SIDE>(p, sums + r * width, row + r);
    for (; r < rows; ++r) finish_rows_of_tiles<1, COLUMNS * TILE_SIDE>(p, sums + r * width, row + r);
}

template <int COLUMNS, class Finish> static void panel_of_tiles(Size rows, const Panel<Pair, Finish>& p) {
    const Size whole = p.depth / TILE_SIDE * TILE_SIDE;
    alignas(64) Pair last[COLUMNS * TILE_SIDE * TILE_SIDE];
    if (whole < p.depth) fill_up<COLUMNS>(p.B + whole * p.ldb, p.ldb, p.depth - whole, COLUMNS * TILE_SIDE, last);
    for (Size r = 0; r < rows; r += 2 * TILE_SIDE) {
        const Size some = rows - r < 2 * TILE_SIDE ? rows - r : 2 * TILE_SIDE;
        for (Size n = r; p.ahead && n < r + some; ++n) fetch(p.A + (n + p.ahead) * p.lda, p.depth * sizeof(Pair));
        if (some > TILE_SIDE) block_of_tiles<2, COLUMNS>(p, r, some, last);
        else block_of_tiles<1, COLUMNS>(p, r, some, last);
    }
}

// As product_of_some, for whole tiles of columns: the number of these columns, or 0 where the depth is too small. The limit comes
// from a count of instructions, not from time: a tile always has 16 pairs, used or not. Few rows, which fill no tile either, are the
// last keys of many: one that is equal to an earlier key has the same product.
template <class Finish>
static Size product_by_tiles(Size rows, Size columns, Size depth, const Pair* A, Size lda, const Pair* B, Size ldb, float* C,
                             Size ldc, bool add, const Finish& finish, Size ahead) {
    if (depth < TILE_SIDE / 2) return 0;
    Size n = 0;
    while (columns - n >= TILE_SIDE) {
        const Panel<Pair, Finish> p = {depth, A, lda, B + n, ldb, C + n, ldc, add, n, finish, n == 0 ? ahead : 0};
        const bool two = columns - n >= 2 * TILE_SIDE;
        if (two) panel_of_tiles<2>(rows, p);
        else panel_of_tiles<1>(rows, p);
        n += two ? 2 * TILE_SIDE : TILE_SIDE;
    }
    return n;
}
template <class Element> constexpr bool ARE_PAIRS = false;
template <> constexpr bool ARE_PAIRS<Pair> = true;
#endif

// `depth` at most DEPTH
template <bool TRANSPOSED, class Element, class Finish>
static void product_of_some(Size rows, Size columns, Size depth, const Element* A, Size lda, const Element* B, Size ldb, float* C,
                            Size ldc, bool add, const Finish& finish, Size ahead) {
    Size n = 0;
#if TILES
    if constexpr (ARE_PAIRS<Element> && !TRANSPOSED)
        n = product_by_tiles(rows, columns, depth, A, lda, B, ldb, C, ldc, add, finish, ahead);
#endif
    while (n < columns) {
        const Panel<Element, Finish> p = {depth, A, lda, B + n, ldb, C + n, ldc, add, n, finish, n == 0 ? ahead : 0};
        Size vectors = (columns - n) / VL;
        if (vectors > MOST_COLUMNS) vectors = vectors == MOST_COLUMNS + 1 ? MOST_COLUMNS - 1 : MOST_COLUMNS;  // no thin rest
        switch (vectors) {
            case 1: panel<1, TRANSPOSED>(rows, p); break;
            case 2: panel<2, TRANSPOSED>(rows, p); break;
#if VL == 16 || defined(__aarch64__)
            case 3: panel<3, TRANSPOSED>(rows, p); break;
            case 4: panel<4, TRANSPOSED>(rows, p); break;
#endif
        }
        n += vectors * VL;
    }
}

// C (rows, columns) = A B, or += with `add`; A (rows, depth), B (depth, columns). TRANSPOSED: A is given as (depth, rows).
// `columns` is a multiple of VL; rows and depth are any. Nothing outside the matrices is read. `finish` gets the blocks of C
// while they are in registers. The rows of A that come `ahead` rows later are fetched, if it is not 0; A is not transposed then.
template <bool TRANSPOSED, class Element, class Finish = Store>
static void product(Size rows, Size columns, Size depth, const Element* A, Size lda, const Element* B, Size ldb, float* C,
                    Size ldc, bool add, const Finish& finish = {}, Size ahead = 0) {
    for (; depth > DEPTH; depth -= DEPTH, A += DEPTH * (TRANSPOSED ? lda : 1), B += DEPTH * ldb, add = true)
        product_of_some<TRANSPOSED>(rows, columns, DEPTH, A, lda, B, ldb, C, ldc, add, Store{}, ahead);
    product_of_some<TRANSPOSED>(rows, columns, depth, A, lda, B, ldb, C, ldc, add, finish, ahead);
}

// ---- B with few columns, in rows of GROUP numbers. `product` would use few lanes of its vectors: here vectors run along the depth
// or along the rows, as A lies.

static const Size MOST_FEW = 2;

// ROWS rows of A at a time, whose sums do not wait for one another
template <int ROWS, class Finish>
INLINE void rows_with_few(const float (&columns)[MOST_FEW][DEPTH], Size few, Size depth, const float* A, Size lda, Size row,
                          float* C, Size ldc, bool add, const Finish& finish) {
    const Size whole = depth / VL * VL;
    Vector c[ROWS][1][GROUP / VL] = {};
    for (Size n = 0; n < few; ++n) {
        Vector total[ROWS] = {};
        for (Size k = 0; k < whole; k += VL)
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i) total[i] += load(A + i * lda + k) * load(columns[n] + k);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
            float rest = 0;
            for (Size k = whole; k < depth; ++k) rest += A[i * lda + k] * columns[n][k];
            c[i][0][0][n] = sum(total[i]) + rest + (add ? C[i * ldc + n] : 0.f);
        }
    }
    for (int i = 0; i < ROWS; ++i) finish(c[i], row + i, 0, C + i * ldc, ldc);
}
// C (rows, GROUP) = A B, or += with `add`; the other columns become 0. `depth` at most DEPTH.
template <class Finish>
static void product_with_few(Size few, Size rows, Size depth, const float* A, Size lda, const float* B, Size ldb, float* C,
                             Size ldc, bool add, const Finish& finish) {
    float columns[MOST_FEW][DEPTH];
    for (Size n = 0; n < few; ++n)
        for (Size k = 0; k < depth; ++k) columns[n][k] = B[k * ldb + n];
    Size r = 0;
    for (; r + 4 <= rows; r += 4) rows_with_few<4>(columns, few, depth, A + r * lda, lda, r, C + r * ldc, ldc, add, finish);
    for (; r < rows; ++r) rows_with_few<1>(columns, few, depth, A + r * lda, lda, r, C + r * ldc, ldc, add, finish);
}
template <int VECTORS>
INLINE void block_with_few(Size few, Size depth, const float* A, Size lda, const float* B, Size ldb, float* C, Size ldc,
                           bool add) {
    for (Size n = 0; n < few; ++n) {
        Vector total[VECTORS] = {};
        for (Size k = 0; k < depth; ++k)
#pragma GCC unroll 4
            for (int m = 0; m < VECTORS; ++m) total[m] += load(A + k * lda + m * VL) * splat(B[k * ldb + n]);
        float column[VECTORS * VL];
        for (int m = 0; m < VECTORS; ++m) store(column + m * VL, total[m]);
        for (Size r = 0; r < VECTORS * VL; ++r) C[r * ldc + n] = add ? C[r * ldc + n] + column[r] : column[r];
    }
}
// The same for A given as (depth, rows). The other columns stay.
static void transposed_product_with_few(Size few, Size rows, Size depth, const float* A, Size lda, const float* B, Size ldb,
                                        float* C, Size ldc, bool add) {
    Size r = 0;
    for (; r + 4 * VL <= rows; r += 4 * VL) block_with_few<4>(few, depth, A + r, lda, B, ldb, C + r * ldc, ldc, add);
    for (; r + VL <= rows; r += VL) block_with_few<1>(few, depth, A + r, lda, B, ldb, C + r * ldc, ldc, add);
    for (; r < rows; ++r)
        for (Size n = 0; n < few; ++n) {
            float total = 0;
            for (Size k = 0; k < depth; ++k) total += A[k * lda + r] * B[k * ldb + n];
            C[r * ldc + n] = add ? C[r * ldc + n] + total : total;
        }
}

}  // namespace
}  // namespace ISA
