// The backward pass of attention over the tiles of one query head, and r Abar, which is made of the same P and dP.
//
// Query row i, key j. In brackets: the names below; maps of a tile lie as (keys, width), and several share a buffer in turn.
//     S  = scale act(q_i . k_j) + mask, or a sum over hidden units (scores.h)                   [logits.S]
//     P  = e^(S - shift_i) factor_i, with the two statistics of a row over all its keys         [weights, P]
//     dP = Z (v_j . grad_out_i), with Z = 1, or by dropout 0 or 1 / (1 - p)                     [grad_p]
//     dS = P (dP - delta_i + grad_lse_i), with delta_i = sum_j P dP = out_i . grad_out_i        [grad_logits]
//     (gradient of row_bias)_ig = sum of dS_ij over the keys j of group g                       [by_bias]
//     dX = the gradient of X = q_i . k_j: for the plain product dS, with the scale in the rows  [grad_products]
//     grad_value_j += sum_i Z P grad_out_i;   grad_key_j += sum_i dX q_i;   grad_query_i += sum_j dX k_j
//     (r Abar)_j += sum_i r_i max(P dP, 0), or sum_i r_i P, over all heads, with r_i over H or over the sum of Abar's row i
//
// Where the keys are one block, each tile finds its own statistics: exact for any logits. Else blocks of keys are the outer loop,
// so that gradients of a block of keys stay in cache, and the statistics come from the log-sum-exp of the forward pass, as in
// FlashAttention.
#pragma once
#include "forward.h"
#include "shared_sums.h"

namespace ISA {
namespace {

// The inputs of r Abar, with Abar = mean over heads of max(P dP, 0), or of P. Such a call has no dropout.
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
    StridedTensor grad_out, out;  // null for Abar = mean P alone
    const double* lse;  // (B, H, N) natural log-sum-exp
    Size lse_source;  // LseSource
    const float* grad_lse;  // (B, H, N) or null
    StridedTensor grad_query, grad_key, grad_value;  // null where they are not needed: then all three are
    float* grad_vector;  // (H, D) or null
    float* grad_row_bias;  // as row_bias, or null
    Relevancy relevancy;
    FIELDS(a, score, dropout, grad_out, out, lse, lse_source, grad_lse, grad_query, grad_key, grad_value, grad_vector,
           grad_row_bias, relevancy)
};

struct BackwardCall {
    const Backward& c;
    // The items are tiles of query rows, key head by key head; the sums are the gradients of a key head's keys and values, and
    // r Abar of a sample.
    SharedSums keys, values, carried;
    Size key_stride, value_stride;  // D and Dv rounded up to VL
    float* vector_parts = nullptr;  // gradients of the units' vector, by part of the query heads of a key head
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

// What a tile's rows take from block to block, (LANES) each: P = e^(S - shift) factor, delta, and the gradients of the queries,
// (D, width), and of their norms, and of their biases. Where keys come in blocks, all tiles of a head lie one after the other.
struct RowState {
    float *shift, *factor, *delta, *grad_query, *by_query_norm;  // grad_query is null where no gradients are needed
    float* by_bias;  // a table (attention.h), or null
    void plan(const Backward& c, Size tiles, bool inputs, Memory& memory) {
        const Size lanes = tiles * LANES;
        shift = memory.take(lanes), factor = memory.take(lanes), delta = memory.take(lanes);
        grad_query = inputs ? memory.take(lanes * c.a.D) : nullptr, by_query_norm = memory.take(lanes);
        by_bias = inputs && c.grad_row_bias ? memory.take(tiles * table_size(c.a)) : nullptr;
    }
    RowState of_tile(Size index, const Attention& a) const {
        const Size at = index * LANES;
        float *query = grad_query ? grad_query + at * a.D : nullptr, *bias = by_bias ? by_bias + index * table_size(a) : nullptr;
        return {shift + at, factor + at, delta + at, query, by_query_norm + at, bias};
    }
    void clear_gradients(const Attention& a) const {
        memset(grad_query, 0, LANES * a.D * sizeof(float)), memset(by_query_norm, 0, LANES * sizeof(float));
        if (by_bias) memset(by_bias, 0, table_size(a) * sizeof(float));
    }
};

// What tiles of rows add to, of the key head and of the sample that are at work
struct UnitSums {
    Sums grad_key, grad_value;
    bool fresh = false;  // whether these two hold nothing yet
    float* carried_out;  // r Abar, (M, T rounded up)
};

struct Gradients : UnitSums {
    Logits logits;
    RowState rows;  // of one tile, or of all tiles of a head
    // of a tile and a block of keys
    float *grad_out, *grad_out_transposed;  // (LANES, value_stride), (Dv, width); or pairs, as Logits::rows
    float *grad_p, *dropped, *saved;  // gradients of P; P after dropout; what scores.h saves for the way back
    Pair* rounded_tile;  // (count, width / 2): P or gradients of the logits
    float *by_key_norm, *grad_vector;  // (M), of the key head that is at work; (H, D)
    // of r Abar
    float *carried_in, *carried_by_factor;  // (LANES, T rounded up): r of a tile's rows by load_carried, and times `factor`
    // of one tile with few rows, or null: (M, GROUP) e^(logit - shift), and the shift of each block (blocks, GROUP)
    float *exponentials, *block_shifts;
    float* scratch;

    void plan(const BackwardCall& call, Memory& memory) {
        const Backward& c = call.c;
        const Attention& a = c.a;
        const bool inputs = call.inputs();
        const Size block = a.key_block(), carried = c.relevancy.rows ? LANES * round_up(c.relevancy.T, VL) : 0;
        logits.pairs = Logits::takes_pairs(a, c.score);
        logits.plan(a, c.score, memory, inputs);
        rows.plan(c, call.at_once() ? 1 : tiles_of(a), inputs, memory);
        grad_out = memory.take(LANES * call.value_stride), grad_out_transposed = memory.take(LANES * a.Dv);
        grad_p = memory.take(block * LANES);
        dropped = c.dropout.probability > 0 ? memory.take(block * LANES) : nullptr;
        saved = c.score.bends() && !c.score.sums_units() ? memory.take(block * LANES) : nullptr;
        rounded_tile = logits.pairs && inputs ? (Pair*)memory.take(block * LANES / 2) : nullptr;
        by_key_norm = memory.take(a.M), grad_vector = memory.take(a.H * a.D);
        carried_in = memory.take(carried), carried_by_factor = memory.take(carried);
        exponentials = call.keeps_exponentials() ? memory.take(a.M * GROUP) : nullptr;
        block_shifts = call.keeps_exponentials() ? memory.take((a.M + block - 1) / block * GROUP) : nullptr;
        scratch = memory.take(LANES * most(a.D, a.Dv) + 6 * LANES);
    }
};

// A tile of query rows and the keys [first, first + count). `loaded` keys are read: later tiles of the block see more of them.
struct Block {
    const Tile& t;
    Size first, count, loaded;
    bool fresh;  // whether the sums of its keys and values hold nothing yet
    RowState rows;  // of the tile
    Size size() const { return count * t.width; }
};

// ---- statistics of rows whose keys come in blocks

// From the logits of all keys, block by block
static void statistics_by_blocks(const Attention& a, const Score& score, Gradients& g, const Tile& t, Size visible,
                                 const Statistics& s) {
    Logits& logits = g.logits;
    float *largest = g.scratch, *rescale = g.scratch + LANES, *S = logits.S;
    double* total = (double*)(g.scratch + 2 * LANES);
    const Size w = t.width;
    logits.load_queries(a, score, t);
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

// From the log-sum-exp of the forward pass, or of the caller: as statistics_of_lse
static bool statistics_of_lse(const Backward& c, const Tile& t, const Statistics& s, bool* lost) {
    return statistics_of_lse(c.a, c.lse, c.lse_source == CALLER_LSE ? LARGEST_CALLER_LSE : LARGEST_OWN_LSE, t, s, lost);
}
static void find_statistics(const Backward& c, Gradients& g, const Tile& t, Size visible, const Statistics& s) {
    if (c.lse_source == NO_LSE) return statistics_by_blocks(c.a, c.score, g, t, visible, s);
    bool lost[LANES];
    if (!statistics_of_lse(c, t, s, lost)) return;
    const Statistics again = {g.scratch + 4 * LANES, g.scratch + 5 * LANES};
    statistics_by_blocks(c.a, c.score, g, t, visible, again);
    for (Size i = 0; i < t.width; ++i)
        if (lost[i]) s.shift[i] = again.shift[i], s.factor[i] = again.factor[i];
}

// ---- weights: those of a tile are P, or exponentials that `factor` makes P of

struct Weights {
    float* data;  // (count, width)
    const float* factor;  // (LANES) by which each row is still to be multiplied; null for P itself
};

// The exponentials that statistics_by_blocks has left behind, each beside the shift of its block
static Weights stored_weights(const BackwardCall& call, Gradients& g, const Block& x) {
    const Size w = x.t.width;
    const float* shift = g.block_shifts + x.first / call.c.a.key_block() * w;
    for (Size i = 0; i < w; ++i)
        g.scratch[i] = x.rows.factor[i] * (shift[i] == -INFINITY ? 0.f : expf(shift[i] - x.rows.shift[i]));
    return {g.exponentials + x.first * w, g.scratch};
}
// From the logits of all keys: the statistics are found on the way.
static Weights whole_weights(Gradients& g, const Block& x) {
    float *largest = g.scratch, *rescale = g.scratch + LANES;
    double* total = (double*)(g.scratch + 2 * LANES);
    online_softmax(g.logits.S, x.count, x.t.width, true, g.logits.top, largest, total, rescale);
    finish_rows(largest, total, x.t.width, {x.rows.shift, x.rows.factor});
    return {g.logits.S, x.rows.factor};
}
static Weights weights_of(const BackwardCall& call, Gradients& g, const Block& x) {
    if (g.exponentials) return stored_weights(call, g, x);
    g.logits.compute(call.c.a, call.c.score, x.t, x.first, x.count, x.loaded, g.saved);
    if (call.at_once()) return whole_weights(g, x);
    probabilities(g.logits.S, x.count, x.t.width, {x.rows.shift, x.rows.factor});
    return {g.logits.S, nullptr};
}

// ---- r Abar

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
// `carry` for so few rows of r that a product would use few lanes of its vectors: here the lanes are rows of the tile.
static void carry_few(const float* X, const Block& x, const float* r, Size T, float* result) {
    const Tile& t = x.t;
    const Size stride = round_up(T, VL), whole = t.rows / VL * VL;
    for (Size n = 0; n < T; ++n) {
        float lane[LANES] = {};
        for (Size i = 0; i < t.rows; ++i) lane[i] = r[i * stride + n];
        for (Size j = 0; j < x.count; ++j) {
            const float* row = X + j * t.width;
            Vector total = Vector{};
            for (Size i = 0; i < whole; i += VL) total += load(lane + i) * load(row + i);
            if (whole < t.rows) total += load(lane + whole) * first_lanes(load(row + whole), t.rows - whole);
            result[j * stride + n] += sum(total);
        }
    }
}
// r Abar += X^T r over the tile's rows: X (count, width), r (width, T rounded up). Lanes beyond the rows may hold NaN.
static void carry(const UnitSums& g, const float* X, const Block& x, const float* r, Size T) {
    const Size stride = round_up(T, VL);
    float* result = g.carried_out + x.first * stride;
    if (T <= 2) return carry_few(X, x, r, T, result);
    product<false>(x.count, stride, x.t.rows, X, x.t.width, r, stride, result, stride, true);
}
// Abar's rows are summed up for row_normalize.
static void sum_rows(const float* contributions, const Block& x, float* sums) {
    for (Size i = 0; i < x.t.width; i += VL) {
        const Vector total = sum_over(x.count, [&](Size j) { return load(contributions + j * x.t.width + i); });
        for (Size n = 0; n < VL && i + n < x.t.rows; ++n) sums[i + n] += total[n];
    }
}
// r of the tile, each row times its factor: so the exponentials themselves need not be multiplied.
static const float* carried_times(Gradients& g, const Block& x, const float* factor, Size T) {
    const Size stride = round_up(T, VL);
    for (Size i = 0; i < x.t.width; ++i)
        for (Size n = 0; n < stride; n += VL)
            store(g.carried_by_factor + i * stride + n, load(g.carried_in + i * stride + n) * splat(factor[i]));
    return g.carried_by_factor;
}
// P, or exponentials, become what each pair brings to Abar. Gradients of P are not stored.
static void take_gradients(const BackwardCall& call, Gradients& g, const Block& x, float* P) {
    if (!call.c.relevancy.is_gradient) return;
    const TakeGradient finish = {P, x.t.width};
    g.logits.value_products(call.c.a, x.t, x.first, x.count, x.loaded, g.grad_out_transposed, g.grad_p, finish);
}

// ---- gradients of P and of values

// grad_p = V grad_out^T, with its dropout
static void probability_gradients(const BackwardCall& call, Gradients& g, const Block& x) {
    const Backward& c = call.c;
    g.logits.value_products(c.a, x.t, x.first, x.count, x.loaded, g.grad_out_transposed, g.grad_p);
    if (c.dropout.probability > 0) drop(c.a, c.dropout, x.t, x.first, x.count, g.grad_p);
}
// Exponentials become P; delta = sum_j P dP of each row, in short sums.
static void finish_probabilities(float* P, const float* factor, const float* grad_p, const Block& x) {
    const Size w = x.t.width;
    for (Size i = 0; i < w; i += GROUP) {
        Vector total[PARTS], by[PARTS];
        for (int p = 0; p < PARTS; ++p) total[p] = Vector{}, by[p] = load(factor + i + p * VL);
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
        for (int p = 0; p < PARTS; ++p) store(x.rows.delta + i + p * VL, total[p]);
    }
}
// Z P, with which the values are summed
static const float* dropped_weights(const Backward& c, Gradients& g, const Block& x, const float* P) {
    if (c.dropout.probability == 0) return P;
    memcpy(g.dropped, P, x.size() * sizeof(float));
    drop(c.a, c.dropout, x.t, x.first, x.count, g.dropped);
    return g.dropped;
}
// grad_value += (Z P)^T grad_out
static void value_gradients(const BackwardCall& call, Gradients& g, const Block& x, const float* dropped) {
    const Size stride = call.value_stride;
    float* to = g.grad_value.row(x.first);
    if (!g.logits.pairs)
        return product<false>(
            x.count, stride, x.t.rows, dropped, x.t.width, g.grad_out, stride, to, g.grad_value.stride, !x.fresh);
    const Pair *along = g.rounded_tile, *rows = (const Pair*)g.grad_out;
    round_tile(dropped, x.t.rows, x.t.width, x.count, 1.f, g.rounded_tile, nullptr);
    product<false>(x.count, stride, half(x.t.rows), along, x.t.width / 2, rows, stride, to, g.grad_value.stride, !x.fresh);
}

// ---- gradients of logits

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
            store(grad_logits + at, p * ((dp - load(x.rows.delta + i)) + load(by_lse + i)));
        }
}

// ---- gradients of queries and keys, by the kind of score

// Scores that sum hidden units: the gradients of q and k times the unit's weight, and that of the weight
static void unit_gradients(const Backward& c, Gradients& g, const Block& x, const float* grad_logits) {
    UnitTile& u = g.logits.units;
    u.backward((float)c.a.scale, x.count, x.t.width, grad_logits);
    for (Size n = 0; n < c.a.D; ++n) {
        g.grad_vector[x.t.h * c.a.D + n] += u.by_weight[n];
        for (Size i = 0; i < x.t.width; ++i)
            x.rows.grad_query[n * x.t.width + i] += u.by_query[i * u.units.count + n] * u.weight[n];
    }
    memset(u.by_weight, 0, u.units.count * sizeof(float));
}
// Their gradient of a block of keys, after the tiles of one query head: the next head has other weights.
static void add_unit_keys(const BackwardCall& call, Gradients& g, Size b, Size h, Size j0, Size count) {
    UnitTile& u = g.logits.units;
    if (!g.logits.holds_block(b, h, j0)) return;  // no tile has seen it
    for (Size n = 0; n < call.c.a.D; ++n)
        for (Size j = 0; j < count; ++j) g.grad_key.row(j0 + j)[n] += u.by_key[n * u.ld + j] * u.weight[n];
    memset(u.by_key, 0, u.units.count * u.ld * sizeof(float));
}

// Scores that are made of q . k: dX, in the place of the gradients of the logits
static void product_gradients(const Backward& c, Gradients& g, const Block& x, float* grad_logits) {
    const float scale = (float)c.a.scale;
    if (c.score.kind == COSINE)
        cosine_gradient(c.score, scale, grad_logits, x.count, x.t, g.logits.query_norm, g.logits.key_norm, g.saved,
                        x.rows.by_query_norm, g.by_key_norm + x.first);
    else if (c.score.bends()) bend(c.score, scale, grad_logits, x.size(), g.saved);
}
static void input_gradients(const Backward& c, Gradients& g, const Block& x, float* grad_logits) {
    if (c.score.sums_units()) return unit_gradients(c, g, x, grad_logits);
    Logits& l = g.logits;
    float* grad_products = grad_logits;
    product_gradients(c, g, x, grad_logits);
    l.keys.gradients(x.t, x.count, l.product_factor(c.score, c.a.scale), grad_products, g.rounded_tile, l.rows,
                     g.grad_key.row(x.first), g.grad_key.stride, !x.fresh, x.rows.grad_query);
}

// A cosine's gradient of x (D) goes by way of its norm, too: `by` sums gradients of logits times cosines.
static void subtract_norm_gradient(const float* x, Size D, float norm, float by, float* gradient, Size stride) {
    for (Size d = 0; by != 0 && d < D; ++d) gradient[d * stride] -= x[d] / norm * by / norm;
}
static void finish_cosine_queries(const BackwardCall& call, Gradients& g, const Tile& t, const RowState& rows) {
    const Logits& l = g.logits;
    for (Size i = 0; i < t.rows; ++i)
        subtract_norm_gradient(
            l.rows + i * l.stride, call.c.a.D, l.query_norm[i], rows.by_query_norm[i], rows.grad_query + i, t.width);
}
// After the last tile of a key head
static void finish_cosine_keys(const BackwardCall& call, Gradients& g, Size b, Size head) {
    const Attention& a = call.c.a;
    by_blocks(a, visible_keys(a, b), [&](Size j0, Size count) {
        Keys& keys = g.logits.keys.numbers;
        load_keys(a, a.key, a.D, keys, b, head, j0, count);
        for (Size j = 0; j < count; ++j) {
            const float* k = keys.rows + j * keys.stride;
            subtract_norm_gradient(k, a.D, norm(k, a.D), g.by_key_norm[j0 + j], g.grad_key.row(j0 + j), 1);
        }
    });
}

// ---- a tile and a block of keys, in each of the three passes

// The pass before r Abar: the sums of Abar's rows
static void row_sums_of_block(const BackwardCall& call, Gradients& g, const Block& x) {
    const Weights weights = weights_of(call, g, x);
    if (weights.factor) scale_rows(weights.data, x.count, x.t.width, weights.factor);
    take_gradients(call, g, x, weights.data);
    sum_rows(weights.data, x, call.row_sums + (x.t.b * call.c.a.H + x.t.h) * call.c.a.N + x.t.first);
}
// r Abar alone
static void carry_block(const BackwardCall& call, Gradients& g, const Block& x) {
    const Size T = call.c.relevancy.T;
    const Weights weights = weights_of(call, g, x);
    take_gradients(call, g, x, weights.data);
    carry(g, weights.data, x, weights.factor ? carried_times(g, x, weights.factor, T) : g.carried_in, T);
}
// The gradients of the inputs, with r Abar or without
template <bool CARRIES> static void gradients_of_block(const BackwardCall& call, Gradients& g, const Block& x) {
    const Backward& c = call.c;
    const Weights weights = weights_of(call, g, x);
    float *P = weights.data, *grad_logits = g.grad_p, *contributions = weights.data;
    probability_gradients(call, g, x);
    if (weights.factor) finish_probabilities(P, weights.factor, g.grad_p, x);
    value_gradients(call, g, x, dropped_weights(c, g, x, P));
    logit_gradients<CARRIES>(c, x, P, g.grad_p);
    if (x.rows.by_bias) sum_by_group(grad_logits, g.logits.bias.rows, x.count, x.t.width, x.rows.by_bias);
    if (CARRIES) carry(g, contributions, x, g.carried_in, c.relevancy.T);
    input_gradients(c, g, x, grad_logits);
}
// The keys of a block that no row of the tile sees; sums of theirs that hold nothing yet become 0.
static void skip_block(const BackwardCall& call, Gradients& g, const Block& x) {
    for (Size j = x.first; x.fresh && call.inputs() && j < x.first + x.count; ++j) {
        for (Size d = 0; d < call.key_stride; d += VL) store(g.grad_key.row(j) + d, Vector{});
        for (Size d = 0; d < call.value_stride; d += VL) store(g.grad_value.row(j) + d, Vector{});
    }
}
static void backward_block(const BackwardCall& call, Gradients& g, const Block& x) {
    if (g.logits.bias.hides_all(call.c.a, x.t, x.first, x.count)) return skip_block(call, g, x);
    if (call.sums_rows) return row_sums_of_block(call, g, x);
    if (!call.inputs()) return carry_block(call, g, x);
    if (call.c.relevancy.rows) return gradients_of_block<true>(call, g, x);
    gradients_of_block<false>(call, g, x);
}

// ---- the tiles of a query head

// Reads the rows of a tile, before its first block
static void start_tile(const BackwardCall& call, Gradients& g, const Tile& t) {
    const Backward& c = call.c;
    g.logits.load_queries(c.a, c.score, t);
    if (c.grad_out.data) g.logits.load_rows(c.grad_out, c.a.dtype, t, c.a.Dv, 1.f, g.grad_out, g.grad_out_transposed);
    if (c.grad_query.data) fetch_rows(c.grad_query, c.a.dtype, t, t.first, c.a.D);
    if (c.relevancy.rows && !call.sums_rows) load_carried(c.relevancy, c.a, t, call.row_sums, g.carried_in);
}

// Where the keys come in blocks: statistics and delta of a tile's rows, before the first block. delta is out grad_out^T.
static void prepare_tile(const BackwardCall& call, Gradients& g, const Tile& t, Size visible, const RowState& rows) {
    const Backward& c = call.c;
    const Attention& a = c.a;
    float* out = g.scratch;
    find_statistics(c, g, t, visible, {rows.shift, rows.factor});
    if (!call.inputs()) return;
    rows.clear_gradients(a);
    load_tile(c.out, a.dtype, t, a.Dv, 1.f, out, a.Dv, nullptr);
    load_tile(c.grad_out, a.dtype, t, a.Dv, 1.f, g.grad_out, call.value_stride, nullptr);
    for (Size i = 0; i < t.width; ++i) {
        double total = 0;  // the rounding of `out` is error enough
        for (Size d = 0; i < t.rows && d < a.Dv; ++d) total += (double)out[i * a.Dv + d] * g.grad_out[i * call.value_stride + d];
        rows.delta[i] = (float)total;
    }
}

// After a tile's last block: writes the gradient of its queries
static void finish_tile(const BackwardCall& call, Gradients& g, const Tile& t, const RowState& rows) {
    const Backward& c = call.c;
    if (c.score.kind == COSINE) finish_cosine_queries(call, g, t, rows);
    store_tile(rows.grad_query, t, c.a.D, g.logits.row_factor(c.score, c.a.scale), c.grad_query, c.a.dtype, g.scratch);
    if (rows.by_bias) store_table(c.a, t, rows.by_bias, c.grad_row_bias);
}

// The tiles [first, last) of one query head, tile by tile: each has all its keys at once.
static void backward_at_once(const BackwardCall& call, Gradients& g, Size b, Size h, Size first, Size last) {
    const Attention& a = call.c.a;
    const Size visible = visible_keys(a, b);
    for (Size n = first; n < last; ++n) {
        const Tile t = tile_at(a, b, h, n);
        const Block x = {t, 0, t.keys(a, visible), visible, g.fresh && n == first, g.rows};
        if (call.inputs()) x.rows.clear_gradients(a);
        if (x.count > 0) start_tile(call, g, t), backward_block(call, g, x);
        if (call.inputs()) finish_tile(call, g, t, x.rows);  // also in a sample without a key
    }
    if (call.inputs() && call.c.score.sums_units() && visible > 0) add_unit_keys(call, g, b, h, 0, visible);
}

// The same block of keys by block: what a tile's rows need again lies in the tile's RowState.
static void backward_by_blocks(const BackwardCall& call, Gradients& g, Size b, Size h, Size first, Size last) {
    const Attention& a = call.c.a;
    const Score& score = call.c.score;
    const Size visible = visible_keys(a, b);
    const auto rows = [&](Size n) { return g.rows.of_tile(n - first, a); };
    for (Size n = first; n < last; ++n) prepare_tile(call, g, tile_at(a, b, h, n), visible, rows(n));
    by_blocks(a, visible, [&](Size j0, Size loaded) {
        for (Size n = first; n < last; ++n) {
            const Tile t = tile_at(a, b, h, n);
            const Block x = {t, j0, least(loaded, t.keys(a, visible) - j0), loaded, g.fresh && n == first, rows(n)};
            if (x.count <= 0) continue;  // under the causal mask
            if (j0 == 0 || last - first > 1) start_tile(call, g, t);
            backward_block(call, g, x);
        }
        if (call.inputs() && score.sums_units()) add_unit_keys(call, g, b, h, j0, loaded);
    });
    for (Size n = first; call.inputs() && n < last; ++n) {
        const Tile t = tile_at(a, b, h, n);
        if (score.kind == COSINE) g.logits.load_queries(a, score, t);
        finish_tile(call, g, t, rows(n));
    }
}

// The first of the tiles fills grad_key and grad_value where they are fresh.
static void backward_head(const BackwardCall& call, Gradients& g, Size b, Size h, Size first, Size last) {
    if (call.at_once()) backward_at_once(call, g, b, h, first, last);
    else backward_by_blocks(call, g, b, h, first, last);
    g.fresh = false;
}

}  // namespace
}  // namespace ISA
