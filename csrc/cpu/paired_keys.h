// Keys, values and rows of a tile of attention as pairs of bfloat16 numbers, beside those that are float32 numbers.
#pragma once
#include "attention.h"
#include "pairs.h"

namespace ISA {
namespace {

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
        if (!TILES && !interleaved) pair_all_rows(rows, stride, count, size, across, size);
        interleaved = true;
        const Size ld = TILES ? half(count) : size;
        product<!TILES>(size, t.width, half(some), across, ld, (const Pair*)weights, t.width, C, t.width, add);
    }
    // From G (some, width), the gradient of `products`, times `factor` and rounded: that of the keys, to_keys (some, stride), or +=
    // with `add`, and that of the tile's rows, to_rows (size, width) or null, added to. `tile_rows` are pairs of rows
    // (width / 2, stride); `along` holds some * width / 2, and G is left undefined.
    void gradients(const Tile& t, Size some, float factor, float* G, Pair* along, const Pair* tile_rows, float* to_keys,
                   Size to_stride, bool add, float* to_rows) {
        const Size columns = round_up(size, VL);
        round_tile(G, t.rows, t.width, some, factor, along, (Pair*)G);
        product<false>(some, columns, half(t.rows), (const Pair*)along, t.width / 2, tile_rows, columns, to_keys, to_stride, add);
        if (to_rows) sum(t, some, G, to_rows, true);
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
        round_tile(S, t.rows, t.width, some, 1.f, nullptr, (Pair*)S);
        paired.sum(t, some, S, C, add);
    }
    // From G (some, width), the gradient of `products`: that of the keys, to_keys (some, stride), or += with `add`, and that of the
    // tile's rows, to_rows (size, width) or null, added to. For pairs G counts `factor` times and is left undefined, and `along` holds some *
    // width / 2. tile_rows are (width, size rounded up), or pairs of rows.
    void gradients(const Tile& t, Size some, float factor, float* G, Pair* along, const float* tile_rows, float* to_keys,
                   Size stride, bool add, float* to_rows) {
        if (pairs) return paired.gradients(t, some, factor, G, along, (const Pair*)tile_rows, to_keys, stride, add, to_rows);
        const Size columns = round_up(size, VL);
        product<false>(some, columns, t.rows, G, t.width, tile_rows, columns, to_keys, stride, add);
        if (to_rows) tile_product<true>(t, size, some, numbers.rows, numbers.stride, G, to_rows, true);
    }
};

}  // namespace
}  // namespace ISA
