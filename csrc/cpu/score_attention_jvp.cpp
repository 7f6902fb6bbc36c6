// The tangents of score_attention's outputs, for dot products: of out and of the log-sum-exp, from those of query, key, value and
// row_bias, which are by_query, by_key, by_value and by_row_bias.
//
// Query row i, key j; Z is a dropout's factor, or 1. In brackets: the names below.
//     S_ij = scale q_i . k_j + mask_ij,   E_ij = e^(S_ij - shift_i), with the shift from the log-sum-exp    [logits.S]
//     x_ij = scale (by_q_i . k_j + q_i . by_k_j) + by_row_bias                                               [tangents_of_logits]
//     W_ij = E_ij (x_ij - c_i),   total_i = sum_j E_ij,   mean_i = sum_j W_ij                                [weigh]
//     to_out_i = sum_j Z (W_ij v_j + E_ij by_v_j)                                                            [add_block]
// At the end (to_out_i - mean_i out_i) / total_i and to_lse_i = c_i + mean_i / total_i                       [finish_rows]
// The centre c_i is the mean of x_ij in the row's first keys. An offset of the whole row is thus no part of W, whose sum is small:
// so it costs few digits, and `out` may be rounded. The total makes up for the rounding of the shift, and of logits that the forward
// pass has found in another order of sums.
//
// Bound: multiply-adds of five products; a forward pass has two. Blocks of keys and tiles of rows are those of the forward pass
// (forward.h); bfloat16 products take packed panels (jvp_panels.h) where it does.
// Measured: rows score_attention/scaled dot, jvp, of benchmarks/results/cpu.json.
#include "jvp_panels.h"
#include "jvp_rows.h"

namespace ISA {
namespace {

// Tiles of a head that pass a block of keys together: unlike forward, keys that are read where they lie, too, since with their tangents
// they are twice as many.
static Size most_tiles(const Attention& a) { return a.M > a.key_block() ? least(8, a.group() * tiles_of(a)) : 1; }

// One thread's memory
struct JvpSpace {
    Logits logits;
    KeyRows by_keys, by_values;
    JvpRows* rows;  // of each tile of a sweep
    float *by_query, *by_query_transposed;  // (LANES, D rounded up), (D, width); as pairs null, and (half(D), width)
    float* x;  // (count, width)
    float* by_bias;  // a table (attention.h), or null
    float* scratch;
    void plan(const JvpCall& call, Memory& memory) {
        const Jvp& c = call.c;
        const Attention& a = c.a;
        const bool pairs = logits.pairs = Logits::takes_pairs(a, c.score);
        logits.plan(a, c.score, memory, false);
        by_keys.plan(a, c.by_key, a.D, pairs, false, memory), by_values.plan(a, c.by_value, a.Dv, pairs, true, memory);
        rows = memory.take_spaces<JvpRows>(most_tiles(a), [&](JvpRows& r) { r.plan(LANES * a.Dv, LANES, memory); });
        by_query = pairs ? nullptr : memory.take(LANES * round_up(a.D, VL)), by_query_transposed = memory.take(LANES * a.D);
        x = memory.take(a.key_block() * LANES);
        by_bias = c.by_row_bias ? memory.take(table_size(a)) : nullptr;
        scratch = memory.take((LANES + 1) * a.Dv);
    }
};

static void load_rows(const Jvp& c, JvpSpace& s, const Tile& t) {
    const Attention& a = c.a;
    Logits& l = s.logits;
    l.load_queries(a, c.score, t);
    l.load_rows(c.by_query, a.dtype, t, a.D, l.row_factor(c.score, a.scale), s.by_query, s.by_query_transposed);
    if (s.by_bias) load_table(a, t, c.by_row_bias, s.by_bias);
}
// Rows whose log-sum-exp is too large for a shift get their largest logit.
static void start_tile(const Jvp& c, JvpSpace& s, const Tile& t, Size visible, const JvpRows& r) {
    const Attention& a = c.a;
    Logits& l = s.logits;
    float largest[LANES];
    bool lost[LANES];
    if (r.start(c, t, a.Dv * t.width, lost)) {
        for (Size i = 0; i < t.width; ++i) largest[i] = -INFINITY;
        l.load_queries(a, c.score, t);
        by_blocks(a, t.keys(a, visible), [&](Size j0, Size count) {
            l.compute(a, c.score, t, j0, count, least(a.key_block(), visible - j0), nullptr);
            for (Size i = 0; i < t.width; i += VL) store(largest + i, maximum(load(largest + i), load(l.top + i)));
        });
        for (Size i = 0; i < t.width; ++i)
            if (lost[i]) r.shift[i] = largest[i];
    }
}

// s.x: of a block of keys, whose rows are loaded
static void tangents_of_logits(const Jvp& c, JvpSpace& s, const Tile& t, Size j0, Size count, Size loaded) {
    const Attention& a = c.a;
    Logits& l = s.logits;
    s.by_keys.load(a, t, j0, loaded);
    l.keys.products(t, count, s.by_query_transposed, s.x, false);
    if (l.pairs) s.by_keys.products(t, count, l.transposed, s.x, true, Scaled<Store>{(float)a.scale, {}});
    else s.by_keys.products(t, count, l.transposed, s.x, true);
    if (s.by_bias) l.bias.load_keys(a, t.b, j0, count), l.bias.add_rows(s.by_bias, t.width, s.x);
}
// S becomes E, and x becomes W; both (count, w)
static void weigh_tile(float* S, float* x, Size count, Size w, const JvpRows& r) {
    for (Size i = 0; i < w; i += GROUP)
        weigh<1>(
            count, r.lanes(i), [&](Size j, int p, Vector shift) { return exp_negative(load(S + j * w + i + p * VL) - shift); },
            [&](Size j, int p) { return load(x + j * w + i + p * VL); },
            [&](Size j, int p, const Vector* e, const Vector* weighted) {
                store(S + j * w + i + p * VL, *e), store(x + j * w + i + p * VL, *weighted);
            });
}
// A tile and a block of keys, of which `loaded` are read for this tile and later ones
static void add_block(const Jvp& c, JvpSpace& s, const Tile& t, const JvpRows& r, Size j0, Size count, Size loaded) {
    const Attention& a = c.a;
    Logits& l = s.logits;
    if (l.bias.hides_all(a, t, j0, count)) return;
    l.compute(a, c.score, t, j0, count, loaded, nullptr);
    tangents_of_logits(c, s, t, j0, count, loaded);
    weigh_tile(l.S, s.x, count, t.width, r);
    if (c.dropout.probability > 0) drop(a, c.dropout, t, j0, count, l.S), drop(a, c.dropout, t, j0, count, s.x);
    l.values.load(a, t, j0, loaded), s.by_values.load(a, t, j0, loaded);
    l.values.sum(t, count, s.x, r.to_out, true);
    s.by_values.sum(t, count, l.S, r.to_out, true);
}
// The tiles [first, last) of one key head, block by block of keys
static void jvp_sweep(const Jvp& c, JvpSpace& s, Size first, Size last) {
    const Attention& a = c.a;
    const Size visible = visible_keys(a, tile_of_item(a, first).b);
    const auto each = [&](const auto& f) {
        for (Size item = first; item < last; ++item) f(tile_of_item(a, item), s.rows[item - first]);
    };
    each([&](const Tile& t, const JvpRows& r) { start_tile(c, s, t, visible, r); });
    by_blocks(a, visible, [&](Size j0, Size loaded) {
        each([&](const Tile& t, const JvpRows& r) {
            const Size count = least(loaded, t.keys(a, visible) - j0);
            if (count <= 0) return;  // under the causal mask
            if (j0 == 0 || last - first > 1) load_rows(c, s, t);
            add_block(c, s, t, r, j0, count, loaded);
        });
    });
    each([&](const Tile& t, const JvpRows& r) { finish_rows(c, t, r, s.scratch); });
}
static void jvp_task(JvpCall& call, JvpSpace& s, Size task) {
    const Attention& a = call.c.a;
    const Size items = a.B * a.H * tiles_of(a);
    by_sweeps(a, share(items, task, call.tasks), share(items, task + 1, call.tasks), LANES, most_tiles(a),
              [&](Size first, Size last) { jvp_sweep(call.c, s, first, last); });
}

static Size score_attention_jvp(const Jvp& c) {
#if TILES
    if (takes_panels(c)) return panels_jvp(c);
#endif
    const Size items = c.a.B * c.a.H * tiles_of(c.a);
    JvpCall call = {c, least(thread_count(), items)};
    return items > 0 ? run_with_space(call.tasks, call, jvp_task) : DONE;
}

}  // namespace
}  // namespace ISA

OPERATOR(score_attention_jvp, Jvp)
