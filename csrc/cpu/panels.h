// The forward pass of plain dot products by tiles of bfloat16 pairs: a panel of keys and values is packed once, and many query rows
// pass it.
//
// Query row i; a panel of keys J, of which j is one. Keys are rows of a tile and query rows are its columns: as in attention.h each
// lane is a query row. In brackets: the names below.
//     S_ij     = q_i . k_j                                                           [scores]
//     L_ij     = scale S_ij + mask_ij,  top'_i = max(top_i, max_J L_ij)              [logits_of_strip]
//     P_ij     = 2^((L_ij - top'_i) log2 e), summed in registers, rounded in pairs   [round_weights]
//     rescale_i = e^(top_i - top'_i),  total_i = rescale_i total_i + sum_J P_ij
//     out_i    = rescale_i out_i + sum_J P_ij v_j, where the sum stays in tiles      [add_values]
// At the end out_i / total_i and lse_i = top_i + ln total_i                          [finish_rows, store_lse]
//
// Bound: tile products, and of the vectors' instructions the exponentials. Tricks: every tile is a dense kilobyte, and the tiles of a
// product follow one another along its depth; so no row is copied to fill a tile up, and no stride is a power of two. Four tiles of
// sums take two loads for two products. A panel stays in the second cache while SWEEP tiles of rows pass it. Counts stand in
// docs/reliability.md; no stored row has the time.
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

// Keys of a panel: all of them up to MOST_KEYS, else equal panels. More numbers in a row, more keys: what a panel costs beside its
// products is as much for each number.
static Size panel_keys(const Attention& a) {
    const Size limit = a.M <= MOST_KEYS ? MOST_KEYS : a.D > 64 ? 1024 : 512, panels = (a.M + limit - 1) / limit;
    return round_up((a.M + panels - 1) / panels, STEP);
}

// ---- products

// Registers 0 to 3: the sums of ROWS by COLUMNS tiles, over `depth` tiles that follow one another from A0, A1, B0 and B1
template <int ROWS, int COLUMNS>
static void sum_products(const Pair* A0, const Pair* A1, const Pair* B0, const Pair* B1, Size depth) {
    const Size row = TILE_SIDE * sizeof(Pair);
    clear_tile_register(0);
    if (COLUMNS == 2) clear_tile_register(1);
    if (ROWS == 2) clear_tile_register(2);
    if (ROWS == 2 && COLUMNS == 2) clear_tile_register(3);
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

// A panel of one key head
struct PackedPanel {
    Pair* keys;  // (keys / TILE_SIDE, depth) tiles of (keys, pairs of numbers)
    Pair* values;  // (Dv / TILE_SIDE, steps) tiles of (numbers, pairs of keys)
    uint16_t* zeros;  // as many as a row has
    Size depth, steps;  // tiles along a query's numbers; along the keys
    void plan(const Attention& a, Memory& memory) {
        const Size most_keys = panel_keys(a);
        depth = steps_of(a.D), steps = steps_of(most_keys);
        keys = (Pair*)memory.take(most_keys / TILE_SIDE * depth * TILE);
        values = (Pair*)memory.take(strips_of(a.Dv) * steps * TILE);
        zeros = (uint16_t*)memory.take(half(most(a.D, a.Dv)));
    }
    void load(const Attention& a, Size b, Size head, Size first, Size count) {
        const uint8_t* visible = a.masks.keys ? a.masks.keys + b * a.M + first : nullptr;
        const Rows key_rows = {a.key, visible, b, head, first, count, a.D, zeros};
        const Rows value_rows = {a.value, visible, b, head, first, count, a.Dv, zeros};
        const uint16_t* row[STEP];
        for (Size s = 0; s < steps_of(count); ++s) {
            Pair* to = keys + 2 * s * depth * TILE;
            key_rows.take(s * STEP, STEP, row);
            pack_rows(row, a.D, depth, to), pack_rows(row + TILE_SIDE, a.D, depth, to + depth * TILE);
            value_rows.take(s * STEP, STEP, row);
            pack_transposed_rows(row, a.Dv, values + s * TILE, steps * TILE);
            count_packed((2 * depth + strips_of(a.Dv)) * TILE * sizeof(Pair));
        }
    }
};

// ---- one thread's memory

// What the rows of a tile take from panel to panel
struct PanelRows {
    Pair* queries;  // (2, depth) tiles of (pairs of numbers, rows)
    float* out;  // (2, Dv rounded up, TILE_SIDE)
    float* largest;  // (PANEL_LANES), as in forward.h
    double* total;
    void plan(const Attention& a, Memory& memory) {
        queries = (Pair*)memory.take(2 * steps_of(a.D) * TILE), out = memory.take(2 * strips_of(a.Dv) * TILE);
        largest = memory.take(PANEL_LANES), total = memory.take_doubles(PANEL_LANES);
    }
};

struct PanelSpace {
    PackedPanel panel;
    PanelRows* rows;  // of each tile of a sweep
    float* S;  // (2, stride): the scores of a strip, (keys, TILE_SIDE)
    Pair* P;  // (2, stride / 2): its weights
    float *top, *rescale, *factor;  // (PANEL_LANES)
    float *sums, *mask, *scratch;  // four tiles; of mask_tile; rows of queries and outputs
    Size stride;
    static Size most_tiles(const Attention& a) { return least(SWEEP, a.group() * tiles_of(a, PANEL_LANES)); }
    void plan(const ForwardCall& call, Memory& memory) {
        const Attention& a = call.c.a;
        panel.plan(a, memory);
        rows = memory.take_spaces<PanelRows>(most_tiles(a), [&](PanelRows& r) { r.plan(a, memory); });
        stride = (panel_keys(a) + STEP) * TILE_SIDE;  // a strip more than the keys have, for the caches' sake
        S = memory.take(2 * stride), P = (Pair*)memory.take(stride);
        top = memory.take(PANEL_LANES), rescale = memory.take(PANEL_LANES), factor = memory.take(PANEL_LANES);
        sums = memory.take(4 * TILE), mask = memory.take(2 * GROUP * LANES);
        scratch = memory.take(most(panel.depth * TILE, TILE_SIDE * a.Dv));
    }
};

// ---- a tile of rows and a panel

INLINE Tile strip_of(const Tile& t, Size s) {
    return {t.b, t.h, t.first + s * TILE_SIDE, least(TILE_SIDE, t.rows - s * TILE_SIDE), TILE_SIDE};
}

static void start_rows(const Attention& a, PanelSpace& x, const Tile& t, const PanelRows& r) {
    const Size depth = x.panel.depth;
    const Rows rows = {a.query, nullptr, t.b, t.h, t.first, t.rows, a.D, x.panel.zeros};
    const uint16_t* row[TILE_SIDE];
    for (Size s = 0; s < t.width / TILE_SIDE; ++s) {
        rows.take(s * TILE_SIDE, TILE_SIDE, row);
        pack_rows(row, a.D, depth, (Pair*)x.scratch);
        for (Size k = 0; k < depth; ++k) {
            const float* from = x.scratch + k * TILE;
            transpose(from, TILE_SIDE, TILE_SIDE, TILE_SIDE, (float*)(r.queries + (s * depth + k) * TILE), TILE_SIDE);
        }
    }
    memset(r.out, 0, 2 * strips_of(a.Dv) * TILE * sizeof(float));
    for (Size i = 0; i < t.width; ++i) r.largest[i] = -INFINITY, r.total[i] = 0;
}

template <int STRIPS> static void scores(PanelSpace& x, const PanelRows& r, Size steps) {
    const Size depth = x.panel.depth;
    const Pair *keys = x.panel.keys, *queries = r.queries;
    for (Size s = 0; s < steps; ++s, keys += 2 * depth * TILE) {
        sum_products<2, STRIPS>(keys, keys + depth * TILE, queries, queries + depth * TILE, depth);
        store_sums<2, STRIPS>(x.S + 2 * s * TILE, x.stride);
    }
}

// S (count, TILE_SIDE), and the largest logit of each row: gives the factor that makes logits of S.
static float logits_of_strip(const Attention& a, const Tile& strip, Size j0, Size count, float* S, float* mask, float* top) {
    float factor = (float)a.scale;
    if (is_masked(a, strip, j0, count) || !(factor > 0)) {
        for (Size n = 0; n < count * TILE_SIDE; n += VL) store(S + n, load(S + n) * factor);
        mask_tile(a, strip, j0, count, S, mask, nullptr);
        factor = 1;
    }
    find_top(S, count, TILE_SIDE, top);
    for (Size i = 0; i < TILE_SIDE; ++i) top[i] *= factor;  // the largest still, where factor > 0
    return factor;
}
// One panel of the online softmax of a strip (forward.h): S times `factor` are logits, and P becomes pairs of their weights.
static void round_weights(const float* S, Size steps, float factor, bool first, const float* top, float* largest, double* total,
                          float* rescale, Pair* P) {
    const Vector nothing = splat(-INFINITY), by = splat(factor);
    Vector shift[PARTS], sum[PARTS];
    for (int p = 0; p < PARTS; ++p) {
        const Vector before = first ? nothing : load(largest + p * VL), now = maximum(before, load(top + p * VL));
        shift[p] = now == nothing ? Vector{} : now, sum[p] = Vector{};
        store(largest + p * VL, now);
        store(rescale + p * VL, exp_negative(before - shift[p]));
    }
    for (Size s = 0; s < steps; ++s) {
        Vector part[PARTS];
        for (int p = 0; p < PARTS; ++p) part[p] = Vector{};
        for (Size j = 0; j < STEP; j += 2, S += 2 * TILE_SIDE, P += TILE_SIDE)
            for (int p = 0; p < PARTS; ++p) {
                // rounded as the backward pass has the logits, so that P and the log-sum-exp are theirs however large these are
                const Vector even = rounded_product(load(S + p * VL), by),
                             odd = rounded_product(load(S + TILE_SIDE + p * VL), by);
                const Vector first_weight = exp_to_round(even - shift[p]), second_weight = exp_to_round(odd - shift[p]);
                store(P + p * VL, rounded_pairs(first_weight, second_weight));
                part[p] += first_weight + second_weight;
            }
        for (int p = 0; p < PARTS; ++p) sum[p] += part[p];
    }
    float of_panel[TILE_SIDE];
    for (int p = 0; p < PARTS; ++p) store(of_panel + p * VL, sum[p]);
    for (Size i = 0; i < TILE_SIDE; ++i) total[i] = (first ? 0. : total[i] * rescale[i]) + of_panel[i];
}

// out (Dv, TILE_SIDE) of each strip = rescale out + the panel's sum
template <int ROWS, int STRIPS>
static void add_values_of_tiles(PanelSpace& x, float* out, Size out_stride, const Pair* values, Size steps) {
    sum_products<ROWS, STRIPS>(values, values + x.panel.steps * TILE, x.P, x.P + x.stride / 2, steps);
    store_sums<ROWS, STRIPS>(x.sums, 2 * TILE);
    for (Size s = 0; s < STRIPS; ++s)
        for (Size n = 0; n < ROWS * TILE_SIDE; ++n)
            for (Size i = 0; i < TILE_SIDE; i += VL) {
                float* to = out + s * out_stride + n * TILE_SIDE + i;
                store(to, load(to) * load(x.rescale + s * TILE_SIDE + i) + load(x.sums + 2 * s * TILE + n * TILE_SIDE + i));
            }
}
template <int STRIPS> static void add_values(const Attention& a, PanelSpace& x, const PanelRows& r, Size steps) {
    const Size tiles = strips_of(a.Dv), out_stride = tiles * TILE;
    for (Size d = 0; d < tiles; d += 2) {
        const Pair* values = x.panel.values + d * x.panel.steps * TILE;
        float* out = r.out + d * TILE;
        if (d + 1 < tiles) add_values_of_tiles<2, STRIPS>(x, out, out_stride, values, steps);
        else add_values_of_tiles<1, STRIPS>(x, out, out_stride, values, steps);
    }
}

template <int STRIPS>
static void pass_panel(const Attention& a, PanelSpace& x, const Tile& t, const PanelRows& r, Size j0, Size count) {
    const Size steps = steps_of(count);
    scores<STRIPS>(x, r, steps);
    for (Size s = 0; s < STRIPS; ++s) {
        float* S = x.S + s * x.stride;
        const Size i = s * TILE_SIDE;
        const float factor = logits_of_strip(a, strip_of(t, s), j0, count, S, x.mask, x.top + i);
        for (Size n = count * TILE_SIDE; n < steps * 2 * TILE; n += VL) store(S + n, splat(-INFINITY));  // keys that fill up
        Pair* P = x.P + s * x.stride / 2;
        round_weights(S, steps, factor, j0 == 0, x.top + i, r.largest + i, r.total + i, x.rescale + i, P);
    }
    add_values<STRIPS>(a, x, r, steps);
}

static void finish_rows_of_panels(const Forward& c, PanelSpace& x, const Tile& t, const PanelRows& r) {
    const Attention& a = c.a;
    store_lse(a, t, r.largest, r.total, c.lse + (t.b * a.H + t.h) * a.N + t.first);
    finish_rows(r.largest, r.total, t.width, {x.rescale, x.factor});
    for (Size s = 0; s < t.width / TILE_SIDE; ++s) {
        float* out = r.out + s * strips_of(a.Dv) * TILE;
        scale_rows(out, a.Dv, TILE_SIDE, x.factor + s * TILE_SIDE);
        store_tile(out, strip_of(t, s), a.Dv, 1.f, c.out, a.dtype, x.scratch);
    }
}

// The tiles [first, last) of rows of one key head
static void sweep(const Forward& c, PanelSpace& x, Size first, Size last) {
    const Attention& a = c.a;
    const Tile any = tile_of_item(a, first, PANEL_LANES);
    const Size visible = visible_keys(a, any.b), most_keys = panel_keys(a);
    const auto each = [&](const auto& f) {
        for (Size item = first; item < last; ++item) f(tile_of_item(a, item, PANEL_LANES), x.rows[item - first]);
    };
    memset(x.panel.zeros, 0, most(a.D, a.Dv) * sizeof(uint16_t));
    each([&](const Tile& t, const PanelRows& r) { start_rows(a, x, t, r); });
    for (Size j0 = 0; j0 < visible; j0 += most_keys) {
        x.panel.load(a, any.b, any.h / a.group(), j0, least(most_keys, visible - j0));
        each([&](const Tile& t, const PanelRows& r) {
            const Size count = least(most_keys, t.keys(a, visible) - j0);
            if (count <= 0) return;  // under the causal mask
            if (t.width > TILE_SIDE) pass_panel<2>(a, x, t, r, j0, count);
            else pass_panel<1>(a, x, t, r, j0, count);
        });
    }
    each([&](const Tile& t, const PanelRows& r) { finish_rows_of_panels(c, x, t, r); });
}
static void panels_task(ForwardCall& call, PanelSpace& x, Size task) {
    const Attention& a = call.c.a;
    const Size items = a.B * a.H * tiles_of(a, PANEL_LANES);
    by_sweeps(a, share(items, task, call.tasks), share(items, task + 1, call.tasks), PANEL_LANES, SWEEP,
              [&](Size first, Size last) { sweep(call.c, x, first, last); });
}

// The one place that says which calls take panels
static bool takes_panels(const Forward& c) {
    const Attention& a = c.a;
    const bool fills_tiles = least(a.M, least(a.D, a.Dv)) >= TILE_SIDE;
    const bool is_plain = c.score.kind == DOT && c.dropout.probability == 0 && !a.masks.row_bias;
    return fills_tiles && is_plain && Logits::takes_pairs(a, c.score);
}
static Size panels_forward(const Forward& c) {
    const Size items = c.a.B * c.a.H * tiles_of(c.a, PANEL_LANES);
    ForwardCall call = {c, least(thread_count(), items)};
    return items > 0 ? run_with_space(call.tasks, call, panels_task) : DONE;
}

}  // namespace
}  // namespace ISA
#endif
