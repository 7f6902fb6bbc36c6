// What attention_divergence.cpp and indexer_divergence.cpp share: rows of two attentions in a tile, compared, and the way back.
//
// Query row i, key j; ' marks the other side. In brackets: the names below.
//     L_ij = ln A_ij = (S_ij - max_j S_ij) - ln sum_j e^(S_ij - max_j S_ij)                [take_logs: S]
//          = S_ij - lse_i, if it is given
//     ln Abar_ij = ln (1/H sum_h A_hij), a log-sum-exp over the heads                     [take_up_head: mean, weights]
//     f(e^L, e^L'), and with r = df/dA the products A r, A' r'                            [Terms; divergence_of_tile]
//     dS_ij = (A r - A sum_j A r) dD_i; of a mean A_h r = (A_h / Abar) Abar r, over H     [logit_gradients]
//
// With means the logits of a side that has gradients are made again. Tricks: a tile has all keys of its rows, so its logits are made
// once, stay in the cache, and become logarithms of weights. f of a small difference of these is at least 0 for each pair and keeps
// its digits. A weight may be too small for float32, its logarithm is not. Forward, products of bfloat16 are those of pairs
// (pairs.h). Backward they are float32: the gradients of a row's logits add up to 0, which rounding to bfloat16 would spoil for keys
// that are alike, even as sums of two such numbers.
// Keys belong to all tiles of a head: shared_sums.h adds up what the tasks have, both sides in one row of each key.
#pragma once
#include "forward.h"
#include "shared_sums.h"

namespace ISA {
namespace {

static const int SIDES = 2;

struct Divergence {
    Attention sides[SIDES];  // masks, B, N and M are those of both
    Size head_mean;
    float* divergence;  // (B, H or 1, N), or null backward
    const float* grad;  // of it, or null forward
    StridedTensor grad_queries[SIDES], grad_keys[SIDES];  // null for a side that needs none
    const Attention& any() const { return sides[0]; }
    bool needs(int side) const { return grad_queries[side].data || grad_keys[side].data; }  // an empty tensor has no pointer
    Size rows_of_heads() const { return head_mean ? 1 : any().H; }  // of the divergence
    Size heads(int side) const { return head_mean ? sides[side].H : 1; }  // of a tile
    Size row(const Tile& t) const { return (t.b * rows_of_heads() + (head_mean ? 0 : t.h)) * any().N + t.first; }
};

// ---- f of a pair

struct Terms {
    Vector f, own, other;  // f(p, q), p df/dp, q df/dq
};
// p (d - 1 + e^-d) for d = ln p - ln q
INLINE Vector kl_term(Vector p, Vector q, Vector d) {
    const Vector near = p * (d * d) * exp_curve(-d), far = p * d + (q - p);
    return absolute(d) < splat(LARGEST_REDUCED) ? near : far;
}
// The terms of a = ln p and b = ln q, finite numbers or NaN. Constants drop out of r: p and q have the same sum over the keys.
struct KlTerms {
    METHOD Terms operator()(Vector a, Vector b) const {
        const Vector p = exp_negative(a), q = exp_negative(b), d = a - b;
        const Vector near = p * expm1_reduced(-d), difference = absolute(d) < splat(LARGEST_REDUCED) ? near : q - p;
        return {kl_term(p, q, d), p * d, difference};
    }
};

// ---- one thread's memory

template <class C> struct DivergenceCall {  // C: a Divergence
    const C& c;
    Size lanes;  // of a tile
    // The items are the tiles of each head, or of a sample for means. The sums are the gradients of the keys of some heads, a row
    // for each key: `key_heads` of each side, `stride` numbers each, from `first` on.
    SharedSums sums;
    Size key_heads[SIDES], stride[SIDES], first[SIDES], row;
    Size tiles() const { return tiles_of(c.any(), lanes); }
    Tile tile(Size item) const {
        const Size head = item / tiles(), heads = c.rows_of_heads();
        return tile_at(c.any(), head / heads, head % heads, item % tiles(), lanes);
    }
    // where the gradients of the first key of this head are added
    float* of_key(float* sums, int side, Size head) const {
        return sums + first[side] + head / c.sides[side].group() % key_heads[side] * stride[side];
    }
};

// An attention in a tile, (keys, width) each
struct AttentionSide {
    Logits logits;
    float *S, *mean;  // ln A of a head, later the gradients of its logits; ln Abar, or null
    float* weights;  // A r, and before of the heads' mean the sum of their weights relative to e^mean; null if neither is needed
    float *grad_query, *scratch;  // (D, LANES)
    const float* lse = nullptr;  // (B, H, N), if it is given
    void plan(const Divergence& c, int side, Size size, bool pairs, Memory& memory) {
        const Attention& a = c.sides[side];
        const bool is_mean = c.heads(side) > 1;
        logits.pairs = pairs && !c.grad && Logits::takes_pairs(a, {});  // both sides alike, for where they are equal
        logits.plan(a, {}, memory, false);
        scratch = logits.S, S = memory.take(size);
        mean = is_mean ? memory.take(size) : nullptr;
        weights = is_mean || c.needs(side) ? memory.take(size) : nullptr;
        grad_query = memory.take(c.needs(side) ? logits.stride * LANES : 0);
    }
    // the log-sum-exp of a head's rows in `to` (LANES), 0 where there is none; null unless it is given
    const float* load_lse(const Attention& a, const Tile& t, float* to) const {
        if (!lse) return nullptr;
        for (Size i = 0; i < LANES; ++i) {
            const float x = i < t.rows ? lse[(t.b * a.H + t.h) * a.N + t.first + i] : 0;
            to[i] = x == -INFINITY ? 0 : x;
        }
        return to;
    }
    const float* compared() const { return mean ? mean : S; }
};

// total (VL) = the sum of f(j) over the keys
template <class F> static void sum_rows(Size keys, double* total, const F& f) {
    for (Size n = 0; n < VL; ++n) total[n] = 0;
    for (Size chunk = 0; chunk < keys; chunk += SHORT_SUM) {
        Vector part = {};
        for (Size j = chunk; j < least(chunk + SHORT_SUM, keys); ++j) part += f(j);
        for (Size n = 0; n < VL; ++n) total[n] += part[n];
    }
}

// ---- logarithms of weights

// S = the logits of head t.h over all keys, -Inf for masked pairs, and the largest of each row
static void attention_logits(const Attention& a, AttentionSide& x, const Tile& t, Size keys, Size loadable, float* largest) {
    const Size w = t.width;
    for (Size i = 0; i < w; i += VL) store(largest + i, splat(-INFINITY));
    x.logits.load_queries(a, {}, t);
    by_blocks(a, keys, [&](Size j0, Size count) {
        x.logits.S = x.S + j0 * w;
        x.logits.compute(a, {}, t, j0, count, least(a.key_block(), loadable - j0), nullptr);
        for (Size i = 0; i < w; i += VL) store(largest + i, maximum(load(largest + i), load(x.logits.top + i)));
    });
}
// make(largest) makes logits S (keys, w); take(at, ln A) takes a vector of their logarithms of weights at each place. lse (w) is
// the rows' log-sum-exp, or null.
template <class Make, class Take>
static void take_logs(float* S, Size keys, Size w, const float* lse, const Make& make, const Take& take) {
    const Vector nothing = splat(-INFINITY);
    float largest[LANES];
    make(largest);
    for (Size at = 0; lse && at < keys * w; at += VL) take(at, load(S + at) - load(lse + at % w));
    for (Size i = 0; !lse && i < w; i += VL) {
        const Vector top = load(largest + i), shift = top == nothing ? Vector{} : top;
        double total[VL];
        float log_total[VL];
        sum_rows(keys, total, [&](Size j) { return exp_negative(load(S + j * w + i) - shift); });
        for (Size n = 0; n < VL; ++n) log_total[n] = total[n] == 0 ? 0.f : (float)log(total[n]);
        const Vector rest = load(log_total);
        for (Size at = i; at < keys * w;
             at += w)  // the largest first: beside a log-sum-exp of huge logits they would lose digits
            take(at, (load(S + at) - shift) - rest);
    }
}
template <class Make>
static void load_logs(float* S, Size keys, Size w, const float* lse, const Make& make) {  // in the place of the logits
    take_logs(S, keys, w, lse, make, [S](Size at, Vector log_p) { store(S + at, log_p); });
}
// The sum of the heads' weights so far is weights e^mean, where mean is the largest logarithm among them.
INLINE void take_up_head(const AttentionSide& x, Size at, Vector log_p) {
    const Vector before = load(x.mean + at), sum = load(x.weights + at);
    const Vector e = exp_negative(before == log_p ? Vector{} : -absolute(log_p - before));  // both may be -Inf
    store(x.weights + at, log_p > before ? sum * e + 1.f : sum + e);
    store(x.mean + at, maximum(before, log_p));
}
// make(tile of a head, largest) makes the head's logits.
template <class Make>
static void load_side(const Divergence& c, const AttentionSide& x, int side, Tile t, Size keys, const Make& make) {
    const Size w = t.width;
    const Attention& a = c.sides[side];
    float of_rows[LANES];
    const auto logits = [&](float* largest) { make(t, largest); };
    const auto take = [&](const auto& f) { take_logs(x.S, keys, w, x.load_lse(a, t, of_rows), logits, f); };
    if (!x.mean) return take([&](Size at, Vector log_p) { store(x.S + at, log_p); });
    take([&](Size at, Vector log_p) { store(x.mean + at, log_p), store(x.weights + at, splat(1.f)); });
    for (t.h = 1; t.h < a.H; ++t.h) take([&](Size at, Vector log_p) { take_up_head(x, at, log_p); });
    const Vector heads = splat((float)a.H);
    for (Size at = 0; at < keys * w; at += VL) store(x.mean + at, load(x.mean + at) + log_all(load(x.weights + at) / heads));
}

// ---- divergence and gradients

// Whether f is linear in p - q. Of a key with more than half of the weight that is what the other keys leave: beside 1 it has no
// digits of its own.
template <class TermsOf> constexpr bool IS_LINEAR = false;

// Of ln A and ln A' forward the divergence of the tile's rows, backward A r and A' r' unless they are null
template <class TermsOf>
static void divergence_of_tile(const Divergence& c, const Tile& t, Size keys, const float* own, const float* other,
                               float* own_weights, float* other_weights, const TermsOf& terms_of) {
    const Size w = t.width;
    const Vector masked = splat(-INFINITY);
    alignas(64) float left[LANES] = {};  // by the other keys, where f is linear
    const auto terms_at = [&](Size at) {
        const Vector a = load(own + at), b = load(other + at);
        const Integers is_masked = (a == masked) | (b == masked);
        Terms x;
        if constexpr (IS_LINEAR<TermsOf>) x = terms_of(is_masked ? Vector{} : a, is_masked ? Vector{} : b, load(left + at % w));
        else x = terms_of(is_masked ? Vector{} : a, is_masked ? Vector{} : b);
        x.f = is_masked ? Vector{} : x.f, x.own = is_masked ? Vector{} : x.own, x.other = is_masked ? Vector{} : x.other;
        return x;
    };
    if constexpr (IS_LINEAR<TermsOf>)
        for (Size i = 0; i < w; i += VL) {
            double total[VL];
            sum_rows(keys, total, [&](Size j) {
                const Vector a = load(own + j * w + i), b = load(other + j * w + i);
                return (a == masked) | (b == masked) ? Vector{} : terms_of.unless_most(a, b);
            });
            for (Size n = 0; n < VL; ++n) left[i + n] = (float)-total[n];
        }
    for (Size i = 0; c.divergence && i < w; i += VL) {
        double total[VL];
        sum_rows(keys, total, [&](Size j) { return terms_at(j * w + i).f; });
        for (Size n = 0; n < VL && i + n < t.rows; ++n) c.divergence[c.row(t) + i + n] = (float)total[n];
    }
    for (Size at = 0; c.grad && at < keys * w; at += VL) {
        const Terms x = terms_at(at);
        if (own_weights) store(own_weights + at, x.own);
        if (other_weights) store(other_weights + at, x.other);
    }
}

// From A r, or Abar r of a mean: in the place of S, ln A, the gradients of its logits. `heads` of the side have the mean.
template <bool MEAN>
static void logit_gradients(const Divergence& c, const Tile& t, Size keys, Size heads, const float* weights, const float* mean,
                            float* S) {
    const Vector masked = splat(-INFINITY);
    const Size w = t.width;
    float grad[LANES] = {};
    for (Size i = 0; i < t.rows; ++i) grad[i] = c.grad[c.row(t) + i] / heads;
    for (Size i = 0; i < w; i += VL) {
        const auto weight = [&](Size at) {  // A r of the head
            const Vector of_row = load(weights + at), log_p = load(S + at);
            if (!MEAN) return of_row;
            const Vector share = of_row * exp_negative(log_p - load(mean + at));
            return log_p == masked ? Vector{} : share;
        };
        double total[VL];
        float of_row[VL];
        sum_rows(keys, total, [&](Size j) { return weight(j * w + i); });
        for (Size n = 0; n < VL; ++n) of_row[n] = (float)total[n];
        const Vector sum = load(of_row), by = load(grad + i);
        for (Size j = 0; j < keys; ++j) {
            const Size at = j * w + i;
            store(S + at, (weight(at) - exp_negative(load(S + at)) * sum) * by);
        }
    }
}
// add(tile of a head) takes S, the gradients of its logits; `make` as in load_side.
template <class Make, class Add>
static void side_gradients(const Divergence& c, const AttentionSide& x, int side, Tile t, Size keys, const Make& make,
                           const Add& add) {
    const Size heads = c.heads(side), last = t.h + heads;
    for (; t.h < last; ++t.h) {
        if (x.mean) load_logs(x.S, keys, t.width, nullptr, [&](float* largest) { make(t, largest); });
        if (x.mean) logit_gradients<true>(c, t, keys, heads, x.weights, x.mean, x.S);
        else logit_gradients<false>(c, t, keys, heads, x.weights, nullptr, x.S);
        add(t);
    }
}
// The gradients of the head's queries, and those of its keys added to `to`, from S over all keys
static void attention_gradients(const Divergence& c, AttentionSide& x, int side, const Tile& t, Size keys, float* to, Size row) {
    const Attention& a = c.sides[side];
    Logits& l = x.logits;
    memset(x.grad_query, 0, a.D * t.width * sizeof(float));
    by_blocks(a, keys, [&](Size j0, Size count) {
        l.keys.load(a, t, j0, count);
        l.keys.gradients(t, count, 1.f, x.S + j0 * t.width, nullptr, l.rows, to + j0 * row, row, true, x.grad_query);
    });
    store_tile(x.grad_query, t, a.D, l.row_factor({}, a.scale), c.grad_queries[side], a.dtype, x.scratch);
}

// ---- all tiles

template <class C> static Size row_count(const DivergenceCall<C>& call) { return call.c.any().M; }
template <class C> static void write_sums(const DivergenceCall<C>& call, Size unit, const float* sums, Size first, Size last) {
    const C& c = call.c;
    for (int side = 0; side < SIDES; ++side) {
        const Attention& a = c.sides[side];
        const Size from = unit * call.key_heads[side];
        for (Size n = 0; c.needs(side) && n < call.key_heads[side]; ++n)
            for (Size j = first; j < last; ++j)
                store_key(a, (from + n) / a.Hkv, (from + n) % a.Hkv, j,
                          sums + j * call.row + call.first[side] + n * call.stride[side], a.D, c.grad_keys[side]);
    }
}

// Tiles of `lanes` rows, of which each is compared over at most so many keys
template <class Tiles, class C> static Size compare_all(const C& c, Size lanes, Size most_keys) {
    const Attention& a = c.any();
    DivergenceCall<C> call = {c, lanes, {}, {}, {}, {}, 0};
    const Size tiles = call.tiles(), items = a.B * c.rows_of_heads() * tiles;
    if (items == 0 || a.H == 0) return DONE;
    // query heads of both sides whose keys no others share
    const Size units = c.head_mean ? 1 : greatest_divisor(a.Hkv, c.sides[1].Hkv), unit = items / (a.B * units);
    for (int side = 0; side < SIDES; ++side) {
        call.key_heads[side] = c.sides[side].Hkv / units, call.stride[side] = round_up(c.sides[side].D, VL);
        call.first[side] = call.row;
        if (c.needs(side)) call.row += call.key_heads[side] * call.stride[side];
    }
    const Size parts = call.row > 0 ? least(unit, parts_of_rows(c.rows_of_heads() / units * a.N, units)) : unit;
    const Size tasks = least(thread_count(), a.B * units * parts);
    Size b = -1, visible = 0;
    Memory starts, memory;
    const Size* start = cut(items, unit, parts, tasks, starts, [&](Size item) {  // under the causal mask some tiles have few keys
        const Tile t = call.tile(item);
        if (t.b != b) b = t.b, visible = visible_keys(a, b);
        return t.width * (least(t.keys(a, visible), most_keys) + 1);
    });
    call.sums = {start, tasks, unit, parts, a.M * call.row};
    if (!start || !memory.place([&] { call.sums.plan(memory); })) return NO_MEMORY;
    return run_and_join<Tiles>(tasks, call);
}

}  // namespace
}  // namespace ISA
