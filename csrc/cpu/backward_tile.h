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

// What r Abar needs: Abar = mean over heads of max(P dP, 0), or of P.
struct Relevancy {
    const float* rows;  // (B, T, N) r, or null
    Size T, is_gradient, row_normalize;
    const float* direct;  // (B, T, M): what is added to r Abar, or null
    float* result;  // (B, T, M)
};

// Where a row's log-sum-exp comes from. The caller's may count keys that are not in this call: P is what it says.
enum LseSource : Size { OWN_LSE = 0, CALLER_LSE = 1, NO_LSE = 2 };

struct Backward {
    Attention a;
    Score score;
    Dropout dropout;
    Rows grad_out, out;  // grad_out may be null for Abar = mean P
    const double* lse;  // (B, H, N) natural log-sum-exp
    Size lse_source;  // LseSource
    const float* grad_lse;  // (B, H, N) or null
    Rows grad_query, grad_key, grad_value;  // null where they are not needed: then all three are
    float* grad_vector;  // (H, D) or null
    Relevancy relevancy;
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
    bool failed = false;
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
    float *out_rows, *out_transposed;  // cotangents of a tile: (LANES, value_stride), (Dv, width)
    float *S, *dP, *kept, *dropped;  // tiles: P; dP, then dS; what scores.h keeps; P after dropout
    float* query;  // gradient: (tiles, D, LANES) or one tile
    Sums key, value;  // gradients of the key head that is at work
    float* result;  // r Abar of the sample that is at work, (M, T rounded up)
    bool fresh = false;  // whether `key` and `value` hold nothing yet
    float *exponentials, *shifts;  // of one tile, or null: (M, GROUP) e^(logit - shift), the shift of each block (blocks, GROUP)
    float *shift, *factor, *delta, *cosine_query, *cosine_key, *rows, *scaled_rows, *scratch, *vector;

    void plan(const BackwardCall& call, Memory& memory) {
        const Backward& c = call.c;
        const Attention& a = c.a;
        const bool inputs = call.inputs();
        const Size block = a.key_block(), tiles = call.at_once() ? 1 : tiles_of(a);
        logits.plan(a, c.score, memory, inputs);
        S = logits.S, exponentials = shifts = nullptr;
        if (call.keeps_exponentials())
            exponentials = memory.take(a.M * GROUP), shifts = memory.take((a.M + block - 1) / block * GROUP);
        out_rows = memory.take(LANES * call.value_stride), out_transposed = memory.take(LANES * a.Dv);
        dP = memory.take(block * LANES);
        kept = c.score.bends() && !c.score.sums_units() ? memory.take(block * LANES) : nullptr;
        dropped = c.dropout.probability > 0 ? memory.take(block * LANES) : nullptr;
        query = inputs ? memory.take(tiles * LANES * a.D) : nullptr;
        shift = memory.take(tiles * LANES), factor = memory.take(tiles * LANES), delta = memory.take(tiles * LANES);
        cosine_query = memory.take(tiles * LANES), cosine_key = memory.take(a.M);
        const Size carried = c.relevancy.rows ? LANES * round_up(c.relevancy.T, VL) : 0;
        rows = memory.take(carried), scaled_rows = memory.take(carried);
        scratch = memory.take(LANES * most(a.D, a.Dv) + 6 * LANES), vector = memory.take(a.H * a.D);
    }
};

// ---- statistics of rows

// The largest logit and the sum over all keys of a tile, block by block. `exponentials` and `shifts` as in Gradients.
static void statistics_by_blocks(const Attention& a, const Score& score, Logits& logits, const Tile& t, Size visible,
                                 float* shift, float* factor, float* scratch, float* exponentials, float* shifts) {
    float *largest = scratch, *rescale = scratch + LANES;
    double* total = (double*)(scratch + 2 * LANES);
    const Size keys = t.keys(a, visible), w = t.width;
    float* S = logits.S;
    for (Size i = 0; i < w; ++i) largest[i] = -INFINITY, total[i] = 0;
    for (Size j0 = 0; j0 < keys; j0 += a.key_block()) {
        const Size count = least(a.key_block(), keys - j0);
        if (exponentials) logits.S = exponentials + j0 * w;
        logits.compute(a, score, t, j0, count, least(a.key_block(), visible - j0), nullptr);
        online_softmax(logits.S, count, w, j0 == 0, logits.top, largest, total, rescale);
        if (shifts) memcpy(shifts + j0 / a.key_block() * w, largest, w * sizeof(float));
    }
    logits.S = S;
    finish_rows(largest, total, w, {shift, factor});
}
// Ours is a float64. Up to 2^24 it gives P = e^(logit - lse) to 2^-29. Beyond it the statistics are computed again.
static const double LARGEST_OWN_LSE = 16777216.;

// Statistics of a tile where its keys come in blocks; `scratch` holds 6 * LANES
static void find_statistics(const Backward& c, Logits& logits, const Tile& t, Size visible, float* shift, float* factor,
                            float* scratch, float* exponentials, float* shifts) {
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
        shift[i] = masked ? INFINITY : (float)x;  // e^(logit - Inf) is 0 whatever the logit is
        factor[i] = masked ? 0.f : (float)exp(shift[i] - x);
    }
    if (!any) return;
    float *own_shift = scratch + 4 * LANES, *own_factor = scratch + 5 * LANES;
    logits.load_queries(c.a, c.score, t);
    statistics_by_blocks(c.a, c.score, logits, t, visible, own_shift, own_factor, scratch, exponentials, shifts);
    for (Size i = 0; i < t.width; ++i)
        if (lost[i]) shift[i] = own_shift[i], factor[i] = own_factor[i];
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
        if (total < 1.17549435e-38f) total = 1;  // r over a subnormal number overflows
        for (Size n = 0; n < v.T; ++n) rows[i * stride + n] = v.rows[(t.b * v.T + n) * a.N + t.first + i] / total;
    }
}

// ---- the tile

// P and dP become max(P dP, 0), or P
INLINE Vector contribution(bool is_gradient, Vector p, Vector dp) { return is_gradient ? maximum(Vector{}, p * dp) : p; }

static void sum_rows(const float* P, const float* dP, bool is_gradient, Size count, const Tile& t, float* sums) {
    for (Size i = 0; i < t.width; i += VL) {
        Vector total = Vector{};
        for (Size chunk = 0; chunk < count; chunk += SHORT_SUM) {
            Vector part = Vector{};
            for (Size j = chunk; j < least(chunk + SHORT_SUM, count); ++j)
                part += contribution(is_gradient, load(P + j * t.width + i), load(dP + j * t.width + i));
            total += part;
        }
        for (Size n = 0; n < VL && i + n < t.rows; ++n) sums[i + n] += total[n];
    }
}

// Everything that a tile and a block of keys give
static void backward_tile(const BackwardCall& call, Gradients& g, const Tile& t, Size j0, Size count, Size loaded, Size index) {
    const Backward& c = call.c;
    const Attention& a = c.a;
    const Size w = t.width, n = count * w;
    const bool inputs = call.inputs(), is_gradient = c.relevancy.is_gradient;
    const bool unscaled = call.at_once() || g.exponentials;  // P is still to be multiplied by `factor`
    float *P = g.S, *dP = g.dP, *shift = g.shift + index * LANES, *factor = g.factor + index * LANES,
          *delta = g.delta + index * LANES;
    if (!g.exponentials) g.logits.compute(a, c.score, t, j0, count, loaded, g.kept);
    if (g.exponentials) {
        P = g.exponentials + j0 * w;
        const float *whole = factor, *here = g.shifts + j0 / a.key_block() * w;
        factor = g.scratch;
        for (Size i = 0; i < w; ++i) factor[i] = whole[i] * (here[i] == -INFINITY ? 0.f : expf(here[i] - shift[i]));
    } else if (unscaled) {
        float *largest = g.scratch, *rescale = g.scratch + LANES;
        double* total = (double*)(g.scratch + 2 * LANES);
        online_softmax(P, count, w, true, g.logits.top, largest, total, rescale);
        finish_rows(largest, total, w, {shift, factor});
    } else {
        const Statistics s = {shift, factor};
        probabilities(P, count, w, s);
    }
    if (c.grad_out.data) load_keys(a, a.value, a.Dv, g.logits.values, t.b, t.h / a.group(), j0, loaded);
    const bool carries = c.relevancy.rows && !call.sums_rows;
    if (carries && unscaled && !inputs && !(c.dropout.probability > 0) && (c.grad_out.data || !is_gradient)) {
        // r Abar alone: each row's factor is taken into r, and dP is not kept
        if (is_gradient)
            tile_product<false>(
                t, count, a.Dv, g.logits.values.rows, g.logits.values.stride, g.out_transposed, dP, false, TakeGradient{P, w});
        const Size stride = round_up(c.relevancy.T, VL);
        for (Size i = 0; i < w; ++i)
            for (Size r = 0; r < stride; r += VL)
                store(g.scaled_rows + i * stride + r, load(g.rows + i * stride + r) * splat(factor[i]));
        return carry(P, count, t, g.scaled_rows, c.relevancy.T, g.result + j0 * stride);
    }
    if (c.grad_out.data)
        tile_product<false>(t, count, a.Dv, g.logits.values.rows, g.logits.values.stride, g.out_transposed, dP, false);
    else
        memset(dP, 0, n * sizeof(float));
    float* weights = P;  // what the values are summed with
    if (c.dropout.probability > 0) {
        if (unscaled) scale_rows(P, count, w, factor);
        memcpy(g.dropped, P, n * sizeof(float));
        drop(a, c.dropout, t, j0, count, g.dropped);
        drop(a, c.dropout, t, j0, count, dP);
        weights = g.dropped;
    }
    if (unscaled) {
        const bool scaled = c.dropout.probability > 0;
        for (Size i = 0; i < w; i += GROUP) {
            Vector total[PARTS], by[PARTS];
            for (int p = 0; p < PARTS; ++p) total[p] = Vector{}, by[p] = scaled ? splat(1.f) : load(factor + i + p * VL);
            for (Size chunk = 0; chunk < count; chunk += SHORT_SUM) {
                Vector part[PARTS];
                for (int p = 0; p < PARTS; ++p) part[p] = Vector{};
                for (Size j = chunk; j < least(chunk + SHORT_SUM, count); ++j)
                    for (int p = 0; p < PARTS; ++p) {
                        const Size at = j * w + i + p * VL;
                        const Vector x = load(P + at) * by[p];
                        store(P + at, x);
                        part[p] += x * load(dP + at);
                    }
                for (int p = 0; p < PARTS; ++p) total[p] += part[p];
            }
            for (int p = 0; p < PARTS; ++p) store(delta + i + p * VL, total[p]);
        }
    }
    if (call.sums_rows) {
        sum_rows(P, dP, is_gradient, count, t, call.row_sums + (t.b * a.H + t.h) * a.N + t.first);
        return;
    }
    if (inputs)
        product<false>(count, call.value_stride, t.rows, weights, w, g.out_rows, call.value_stride, g.value.row(j0),
                       g.value.stride, !g.fresh);
    float by_lse[LANES] = {};  // beside delta, not in it: P = 1 leaves it as it is
    for (Size i = 0; c.grad_lse && i < t.rows; ++i) by_lse[i] = c.grad_lse[(t.b * a.H + t.h) * a.N + t.first + i];
    for (Size j = 0; j < count; ++j)
        for (Size i = 0; i < w; i += VL) {
            const Size at = j * w + i;
            const Vector p = load(P + at), dp = load(dP + at);
            if (carries) store(P + at, contribution(is_gradient, p, dp));
            store(dP + at, p * ((dp - load(delta + i)) + load(by_lse + i)));
        }
    if (carries) carry(P, count, t, g.rows, c.relevancy.T, g.result + j0 * round_up(c.relevancy.T, VL));
    if (!inputs) return;
    float* query = g.query + index * LANES * a.D;
    if (c.score.sums_units()) {
        UnitTile& u = g.logits.units;
        u.backward((float)a.scale, count, w, dP);
        for (Size n = 0; n < a.D; ++n) {
            g.vector[t.h * a.D + n] += u.by_weight[n];
            for (Size i = 0; i < w; ++i) query[n * w + i] += u.by_query[i * u.units.count + n] * u.weight[n];
        }
        memset(u.by_weight, 0, u.units.count * sizeof(float));
        return;
    }
    if (c.score.kind == COSINE)
        cosine_gradient(c.score, (float)a.scale, dP, count, t, g.logits.query_norm, g.logits.key_norm, g.kept,
                        g.cosine_query + index * LANES, g.cosine_key + j0);
    else if (c.score.bends())
        bend(c.score, (float)a.scale, dP, n, g.kept);
    product<false>(count, call.key_stride, t.rows, dP, w, g.logits.rows, g.logits.stride, g.key.row(j0), g.key.stride, !g.fresh);
    tile_product<true>(t, a.D, count, g.logits.keys.rows, g.logits.keys.stride, dP, query, true);
}

// What a tile needs before its first block
static void start_tile(const BackwardCall& call, Gradients& g, const Tile& t) {
    const Backward& c = call.c;
    g.logits.load_queries(c.a, c.score, t);
    if (c.grad_out.data)
        load_tile(c.grad_out, c.a.dtype, t, c.a.Dv, 1.f, g.out_rows, call.value_stride, g.out_transposed);
    else
        memset(g.out_transposed, 0, c.a.Dv * t.width * sizeof(float)),
            memset(g.out_rows, 0, t.width * call.value_stride * sizeof(float));
    if (c.grad_query.data) fetch_rows(c.grad_query, c.a.dtype, t, t.first, c.a.D);
    if (c.relevancy.rows && !call.sums_rows) load_carried(c.relevancy, c.a, t, call.row_sums, g.rows);
}

static void finish_tile(const BackwardCall& call, Gradients& g, const Tile& t, Size index) {
    const Backward& c = call.c;
    const Attention& a = c.a;
    float* query = g.query + index * LANES * a.D;
    if (c.score.kind == COSINE) {  // the part of |q|
        const float* by = g.cosine_query + index * LANES;
        for (Size i = 0; i < t.rows; ++i) {
            const float length = g.logits.query_norm[i];
            for (Size d = 0; by[i] != 0 && d < a.D; ++d)
                query[d * t.width + i] -= g.logits.rows[i * g.logits.stride + d] / length * by[i] / length;
        }
    }
    store_tile(query, t, a.D, Logits::query_factor(c.score, a.scale), c.grad_query, a.dtype, g.scratch);
}

// After the tiles of one query head: the units' gradient of a block of keys
static void add_unit_keys(const BackwardCall& call, Gradients& g, Size j0, Size count) {
    UnitTile& u = g.logits.units;
    for (Size n = 0; n < call.c.a.D; ++n)
        for (Size j = 0; j < count; ++j) g.key.row(j0 + j)[n] += u.by_key[n * u.ld + j] * u.weight[n];
    memset(u.by_key, 0, u.units.count * u.ld * sizeof(float));
}

// The tiles [first, last) of one query head. The first of them fills `key` and `value` where they are fresh.
static void backward_head(const BackwardCall& call, Gradients& g, Size b, Size h, Size first, Size last) {
    const Backward& c = call.c;
    const Attention& a = c.a;
    const Size visible = visible_keys(a, b), block = a.key_block();
    const bool at_once = call.at_once(), inputs = call.inputs(), fresh = g.fresh;
    if (inputs && !at_once) {
        memset(g.query, 0, (last - first) * LANES * a.D * sizeof(float));
        memset(g.cosine_query, 0, (last - first) * LANES * sizeof(float));
    }
    for (Size n = first; !at_once && n < last; ++n) {
        const Tile t = tile_at(a, b, h, n);
        const Size at = (n - first) * LANES;
        float* delta = g.delta + at;
        find_statistics(c, g.logits, t, visible, g.shift + at, g.factor + at, g.scratch, g.exponentials, g.shifts);
        for (Size i = 0; i < t.width; ++i) delta[i] = 0;
        if (!inputs) continue;
        float* out = g.scratch;
        load_tile(c.out, a.dtype, t, a.Dv, 1.f, out, a.Dv, nullptr);
        load_tile(c.grad_out, a.dtype, t, a.Dv, 1.f, g.out_rows, call.value_stride, nullptr);
        for (Size i = 0; i < t.rows; ++i) {
            double total = 0;  // the rounding of `out` is error enough
            for (Size d = 0; d < a.Dv; ++d) total += (double)out[i * a.Dv + d] * g.out_rows[i * call.value_stride + d];
            delta[i] = (float)total;
        }
    }
    for (Size j0 = 0; j0 < most(visible, 1); j0 += block) {  // a sample without a key, too, has gradients to write
        for (Size n = first; n < last; ++n) {
            const Tile t = tile_at(a, b, h, n);
            const Size index = at_once ? 0 : n - first, count = least(block, t.keys(a, visible) - j0);
            g.fresh = fresh && n == first;
            if (at_once && inputs)
                memset(g.query, 0, LANES * a.D * sizeof(float)), memset(g.cosine_query, 0, LANES * sizeof(float));
            if (count > 0) {
                if (j0 == 0 || last - first > 1) start_tile(call, g, t);
                backward_tile(call, g, t, j0, count, least(block, visible - j0), index);
            }
            if (at_once && inputs) finish_tile(call, g, t, 0);
        }
        if (inputs && c.score.sums_units() && visible > 0) add_unit_keys(call, g, j0, least(block, visible - j0));
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
