// The forward pass of plain dot products by tiles of bfloat16 pairs: a panel of keys and values is packed once, and many query rows
// pass it.
//
// Query row i; a panel of keys J, of which j is one. Keys are rows of a tile and query rows are its columns: as in attention.h each
// lane is a query row. In brackets: the names below.
//     S_ij     = q_i . k_j                                                           [key_products]
//     L_ij     = scale S_ij + mask_ij,  top'_i = max(top_i, max_J L_ij)              [logits_of_strip]
//     P_ij     = 2^((L_ij - top'_i) log2 e), summed in registers, rounded in pairs   [round_weights]
//     rescale_i = e^(top_i - top'_i),  total_i = rescale_i total_i + sum_J P_ij
//     out_i    = rescale_i out_i + sum_J P_ij v_j, where the sum stays in tiles      [add_values]
// At the end out_i / total_i and lse_i = top_i + ln total_i                          [finish_rows, store_lse]
//
// Bound: tile products, and of the vectors' instructions the exponentials. Tricks: no row is copied within a product
// (packed_tiles.h), and no stride is a power of two. Four tiles of sums take two loads for two products. A panel stays in the second
// cache while SWEEP tiles of rows pass it. `python -m tools.tiles` counts; no stored row has the time.
#pragma once
#include "packed_tiles.h"

#if TILES
namespace ISA {
namespace {

// All keys up to MOST_KEYS are one panel. More numbers in a row, more keys: what a panel costs beside its products is as much for
// each number.
static Size panel_keys(const Attention& a) { return equal_panels(a.M, a.M <= MOST_KEYS ? MOST_KEYS : a.D > 64 ? 1024 : 512); }

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
    PackedKeys keys, values;  // of a panel of one key head
    uint16_t* zeros;  // as many as a row has
    PanelRows* rows;  // of each tile of a sweep
    float* S;  // (2, stride): the scores of a strip, (keys, TILE_SIDE)
    Pair* P;  // (2, stride / 2): its weights
    float *top, *rescale, *factor;  // (PANEL_LANES)
    float *sums, *mask, *scratch;  // four tiles; of mask_tile; rows of queries and outputs
    Size stride;
    static Size most_tiles(const Attention& a) { return least(SWEEP, a.group() * tiles_of(a, PANEL_LANES)); }
    void plan(const ForwardCall& call, Memory& memory) {
        const Attention& a = call.c.a;
        keys.plan(a.D, panel_keys(a), true, false, memory), values.plan(a.Dv, panel_keys(a), false, true, memory);
        zeros = (uint16_t*)memory.take(half(most(a.D, a.Dv)));
        rows = memory.take_spaces<PanelRows>(most_tiles(a), [&](PanelRows& r) { r.plan(a, memory); });
        stride = (panel_keys(a) + STEP) * TILE_SIDE;  // a strip more than the keys have, for the caches' sake
        S = memory.take(2 * stride), P = (Pair*)memory.take(stride);
        top = memory.take(PANEL_LANES), rescale = memory.take(PANEL_LANES), factor = memory.take(PANEL_LANES);
        sums = memory.take(4 * TILE), mask = memory.take(2 * GROUP * LANES);
        scratch = memory.take(most(keys.depth * TILE, TILE_SIDE * a.Dv));
    }
};

// ---- a tile of rows and a panel

static void start_rows(const Attention& a, PanelSpace& x, const Tile& t, const PanelRows& r) {
    pack_strips({a.query, nullptr, t.b, t.h, t.first, t.rows, a.D, x.zeros}, t, x.keys.depth, (Pair*)x.scratch, r.queries);
    memset(r.out, 0, 2 * strips_of(a.Dv) * TILE * sizeof(float));
    for (Size i = 0; i < t.width; ++i) r.largest[i] = -INFINITY, r.total[i] = 0;
}

// S (count, TILE_SIDE), and the largest logit of each row: gives the factor that makes logits of S.
static float logits_of_strip(const Attention& a, const Tile& strip, Size j0, Size count, float* S, float* mask, float* top) {
    const float factor = mask_strip(a, strip, j0, count, S, mask);
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
    clear_sums<ROWS, STRIPS>();
    add_products<ROWS, STRIPS>(values, values + x.values.steps * TILE, x.P, x.P + x.stride / 2, steps);
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
        const Pair* values = x.values.strip(d);
        float* out = r.out + d * TILE;
        if (d + 1 < tiles) add_values_of_tiles<2, STRIPS>(x, out, out_stride, values, steps);
        else add_values_of_tiles<1, STRIPS>(x, out, out_stride, values, steps);
    }
}

template <int STRIPS>
static void pass_panel(const Attention& a, PanelSpace& x, const Tile& t, const PanelRows& r, Size j0, Size count) {
    const Size steps = steps_of(count);
    key_products<STRIPS>(x.keys, 0, steps, r.queries, x.S, x.stride);
    for (Size s = 0; s < STRIPS; ++s) {
        float* S = x.S + s * x.stride;
        const Size i = s * TILE_SIDE;
        const float factor = logits_of_strip(a, strip_of(t, s), j0, count, S, x.mask, x.top + i);
        hide_rest(count, S);
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
    memset(x.zeros, 0, most(a.D, a.Dv) * sizeof(uint16_t));
    each([&](const Tile& t, const PanelRows& r) { start_rows(a, x, t, r); });
    for (Size j0 = 0; j0 < visible; j0 += most_keys) {
        load_panel(a, a.key, a.value, any.b, any.h / a.group(), j0, least(most_keys, visible - j0), x.zeros, x.keys, x.values);
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

static Size panels_forward(const Forward& c) {
    const Size items = c.a.B * c.a.H * tiles_of(c.a, PANEL_LANES);
    ForwardCall call = {c, least(thread_count(), items)};
    return items > 0 ? run_with_space(call.tasks, call, panels_task) : DONE;
}

}  // namespace
}  // namespace ISA
#endif
