// Tiles of bfloat16 pairs as panels of keys and values, and query rows, are packed into them, and their products (panels.h,
// backward_panels.h).
//
// Every tile is a dense kilobyte, and the tiles of a product follow one another along its depth: so no row is copied to fill a tile
// up within a product.
#pragma once
#include "forward.h"

#if TILES
namespace ISA {
namespace {

static const Size TILE = TILE_SIDE * TILE_SIDE;  // pairs, or sums, of a tile
static const Size STEP = 2 * TILE_SIDE;  // bfloat16 numbers in a row of a tile; keys, or features, of two tiles
static const Size PANEL_LANES = 2 * TILE_SIDE;  // query rows of a tile (attention.h): two strips of TILE_SIDE, each one's columns
static const Size SWEEP = 64;  // so many tiles of query rows pass a packed panel: their sums fit the second cache

INLINE Size steps_of(Size numbers) { return (numbers + STEP - 1) / STEP; }
INLINE Size strips_of(Size numbers) { return (numbers + TILE_SIDE - 1) / TILE_SIDE; }
// Keys of a panel: equal panels of at most `limit`
INLINE Size equal_panels(Size keys, Size limit) {
    const Size panels = (keys + limit - 1) / limit;
    return round_up((keys + panels - 1) / panels, STEP);
}

// ---- products

// Registers 0 to 3 are the sums of ROWS by COLUMNS tiles.
template <int ROWS, int COLUMNS> static void clear_sums() {
    clear_tile_register(0);
    if (COLUMNS == 2) clear_tile_register(1);
    if (ROWS == 2) clear_tile_register(2);
    if (ROWS == 2 && COLUMNS == 2) clear_tile_register(3);
}
// Over `depth` tiles that follow one another from A0, A1, B0 and B1
template <int ROWS, int COLUMNS>
static void add_products(const Pair* A0, const Pair* A1, const Pair* B0, const Pair* B1, Size depth) {
    const Size row = TILE_SIDE * sizeof(Pair);
    for (Size at = 0; at < depth * TILE; at += TILE) {
        load_tile_register(4, A0 + at, row);
        load_tile_register(6, B0 + at, row);
        multiply_tile_registers(0, 4, 6);
        if (COLUMNS == 2) {
            load_tile_register(7, B1 + at, row);
            multiply_tile_registers(1, 4, 7);
        }
        if (ROWS == 2) {
            load_tile_register(5, A1 + at, row);
            multiply_tile_registers(2, 5, 6);
        }
        if (ROWS == 2 && COLUMNS == 2) multiply_tile_registers(3, 5, 7);
    }
}
// The sums into `to`, the tiles of a column one after the other, and `stride` numbers from column to column
template <int ROWS, int COLUMNS> static void store_sums(float* to, Size stride) {
    const Size row = TILE_SIDE * sizeof(float);
    store_tile_register(0, to, row);
    if (COLUMNS == 2) store_tile_register(1, to + stride, row);
    if (ROWS == 2) store_tile_register(2, to + TILE, row);
    if (ROWS == 2 && COLUMNS == 2) store_tile_register(3, to + stride + TILE, row);
}
template <int ROWS, int COLUMNS> static void load_sums(const float* from, Size stride) {
    const Size row = TILE_SIDE * sizeof(float);
    load_tile_register(0, from, row);
    if (COLUMNS == 2) load_tile_register(1, from + stride, row);
    if (ROWS == 2) load_tile_register(2, from + TILE, row);
    if (ROWS == 2 && COLUMNS == 2) load_tile_register(3, from + stride + TILE, row);
}

// ---- packing

// `count` rows of a head from `first` on, and zeros behind them and in the place of padding, which is not read
struct Rows {
    const StridedTensor& x;
    const uint8_t* visible;  // of these rows, or null
    Size b, head, first, count, size;
    const uint16_t* zeros;  // (size)
    void take(Size j, Size some, const uint16_t** to) const {  // `some` rows from j on
        for (Size n = 0; n < some; ++n, ++j) {
            const bool is_masked = j >= count || (visible && !visible[j]);
            to[n] = is_masked ? zeros : (const uint16_t*)element(x.data, BFLOAT16, x.at(b, head, first + j));
            if (j + some < count) fetch_row(x, BFLOAT16, b, head, first + j + some, size);
        }
    }
};
// TILE_SIDE rows: `depth` tiles of (rows, pairs of their numbers), filled up with zeros
static void pack_rows(const uint16_t* const* row, Size size, Size depth, Pair* to) {
    const Size whole = size / STEP;
    for (Size n = 0; n < TILE_SIDE; ++n) {
        for (Size k = 0; k < whole; ++k) memcpy(to + k * TILE + n * TILE_SIDE, row[n] + k * STEP, STEP * sizeof(uint16_t));
        if (whole == depth) continue;
        Pair* last = to + whole * TILE + n * TILE_SIDE;
        memset(last, 0, TILE_SIDE * sizeof(Pair));
        memcpy(last, row[n] + whole * STEP, (size - whole * STEP) * sizeof(uint16_t));
    }
}
// STEP rows: tiles of (TILE_SIDE numbers, pairs of rows), with `stride` pairs from tile to tile
static void pack_transposed_rows(const uint16_t* const* row, Size size, Pair* to, Size stride) {
    alignas(64) Pair pairs[TILE];
    for (Size d = 0; d < size; d += TILE_SIDE, to += stride) {
        for (Size n = 0; n < TILE_SIDE; ++n) {
            const uint16_t *first = row[2 * n] + d, *second = row[2 * n + 1] + d;
            Pair* pair = pairs + n * TILE_SIDE;
            if (size - d < TILE_SIDE) pair_rows(first, second, size - d, pair, TILE_SIDE);
            else
                for (Size i = 0; i < TILE_SIDE; i += VL) store(pair + i, interleave(load(first + i), load(second + i)));
        }
        transpose((const float*)pairs, TILE_SIDE, TILE_SIDE, TILE_SIDE, (float*)to, TILE_SIDE);
    }
}

// STEP rows: tiles of (pairs of rows, TILE_SIDE numbers), with `stride` pairs from tile to tile
static void pack_pairs_of_rows(const uint16_t* const* row, Size size, Pair* to, Size stride) {
    count_packed(strips_of(size) * TILE * sizeof(Pair));
    for (Size d = 0; d < size; d += TILE_SIDE, to += stride)
        for (Size n = 0; n < TILE_SIDE; ++n) {
            const uint16_t *first = row[2 * n] + d, *second = row[2 * n + 1] + d;
            pair_rows(first, second, least(TILE_SIDE, size - d), to + n * TILE_SIDE, TILE_SIDE);
        }
}
// TILE_SIDE rows: `depth` tiles of (pairs of numbers, rows). `scratch` holds as many.
static void pack_columns(const uint16_t* const* row, Size size, Size depth, Pair* scratch, Pair* to) {
    count_packed(depth * TILE * sizeof(Pair));
    pack_rows(row, size, depth, scratch);
    for (Size k = 0; k < depth * TILE; k += TILE)
        transpose((const float*)(scratch + k), TILE_SIDE, TILE_SIDE, TILE_SIDE, (float*)(to + k), TILE_SIDE);
}

// The keys, or the values, of a panel. Either form is null where no product takes it.
struct PackedKeys {
    Pair* rows;  // (keys / TILE_SIDE, depth) tiles of (keys, pairs of numbers)
    Pair* transposed;  // (size / TILE_SIDE, steps) tiles of (numbers, pairs of keys)
    Size size, depth, steps;  // tiles along a key's numbers; along the keys
    void plan(Size numbers, Size keys, bool takes_rows, bool takes_transposed, Memory& memory) {
        size = numbers, depth = steps_of(size), steps = steps_of(keys);
        rows = takes_rows ? (Pair*)memory.take(keys / TILE_SIDE * depth * TILE) : nullptr;
        transposed = takes_transposed ? (Pair*)memory.take(strips_of(size) * steps * TILE) : nullptr;
    }
    const Pair* step(Size n) const { return rows + 2 * n * depth * TILE; }  // rows of keys
    const Pair* strip(Size n) const { return transposed + n * steps * TILE; }  // of numbers
    void load(const Rows& from) {
        const uint16_t* row[STEP];
        for (Size s = 0; s < steps_of(from.count); ++s) {
            from.take(s * STEP, STEP, row);
            for (Size strip = 2 * s; rows && strip < 2 * s + 2; ++strip)
                pack_rows(row + strip % 2 * TILE_SIDE, size, depth, rows + strip * depth * TILE);
            if (transposed) pack_transposed_rows(row, size, transposed + s * TILE, steps * TILE);
            count_packed(((rows ? 2 * depth : 0) + (transposed ? strips_of(size) : 0)) * TILE * sizeof(Pair));
        }
    }
};
// Keys and values of a panel of one key head, or their tangents; `zeros` are as many as a row has
static void load_panel(const Attention& a, const StridedTensor& key, const StridedTensor& value, Size b, Size head, Size first,
                       Size count, const uint16_t* zeros, PackedKeys& keys, PackedKeys& values) {
    const uint8_t* visible = a.masks.keys ? a.masks.keys + b * a.M + first : nullptr;
    keys.load({key, visible, b, head, first, count, a.D, zeros});
    values.load({value, visible, b, head, first, count, a.Dv, zeros});
}

// ---- a tile of rows

INLINE Tile strip_of(const Tile& t, Size s) {
    return {t.b, t.h, t.first + s * TILE_SIDE, least(TILE_SIDE, t.rows - s * TILE_SIDE), TILE_SIDE};
}
// Each strip's rows: (strips, depth) tiles of (pairs of numbers, rows)
static void pack_strips(const Rows& rows, const Tile& t, Size depth, Pair* scratch, Pair* to) {
    const uint16_t* row[TILE_SIDE];
    for (Size s = 0; s < t.width / TILE_SIDE; ++s) {
        rows.take(s * TILE_SIDE, TILE_SIDE, row);
        pack_columns(row, rows.size, depth, scratch, to + s * depth * TILE);
    }
}
// Products of the keys of `steps` steps from `first` on, by the strips of a tile: (keys, TILE_SIDE) of each, `stride` numbers apart
template <int STRIPS>
static void key_products(const PackedKeys& keys, Size first, Size steps, const Pair* strips, float* to, Size stride) {
    const Size depth = keys.depth;
    for (Size s = 0; s < steps; ++s) {
        const Pair* rows = keys.step(first + s);
        clear_sums<2, STRIPS>();
        add_products<2, STRIPS>(rows, rows + depth * TILE, strips, strips + depth * TILE, depth);
        store_sums<2, STRIPS>(to + 2 * s * TILE, stride);
    }
}
// S (count, TILE_SIDE) becomes logits where a mask acts. Gives the factor that makes logits of S.
static float mask_strip(const Attention& a, const Tile& strip, Size j0, Size count, float* S, float* mask) {
    const float factor = (float)a.scale;
    if (!is_masked(a, strip, j0, count) && factor > 0) return factor;
    for (Size n = 0; n < count * TILE_SIDE; n += VL) store(S + n, load(S + n) * factor);
    mask_tile(a, strip, j0, count, S, mask, nullptr);
    return 1;
}
// The keys behind `count` that fill a step up
static void hide_rest(Size count, float* S) {
    for (Size n = count * TILE_SIDE; n < steps_of(count) * 2 * TILE; n += VL) store(S + n, splat(-INFINITY));
}

// The one place that says which calls take panels
static bool takes_panels(const Attention& a, const Score& score, const Dropout& dropout) {
    const bool fills_tiles = least(a.M, least(a.D, a.Dv)) >= TILE_SIDE;
    const bool is_plain = score.kind == DOT && dropout.probability == 0 && !a.masks.row_bias;
    return fills_tiles && is_plain && Logits::takes_pairs(a, score);
}

}  // namespace
}  // namespace ISA
#endif
