// The backward pass of plain dot products by tiles of bfloat16 pairs, and r Abar beside it: a panel of keys and values is packed once
// for up to SWEEP tiles of query rows, which pass it block by block of rows.
//
// Query row i, key j; lse and delta_i = out_i . grad_out_i are numbers of a row. In brackets: the names below.
//     S_ij  = q_i . k_j,   dP_ij = v_j . grad_out_i, a CHUNK of keys at a time                          [key_products]
//     P_ij  = 2^((scale S_ij + mask_ij - lse_i) log2 e),   dS_ij = P_ij (dP_ij - delta_i + grad_lse_i)  [pair_gradients]
//     grad_query_i += sum_J scale dS_ij k_j, over the keys of a panel                                   [query_gradients]
//     grad_value_j += sum_I P_ij grad_out_i,   grad_key_j += sum_I scale dS_ij q_i, over a block I of rows  [key_gradients]
//     (r Abar)_j   += sum_i r_i max(P_ij dP_ij, 0), or sum_i r_i P_ij                                   [carry]
// P and scale dS are rounded to pairs of rows, as the sums over rows take them, and dS also to pairs of keys.
//
// Bound: tile products, and of the vectors' instructions the exponentials. Tricks: a chunk's S and dP stay in the first cache. All
// three sums are tiles in memory, which a product loads and stores once for a panel of keys, or once for BLOCK_TILES tiles of rows.
// No softmax of a panel has to be closed: the log-sum-exp comes from the forward pass. `python -m tools.tiles` counts; no stored
// row has the time.
#pragma once
#include "key_heads.h"
#include "panels.h"

#if TILES
namespace ISA {
namespace {

static const Size CHUNK = 64;  // keys whose S and dP, of 32 rows, are 16 KB
static const Size BLOCK_TILES = 8;  // tiles of rows over which the gradients of keys and values are summed in registers
static const Size TO_NEXT =
    BLOCK_TILES + 1;  // tiles from one such sum's to the next one's: no power of two, for the caches' sake

// Keys of a panel: fewer than in the forward pass, since P and dS of a block of rows lie in the second cache beside it
static Size backward_panel_keys(const Attention& a) { return equal_panels(a.M, a.D > 64 ? 256 : 512); }

// ---- one thread's memory

// What a block of tiles of rows takes from panel to panel
struct RowBlock {
    Pair *queries, *grads;  // of each tile: (2, depth) tiles of (pairs of numbers, rows)
    Pair *query_pairs, *grad_pairs;  // (D / TILE_SIDE, TO_NEXT) tiles of (pairs of rows, numbers)
    float* grad_query;  // of each tile: (2, D / TILE_SIDE) tiles of (numbers, rows)
    float *shift, *factor, *delta, *by_lse;  // (BLOCK_TILES, PANEL_LANES)
    void plan(const Attention& a, Memory& memory) {
        const Size lanes = BLOCK_TILES * PANEL_LANES;
        queries = (Pair*)memory.take(lanes / TILE_SIDE * steps_of(a.D) * TILE);
        grads = (Pair*)memory.take(lanes / TILE_SIDE * steps_of(a.Dv) * TILE);
        query_pairs = (Pair*)memory.take(strips_of(a.D) * TO_NEXT * TILE);
        grad_pairs = (Pair*)memory.take(strips_of(a.Dv) * TO_NEXT * TILE);
        grad_query = memory.take(lanes / TILE_SIDE * strips_of(a.D) * TILE);
        shift = memory.take(lanes), factor = memory.take(lanes), delta = memory.take(lanes), by_lse = memory.take(lanes);
    }
};

struct BackwardPanels {
    UnitSums sums;
    PackedKeys keys, values;
    float *grad_key, *grad_value;  // of the panel: (D / TILE_SIDE, keys / TILE_SIDE) tiles of (keys, numbers)
    RowBlock* blocks;  // of a sweep
    float *S, *dP;  // (2, stride): of a chunk and a strip, (CHUNK, TILE_SIDE)
    Pair *P, *dS;  // of a panel and a block of rows: (keys / TILE_SIDE, TO_NEXT) tiles of (keys, pairs of rows)
    Pair* columns;  // (2, column_stride): dS of a panel and a strip as pairs of keys, (keys / 2, TILE_SIDE)
    float *contributions, *carried_in;  // (CHUNK, PANEL_LANES); (PANEL_LANES, T rounded up)
    float *mask, *scratch;
    uint16_t* zeros;
    Size stride, column_stride, key_strips;
    void plan(const BackwardCall& call, Memory& memory) {
        const Attention& a = call.c.a;
        const Size most_keys = backward_panel_keys(a), tiles = least(SWEEP, a.group() * tiles_of(a, PANEL_LANES));
        const bool carries = call.c.relevancy.rows;
        key_strips = most_keys / TILE_SIDE, stride = (CHUNK + TILE_SIDE) * TILE_SIDE;
        column_stride = (most_keys / STEP + 1) * TILE;
        keys.plan(a.D, most_keys, true, true, memory), values.plan(a.Dv, most_keys, true, false, memory);
        grad_key = memory.take(strips_of(a.D) * key_strips * TILE), grad_value = memory.take(strips_of(a.Dv) * key_strips * TILE);
        blocks = memory.take_spaces<RowBlock>((tiles + BLOCK_TILES - 1) / BLOCK_TILES, [&](RowBlock& r) { r.plan(a, memory); });
        S = memory.take(2 * stride), dP = memory.take(2 * stride);
        P = (Pair*)memory.take(key_strips * TO_NEXT * TILE), dS = (Pair*)memory.take(key_strips * TO_NEXT * TILE);
        columns = (Pair*)memory.take(2 * column_stride);
        contributions = carries ? memory.take(CHUNK * PANEL_LANES) : nullptr;
        carried_in = memory.take(carries ? PANEL_LANES * round_up(call.c.relevancy.T, VL) : 0);
        mask = memory.take(2 * GROUP * LANES);
        scratch = memory.take(TILE_SIDE * round_up(most(a.D, a.Dv), STEP) + 6 * PANEL_LANES);
        zeros = (uint16_t*)memory.take(half(most(a.D, a.Dv)));
    }
};

// A tile of a block of rows: the n-th
struct BlockTile {
    const Tile& t;
    const RowBlock& rows;
    Size n;
    Size lane() const { return n * PANEL_LANES; }
    Pair* queries(const BackwardPanels& x) const { return rows.queries + 2 * n * x.keys.depth * TILE; }
    Pair* grads(const BackwardPanels& x) const { return rows.grads + 2 * n * x.values.depth * TILE; }
    float* grad_query(const Attention& a) const { return rows.grad_query + 2 * n * strips_of(a.D) * TILE; }
};

// ---- rows

// delta = out . grad_out of each row, 0 behind them: the rounding of `out` is error enough
static void find_delta(const Backward& c, const Tile& t, float* delta) {
    const Size Dv = c.a.Dv, whole = Dv / VL * VL;
    for (Size i = 0; i < t.rows; ++i) {
        const uint16_t* out = (const uint16_t*)element(c.out.data, BFLOAT16, c.out.at(t.b, t.h, t.first + i));
        const uint16_t* grad = (const uint16_t*)element(c.grad_out.data, BFLOAT16, c.grad_out.at(t.b, t.h, t.first + i));
        Vector total = {};
        for (Size d = 0; d < whole; d += VL) total += widened(load(out + d), true) * widened(load(grad + d), true);
        if (whole < Dv)
            total += widened(load_some(out + whole, Dv - whole), true) * widened(load_some(grad + whole, Dv - whole), true);
        delta[i] = sum(total);
    }
    for (Size i = t.rows; i < PANEL_LANES; ++i) delta[i] = 0;
}
// From the logits of all keys, where the log-sum-exp is too large; the tile's queries are packed
template <int STRIPS>
static void statistics_by_panels(const Attention& a, BackwardPanels& x, const BlockTile& b, const Statistics& s) {
    const Size visible = b.t.keys(a, visible_keys(a, b.t.b)), most_keys = backward_panel_keys(a);
    float *largest = x.scratch, *rescale = largest + PANEL_LANES, *top = rescale + PANEL_LANES;
    double* total = (double*)(top + PANEL_LANES);
    for (Size i = 0; i < b.t.width; ++i) largest[i] = -INFINITY, total[i] = 0;
    for (Size j0 = 0; j0 < visible; j0 += most_keys) {
        const Size count = least(most_keys, visible - j0);
        load_panel(a, a.key, a.value, b.t.b, b.t.h / a.group(), j0, count, x.zeros, x.keys, x.values);
        for (Size from = 0; from < count; from += CHUNK) {
            const Size some = least(CHUNK, count - from), steps = steps_of(some);
            key_products<STRIPS>(x.keys, from / STEP, steps, b.queries(x), x.S, x.stride);
            for (Size strip = 0; strip < STRIPS; ++strip) {
                const Size i = strip * TILE_SIDE;
                float* S = x.S + strip * x.stride;
                const float factor = logits_of_strip(a, strip_of(b.t, strip), j0 + from, some, S, x.mask, top + i);
                hide_rest(some, S);
                round_weights(S, steps, factor, j0 + from == 0, top + i, largest + i, total + i, rescale + i, x.columns);
            }
        }
    }
    finish_rows(largest, total, b.t.width, s);
}
static void find_statistics(const BackwardCall& call, BackwardPanels& x, const BlockTile& b) {
    const Statistics s = {b.rows.shift + b.lane(), b.rows.factor + b.lane()};
    bool lost[LANES];
    if (!statistics_of_lse(call.c, b.t, s, lost)) return;
    const Statistics again = {x.S, x.dP};
    if (b.t.width > TILE_SIDE) statistics_by_panels<2>(call.c.a, x, b, again);
    else statistics_by_panels<1>(call.c.a, x, b, again);
    for (Size i = 0; i < b.t.width; ++i)
        if (lost[i]) s.shift[i] = again.shift[i], s.factor[i] = again.factor[i];
}
static void start_packed_tile(const BackwardCall& call, BackwardPanels& x, const BlockTile& b) {
    const Backward& c = call.c;
    const Attention& a = c.a;
    const Tile& t = b.t;
    const Rows queries = {a.query, nullptr, t.b, t.h, t.first, t.rows, a.D, x.zeros};
    const Rows grads = {c.grad_out, nullptr, t.b, t.h, t.first, t.rows, a.Dv, x.zeros};
    const uint16_t* row[STEP];
    pack_strips(queries, t, x.keys.depth, (Pair*)x.scratch, b.queries(x));
    pack_strips(grads, t, x.values.depth, (Pair*)x.scratch, b.grads(x));
    queries.take(0, STEP, row);
    pack_pairs_of_rows(row, a.D, b.rows.query_pairs + b.n * TILE, TO_NEXT * TILE);
    grads.take(0, STEP, row);
    pack_pairs_of_rows(row, a.Dv, b.rows.grad_pairs + b.n * TILE, TO_NEXT * TILE);
    memset(b.grad_query(a), 0, 2 * strips_of(a.D) * TILE * sizeof(float));
    find_delta(c, t, b.rows.delta + b.lane());
    for (Size i = 0; i < t.width; ++i)  // added after dP - delta, so that P = 1 keeps exactly this value
        b.rows.by_lse[b.lane() + i] = c.grad_lse && i < t.rows ? c.grad_lse[(t.b * a.H + t.h) * a.N + t.first + i] : 0.f;
    find_statistics(call, x, b);
}
static void finish_packed_tile(const BackwardCall& call, BackwardPanels& x, const BlockTile& b) {
    const Attention& a = call.c.a;
    for (Size s = 0; s < b.t.width / TILE_SIDE; ++s)
        store_tile(
            b.grad_query(a) + s * strips_of(a.D) * TILE, strip_of(b.t, s), a.D, 1.f, call.c.grad_query, a.dtype, x.scratch);
}

// ---- a tile of rows and a panel

// Of `keys` keys of a strip, S times `factor` being logits: P and scale dS rounded, as the halves of rows of tiles that lie TO_NEXT
// tiles apart, and dS in pairs of keys. CARRIES: what each pair brings to Abar, (keys, width).
template <bool CARRIES>
static void pair_gradients(const Backward& c, const BackwardPanels& x, const BlockTile& b, Size s, Size from, Size keys,
                           float factor) {
    const Size lane = b.lane() + s * TILE_SIDE, width = b.t.width;
    const float *S = x.S + s * x.stride, *dP = x.dP + s * x.stride;
    float* contributions = x.contributions + s * TILE_SIDE;
    const Size first_row = (from / TILE_SIDE * TO_NEXT + b.n) * TILE;
    uint16_t *to_P = (uint16_t*)(x.P + first_row) + s * TILE_SIDE, *to_dS = (uint16_t*)(x.dS + first_row) + s * TILE_SIDE;
    const bool is_gradient = c.relevancy.is_gradient;
    Pair* columns = x.columns + s * x.column_stride + from / 2 * TILE_SIDE;
    const Vector by = splat(factor), scale = splat((float)c.a.scale);
    Vector shift[PARTS], of_row[PARTS], delta[PARTS], by_lse[PARTS];
    for (int p = 0; p < PARTS; ++p) {
        shift[p] = load(b.rows.shift + lane + p * VL), of_row[p] = load(b.rows.factor + lane + p * VL);
        delta[p] = load(b.rows.delta + lane + p * VL), by_lse[p] = load(b.rows.by_lse + lane + p * VL);
    }
    for (Size j = 0; j < keys; j += 2) {
        const Size row = (j / TILE_SIDE * TO_NEXT * TILE + j % TILE_SIDE * TILE_SIDE) * 2;
        for (int p = 0; p < PARTS; ++p) {
            Vector P[2], dS[2];
            for (int n = 0; n < 2; ++n) {
                const Size at = (j + n) * TILE_SIDE + p * VL;
                const Vector logit = rounded_product(load(S + at), by) - shift[p], dp = load(dP + at);
                P[n] = (CARRIES ? exp_all(logit) : exp_to_round(logit)) * of_row[p];
                dS[n] = P[n] * ((dp - delta[p]) + by_lse[p]) * scale;
                if (CARRIES) store(contributions + (j + n) * width + p * VL, contribution(is_gradient, P[n], dp));
            }
            const Size first = row + p * VL, second = first + STEP;
            store_rounded(P[0], P[1], to_P + first, to_P + second, nullptr);
            store_rounded(dS[0], dS[1], to_dS + first, to_dS + second, columns + j / 2 * TILE_SIDE + p * VL);
        }
    }
}
// P and dS of the tile are 0 for the steps [first, last) of keys.
static void clear_pairs(const BackwardPanels& x, Size n, Size first, Size last) {
    for (Size k = 2 * first; k < 2 * last; ++k) {
        memset(x.P + (k * TO_NEXT + n) * TILE, 0, TILE * sizeof(Pair));
        memset(x.dS + (k * TO_NEXT + n) * TILE, 0, TILE * sizeof(Pair));
    }
}
template <int ROWS, int STRIPS>
static void add_query_gradients(const BackwardPanels& x, const Pair* keys, Size steps, float* to, Size stride) {
    load_sums<ROWS, STRIPS>(to, stride);
    add_products<ROWS, STRIPS>(keys, keys + x.keys.steps * TILE, x.columns, x.columns + x.column_stride, steps);
    store_sums<ROWS, STRIPS>(to, stride);
}
template <int STRIPS> static void query_gradients(const Attention& a, const BackwardPanels& x, const BlockTile& b, Size steps) {
    const Size strips = strips_of(a.D);
    for (Size d = 0; d < strips; d += 2) {
        float* to = b.grad_query(a) + d * TILE;
        if (d + 1 < strips) add_query_gradients<2, STRIPS>(x, x.keys.strip(d), steps, to, strips * TILE);
        else add_query_gradients<1, STRIPS>(x, x.keys.strip(d), steps, to, strips * TILE);
    }
}
template <int STRIPS, bool CARRIES>
static void pass_tile(const BackwardCall& call, BackwardPanels& x, const BlockTile& b, Size j0, Size count) {
    const Backward& c = call.c;
    const Attention& a = c.a;
    if (STRIPS == 1) clear_pairs(x, b.n, 0, steps_of(count));  // of the missing strip
    if (CARRIES) load_carried(c.relevancy, a, b.t, call.row_sums, x.carried_in);
    for (Size from = 0; from < count; from += CHUNK) {
        const Size some = least(CHUNK, count - from), steps = steps_of(some);
        key_products<STRIPS>(x.keys, from / STEP, steps, b.queries(x), x.S, x.stride);
        key_products<STRIPS>(x.values, from / STEP, steps, b.grads(x), x.dP, x.stride);
        for (Size s = 0; s < STRIPS; ++s) {
            float* S = x.S + s * x.stride;
            const float factor = mask_strip(a, strip_of(b.t, s), j0 + from, some, S, x.mask);
            hide_rest(some, S);
            pair_gradients<CARRIES>(c, x, b, s, from, steps * STEP, factor);
        }
        if (CARRIES) carry(x.sums, x.contributions, {b.t, j0 + from, some, some, false, {}}, x.carried_in, c.relevancy.T);
    }
    query_gradients<STRIPS>(a, x, b, steps_of(count));
}

// ---- a block of rows and a panel

template <int COLUMNS>
static void add_key_gradients(const Pair* X, const Pair* rows, Size depth, bool fresh, float* to, Size stride) {
    if (fresh) clear_sums<2, COLUMNS>();
    else load_sums<2, COLUMNS>(to, stride);
    add_products<2, COLUMNS>(X, X + TO_NEXT * TILE, rows, rows + TO_NEXT * TILE, depth);
    store_sums<2, COLUMNS>(to, stride);
}
// to (D / TILE_SIDE, key_strips) tiles += X rows, of one step of keys, over `depth` tiles of rows from the one named `first`
static void key_gradients(const BackwardPanels& x, const Pair* X, const Pair* rows, Size size, Size step, Size first, Size depth,
                          bool fresh, float* to) {
    const Size strips = strips_of(size), stride = x.key_strips * TILE;
    X += (2 * step * TO_NEXT + first) * TILE, rows += first * TILE, to += 2 * step * TILE;
    for (Size d = 0; d < strips; d += 2, rows += 2 * TO_NEXT * TILE, to += 2 * stride) {
        if (d + 1 < strips) add_key_gradients<2>(X, rows, depth, fresh, to, stride);
        else add_key_gradients<1>(X, rows, depth, fresh, to, stride);
    }
}
// The tiles of items [first, last). The panel has `loaded` keys from j0; `fresh`: whether its sums hold nothing yet
static void pass_block(const BackwardCall& call, BackwardPanels& x, const RowBlock& rows, Size first, Size last, Size j0,
                       Size loaded, Size visible, bool fresh) {
    const Attention& a = call.c.a;
    const Size tiles = last - first, all = steps_of(loaded);
    Size steps[BLOCK_TILES];
    for (Size n = 0; n < tiles; ++n) {
        const Tile t = tile_of_item(a, first + n, PANEL_LANES);
        const BlockTile b = {t, rows, n};
        const Size count = most(least(loaded, t.keys(a, visible) - j0), 0);  // under the causal mask
        const auto pass = [&](auto strips) {
            if (call.c.relevancy.rows) pass_tile<strips.value, true>(call, x, b, j0, count);
            else pass_tile<strips.value, false>(call, x, b, j0, count);
        };
        steps[n] = steps_of(count);
        clear_pairs(x, n, steps[n], all);
        if (count > 0 && t.width > TILE_SIDE) pass(Constant<2>());
        else if (count > 0) pass(Constant<1>());
    }
    for (Size s = 0; s < all; ++s) {
        Size from = 0;
        while (from < tiles && steps[from] <= s) ++from;  // tiles that do not see these keys
        if (from == tiles && !fresh) continue;
        key_gradients(x, x.P, rows.grad_pairs, a.Dv, s, from, tiles - from, fresh, x.grad_value);
        key_gradients(x, x.dS, rows.query_pairs, a.D, s, from, tiles - from, fresh, x.grad_key);
    }
}
// The panel's sums into those of the key head
static void write_panel(const BackwardPanels& x, const float* tiles, Size size, Size count, bool fresh, const Sums& to, Size j0) {
    for (Size j = 0; j < count; ++j)
        for (Size d = 0; d < size; d += VL) {
            const Vector some = load(tiles + (d / TILE_SIDE * x.key_strips * TILE_SIDE + j) * TILE_SIDE + d % TILE_SIDE);
            float* at = to.row(j0 + j) + d;
            store(at, fresh ? some : load(at) + some);
        }
}

// ---- a key head

// The tiles [first, last) of its rows
static void backward_sweep(const BackwardCall& call, BackwardPanels& x, Size first, Size last) {
    const Attention& a = call.c.a;
    const Tile any = tile_of_item(a, first, PANEL_LANES);
    const Size visible = visible_keys(a, any.b), most_keys = backward_panel_keys(a), tiles = last - first;
    const Size blocks = (tiles + BLOCK_TILES - 1) / BLOCK_TILES;
    const auto block_at = [&](Size n) { return first + share(tiles, n, blocks); };
    const auto each_tile = [&](const auto& f) {
        for (Size n = 0; n < blocks; ++n)
            for (Size item = block_at(n); item < block_at(n + 1); ++item) {
                const Tile t = tile_of_item(a, item, PANEL_LANES);
                f(BlockTile{t, x.blocks[n], item - block_at(n)});
            }
    };
    memset(x.zeros, 0, most(a.D, a.Dv) * sizeof(uint16_t));
    each_tile([&](const BlockTile& b) { start_packed_tile(call, x, b); });
    for (Size j0 = 0; j0 < visible; j0 += most_keys) {
        const Size loaded = least(most_keys, visible - j0);
        load_panel(a, a.key, a.value, any.b, any.h / a.group(), j0, loaded, x.zeros, x.keys, x.values);
        for (Size n = 0; n < blocks; ++n)
            pass_block(call, x, x.blocks[n], block_at(n), block_at(n + 1), j0, loaded, visible, n == 0);
        write_panel(x, x.grad_key, a.D, loaded, x.sums.fresh, x.sums.grad_key, j0);
        write_panel(x, x.grad_value, a.Dv, loaded, x.sums.fresh, x.sums.grad_value, j0);
    }
    x.sums.fresh = false;
    each_tile([&](const BlockTile& b) { finish_packed_tile(call, x, b); });
}
static void backward_panels_task(BackwardCall& call, BackwardPanels& x, Size task) {
    by_key_heads(call, x.sums, task, [&](Size, Size begin, Size end) {
        by_sweeps(call.c.a, begin, end, PANEL_LANES, SWEEP, [&](Size first, Size last) { backward_sweep(call, x, first, last); });
    });
}

}  // namespace
}  // namespace ISA
#endif
