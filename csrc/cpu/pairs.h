// bfloat16 numbers two by two, as products take them: keys and values, rows of a tile, and tiles of float32 rounded to them.
//
// Pairs lie along the depth of a product. Along a row they are the tensor itself. Pairs of two rows are interleaved, once for all
// the tiles of a head.
#pragma once
#include "products.h"
#include "rows.h"

namespace ISA {
namespace {

// Whether products of a call go by tiles, or are those of pairs; `numbers` are the fewest along a side of them
INLINE bool tiles_pay(Size dtype, Size numbers) {
    return TILES && dtype == BFLOAT16 && numbers >= TILE_SIDE;
}  // fewer fill no tile
INLINE bool pairs_pay(Size dtype, Size numbers) {
    return tiles_pay(dtype, numbers) || (PAIRS && dtype == BFLOAT16 && pairs_are_fast());
}

INLINE Size half(Size n) { return (n + 1) / 2; }
INLINE Words interleave(Halves first, Halves second) { return as_words(first) | as_words(second) << 16; }
INLINE Halves rounded(Vector x) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh(x);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return (Halves)vcvt_bf16_f32(x);
#else
    const Words bits = (Words)x, even = bits + 0x7fff + (bits >> 16 & 1);
    return __builtin_convertvector((x == x ? even : bits | 0x400000) >> 16, Halves);
#endif
}

#if defined(__AVX512BF16__)
INLINE Words paired(__m512i both) {  // of the numbers of two vectors, one behind the other
    typedef uint16_t Lanes __attribute__((vector_size(64)));
    const Lanes order = {
        0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (Words)_mm512_permutexvar_epi16((__m512i)order, both);
}
#endif
INLINE Words rounded_pairs(Vector first, Vector second) {
#if defined(__AVX512BF16__)
    return paired((__m512i)_mm512_cvtne2ps_pbh(second, first));
#else
    return interleave(rounded(first), rounded(second));
#endif
}
// Both rounded, each to a row, and pairs of them, unless `pairs` is null
INLINE void store_rounded(Vector first, Vector second, uint16_t* to_first, uint16_t* to_second, Pair* pairs) {
#if defined(__AVX512BF16__)
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    store(to_first, (Halves)_mm512_castsi512_si256(both));
    store(to_second, (Halves)_mm512_extracti64x4_epi64(both, 1));
    if (pairs) store(pairs, paired(both));
#else
    const Halves rounded_first = rounded(first), rounded_second = rounded(second);
    store(to_first, rounded_first), store(to_second, rounded_second);
    if (pairs) store(pairs, interleave(rounded_first, rounded_second));
#endif
}

// to (columns) = pairs of the numbers of two rows; zeros take the place of a row that is null, and lie behind `size`.
static void pair_rows(const uint16_t* first, const uint16_t* second, Size size, Pair* to, Size columns) {
    Size i = 0;
    for (; second && i + VL <= size; i += VL) store(to + i, interleave(load(first + i), load(second + i)));
    for (; i < size; ++i) to[i] = {first[i], second ? second[i] : (uint16_t)0};
    memset(to + size, 0, (columns - size) * sizeof(Pair));
}
// to (size, half(count)) = the same of `count` rows (*, stride), transposed
static void pair_columns(const Pair* rows, Size stride, Size count, Size size, Pair* to) {
    const Size pairs = half(count);
    alignas(64) Pair tile[GROUP * GROUP] = {}, turned[GROUP * GROUP];
    for (Size k = 0; k < pairs; k += GROUP)
        for (Size d = 0; d < size; d += GROUP) {
            const Size some_pairs = least(GROUP, pairs - k), some = least(GROUP, size - d);
            for (Size i = 0; i < some_pairs; ++i) {
                const Size j = 2 * (k + i);
                const uint16_t *first = (const uint16_t*)(rows + j * stride) + d, *second = first + 2 * stride;
                pair_rows(first, j + 1 < count ? second : nullptr, some, tile + i * GROUP, GROUP);
            }
            count_packed(sizeof tile);
            const bool whole = some_pairs == GROUP && some == GROUP;
            Pair* at = to + d * pairs + k;
            transpose((const float*)tile, GROUP, GROUP, GROUP, (float*)(whole ? at : turned), whole ? pairs : GROUP);
            for (Size n = 0; !whole && n < some; ++n) memcpy(at + n * pairs, turned + n * GROUP, some_pairs * sizeof(Pair));
        }
}
// to (half(count), columns) = pairs of two of the rows (count, stride), with zeros behind the last one and behind `size`
static void pair_all_rows(const Pair* rows, Size stride, Size count, Size size, Pair* to, Size columns) {
    count_packed(half(count) * columns * sizeof(Pair));
    for (Size j = 0; j < count; j += 2) {
        const Pair *first = rows + j * stride, *second = j + 1 < count ? first + stride : nullptr;
        pair_rows((const uint16_t*)first, (const uint16_t*)second, size, to + j / 2 * columns, columns);
    }
}
// to (half(size)) = the numbers of one row
static void fill_pairs(const void* row, Size size, Pair* to) {
    if (size % 2) to[size / 2].second = 0;
    if (size > 0) memcpy(to, row, size * sizeof(uint16_t));
}

// A tile X (count, w) times `factor`, rounded: pairs of query rows (count, w / 2) into `along`, with 0 behind the `rows`, and pairs
// of keys (half(count), w) into `across`, which may be X itself. Either may be null.
static void round_tile(const float* X, Size rows, Size w, Size count, float factor, Pair* along, Pair* across) {
    uint16_t* halves = (uint16_t*)along;
    for (Size j = 0; j < count; j += 2)
        for (Size i = 0; i < w; i += VL) {
            const bool last = j + 1 == count;
            const Vector first = load(X + j * w + i) * factor, second = last ? Vector{} : load(X + (j + 1) * w + i) * factor;
            if (along) store(halves + j * w + i, rounded(first));
            if (along && !last) store(halves + (j + 1) * w + i, rounded(second));
            if (across) store(across + j / 2 * w + i, rounded_pairs(first, second));
        }
    for (Size j = 0; along && rows % 2 && j < count; ++j) halves[j * w + rows] = 0;
}

}  // namespace
}  // namespace ISA
