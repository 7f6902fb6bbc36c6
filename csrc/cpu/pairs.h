// bfloat16 numbers two by two, as products take them: keys and values, rows of a tile, and tiles of float32 rounded to them.
//
// Pairs lie along the depth of a product. Along a row they are the tensor itself. Pairs of two rows are interleaved, once for all
// the tiles of a head.
#pragma once
#include "attention.h"

namespace ISA {
namespace {

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
// to (half(size)) = the numbers of one row
static void fill_pairs(const void* row, Size size, Pair* to) {
    if (size % 2) to[size / 2].second = 0;
    if (size > 0) memcpy(to, row, size * sizeof(uint16_t));
}

// A tile X (count, width) times `factor`, rounded: pairs of query rows (count, width / 2) into `along`, with 0 behind the `rows`,
// and pairs of keys (half(count), width) into `across`, which may be X itself. Either may be null.
static void round_tile(const float* X, const Tile& t, Size count, float factor, Pair* along, Pair* across) {
    const Size w = t.width;
    uint16_t* halves = (uint16_t*)along;
    for (Size j = 0; j < count; j += 2)
        for (Size i = 0; i < w; i += VL) {
            const bool last = j + 1 == count;
            const Vector first = load(X + j * w + i) * factor, second = last ? Vector{} : load(X + (j + 1) * w + i) * factor;
            if (along) store(halves + j * w + i, rounded(first));
            if (along && !last) store(halves + (j + 1) * w + i, rounded(second));
            if (across) store(across + j / 2 * w + i, rounded_pairs(first, second));
        }
    for (Size j = 0; along && t.rows % 2 && j < count; ++j) halves[j * w + t.rows] = 0;
}

// The rows of a tile: `transposed` (half(size), width), and pairs of two rows (width / 2, stride) into `across`, or null; zeros lie
// beyond the rows and beyond `size`. `scratch` holds LANES * half(size).
static void load_pairs(const StridedTensor& x, const Tile& t, Size size, Pair* transposed, Pair* across, Size stride,
                       Pair* scratch) {
    const Size n = half(size);
    count_packed(t.width * (n + (across ? stride / 2 : 0)) * sizeof(Pair));
    for (Size i = 0; i < t.rows; ++i) fill_pairs(element(x.data, BFLOAT16, x.at(t.b, t.h, t.first + i)), size, scratch + i * n);
    fetch_rows(x, BFLOAT16, t, t.first + t.rows, size);
    memset(scratch + t.rows * n, 0, (t.width - t.rows) * n * sizeof(Pair));
    transpose((const float*)scratch, n, t.width, n, (float*)transposed, t.width);
    for (Size i = 0; across && i < t.width; i += 2)
        pair_rows(
            (const uint16_t*)(scratch + i * n), (const uint16_t*)(scratch + (i + 1) * n), size, across + i / 2 * stride, stride);
}

// A block of keys, or of values: as `Keys`
struct PairedKeys {
    const Pair* rows;  // (count, stride)
    Size stride, size, ahead;
    Pair *copy, *across;  // across: pairs of two keys, (half(count), size), transposed for tiles; each null where not needed
    bool interleaved;  // whether `across` is filled
    Size b, head, first, count;
    static bool are_pairs(const StridedTensor& x, Size size) { return size % 2 == 0 && x.stride_n % 2 == 0; }
    void plan(const Attention& a, const StridedTensor& x, Size numbers, bool sums, Memory& memory) {
        size = numbers, ahead = a.ahead();
        copy = a.masks.keys || !are_pairs(x, size) ? (Pair*)memory.take(a.key_block() * half(size)) : nullptr;
        across = sums ? (Pair*)memory.take(half(a.key_block()) * size) : nullptr;
        b = head = first = -1;
    }
    void load(const Attention& a, const StridedTensor& x, Size of_b, Size of_head, Size from, Size some) {
        if (b == of_b && head == of_head && first == from && count >= some) return;
        b = of_b, head = of_head, first = from, count = some, interleaved = false;
        const uint8_t* visible = a.masks.keys ? a.masks.keys + b * a.M + first : nullptr;
        const bool in_place = are_pairs(x, size) && all_visible(visible, count);
        rows = in_place ? (const Pair*)element(x.data, BFLOAT16, x.at(b, head, first)) : copy;
        stride = in_place ? x.stride_n / 2 : half(size);
        for (Size j = 0; !in_place && j < count; ++j) {
            fetch_row(x, BFLOAT16, b, head, first + j + 16, size);
            if (visible && !visible[j]) memset(copy + j * stride, 0, stride * sizeof(Pair));
            else fill_pairs(element(x.data, BFLOAT16, x.at(b, head, first + j)), size, copy + j * stride);
        }
    }
    // C (some, width) = the first keys by rows of a tile, transposed as (half(size), width), or += with `add`
    template <class Finish>
    void products(const Tile& t, Size some, const float* transposed, float* C, bool add, const Finish& finish) const {
        const Pair* tile = (const Pair*)transposed;
        product<false>(some, t.width, half(size), rows, stride, tile, t.width, C, t.width, add, finish, ahead);
    }
    // C (size, width) = the first keys' sum with the weights (half(some), width), or += with `add`
    void sum(const Tile& t, Size some, const float* weights, float* C, bool add) {
        if (TILES && !interleaved) pair_columns(rows, stride, count, size, across);
        for (Size j = 0; !TILES && !interleaved && j < count; j += 2) {
            const Pair *first_row = rows + j * stride, *second_row = j + 1 < count ? first_row + stride : nullptr;
            pair_rows((const uint16_t*)first_row, (const uint16_t*)second_row, size, across + j / 2 * size, size);
        }
        interleaved = true;
        const Size ld = TILES ? half(count) : size;
        product<!TILES>(size, t.width, half(some), across, ld, (const Pair*)weights, t.width, C, t.width, add);
    }
    // From G (some, width), the gradient of `products`, times `factor` and rounded: that of the keys, to_keys (some, stride), or +=
    // with `add`, and that of the tile's rows, to_rows (size, width), added to. `tile_rows` are pairs of rows (width / 2, stride);
    // `along` holds some * width / 2, and G is left undefined.
    void gradients(const Tile& t, Size some, float factor, float* G, Pair* along, const Pair* tile_rows, float* to_keys,
                   Size to_stride, bool add, float* to_rows) {
        const Size columns = round_up(size, VL);
        round_tile(G, t, some, factor, along, (Pair*)G);
        product<false>(some, columns, half(t.rows), (const Pair*)along, t.width / 2, tile_rows, columns, to_keys, to_stride, add);
        sum(t, some, G, to_rows, true);
    }
};

// A block of keys, or of values, beside rows of a tile: as float32 numbers, or as pairs
struct KeyRows {
    bool pairs;
    StridedTensor from;
    Size size, ahead;
    Keys numbers;
    PairedKeys paired;
    void plan(const Attention& a, const StridedTensor& x, Size numbers_of_a_row, bool takes_pairs, bool sums, Memory& memory) {
        pairs = takes_pairs, from = x, size = numbers_of_a_row, ahead = a.ahead();
        if (pairs) paired.plan(a, from, size, sums, memory);
        else numbers.plan(a, size, memory);
    }
    void load(const Attention& a, const Tile& t, Size first, Size count) {
        const Size head = t.h / a.group();
        if (pairs) paired.load(a, from, t.b, head, first, count);
        else load_keys(a, from, size, numbers, t.b, head, first, count);
    }
    // C (some, width) = the first keys by rows of a tile, transposed as (size, width) or as pairs, or += with `add`
    template <class Finish = Store>
    void products(const Tile& t, Size some, const float* transposed, float* C, bool add, const Finish& finish = {}) const {
        if (pairs) paired.products(t, some, transposed, C, add, finish);
        else tile_product<false>(t, some, size, numbers.rows, numbers.stride, transposed, C, add, finish, ahead);
    }
    // C (size, width) = the first keys' sum with the weights S (some, width), or += with `add`; pairs leave S undefined.
    void sum(const Tile& t, Size some, float* S, float* C, bool add) {
        if (!pairs) return tile_product<true>(t, size, some, numbers.rows, numbers.stride, S, C, add);
        round_tile(S, t, some, 1.f, nullptr, (Pair*)S);
        paired.sum(t, some, S, C, add);
    }
    // From G (some, width), the gradient of `products`: that of the keys, to_keys (some, stride), or += with `add`, and that of the
    // tile's rows, to_rows (size, width), added to. For pairs G counts `factor` times and is left undefined, and `along` holds some *
    // width / 2. tile_rows are (width, size rounded up), or pairs of rows.
    void gradients(const Tile& t, Size some, float factor, float* G, Pair* along, const float* tile_rows, float* to_keys,
                   Size stride, bool add, float* to_rows) {
        if (pairs) return paired.gradients(t, some, factor, G, along, (const Pair*)tile_rows, to_keys, stride, add, to_rows);
        const Size columns = round_up(size, VL);
        product<false>(some, columns, t.rows, G, t.width, tile_rows, columns, to_keys, stride, add);
        tile_product<true>(t, size, some, numbers.rows, numbers.stride, G, to_rows, true);
    }
};

}  // namespace
}  // namespace ISA
