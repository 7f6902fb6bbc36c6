// The tiles of one query head in the backward pass of attention: r Abar takes P and dP from the registers that hold them anyway.
//
// Where the keys are one block, each tile finds its own statistics: exact for any logits. Else blocks of keys are the outer loop,
// so that gradients of a block of keys stay in cache, and the statistics come from the log-sum-exp of the forward pass, as in
// FlashAttention.
#pragma once
#include "forward.h"
#include "shared_sums.h"

namespace ISA {
namespace {

// The inputs of r Abar, with Abar = mean over heads of max(P dP, 0), or of P
struct Relevancy {
    const float* rows;  // (B, T, N) r, or null
    Size T, is_gradient, row_normalize;
    const float* direct;  // (B, T, M): what is added to r Abar, or null
    float* result;  // (B, T, M)
    FIELDS(rows, T, is_gradient, row_normalize, direct, result)
};

// Where a row's log-sum-exp comes from. The caller's may count keys that are not in this call: P is what it says.
enum LseSource : Size { OWN_LSE = 0, CALLER_LSE = 1, NO_LSE = 2 };

struct Backward {
    Attention a;
    Score score;
    Dropout dropout;
    StridedTensor grad_out, out;  // grad_out may be null for Abar = mean P
    const double* lse;  // (B, H, N) natural log-sum-exp
    Size lse_source;  // LseSource
    const float* grad_lse;  // (B, H, N) or null
    StridedTensor grad_query, grad_key, grad_value;  // null where they are not needed: then all three are
    float* grad_vector;  // (H, D) or null
    Relevancy relevancy;
    FIELDS(a, score, dropout, grad_out, out, lse, lse_source, grad_lse, grad_query, grad_key, grad_value, grad_vector, relevancy)
};

struct BackwardCall {
    const Backward& c;
    // The items are tiles of query rows, key head by key head; the sums are the gradients of a key head's keys and values, and
    // r Abar of a sample.
    SharedSums keys, values, carried;
    Size key_stride, value_stride;  // D and Dv rounded up to VL
    float* vector_parts = nullptr;  // gradients of the units' vector, by task
    float* row_sums = nullptr;  // (B, H, N) sums of max(P dP, 0) or P over the keys, for row_normalize
    bool sums_rows = false;  // this pass computes row_sums alone
    bool inputs() const { return (c.grad_query.data || c.grad_value.data) && !sums_rows; }  // an empty tensor has no pointer
    // whether a tile has all keys at once and finds its statistics itself
    bool at_once() const { return c.a.M <= c.a.key_block() && c.lse_source != CALLER_LSE; }
    // whether the statistics of few rows over many keys leave the exponentials behind: there reading the keys is what takes time
    bool keeps_exponentials() const {
        return !at_once() && !inputs() && c.lse_source == NO_LSE && c.a.N <= GROUP && c.a.M <= MOST_KEYS_OF_FEW;
    }
};

// ---- one thread's memory

// Rows of D or Dv numbers, one for each key
struct Sums {
    float* first;
    Size stride;
    float* row(Size j) const { return first + j * stride; }
};

struct Gradients {
    Logits logits;
    float *grad_out, *grad_out_transposed;  // of a tile: (LANES, value_stride), (Dv, width); or pairs, as Logits::rows
    float *grad_p, *dropped, *kept;  // of a tile: gradients of P; P after dropout; what scores.h keeps
    Pair* rounded_tile;  // (count, width / 2): P or gradients of the logits
    // (tiles, *) or one tile's: statistics of the rows, sum_j P dP, the gradient (D, LANES) of the query and that of its norm
    float *shift, *factor, *delta, *grad_query, *by_query_norm;
    Sums grad_key, grad_value;  // of the key head that is at work
    bool fresh = false;  // whether these two hold nothing yet
    float *by_key_norm, *grad_vector;  // (M), (H, D)
    float *carried_in, *carried_by_factor;  // (LANES, T rounded up): r of a tile's rows by load_carried, and times `factor`
    float* carried_out;  // r Abar of the sample that is at work, (M, T rounded up)
    float *exponentials,
        *block_shifts;  // of one tile, or null: (M, GROUP) e^(logit - shift), the shift of each block (blocks, GROUP)
    float* scratch;

    void plan(const BackwardCall& call, Memory& memory) {
        const Backward& c = call.c;
        const Attention& a = c.a;
        const bool inputs = call.inputs();
        const Size block = a.key_block(), lanes = (call.at_once() ? 1 : tiles_of(a)) * LANES;
        const Size carried = c.relevancy.rows ? LANES * round_up(c.relevancy.T, VL) : 0;
        logits.pairs = Logits::takes_pairs(a, c.score);
        logits.plan(a, c.score, memory, inputs);
        rounded_tile = logits.pairs && inputs ? (Pair*)memory.take(block * LANES / 2) : nullptr;
        exponentials = call.keeps_exponentials() ? memory.take(a.M * GROUP) : nullptr;
        block_shifts = call.keeps_exponentials() ? memory.take((a.M + block - 1) / block * GROUP) : nullptr;
        grad_out = memory.take(LANES * call.value_stride), grad_out_transposed = memory.take(LANES * a.Dv);
        grad_p = memory.take(block * LANES);
        kept = c.score.bends() && !c.score.sums_units() ? memory.take(block * LANES) : nullptr;
        dropped = c.dropout.probability > 0 ? memory.take(block * LANES) : nullptr;
        shift = memory.take(lanes), factor = memory.take(lanes), delta = memory.take(lanes);
        grad_query = inputs ? memory.take(lanes * a.D) : nullptr, by_query_norm = memory.take(lanes);
        by_key_norm = memory.take(a.M), grad_vector = memory.take(a.H * a.D);
        carried_in = memory.take(carried), carried_by_factor = memory.take(carried);
        scratch = memory.take(LANES * most(a.D, a.Dv) + 6 * LANES);
    }
};

// A tile of query rows and the keys [first, first + count). `loaded` keys are read: later tiles of the block see more of them.
struct Block {
    const Tile& t;
    Size first, count, loaded;
    float *shift, *factor, *delta, *grad_query, *by_query_norm;  // of the tile's rows: see Gradients
    Size size() const { return count * t.width; }
};

// ---- statistics of rows

// The largest logit and the sum over all keys of a tile, block by block
static void statistics_by_blocks(const Attention& a, const Score& score, Gradients& g, const Tile& t, Size visible,
                                 const Statistics& s) {
    Logits& logits = g.logits;
    float *largest = g.scratch, *rescale = g.scratch + LANES, *S = logits.S;
    double* total = (double*)(g.scratch + 2 * LANES);
    const Size w = t.width;
    for (Size i = 0; i < w; ++i) largest[i] = -INFINITY, total[i] = 0;
    by_blocks(a, t.keys(a, visible), [&](Size j0, Size count) {
        if (g.exponentials) logits.S = g.exponentials + j0 * w;
        logits.compute(a, score, t, j0, count, least(a.key_block(), visible - j0), nullptr);
        online_softmax(logits.S, count, w, j0 == 0, logits.top, largest, total, rescale);
        if (g.block_shifts) memcpy(g.block_shifts + j0 / a.key_block() * w, largest, w * sizeof(float));
    });
    logits.S = S;
    finish_rows(largest, total, w, s);
}
// Ours is a float64. Up to 2^24 it gives P = e^(logit - lse) to 2^-29. Beyond it the statistics are computed again.
static const double LARGEST_OWN_LSE = 16777216.;

// Statistics of a tile where its keys come in blocks
static void find_statistics(const Backward& c, Gradients& g, const Tile& t, Size visible, const Statistics& s) {
    const double* lse = c.lse_source == NO_LSE ? nullptr : c.lse + (t.b * c.a.H + t.h) * c.a.N + t.first;
    const double* mask_shifts = c.a.mask_shifts(t.b, t.h, t.first);
    const double bound = c.lse_source == CALLER_LSE ? LARGEST_CALLER_LSE : LARGEST_OWN_LSE;
    bool lost[LANES], any = false;
    for (Size i = 0; i < t.width; ++i) {
        double x = i >= t.rows ? -INFINITY : lse ? lse[i] : 0;
        const bool masked = fabs(x) == INFINITY;
        lost[i] = i < t.rows && !masked && (!lse || fabs(x) > bound);
        if (mask_shifts && i < t.rows) x -= mask_shifts[i];
        any |= lost[i];
        s.shift[i] = masked ? INFINITY : (float)x;  // e^(logit - Inf) is 0 whatever the logit is
        const double rounded_by = s.shift[i] - x;  // beyond 2^24 P is 0, and this has no bound
        s.factor[i] = masked ? 0.f : fabs(rounded_by) < 1 ? (float)exp(rounded_by) : 1.f;
    }
    if (!any) return;
    const Statistics again = {g.scratch + 4 * LANES, g.scratch + 5 * LANES};
    g.logits.load_queries(c.a, c.score, t);
    statistics_by_blocks(c.a, c.score, g, t, visible, again);
    for (Size i = 0; i < t.width; ++i)
        if (lost[i]) s.shift[i] = again.shift[i], s.factor[i] = again.factor[i];
}

// ---- r Abar

// result (count, stride) += X^T r over the tile's rows: X (count, width), r (width, stride). Lanes beyond the rows may hold NaN.
static void carry(const float* X, Size count, const Tile& t, const float* r, Size T, float* result) {
    const Size stride = round_up(T, VL), w = t.width, whole = t.rows / VL * VL;
    if (T > 2) {
        product<false>(count, stride, t.rows, X, w, r, stride, result, stride, true);
        return;
    }
    for (Size n = 0; n < T; ++n) {
        float lane[LANES] = {};
        for (Size i = 0; i < t.rows; ++i) lane[i] = r[i * stride + n];
        for (Size j = 0; j < count; ++j) {
            Vector total = Vector{};
            for (Size i = 0; i < whole; i += VL) total += load(lane + i) * load(X + j * w + i);
            if (whole < t.rows) total += load(lane + whole) * first_lanes(load(X + j * w + whole), t.rows - whole);
            result[j * stride + n] += sum(total);
        }
    }
}
// r of a tile as (width, stride), over the number of heads, or over the sums of Abar's rows. A zero row stays zero, also one whose
// sum is subnormal
static void load_carried(const Relevancy& v, const Attention& a, const Tile& t, const float* row_sums, float* rows) {
    const Size stride = round_up(v.T, VL);
    memset(rows, 0, t.width * stride * sizeof(float));
    for (Size i = 0; i < t.rows; ++i) {
        float total = row_sums ? 0.f : (float)a.H;
        for (Size h = 0; row_sums && h < a.H; ++h) total += row_sums[(t.b * a.H + h) * a.N + t.first + i];
        if (total < FLT_MIN) total = 1;  // r over a subnormal number overflows
        for (Size n = 0; n < v.T; ++n) rows[i * stride + n] = v.rows[(t.b * v.T + n) * a.N + t.first + i] / total;
    }
}

// ---- phase 1: weights. Those of a tile are P, or exponentials that `factor` makes P of.

struct Weights {
    float* data;  // (count, width)
    const float* factor;  // (LANES) by which each row is still to be multiplied; null for P itself
};

// The exponentials that find_statistics has left behind
static Weights kept_weights(const BackwardCall& call, Gradients& g, const Block& x) {
    const Size w = x.t.width;
    const float* shift = g.block_shifts + x.first / call.c.a.key_block() * w;
    for (Size i = 0; i < w; ++i) g.scratch[i] = x.factor[i] * (shift[i] == -INFINITY ? 0.f : expf(shift[i] - x.shift[i]));
    return {g.exponentials + x.first * w, g.scratch};
}
// From the logits of all keys: the statistics are found on the way.
static Weights whole_weights(Gradients& g, const Block& x) {
    float *largest = g.scratch, *rescale = g.scratch + LANES;
    double* total = (double*)(g.scratch + 2 * LANES);
    online_softmax(g.logits.S, x.count, x.t.width, true, g.logits.top, largest, total, rescale);
    finish_rows(largest, total, x.t.width, {x.shift, x.factor});
    return {g.logits.S, x.factor};
}
static Weights weights_of(const BackwardCall& call, Gradients& g, const Block& x) {
    if (g.exponentials) return kept_weights(call, g, x);
    g.logits.compute(call.c.a, call.c.score, x.t, x.first, x.count, x.loaded, g.kept);
    if (call.at_once()) return whole_weights(g, x);
    probabilities(g.logits.S, x.count, x.t.width, {x.shift, x.factor});
    return {g.logits.S, nullptr};
}

// ---- phase 2: gradients of P

// grad_p = V grad_out^T, with its dropout
static void probability_gradients(const BackwardCall& call, Gradients& g, const Block& x) {
    const Backward& c = call.c;
    if (!c.grad_out.data) memset(g.grad_p, 0, x.size() * sizeof(float));
    else g.logits.value_products(c.a, x.t, x.first, x.count, x.loaded, g.grad_out_transposed, g.grad_p);
    if (c.dropout.probability > 0) drop(c.a, c.dropout, x.t, x.first, x.count, g.grad_p);
}
// Exponentials become P, times `factor` or as they are without one; delta = sum_j P dP of each row.
static void finish_probabilities(float* P, const float* factor, const float* grad_p, const Block& x) {
    const Size w = x.t.width;
    for (Size i = 0; i < w; i += GROUP) {
        Vector total[PARTS], by[PARTS];
        for (int p = 0; p < PARTS; ++p) total[p] = Vector{}, by[p] = factor ? load(factor + i + p * VL) : splat(1.f);
        for (Size chunk = 0; chunk < x.count; chunk += SHORT_SUM) {
            Vector part[PARTS];
            for (int p = 0; p < PARTS; ++p) part[p] = Vector{};
            for (Size j = chunk; j < least(chunk + SHORT_SUM, x.count); ++j)
                for (int p = 0; p < PARTS; ++p) {
                    const Size at = j * w + i + p * VL;
                    const Vector probability = load(P + at) * by[p];
                    store(P + at, probability);
                    part[p] += probability * load(grad_p + at);
                }
            for (int p = 0; p < PARTS; ++p) total[p] += part[p];
        }
        for (int p = 0; p < PARTS; ++p) store(x.delta + i + p * VL, total[p]);
    }
}
// P after dropout, with which the values are summed; the weights become P.
static const float* finish_weights(const BackwardCall& call, Gradients& g, const Block& x, const Weights& weights) {
    const Backward& c = call.c;
    const bool drops = c.dropout.probability > 0;
    if (drops && weights.factor) scale_rows(weights.data, x.count, x.t.width, weights.factor);
    if (drops) {
        memcpy(g.dropped, weights.data, x.size() * sizeof(float));
        drop(c.a, c.dropout, x.t, x.first, x.count, g.dropped);
    }
    if (weights.factor) finish_probabilities(weights.data, drops ? nullptr : weights.factor, g.grad_p, x);
    return drops ? g.dropped : weights.data;
}

// grad_value += P^T grad_out
static void value_gradients(const BackwardCall& call, Gradients& g, const Block& x, const float* P) {
    const Size stride = call.value_stride;
    float* to = g.grad_value.row(x.first);
    if (!g.logits.pairs)
        return product<false>(x.count, stride, x.t.rows, P, x.t.width, g.grad_out, stride, to, g.grad_value.stride, !g.fresh);
    const Pair *along = g.rounded_tile, *rows = (const Pair*)g.grad_out;
    round_tile(P, x.t, x.count, 1.f, g.rounded_tile, nullptr);
    product<false>(x.count, stride, half(x.t.rows), along, x.t.width / 2, rows, stride, to, g.grad_value.stride, !g.fresh);
}

// ---- phase 3: r Abar

// Abar's rows are summed up for row_normalize.
static void sum_rows(const float* P, const float* grad_p, bool is_gradient, const Block& x, float* sums) {
    for (Size i = 0; i < x.t.width; i += VL) {
        const Vector total = sum_over(x.count, [&](Size j) {
            return contribution(is_gradient, load(P + j * x.t.width + i), load(grad_p + j * x.t.width + i));
        });
        for (Size n = 0; n < VL && i + n < x.t.rows; ++n) sums[i + n] += total[n];
    }
}
// r Abar alone, from exponentials: each row's factor is taken into r, and gradients of P are not stored.
static void carry_alone(const BackwardCall& call, Gradients& g, const Block& x, const Weights& weights) {
    const Backward& c = call.c;
    const Size T = c.relevancy.T, stride = round_up(T, VL), w = x.t.width;
    float* contributions = weights.data;
    if (c.relevancy.is_gradient)
        g.logits.value_products(
            c.a, x.t, x.first, x.count, x.loaded, g.grad_out_transposed, g.grad_p, TakeGradient{contributions, w});
    for (Size i = 0; i < w; ++i)
        for (Size n = 0; n < stride; n += VL)
            store(g.carried_by_factor + i * stride + n, load(g.carried_in + i * stride + n) * splat(weights.factor[i]));
    carry(contributions, x.count, x.t, g.carried_by_factor, T, g.carried_out + x.first * stride);
}

// ---- phase 4: gradients of the logits, of keys and of queries

// In the place of grad_p: P (dP - delta + grad_lse). CARRIES: in the place of P what each pair brings to Abar.
template <bool CARRIES> static void logit_gradients(const Backward& c, const Block& x, float* P, float* grad_p) {
    float *contributions = P, *grad_logits = grad_p;
    float by_lse[LANES] = {};  // added after dP - delta, so that P = 1 keeps exactly this value
    const Size first = (x.t.b * c.a.H + x.t.h) * c.a.N + x.t.first;
    for (Size i = 0; c.grad_lse && i < x.t.rows; ++i) by_lse[i] = c.grad_lse[first + i];
    for (Size j = 0; j < x.count; ++j)
        for (Size i = 0; i < x.t.width; i += VL) {
            const Size at = j * x.t.width + i;
            const Vector p = load(P + at), dp = load(grad_p + at);
            if (CARRIES) store(contributions + at, contribution(c.relevancy.is_gradient, p, dp));
            store(grad_logits + at, p * ((dp - load(x.delta + i)) + load(by_lse + i)));
        }
}
static void unit_input_gradients(const Backward& c, Gradients& g, const Block& x, const float* grad_logits) {
    UnitTile& u = g.logits.units;
    u.backward((float)c.a.scale, x.count, x.t.width, grad_logits);
    for (Size n = 0; n < c.a.D; ++n) {
        g.grad_vector[x.t.h * c.a.D + n] += u.by_weight[n];
        for (Size i = 0; i < x.t.width; ++i) x.grad_query[n * x.t.width + i] += u.by_query[i * u.units.count + n] * u.weight[n];
    }
    memset(u.by_weight, 0, u.units.count * sizeof(float));
}
// For scores that are made of dot products, whose gradients take the place of those of the logits
static void dot_input_gradients(const BackwardCall& call, Gradients& g, const Block& x, float* grad_logits) {
    const Backward& c = call.c;
    Logits& l = g.logits;
    float* grad_products = grad_logits;
    if (c.score.kind == COSINE)
        cosine_gradient(c.score, (float)c.a.scale, grad_products, x.count, x.t, l.query_norm, l.key_norm, g.kept, x.by_query_norm,
                        g.by_key_norm + x.first);
    else if (c.score.bends()) bend(c.score, (float)c.a.scale, grad_products, x.size(), g.kept);
    l.keys.gradients(x.t, x.count, l.product_factor(c.score, c.a.scale), grad_products, g.rounded_tile, l.rows,
                     g.grad_key.row(x.first), g.grad_key.stride, !g.fresh, x.grad_query);
}

// The phases. The buffer of P and that of its gradients are each used for what the next phase makes of them.
static void backward_block(const BackwardCall& call, Gradients& g, const Block& x) {
    const Backward& c = call.c;
    const Relevancy& v = c.relevancy;
    const bool inputs = call.inputs(), carries = v.rows && !call.sums_rows, drops = c.dropout.probability > 0;
    const Weights weights = weights_of(call, g, x);
    if (carries && weights.factor && !inputs && !drops && (c.grad_out.data || !v.is_gradient))
        return carry_alone(call, g, x, weights);
    probability_gradients(call, g, x);
    const float* summed = finish_weights(call, g, x, weights);
    float* P = weights.data;
    if (call.sums_rows)
        return sum_rows(P, g.grad_p, v.is_gradient, x, call.row_sums + (x.t.b * c.a.H + x.t.h) * c.a.N + x.t.first);
    if (inputs) value_gradients(call, g, x, summed);
    if (carries) {
        logit_gradients<true>(c, x, P, g.grad_p);
        carry(P, x.count, x.t, g.carried_in, v.T, g.carried_out + x.first * round_up(v.T, VL));
    } else {
        logit_gradients<false>(c, x, P, g.grad_p);
    }
    if (!inputs) return;
    if (c.score.sums_units()) return unit_input_gradients(c, g, x, g.grad_p);
    dot_input_gradients(call, g, x, g.grad_p);
}

// ---- the tiles of a query head

// Reads the rows of a tile, before its first block
static void start_tile(const BackwardCall& call, Gradients& g, const Tile& t) {
    const Backward& c = call.c;
    g.logits.load_queries(c.a, c.score, t);
    if (c.grad_out.data) {
        g.logits.load_rows(c.grad_out, c.a.dtype, t, c.a.Dv, 1.f, g.grad_out, g.grad_out_transposed);
    } else {
        memset(g.grad_out_transposed, 0, c.a.Dv * t.width * sizeof(float));
        memset(g.grad_out, 0, t.width * call.value_stride * sizeof(float));
    }
    if (c.grad_query.data) fetch_rows(c.grad_query, c.a.dtype, t, t.first, c.a.D);
    if (c.relevancy.rows && !call.sums_rows) load_carried(c.relevancy, c.a, t, call.row_sums, g.carried_in);
}

// After a tile's last block: the gradient of its queries, from that of tile number `index` of those at work
static void finish_tile(const BackwardCall& call, Gradients& g, const Tile& t, Size index) {
    const Backward& c = call.c;
    const Size D = c.a.D;
    float* grad_query = g.grad_query + index * LANES * D;
    const float* by_norm = g.by_query_norm + index * LANES;
    for (Size i = 0; c.score.kind == COSINE && i < t.rows; ++i) {
        const float length = g.logits.query_norm[i];
        for (Size d = 0; by_norm[i] != 0 && d < D; ++d)
            grad_query[d * t.width + i] -= g.logits.rows[i * g.logits.stride + d] / length * by_norm[i] / length;
    }
    store_tile(grad_query, t, D, g.logits.row_factor(c.score, c.a.scale), c.grad_query, c.a.dtype, g.scratch);
}

// After the tiles of one query head: the units' gradient of a block of keys
static void add_unit_keys(const BackwardCall& call, Gradients& g, Size j0, Size count) {
    UnitTile& u = g.logits.units;
    for (Size n = 0; n < call.c.a.D; ++n)
        for (Size j = 0; j < count; ++j) g.grad_key.row(j0 + j)[n] += u.by_key[n * u.ld + j] * u.weight[n];
    memset(u.by_key, 0, u.units.count * u.ld * sizeof(float));
}

// Where the keys come in blocks: statistics and delta of a tile's rows, before the first block. delta is out grad_out^T.
static void prepare_tile(const BackwardCall& call, Gradients& g, const Tile& t, Size visible, Size index) {
    const Backward& c = call.c;
    const Attention& a = c.a;
    const Size at = index * LANES;
    float *delta = g.delta + at, *out = g.scratch;
    find_statistics(c, g, t, visible, {g.shift + at, g.factor + at});
    for (Size i = 0; i < t.width; ++i) delta[i] = 0;
    if (!call.inputs()) return;
    load_tile(c.out, a.dtype, t, a.Dv, 1.f, out, a.Dv, nullptr);
    load_tile(c.grad_out, a.dtype, t, a.Dv, 1.f, g.grad_out, call.value_stride, nullptr);
    for (Size i = 0; i < t.rows; ++i) {
        double total = 0;  // the rounding of `out` is error enough
        for (Size d = 0; d < a.Dv; ++d) total += (double)out[i * a.Dv + d] * g.grad_out[i * call.value_stride + d];
        delta[i] = (float)total;
    }
}

// The tiles [first, last) of one query head. The first of them fills grad_key and grad_value where they are fresh.
static void backward_head(const BackwardCall& call, Gradients& g, Size b, Size h, Size first, Size last) {
    const Backward& c = call.c;
    const Attention& a = c.a;
    const Size visible = visible_keys(a, b), most_keys = a.key_block();
    const bool at_once = call.at_once(), inputs = call.inputs(), fresh = g.fresh;
    const auto clear_queries = [&](Size tiles) {
        memset(g.grad_query, 0, tiles * LANES * a.D * sizeof(float));
        memset(g.by_query_norm, 0, tiles * LANES * sizeof(float));
    };
    if (inputs && !at_once) clear_queries(last - first);
    for (Size n = first; !at_once && n < last; ++n) prepare_tile(call, g, tile_at(a, b, h, n), visible, n - first);
    for (Size j0 = 0; j0 < most(visible, 1); j0 += most_keys) {  // a sample without a key, too, has gradients to write
        const Size loaded = least(most_keys, visible - j0);
        for (Size n = first; n < last; ++n) {
            const Tile t = tile_at(a, b, h, n);
            const Size at = at_once ? 0 : (n - first) * LANES, count = least(most_keys, t.keys(a, visible) - j0);
            g.fresh = fresh && n == first;
            if (inputs && at_once) clear_queries(1);
            if (count > 0) {
                if (j0 == 0 || last - first > 1) start_tile(call, g, t);
                backward_block(call, g,
                               {t, j0, count, loaded, g.shift + at, g.factor + at, g.delta + at,
                                inputs ? g.grad_query + at * a.D : nullptr, g.by_query_norm + at});
            }
            if (inputs && at_once) finish_tile(call, g, t, 0);
        }
        if (inputs && c.score.sums_units() && visible > 0) add_unit_keys(call, g, j0, loaded);
    }
    g.fresh = false;
    for (Size n = first; inputs && !at_once && n < last; ++n) {
        const Tile t = tile_at(a, b, h, n);
        if (c.score.kind == COSINE) g.logits.load_queries(a, c.score, t);
        finish_tile(call, g, t, n - first);
    }
}

}  // namespace
}  // namespace ISA
