// attention_divergence: D_i = sum_j f(A_ij, A'_ij) of two attentions over the same keys, or of their means over the heads, and the
// gradients of both sides' queries and keys (streaming/attention_divergence.py has the law).
//
// Query row i, key j; ' marks the other side. In brackets: the names below.
//     L_ij = ln A_ij = (S_ij - max_j S_ij) - ln sum_j e^(S_ij - max_j S_ij)                [load_logs: S]
//     ln Abar_ij = ln (1/H sum_h A_hij), a log-sum-exp over the heads                     [take_up_head: mean, weights]
//     f(e^L, e^L'), and with r = df/dA the products A r, A' r'                            [Terms; divergence_of_tile]
//     dS_ij = (A r - A sum_j A r) dD_i; of a mean A_h r = (A_h / Abar) Abar r, over H     [logit_gradients]
//
// Bound: multiply-adds, two products of a pair forward; backward these and two more for a side that has gradients. With means
// the logits of such a side are made again. Tricks: a tile has all keys of its rows, so its logits are made once, stay in the
// cache, and become logarithms of weights. f of a small difference of these is at least 0 for each pair and keeps its digits. A
// weight may be too small for float32, its logarithm is not. Forward, products of bfloat16 are those of pairs (pairs.h).
// Backward they are float32: the gradients of a row's logits add up to 0, which rounding to bfloat16 would spoil for keys that are
// alike, even as sums of two such numbers.
// Keys belong to all tiles of a head: shared_sums.h adds up what the tasks have, both sides in one row of each key.
// Measured in turns with streaming and the formula's compilation on a busy machine, forward and backward, with one thread, one head
// of 64 numbers in float32: 2,048 tokens 5.8 and 1.8 times as fast for KL, 7.1 and 2.5 times for Jensen-Shannon; 8,192 tokens 4.6 and
// 1.8 times for KL.
#include "forward.h"
#include "shared_sums.h"

namespace ISA {
namespace {

enum Kind : Size { KL = 0, REVERSE_KL = 1, JS = 2, HELLINGER = 3, TOTAL_VARIATION = 4 };
static const int SIDES = 2;

struct AttentionDivergence {
    Attention sides[SIDES];  // masks, B, N and M are those of both
    Size kind;
    double beta;
    Size head_mean;
    float* divergence;  // (B, H or 1, N), or null backward
    const float* grad;  // of it, or null forward
    StridedTensor grad_queries[SIDES], grad_keys[SIDES];  // null for a side that needs none
    FIELDS(sides, kind, beta, head_mean, divergence, grad, grad_queries, grad_keys)
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
struct ReverseKlTerms {
    METHOD Terms operator()(Vector a, Vector b) const {
        const Terms x = KlTerms{}(b, a);
        return {x.f, x.other, x.own};
    }
};
struct JsTerms {
    float beta, rest;  // of q: in float32 1 - beta could lose most of its digits
    // With the mean m = beta p + (1 - beta) q, whose logarithm is that of the larger of p and q and L = ln(m / larger)
    METHOD Terms operator()(Vector a, Vector b) const {
        const Vector p = exp_negative(a), q = exp_negative(b), d = a - b, size = absolute(d), one = splat(1.f);
        const Vector of_p = splat(beta), of_q = splat(rest), lowest = splat(-87.f);
        const Integers first = d >= Vector{};
        const Vector of_larger = first ? of_p : of_q, of_smaller = first ? of_q : of_p;
        const Vector change = of_smaller * expm1_bounded(maximum(lowest, -size));  // m / larger - 1
        const Vector near = log1p_all(change), far = log_all(of_larger + of_smaller * exp_negative(-size));
        const Vector L = size < one ? near : far;
        const Vector to_p = (first ? Vector{} : d) - L, to_q = (first ? -d : Vector{}) - L;  // ln(p / m), ln(q / m)
        const Vector m = of_p * p + of_q * q;
        return {of_p * kl_term(p, m, to_p) + of_q * kl_term(q, m, to_q), of_p * p * to_p, of_q * q * to_q};
    }
};
struct HellingerTerms {
    METHOD Terms operator()(Vector a, Vector b) const {
        const Vector d = a - b, larger = exp_negative(0.5f * maximum(a, b)), lowest = splat(-87.f);
        const Vector change = larger * expm1_bounded(maximum(lowest, -0.5f * absolute(d))), smaller = larger + change;
        const Integers first = d >= Vector{};
        const Vector x = first ? larger : smaller, y = first ? smaller : larger, difference = first ? -change : change;
        return {0.5f * difference * difference, 0.5f * x * difference, -0.5f * y * difference};
    }
};
struct TotalVariationTerms {
    METHOD Terms operator()(Vector a, Vector b) const {
        const Vector d = a - b, half = splat(0.5f), lowest = splat(-87.f);
        const Vector change = exp_negative(maximum(a, b)) * expm1_bounded(maximum(lowest, -absolute(d)));
        const Vector sign = d > Vector{} ? half : d < Vector{} ? -half : half * d;  // 0, or NaN
        return {-half * change, exp_negative(a) * sign, -exp_negative(b) * sign};
    }
};
template <class F> static void with_terms(const AttentionDivergence& c, const F& f) {
    switch (c.kind) {
        case KL: return f(KlTerms{});
        case REVERSE_KL: return f(ReverseKlTerms{});
        case JS: return f(JsTerms{(float)c.beta, (float)(1 - c.beta)});
        case HELLINGER: return f(HellingerTerms{});
        case TOTAL_VARIATION: return f(TotalVariationTerms{});
    }
}

// ---- one thread's memory

struct DivergenceCall {
    const AttentionDivergence& c;
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
};

// One side of a tile, (keys, width) each
struct DivergenceSide {
    Logits logits;
    float *S, *mean;  // ln A of a head, later the gradients of its logits; ln Abar, or null
    float* weights;  // A r, and before of the heads' mean the sum of their weights relative to e^mean; null if neither is needed
    float *grad_query, *scratch;  // (D, LANES)
    void plan(const DivergenceCall& call, int side, Memory& memory) {
        const Attention& a = call.c.sides[side];
        const Size size = a.M * call.lanes;
        const bool is_mean = call.c.heads(side) > 1;
        logits.pairs = !call.c.grad && Logits::takes_pairs(a, {});  // both sides alike, for where they are equal
        logits.plan(a, {}, memory, false);
        scratch = logits.S, S = memory.take(size);
        mean = is_mean ? memory.take(size) : nullptr;
        weights = is_mean || call.c.needs(side) ? memory.take(size) : nullptr;
        grad_query = memory.take(call.c.needs(side) ? a.D * LANES : 0);
    }
    const float* compared() const { return mean ? mean : S; }
};
struct DivergenceTiles {
    DivergenceSide sides[SIDES];
    void plan(const DivergenceCall& call, Memory& memory) {
        for (int side = 0; side < SIDES; ++side) sides[side].plan(call, side, memory);
    }
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

// S = ln A of head t.h, -Inf for masked pairs
static void load_logs(const Attention& a, DivergenceSide& x, const Tile& t, Size keys, Size loadable) {
    const Size w = t.width;
    const Vector nothing = splat(-INFINITY);
    float largest[LANES];
    for (Size i = 0; i < w; i += VL) store(largest + i, nothing);
    x.logits.load_queries(a, {}, t);
    by_blocks(a, keys, [&](Size j0, Size count) {
        x.logits.S = x.S + j0 * w;
        x.logits.compute(a, {}, t, j0, count, least(a.key_block(), loadable - j0), nullptr);
        for (Size i = 0; i < w; i += VL) store(largest + i, maximum(load(largest + i), load(x.logits.top + i)));
    });
    for (Size i = 0; i < w; i += VL) {
        const Vector top = load(largest + i), shift = top == nothing ? Vector{} : top;
        double total[VL];
        float log_total[VL];
        sum_rows(keys, total, [&](Size j) { return exp_negative(load(x.S + j * w + i) - shift); });
        for (Size n = 0; n < VL; ++n) log_total[n] = total[n] == 0 ? 0.f : (float)log(total[n]);
        const Vector rest = load(log_total);
        for (Size j = 0; j < keys;
             ++j) {  // the largest is taken off first: behind it a log-sum-exp of huge logits would lose its digits
            float* s = x.S + j * w + i;
            store(s, (load(s) - shift) - rest);
        }
    }
}
// The sum of the heads' weights so far is weights e^mean, where mean is the largest logarithm among them.
static void take_up_head(const DivergenceSide& x, Size n, bool first) {
    if (first) memcpy(x.mean, x.S, n * sizeof(float));
    for (Size i = 0; i < n; i += VL) {
        if (first) {
            store(x.weights + i, splat(1.f));
            continue;
        }
        const Vector before = load(x.mean + i), log_p = load(x.S + i), sum = load(x.weights + i);
        const Vector e = exp_negative(before == log_p ? Vector{} : -absolute(log_p - before));  // both may be -Inf
        store(x.weights + i, log_p > before ? sum * e + 1.f : sum + e);
        store(x.mean + i, maximum(before, log_p));
    }
}
static void load_side(const AttentionDivergence& c, DivergenceSide& x, int side, Tile t, Size keys, Size loadable) {
    const Attention& a = c.sides[side];
    if (!x.mean) {
        if (c.head_mean) t.h = 0;
        return load_logs(a, x, t, keys, loadable);
    }
    for (t.h = 0; t.h < a.H; ++t.h) {
        load_logs(a, x, t, keys, loadable);
        take_up_head(x, keys * t.width, t.h == 0);
    }
    const Vector heads = splat((float)a.H);
    for (Size i = 0; i < keys * t.width; i += VL) store(x.mean + i, load(x.mean + i) + log_all(load(x.weights + i) / heads));
}

// ---- divergence and gradients

// Forward the divergence of the tile's rows, backward A r of each side that has gradients
static void divergence_of_tile(const AttentionDivergence& c, const DivergenceTiles& x, const Tile& t, Size keys) {
    const Size w = t.width;
    const float *own = x.sides[0].compared(), *other = x.sides[1].compared();
    float* own_weights = c.needs(0) ? x.sides[0].weights : nullptr;
    float* other_weights = c.needs(1) ? x.sides[1].weights : nullptr;
    const Vector masked = splat(-INFINITY);
    with_terms(c, [&](const auto& terms_of) {
        const auto terms_at = [&](Size at) {
            const Vector a = load(own + at), b = load(other + at);
            const Integers is_masked = (a == masked) | (b == masked);
            Terms x = terms_of(is_masked ? Vector{} : a, is_masked ? Vector{} : b);
            x.f = is_masked ? Vector{} : x.f, x.own = is_masked ? Vector{} : x.own, x.other = is_masked ? Vector{} : x.other;
            return x;
        };
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
    });
}

// In the place of S the gradients of a head's logits, from `grad` (LANES) of the divergence
template <bool MEAN> static void logit_gradients(const DivergenceSide& x, Size keys, Size w, const float* grad) {
    const Vector masked = splat(-INFINITY);
    for (Size i = 0; i < w; i += VL) {
        const auto weight = [&](Size at) {  // A r of the head
            const Vector of_row = load(x.weights + at), log_p = load(x.S + at);
            if (!MEAN) return of_row;
            const Vector share = of_row * exp_negative(log_p - load(x.mean + at));
            return log_p == masked ? Vector{} : share;
        };
        double total[VL];
        float of_row[VL];
        sum_rows(keys, total, [&](Size j) { return weight(j * w + i); });
        for (Size n = 0; n < VL; ++n) of_row[n] = (float)total[n];
        const Vector sum = load(of_row), by = load(grad + i);
        for (Size j = 0; j < keys; ++j) {
            const Size at = j * w + i;
            store(x.S + at, (weight(at) - exp_negative(load(x.S + at)) * sum) * by);
        }
    }
}
// The gradients of the head's queries, and those of its keys added to `sums`
static void head_gradients(const DivergenceCall& call, DivergenceSide& x, int side, const Tile& t, Size keys, float* sums) {
    const AttentionDivergence& c = call.c;
    const Attention& a = c.sides[side];
    const Size w = t.width;
    float grad[LANES] = {};
    for (Size i = 0; i < t.rows; ++i) grad[i] = c.grad[c.row(t) + i] / c.heads(side);
    if (x.mean) logit_gradients<true>(x, keys, w, grad);
    else logit_gradients<false>(x, keys, w, grad);
    memset(x.grad_query, 0, a.D * w * sizeof(float));
    float* to = sums + call.first[side] + t.h / a.group() % call.key_heads[side] * call.stride[side];
    Logits& l = x.logits;
    by_blocks(a, keys, [&](Size j0, Size count) {
        l.keys.load(a, t, j0, count);
        l.keys.gradients(t, count, 1.f, x.S + j0 * w, nullptr, l.rows, to + j0 * call.row, call.row, true, x.grad_query);
    });
    store_tile(x.grad_query, t, a.D, l.row_factor({}, a.scale), c.grad_queries[side], a.dtype, x.scratch);
}
static void add_item(const DivergenceCall& call, DivergenceTiles& x, Size item, float* sums) {
    const AttentionDivergence& c = call.c;
    Tile t = call.tile(item);
    const Size visible = visible_keys(c.any(), t.b), keys = t.keys(c.any(), visible);
    for (int side = 0; side < SIDES; ++side) load_side(c, x.sides[side], side, t, keys, visible);
    divergence_of_tile(c, x, t, keys);
    for (int side = 0; side < SIDES; ++side) {
        DivergenceSide& s = x.sides[side];
        if (!c.needs(side)) continue;
        const Size first = c.head_mean ? 0 : t.h;
        for (Size n = 0; n < c.heads(side); ++n) {
            t.h = first + n;
            if (s.mean) load_logs(c.sides[side], s, t, keys, visible);
            head_gradients(call, s, side, t, keys, sums);
        }
        t.h = first;
    }
}

// ---- all tiles

static Size row_count(const DivergenceCall& call) { return call.c.any().M; }
static void write_sums(const DivergenceCall& call, Size unit, const float* sums, Size first, Size last) {
    const AttentionDivergence& c = call.c;
    for (int side = 0; side < SIDES; ++side) {
        const Attention& a = c.sides[side];
        const Size from = unit * call.key_heads[side];
        for (Size n = 0; c.needs(side) && n < call.key_heads[side]; ++n)
            for (Size j = first; j < last; ++j)
                store_key(a, (from + n) / a.Hkv, (from + n) % a.Hkv, j,
                          sums + j * call.row + call.first[side] + n * call.stride[side], a.D, c.grad_keys[side]);
    }
}

static Size attention_divergence(const AttentionDivergence& c) {
    const Attention& a = c.any();
    DivergenceCall call = {c, lanes_of_map(a), {}, {}, {}, {}, 0};
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
        return t.width * (t.keys(a, visible) + 1);
    });
    call.sums = {start, tasks, unit, parts, a.M * call.row};
    if (!start || !memory.place([&] { call.sums.plan(memory); })) return NO_MEMORY;
    return run_and_join<DivergenceTiles>(tasks, call);
}

}  // namespace
}  // namespace ISA

OPERATOR(attention_divergence, AttentionDivergence)
