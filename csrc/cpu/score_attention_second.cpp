// The second derivatives of score_attention, for dot products: gradients by query, key, value and row_bias of grad_out times the
// tangent of out and grad_lse times that of lse, for the tangents by_query, by_key, by_value and by_row_bias; and these tangents.
//
// In the words of streaming/score_attention.py, with c(x) for what is left of x in a row less its mean under P:
//     x = scale (by_query K^T + Q by_key^T) + by_row_bias,  dP = grad_out V^T,  w = grad_out by_value^T,  e = c(dP) + grad_lse
//     dS = P e,  of_dP = P c(x),  of_S = P c(c(x) e + w),  and the tangent of lse is the mean of x, the gradient
// of row_bias the sum of of_S over the keys of a group. The tangent of the backward pass has those of grad_out and grad_lse, too:
// w += grad_out_tangent V^T, of_S += P grad_lse_tangent, to_value += P^T grad_out_tangent. It leaves out the tangents of out.
// This of_S is streaming's: a part that is constant in a row is no part of it, and what is subtracted first leaves no digits to lose.
//
// Bound: multiply-adds of twelve products, five of them for S, x, dP and w, two for the tangents of out; a backward pass has five. A tile
// has all keys of its rows, so nothing is made twice and no statistics of the forward pass are needed, whatever the logits are. The
// gradients of keys and values belong to all tiles of a key head (shared_sums.h).
// Measured: rows score_attention/scaled dot, second derivatives, of benchmarks/results/cpu.json.
#include "forward.h"
#include "shared_sums.h"

namespace ISA {
namespace {

struct Second {
    Attention a;
    Score score;  // a dot product
    Dropout dropout;
    StridedTensor grad_out, by_query, by_key, by_value, grad_out_tangent;  // the last one may be null
    const float *grad_lse, *grad_lse_tangent;  // (B, H, N) or null
    StridedTensor to_out, to_query, to_key, to_value;
    float* to_lse;  // (B, H, N)
    const float* by_row_bias;  // as row_bias, or null
    float* to_row_bias;  // as row_bias, or null
    FIELDS(a, score, dropout, grad_out, by_query, by_key, by_value, grad_out_tangent, grad_lse, grad_lse_tangent, to_out,
           to_query, to_key, to_value, to_lse, by_row_bias, to_row_bias)
};

struct SecondCall {
    const Second& c;
    // The items are tiles of query rows, key head by key head; the sums are the gradients of a head's keys and values, in one row
    // for each key
    SharedSums sums;
    Size lanes, key_stride, stride;  // of a tile; of a key's part of a row, and of the row
};

// One thread's tiles, (keys, width) each
struct SecondTiles {
    Logits logits;
    KeyRows by_keys, by_values;
    WholeRows whole;
    float *P, *dP, *x, *w;  // P: whole.S; later, in this order, P, dS, the gradients of dP and S
    Pair* rounded_tile;  // of a block of these gradients; null where products take no pairs
    // (LANES, D or Dv rounded up), (D or Dv, width); or pairs, as Logits::rows
    float *by_query, *by_query_transposed, *grad_out, *grad_out_transposed;
    float *grad_out_tangent, *grad_out_tangent_transposed;  // as grad_out, or null
    float *to_query, *to_out;  // (D, LANES), (Dv, LANES) or null
    float* mean;  // (LANES)
    float *by_bias, *to_bias;  // tables (attention.h), or null

    void plan(const SecondCall& call, Memory& memory) {
        const Second& c = call.c;
        const Attention& a = c.a;
        const Size size = a.M * call.lanes;
        const bool pairs = logits.pairs = Logits::takes_pairs(a, c.score);
        logits.plan(a, c.score, memory, true);
        by_keys.plan(a, c.by_key, a.D, pairs, true, memory), by_values.plan(a, c.by_value, a.Dv, pairs, true, memory);
        whole.plan(size, memory);
        P = whole.S, dP = memory.take(size), x = memory.take(size), w = memory.take(size);
        rounded_tile = pairs ? (Pair*)memory.take(a.key_block() * LANES / 2) : nullptr;
        by_query = memory.take(LANES * call.key_stride), by_query_transposed = memory.take(LANES * a.D);
        grad_out = memory.take(LANES * (call.stride - call.key_stride)), grad_out_transposed = memory.take(LANES * a.Dv);
        const bool has_tangent = c.grad_out_tangent.data;
        grad_out_tangent = has_tangent ? memory.take(LANES * (call.stride - call.key_stride)) : nullptr;
        grad_out_tangent_transposed = has_tangent ? memory.take(LANES * a.Dv) : nullptr;
        to_query = memory.take(LANES * a.D), to_out = c.to_out.data ? memory.take(LANES * a.Dv) : nullptr;
        mean = memory.take(LANES);
        by_bias = c.by_row_bias ? memory.take(table_size(a)) : nullptr;
        to_bias = c.to_row_bias ? memory.take(table_size(a)) : nullptr;
    }
};

// s.whole, and the products x, dP and w
static void load_tiles(const Second& c, SecondTiles& s, const Tile& t, Size keys, Size visible) {
    const Attention& a = c.a;
    Logits& l = s.logits;
    const Size width = t.width;
    l.load_queries(a, c.score, t);
    l.load_rows(c.by_query, a.dtype, t, a.D, l.row_factor(c.score, a.scale), s.by_query, s.by_query_transposed);
    l.load_rows(c.grad_out, a.dtype, t, a.Dv, 1.f, s.grad_out, s.grad_out_transposed);
    if (s.grad_out_tangent)
        l.load_rows(c.grad_out_tangent, a.dtype, t, a.Dv, 1.f, s.grad_out_tangent, s.grad_out_tangent_transposed);
    if (s.by_bias) load_table(a, t, c.by_row_bias, s.by_bias);
    s.whole.compute(l, a, c.score, t, keys, visible, nullptr);
    by_blocks(a, keys, [&](Size j0, Size count) {
        const Size loaded = least(a.key_block(), visible - j0);  // later tiles may see more
        float *dP = s.dP + j0 * width, *x = s.x + j0 * width, *w = s.w + j0 * width;
        l.keys.load(a, t, j0, loaded), s.by_keys.load(a, t, j0, loaded), s.by_values.load(a, t, j0, loaded);
        l.keys.products(t, count, s.by_query_transposed, x, false);
        if (l.pairs) s.by_keys.products(t, count, l.transposed, x, true, Scaled<Store>{(float)a.scale, {}});
        else s.by_keys.products(t, count, l.transposed, x, true);
        if (s.by_bias) l.bias.load_keys(a, t.b, j0, count), l.bias.add_rows(s.by_bias, width, x);
        l.value_products(a, t, j0, count, loaded, s.grad_out_transposed, dP);
        s.by_values.products(t, count, s.grad_out_transposed, w, false);
        if (s.grad_out_tangent) l.values.products(t, count, s.grad_out_tangent_transposed, w, true);
        if (c.dropout.probability > 0) drop(a, c.dropout, t, j0, count, dP), drop(a, c.dropout, t, j0, count, w);
    });
}

// From the products to the gradients of S and dP, in place; s.mean is that of x.
static void tile_gradients(const Second& c, SecondTiles& s, const Tile& t, Size keys) {
    float by_lse[LANES] = {}, by_lse_tangent[LANES] = {};
    const Size first = (t.b * c.a.H + t.h) * c.a.N + t.first;
    for (Size i = 0; c.grad_lse && i < t.rows; ++i) by_lse[i] = c.grad_lse[first + i];
    for (Size i = 0; c.grad_lse_tangent && i < t.rows; ++i) by_lse_tangent[i] = c.grad_lse_tangent[first + i];
    for (Size i = 0; i < t.width; i += VL) {
        const Vector factor = load(s.whole.factor + i), lse = load(by_lse + i);
        const auto p = [&](Size j) { return load(s.P + j * t.width + i) * factor; };
        const auto at = [&](const float* tile, Size j) { return load(tile + j * t.width + i); };
        const Vector mean = sum_over(keys, [&](Size j) { return p(j) * at(s.x, j); });
        const Vector delta = sum_over(keys, [&](Size j) { return p(j) * at(s.dP, j); });
        const auto both = [&](Size j) { return (at(s.x, j) - mean) * ((at(s.dP, j) - delta) + lse) + at(s.w, j); };
        const Vector of_both = sum_over(keys, [&](Size j) { return p(j) * both(j); }) - load(by_lse_tangent + i);
        store(s.mean + i, mean);
        for (Size j = 0; j < keys; ++j) {
            const Size n = j * t.width + i;
            const Vector P = p(j), of_S = P * (both(j) - of_both);
            store(s.dP + n, P * ((load(s.dP + n) - delta) + lse)), store(s.x + n, P * (load(s.x + n) - mean));
            store(s.w + n, of_S), store(s.P + n, P);
        }
    }
}

// One tile; its part of the gradients of keys and values is added to sums (M, call.stride).
static void second_tile(const SecondCall& call, SecondTiles& s, const Tile& t, float* sums) {
    const Second& c = call.c;
    const Attention& a = c.a;
    const Size visible = visible_keys(a, t.b), keys = t.keys(a, visible);
    Logits& l = s.logits;
    const float row_factor = l.row_factor(c.score, a.scale), factor = l.product_factor(c.score, a.scale);
    load_tiles(c, s, t, keys, visible);
    tile_gradients(c, s, t, keys);
    if (s.to_bias) memset(s.to_bias, 0, table_size(a) * sizeof(float));
    memset(s.to_query, 0, a.D * t.width * sizeof(float));
    if (s.to_out) memset(s.to_out, 0, a.Dv * t.width * sizeof(float));
    by_blocks(a, keys, [&](Size j0, Size count) {
        const Size loaded = least(a.key_block(), visible - j0);  // later tiles may see more
        float *to_keys = sums + j0 * call.stride, *to_values = to_keys + call.key_stride;
        const auto gradients = [&](KeyRows& rows, float by, float* tile, const float* tile_rows, float* to, float* to_rows) {
            rows.load(a, t, j0, loaded);
            rows.gradients(t, count, by, tile + j0 * t.width, s.rounded_tile, tile_rows, to, call.stride, true, to_rows);
        };
        if (c.dropout.probability > 0)
            drop(a, c.dropout, t, j0, count, s.x + j0 * t.width), drop(a, c.dropout, t, j0, count, s.P + j0 * t.width);
        if (s.to_bias) l.bias.load_keys(a, t.b, j0, count);
        if (s.to_bias) sum_by_group(s.w + j0 * t.width, l.bias.rows, count, t.width, s.to_bias);
        gradients(l.keys, factor, s.w, l.rows, to_keys, s.to_query);
        gradients(s.by_keys, factor, s.dP, s.by_query, to_keys, s.to_query);
        gradients(l.values, 1.f, s.x, s.grad_out, to_values, s.to_out);
        if (s.grad_out_tangent) gradients(l.values, 1.f, s.P, s.grad_out_tangent, to_values, nullptr);
        if (!s.to_out) return;
        s.by_values.load(a, t, j0, loaded);
        s.by_values.sum(t, count, s.P + j0 * t.width, s.to_out, true);
    });
    store_tile(s.to_query, t, a.D, row_factor, c.to_query, a.dtype, s.by_query);
    if (s.to_out) store_tile(s.to_out, t, a.Dv, 1.f, c.to_out, a.dtype, s.grad_out);
    if (s.to_bias) store_table(a, t, s.to_bias, c.to_row_bias);
    memcpy(c.to_lse + (t.b * a.H + t.h) * a.N + t.first, s.mean, t.rows * sizeof(float));
}

// The gradients of a key head's keys and values, from the rows [first, last) of its sums
static void write_sums(const SecondCall& call, Size unit, const float* sums, Size first, Size last) {
    const Attention& a = call.c.a;
    for (Size j = first; j < last; ++j) {
        const float* row = sums + j * call.stride;
        store_key(a, unit / a.Hkv, unit % a.Hkv, j, row, a.D, call.c.to_key);
        store_key(a, unit / a.Hkv, unit % a.Hkv, j, row + call.key_stride, a.Dv, call.c.to_value);
    }
}
static Size row_count(const SecondCall& call) { return call.c.a.M; }
static void add_item(const SecondCall& call, SecondTiles& s, Size item, float* sums) {
    second_tile(call, s, tile_of_item(call.c.a, item, call.lanes), sums);
}

static Size score_attention_second(const Second& c) {
    const Attention& a = c.a;
    if (a.B * a.H * a.N == 0) return DONE;
    const Size lanes = lanes_of_map(a), tiles = a.group() * tiles_of(a, lanes), items = a.B * a.Hkv * tiles;
    const Size parts = least(tiles, parts_of_rows(a.group() * a.N, a.Hkv)), tasks = least(thread_count(), a.B * a.Hkv * parts);
    const Size key_stride = round_up(a.D, VL), stride = key_stride + round_up(a.Dv, VL);
    Memory starts, memory;
    const Size* start = cut(items, tiles, parts, tasks, starts);
    SecondCall call = {c, {start, tasks, tiles, parts, a.M * stride}, lanes, key_stride, stride};
    if (!start || !memory.place([&] { call.sums.plan(memory); })) return NO_MEMORY;
    return run_and_join<SecondTiles>(tasks, call);
}

}  // namespace
}  // namespace ISA

OPERATOR(score_attention_second, Second)
