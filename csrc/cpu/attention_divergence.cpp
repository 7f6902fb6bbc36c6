// attention_divergence: D_i = sum_j f(A_ij, A'_ij) of two attentions over the same keys, or of their means over the heads, and the
// gradients of both sides' queries and keys (divergence.h; streaming/attention_divergence.py has the law).
//
// Bound: multiply-adds, two products of a pair forward; backward these and two more for a side that has gradients.
// Measured in turns with streaming and the formula's compilation on a busy machine, forward and backward, with one thread, one head
// of 64 numbers in float32: 2,048 tokens 5.8 and 1.8 times as fast for KL, 7.1 and 2.5 times for Jensen-Shannon; 8,192 tokens 4.6 and
// 1.8 times for KL.
#include "divergence.h"

namespace ISA {
namespace {

enum Kind : Size { KL = 0, REVERSE_KL = 1, JS = 2, HELLINGER = 3, TOTAL_VARIATION = 4 };

struct AttentionDivergence : Divergence {
    Size kind;
    double beta;
    FIELDS(sides, head_mean, divergence, grad, grad_queries, grad_keys, kind, beta)
};

// ---- f of a pair

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
    static METHOD Vector difference(Vector a, Vector b) {  // p - q
        const Vector d = a - b, lowest = splat(-87.f);
        const Vector change = exp_negative(maximum(a, b)) * expm1_bounded(maximum(lowest, -absolute(d)));
        return d > Vector{} ? -change : change;
    }
    static METHOD Integers is_most(Vector a) { return a > splat(-0.69314718f); }
    METHOD Vector unless_most(Vector a, Vector b) const { return is_most(a) ? Vector{} : difference(a, b); }
    METHOD Terms operator()(Vector a, Vector b, Vector left) const {
        const Vector half = splat(0.5f), d = is_most(a) ? left : difference(a, b);
        const Vector sign = d > Vector{} ? half : d < Vector{} ? -half : half * d;  // 0, or NaN
        return {half * absolute(d), exp_negative(a) * sign, -exp_negative(b) * sign};
    }
};
template <> constexpr bool IS_LINEAR<TotalVariationTerms> = true;
template <class F> static void with_terms(const AttentionDivergence& c, const F& f) {
    switch (c.kind) {
        case KL: return f(KlTerms{});
        case REVERSE_KL: return f(ReverseKlTerms{});
        case JS: return f(JsTerms{(float)c.beta, (float)(1 - c.beta)});
        case HELLINGER: return f(HellingerTerms{});
        case TOTAL_VARIATION: return f(TotalVariationTerms{});
    }
}

// ---- a tile

struct DivergenceTiles {
    AttentionSide sides[SIDES];
    void plan(const DivergenceCall<AttentionDivergence>& call, Memory& memory) {
        for (int side = 0; side < SIDES; ++side) sides[side].plan(call.c, side, call.c.any().M * call.lanes, true, memory);
    }
};
static void add_item(const DivergenceCall<AttentionDivergence>& call, DivergenceTiles& x, Size item, float* sums) {
    const AttentionDivergence& c = call.c;
    const Tile tile = call.tile(item);
    const Size visible = visible_keys(c.any(), tile.b), keys = tile.keys(c.any(), visible);
    const auto logits = [&](int side) {
        return [&, side](
                   const Tile& t, float* largest) { attention_logits(c.sides[side], x.sides[side], t, keys, visible, largest); };
    };
    for (int side = 0; side < SIDES; ++side) load_side(c, x.sides[side], side, tile, keys, logits(side));
    float* weights[SIDES];
    for (int side = 0; side < SIDES; ++side) weights[side] = c.needs(side) ? x.sides[side].weights : nullptr;
    with_terms(c, [&](const auto& terms_of) {
        divergence_of_tile(c, tile, keys, x.sides[0].compared(), x.sides[1].compared(), weights[0], weights[1], terms_of);
    });
    for (int side = 0; side < SIDES; ++side)
        if (c.needs(side))
            side_gradients(c, x.sides[side], side, tile, keys, logits(side), [&](const Tile& t) {
                attention_gradients(c, x.sides[side], side, t, keys, call.of_key(sums, side, t.h), call.row);
            });
}

static Size attention_divergence(const AttentionDivergence& c) {
    return compare_all<DivergenceTiles>(c, lanes_of_map(c.any()), c.any().M);
}

}  // namespace
}  // namespace ISA

OPERATOR(attention_divergence, AttentionDivergence)
