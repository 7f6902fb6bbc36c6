// score_attention_jvp by tiles of bfloat16 pairs: panels of keys, values and their tangents are packed once, and many query rows pass
// them, a CHUNK of keys at a time (formulas: score_attention_jvp.cpp; tiles: packed_tiles.h).
//
// x is one sum of tile products with keys and with their tangents, and to_out one with values and with theirs: both stay in registers.
// As in the backward pass no softmax of a panel has to be closed.
#pragma once
#include "jvp_rows.h"
#include "packed_tiles.h"

#if TILES
namespace ISA {
namespace {

static const Size CHUNK = 64;  // keys whose S and x, of 32 rows, are 16 KB

// Keys of a panel: fewer than in the forward pass, since their tangents lie in the second cache beside them
static Size jvp_panel_keys(const Attention& a) { return equal_panels(a.M, a.D > 64 ? 256 : 512); }

// Fewer rows may take few_rows.h forward, whose logits have other bits than a shift from a large log-sum-exp allows.
static bool takes_panels(const Jvp& c) { return takes_panels(c.a, c.score, c.dropout) && c.a.N > TILE_SIDE; }

struct JvpPanelRows : JvpRows {  // to_out: (2, Dv rounded up, TILE_SIDE)
    Pair *queries, *by_queries;  // (2, depth) tiles of (pairs of numbers, rows)
    void plan(const Attention& a, Memory& memory) {
        JvpRows::plan(2 * strips_of(a.Dv) * TILE, PANEL_LANES, memory);
        queries = (Pair*)memory.take(2 * steps_of(a.D) * TILE), by_queries = (Pair*)memory.take(2 * steps_of(a.D) * TILE);
    }
};
struct JvpPanels {
    PackedKeys keys, by_keys, values, by_values;  // of a panel of one key head
    uint16_t* zeros;  // as many as a row has
    JvpPanelRows* rows;  // of each tile of a sweep
    float *S, *x;  // (2, CHUNK, TILE_SIDE)
    Pair *E, *W;  // (2, stride): of a strip and the panel
    float *mask, *scratch;
    Size stride;
    void plan(const JvpCall& call, Memory& memory) {
        const Attention& a = call.c.a;
        const Size count = jvp_panel_keys(a), tiles = least(SWEEP, a.group() * tiles_of(a, PANEL_LANES));
        keys.plan(a.D, count, true, false, memory), by_keys.plan(a.D, count, true, false, memory);
        values.plan(a.Dv, count, false, true, memory), by_values.plan(a.Dv, count, false, true, memory);
        zeros = (uint16_t*)memory.take(half(most(a.D, a.Dv)));
        rows = memory.take_spaces<JvpPanelRows>(tiles, [&](JvpPanelRows& r) { r.plan(a, memory); });
        S = memory.take(2 * CHUNK * TILE_SIDE), x = memory.take(2 * CHUNK * TILE_SIDE);
        stride = (count + STEP) / 2 * TILE_SIDE;  // a step more than the keys have, for the caches' sake
        E = (Pair*)memory.take(2 * stride), W = (Pair*)memory.take(2 * stride);
        mask = memory.take(2 * GROUP * LANES);
        scratch = memory.take(most(keys.depth * TILE, (TILE_SIDE + 1) * a.Dv));
    }
};

static void start_packed_rows(const Jvp& c, JvpPanels& s, const Tile& t, const JvpPanelRows& r) {
    const Attention& a = c.a;
    bool lost[LANES];  // their shifts are right where the logits are those of the forward pass
    r.start(c, t, 2 * strips_of(a.Dv) * TILE, lost);
    pack_strips({a.query, nullptr, t.b, t.h, t.first, t.rows, a.D, s.zeros}, t, s.keys.depth, (Pair*)s.scratch, r.queries);
    pack_strips({c.by_query, nullptr, t.b, t.h, t.first, t.rows, a.D, s.zeros}, t, s.keys.depth, (Pair*)s.scratch, r.by_queries);
}

// s.x of `steps` steps of keys from `first` on, to be multiplied by the scale
template <int STRIPS> static void tangent_products(const JvpPanels& s, const JvpPanelRows& r, Size first, Size steps) {
    const Size next = s.keys.depth * TILE;
    for (Size n = 0; n < steps; ++n) {
        const Pair *keys = s.keys.step(first + n), *by_keys = s.by_keys.step(first + n);
        clear_sums<2, STRIPS>();
        add_products<2, STRIPS>(keys, keys + next, r.by_queries, r.by_queries + next, s.keys.depth);
        add_products<2, STRIPS>(by_keys, by_keys + next, r.queries, r.queries + next, s.keys.depth);
        store_sums<2, STRIPS>(s.x + 2 * n * TILE, CHUNK * TILE_SIDE);
    }
}
// E and W of a strip and a chunk, `from` keys behind the panel's first. S times `factor` are logits.
static void weigh_strip(const Jvp& c, const JvpPanels& s, const JvpRows& r, Size strip, Size from, Size keys, float factor) {
    const float *S = s.S + strip * CHUNK * TILE_SIDE, *x = s.x + strip * CHUNK * TILE_SIDE;
    Pair *E = s.E + strip * s.stride + from / 2 * TILE_SIDE, *W = s.W + strip * s.stride + from / 2 * TILE_SIDE;
    const Vector by = splat(factor), scale = splat((float)c.a.scale);
    weigh<2>(
        keys, r.lanes(strip * TILE_SIDE),
        [&](Size j, int p, Vector shift) { return exp_to_round(rounded_product(load(S + j * TILE_SIDE + p * VL), by) - shift); },
        [&](Size j, int p) { return load(x + j * TILE_SIDE + p * VL) * scale; },
        [&](Size j, int p, const Vector* e, const Vector* w) {
            store(E + j / 2 * TILE_SIDE + p * VL, rounded_pairs(e[0], e[1]));
            store(W + j / 2 * TILE_SIDE + p * VL, rounded_pairs(w[0], w[1]));
        });
}
template <int ROWS, int STRIPS>
static void add_values(const JvpPanels& s, const Pair* values, const Pair* by_values, Size steps, float* to, Size to_stride) {
    const Size next = s.values.steps * TILE;
    load_sums<ROWS, STRIPS>(to, to_stride);
    add_products<ROWS, STRIPS>(values, values + next, s.W, s.W + s.stride, steps);
    add_products<ROWS, STRIPS>(by_values, by_values + next, s.E, s.E + s.stride, steps);
    store_sums<ROWS, STRIPS>(to, to_stride);
}
template <int STRIPS>
static void pass_panel(const Jvp& c, JvpPanels& s, const Tile& t, const JvpPanelRows& r, Size j0, Size count) {
    const Attention& a = c.a;
    const Size strips = strips_of(a.Dv), steps = steps_of(count);
    for (Size from = 0; from < count; from += CHUNK) {
        const Size some = least(CHUNK, count - from), steps_of_some = steps_of(some);
        key_products<STRIPS>(s.keys, from / STEP, steps_of_some, r.queries, s.S, CHUNK * TILE_SIDE);
        tangent_products<STRIPS>(s, r, from / STEP, steps_of_some);
        for (Size strip = 0; strip < STRIPS; ++strip) {
            float* S = s.S + strip * CHUNK * TILE_SIDE;
            const float factor = mask_strip(a, strip_of(t, strip), j0 + from, some, S, s.mask);
            hide_rest(some, S);
            weigh_strip(c, s, r, strip, from, steps_of_some * STEP, factor);
        }
    }
    for (Size d = 0; d < strips; d += 2) {
        const Pair *values = s.values.strip(d), *by_values = s.by_values.strip(d);
        if (d + 1 < strips) add_values<2, STRIPS>(s, values, by_values, steps, r.to_out + d * TILE, strips * TILE);
        else add_values<1, STRIPS>(s, values, by_values, steps, r.to_out + d * TILE, strips * TILE);
    }
}
static void finish_packed_rows(const Jvp& c, JvpPanels& s, const Tile& t, const JvpPanelRows& r) {
    for (Size strip = 0; strip < t.width / TILE_SIDE; ++strip) {
        JvpRows rows = r.lanes(strip * TILE_SIDE);
        rows.to_out += strip * strips_of(c.a.Dv) * TILE;
        finish_rows(c, strip_of(t, strip), rows, s.scratch);
    }
}

// The tiles [first, last) of rows of one key head
static void jvp_panels_sweep(const Jvp& c, JvpPanels& s, Size first, Size last) {
    const Attention& a = c.a;
    const Tile any = tile_of_item(a, first, PANEL_LANES);
    const Size head = any.h / a.group(), visible = visible_keys(a, any.b), most_keys = jvp_panel_keys(a);
    const auto each = [&](const auto& f) {
        for (Size item = first; item < last; ++item) f(tile_of_item(a, item, PANEL_LANES), s.rows[item - first]);
    };
    memset(s.zeros, 0, most(a.D, a.Dv) * sizeof(uint16_t));
    each([&](const Tile& t, const JvpPanelRows& r) { start_packed_rows(c, s, t, r); });
    for (Size j0 = 0; j0 < visible; j0 += most_keys) {
        const Size loaded = least(most_keys, visible - j0);
        load_panel(a, a.key, a.value, any.b, head, j0, loaded, s.zeros, s.keys, s.values);
        load_panel(a, c.by_key, c.by_value, any.b, head, j0, loaded, s.zeros, s.by_keys, s.by_values);
        each([&](const Tile& t, const JvpPanelRows& r) {
            const Size count = least(loaded, t.keys(a, visible) - j0);
            if (count <= 0) return;  // under the causal mask
            if (t.width > TILE_SIDE) pass_panel<2>(c, s, t, r, j0, count);
            else pass_panel<1>(c, s, t, r, j0, count);
        });
    }
    each([&](const Tile& t, const JvpPanelRows& r) { finish_packed_rows(c, s, t, r); });
}
static void jvp_panels_task(JvpCall& call, JvpPanels& s, Size task) {
    const Attention& a = call.c.a;
    const Size items = a.B * a.H * tiles_of(a, PANEL_LANES);
    by_sweeps(a, share(items, task, call.tasks), share(items, task + 1, call.tasks), PANEL_LANES, SWEEP,
              [&](Size first, Size last) { jvp_panels_sweep(call.c, s, first, last); });
}
static Size panels_jvp(const Jvp& c) {
    const Size items = c.a.B * c.a.H * tiles_of(c.a, PANEL_LANES);
    JvpCall call = {c, least(thread_count(), items)};
    return items > 0 ? run_with_space(call.tasks, call, jvp_panels_task) : DONE;
}

}  // namespace
}  // namespace ISA
#endif
