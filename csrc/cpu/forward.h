// Logits of a tile, and the forward pass of attention over them: online softmax over blocks of keys, as FlashAttention has it.
//
// Query row i; a block of keys j; Z is a dropout's factor, 0 or 1 / (1 - p), or 1. In brackets: the names below.
//     S_ij = the score times scale, and the mask                                     [Logits::compute: S, top]
//     top' = max(top_i, max_j S_ij),  rescale = e^(top_i - top')                     [online_softmax: largest, rescale]
//     P_ij = e^(S_ij - top'),  total_i = rescale total_i + sum_j P_ij
//     out_i = rescale out_i + sum_j Z P_ij v_j                                       [drop, values.sum]
// At the end out_i / total_i and lse_i = top_i + ln total_i                          [finish_rows, store_lse]
#pragma once
#include "paired_keys.h"
#include "scores.h"

namespace ISA {
namespace {

struct Dropout {
    int64_t seed;        // 0 without dropout
    double probability;  // of dropping a weight
    FIELDS(seed, probability)
};

// A 32-bit hash (xor-shift, multiply): streaming/_dropout.py
template <class Word> INLINE Word mix(Word x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}
// X (count, width) *= 0 where the weight is dropped, else 1 / (1 - p)
static void drop(const Attention& a, const Dropout& dropout, const Tile& t, Size j0, Size count, float* X) {
    const uint64_t seed = (uint64_t)dropout.seed;
    uint32_t row[LANES];
    for (Size i = 0; i < t.width; ++i) {
        const uint64_t index = (uint64_t)((t.b * a.H + t.h) * a.N + t.first + i);
        row[i] = mix(mix((uint32_t)index) ^ mix((uint32_t)((index >> 32) + (seed & 0xFFFFFFFFu))) ^ mix((uint32_t)(seed >> 32)));
    }
    const uint32_t threshold = (uint32_t)(dropout.probability * 4294967296.0);
    const Vector factor = splat((float)(1.0 / (1.0 - dropout.probability)));
    for (Size j = 0; j < count; ++j) {
        const uint32_t column = mix((uint32_t)(j0 + j) + 0x9E3779B9u);
        for (Size i = 0; i < t.width; i += VL) {
            Words word;
            memcpy(&word, row + i, sizeof word);
            float* x = X + j * t.width + i;
            store(x, mix(word ^ column) >= threshold ? load(x) * factor : Vector{});
        }
    }
}

// Whether the products of a call are those of pairs (pairs.h); `numbers` are the fewest of a row of a key or value
static bool takes_pairs(const Attention& a, const Score& score, Size numbers) {
    return score.is_product() && a.N > MOST_FEW && pairs_pay(a.dtype, least(a.M, numbers));
}

// One thread's query rows of a tile and the logits of a block of keys
struct Logits {
    bool pairs = false;  // whether bfloat16 rows stay so (pairs.h)
    KeyRows keys, values;
    UnitTile units;
    GroupBias bias;
    // (LANES, stride), (D, width): query rows, times query_factor; as pairs: (LANES / 2, stride), (half(D), width)
    float *rows, *transposed;
    float *S, *top, *mask, *query_norm, *key_norm;  // top: the largest logit of each row
    Pair* scratch;  // of load_pairs
    Size stride;
    Size block_b, block_head, block_first;  // of the units and norms of the keys

    // Queries of plain dot products are multiplied by the scale before the product, but pairs after it: they would be rounded.
    static float query_factor(const Score& score, double scale) { return score.kind == DOT ? (float)scale : 1.f; }
    float row_factor(const Score& score, double scale) const { return pairs ? 1.f : query_factor(score, scale); }
    float product_factor(const Score& score, double scale) const { return pairs ? query_factor(score, scale) : 1.f; }
    static bool takes_pairs(const Attention& a, const Score& score) {  // a map of weights alone has no values
        return ::ISA::takes_pairs(a, score, a.Dv > 0 ? least(a.D, a.Dv) : a.D);
    }

    void plan(const Attention& a, const Score& score, Memory& memory, bool backward) {
        keys.plan(a, a.key, a.D, pairs, backward, memory), values.plan(a, a.value, a.Dv, pairs, true, memory);
        if (score.sums_units()) units.plan(a, memory, backward);
        bias.plan(a, memory);
        stride = round_up(a.D, VL);
        rows = pairs && !backward ? nullptr : memory.take(LANES * stride), transposed = memory.take(LANES * a.D);
        scratch = pairs ? (Pair*)memory.take(LANES * half(most(a.D, a.Dv))) : nullptr;
        S = memory.take(most(a.key_block(), most(a.D, a.Dv)) * LANES), top = memory.take(LANES);
        mask = memory.take(2 * GROUP * LANES), query_norm = memory.take(LANES), key_norm = memory.take(a.key_block());
        block_b = block_head = block_first = -1;
    }
    void load_queries(const Attention& a, const Score& score, const Tile& t) {
        bias.load_tile(a, t);
        if (pairs) return load_pairs(a.query, t, a.D, (Pair*)transposed, (Pair*)rows, stride, scratch);
        load_tile(a.query, a.dtype, t, a.D, query_factor(score, a.scale), rows, stride, transposed);
        if (score.kind == COSINE)
            for (Size i = 0; i < t.width; ++i) query_norm[i] = norm(rows + i * stride, a.D);
    }
    // S = the masked logits of `count` keys from j0, and `top` of them; `saved` (count, width) is for `bend` and cosine_gradient,
    // or null. The block that is loaded, `loaded` keys, serves tiles that see more of it, too.
    void compute(const Attention& a, const Score& score, const Tile& t, Size j0, Size count, Size loaded, float* saved) {
        keys.load(a, t, j0, loaded);
        if (bias.hides_all(a, t, j0, count)) return hide_scores(t.width, top, nullptr), hide_scores(count * t.width, S, saved);
        if (score.kind == DOT) return dot_scores(a, t, j0, count);
        if (score.sums_units()) unit_scores(a, score, t, j0, count, loaded);
        else if (score.kind == COSINE) cosine_scores(a, score, t, j0, count, loaded, saved);
        else activated_products(a, score, t, count, saved);
        mask_scores(a, t, j0, count);
    }
    void mask_scores(const Attention& a, const Tile& t, Size j0, Size count) {
        mask_tile(a, t, j0, count, S, mask, &bias);
        find_top(S, count, t.width, top);
    }
    void dot_scores(const Attention& a, const Tile& t, Size j0, Size count) {
        dot_logits(a, t, j0, count, S, mask, bias, top, [&](const auto& finish) {
            if (pairs) keys.paired.products(t, count, transposed, S, false, scaled((float)a.scale, finish));
            else keys.products(t, count, transposed, S, false, finish);
        });
    }
    void activated_products(const Attention& a, const Score& score, const Tile& t, Size count, float* saved) {
        keys.products(t, count, transposed, S, false);
        activate(score, (float)a.scale, S, count * t.width, saved);
    }
    void cosine_scores(const Attention& a, const Score& score, const Tile& t, Size j0, Size count, Size loaded, float* saved) {
        const Keys& k = keys.numbers;
        const uint8_t* visible = a.masks.keys ? a.masks.keys + t.b * a.M + j0 : nullptr;
        keys.products(t, count, transposed, S, false);
        const bool another = is_another_block(t.b, t.h / a.group(), j0);
        for (Size j = 0; another && j < loaded; ++j)  // padding is zeros, over whose norm nothing can be divided
            key_norm[j] = visible && !visible[j] ? 1.f : norm(k.rows + j * k.stride, a.D);
        divide_by_norms(score, (float)a.scale, S, count, t.width, query_norm, key_norm, saved);
    }
    void unit_scores(const Attention& a, const Score& score, const Tile& t, Size j0, Size count, Size loaded) {
        const Keys& k = keys.numbers;
        if (is_another_block(t.b, t.h, j0)) units.load_head(score, a, t.h), units.load_keys(a, k, loaded);
        units.load_rows(score, a, rows, stride, t.rows, k, loaded);
        units.forward((float)a.scale, count, t.width, S);
    }
    bool holds_block(Size b, Size head, Size first) const { return block_b == b && block_head == head && block_first == first; }
    // Whether units or norms are those of other keys, which these then become. The units' weights belong to the query head.
    bool is_another_block(Size b, Size head, Size first) {
        const bool another = !holds_block(b, head, first);
        block_b = b, block_head = head, block_first = first;
        return another;
    }
    // Rows of a tile beside the queries: at (LANES, rounded up), times `factor`, and transposed; or both as pairs, as they are
    void load_rows(const StridedTensor& x, Size dtype, const Tile& t, Size size, float factor, float* at, float* transposed_at) {
        const Size columns = round_up(size, VL);
        if (pairs) load_pairs(x, t, size, (Pair*)transposed_at, (Pair*)at, columns, scratch);
        else load_tile(x, dtype, t, size, factor, at, columns, transposed_at);
    }
    // The products of `count` values from j0 with such rows, to C (count, width) as `finish` has them
    template <class Finish = Store>
    void value_products(const Attention& a, const Tile& t, Size j0, Size count, Size loaded, const float* transposed_rows,
                        float* C, const Finish& finish = {}) {
        values.load(a, t, j0, loaded);
        values.products(t, count, transposed_rows, C, false, finish);
    }
};

// A tile of rows with all their keys
struct WholeRows {
    float* S;  // (keys, width): e^(logit - shift), of which `factor` makes P
    float *shift, *factor;  // (LANES)
    void plan(Size numbers, Memory& memory) { S = memory.take(numbers), shift = memory.take(LANES), factor = memory.take(LANES); }
    // `loadable` keys may be loaded, for later tiles; `saved` as in Logits::compute, of all keys
    void compute(Logits& logits, const Attention& a, const Score& score, const Tile& t, Size keys, Size loadable, float* saved) {
        const Size w = t.width;
        float largest[LANES], rescale[LANES];
        double total[LANES];
        for (Size i = 0; i < w; ++i) largest[i] = shift[i] = -INFINITY, total[i] = 0;
        by_blocks(a, keys, [&](Size j0, Size count) {
            logits.S = S + j0 * w;
            logits.compute(a, score, t, j0, count, least(a.key_block(), loadable - j0), saved ? saved + j0 * w : nullptr);
            for (Size i = 0; i < w; i += VL) store(largest + i, maximum(load(largest + i), load(logits.top + i)));
        });
        by_blocks(
            a, keys, [&](Size j0, Size count) { online_softmax(S + j0 * w, count, w, j0 == 0, largest, shift, total, rescale); });
        finish_rows(shift, total, w, {shift, factor});
    }
};

struct Forward {
    Attention a;
    Score score;
    Dropout dropout;
    StridedTensor out;
    double* lse;  // (B, H, N); rounded to float32 it would not give P = e^(logit - lse) as exactly as a softmax
    FIELDS(a, score, dropout, out, lse)
};

struct ForwardCall {
    const Forward& c;
    Size tasks;
};
// What the rows of a tile take from block to block
struct RunningSums {
    float *out, *largest;  // (Dv, width), (LANES)
    double* total;
    bool is_fresh;  // no block so far that any row sees
    void plan(const Attention& a, Memory& memory) {
        out = memory.take(a.Dv * LANES), largest = memory.take(LANES), total = memory.take_doubles(LANES);
    }
};
struct ForwardSpace {
    Logits logits;
    RunningSums* sums;  // of each tile of a sweep
    float *rescale, *factor;
    // Tiles of a head that pass a block of keys together: so keys and values that are widened, paired or copied are so once for all
    // of them. Their sums stay in the second cache. A single block of keys stays for all tiles anyway.
    static Size most_tiles(const Attention& a) {
        const bool copies = a.dtype != FLOAT32 || a.masks.keys;
        return copies && a.M > a.key_block() ? least(8, a.group() * tiles_of(a)) : 1;
    }
    void plan(const ForwardCall& call, Memory& memory) {
        const Attention& a = call.c.a;
        logits.pairs = Logits::takes_pairs(a, call.c.score);
        logits.plan(a, call.c.score, memory, false);
        sums = memory.take_spaces<RunningSums>(most_tiles(a), [&](RunningSums& sums) { sums.plan(a, memory); });
        rescale = memory.take(LANES), factor = memory.take(LANES);
    }
};
// The log-sum-exp of a tile's rows: -Inf where a row sees no key, and finite where float32 cannot hold a finite one, since a public
// call gives it in float32.
static void store_lse(const Attention& a, const Tile& t, const float* largest, const double* total, double* lse) {
    const double* shifts = a.mask_shifts(t.b, t.h, t.first);
    for (Size i = 0; i < t.rows; ++i) {
        const double x = largest[i] + log(total[i]) + (shifts ? shifts[i] : 0.);
        const bool masked = largest[i] == -INFINITY && total[i] == 0.;
        lse[i] = masked ? -INFINITY : finite_in_float32(x);
    }
}
// f(first, last) for the items from `begin` to `end`, tiles of query rows, in runs of at most `most_tiles` that share a key head
template <class F> static void by_sweeps(const Attention& a, Size begin, Size end, Size lanes, Size most_tiles, const F& f) {
    const Size of_head = a.group() * tiles_of(a, lanes);
    for (Size first = begin, last; first < end; first = last) {
        last = least(least(end, first + most_tiles), (first / of_head + 1) * of_head);
        f(first, last);
    }
}

static void start_sums(const Forward& c, const Tile& t, RunningSums& sums) {
    fetch_rows(c.out, c.a.dtype, t, t.first, c.a.Dv);
    for (Size i = 0; i < t.width; ++i) sums.largest[i] = -INFINITY, sums.total[i] = 0;
    memset(sums.out, 0, c.a.Dv * t.width * sizeof(float));
    sums.is_fresh = true;
}
// A tile and a block of keys, of which `loaded` are read for this tile and later ones
static void add_block(const Forward& c, ForwardSpace& x, const Tile& t, RunningSums& sums, Size j0, Size count, Size loaded) {
    const Attention& a = c.a;
    Logits& logits = x.logits;
    const Size w = t.width;
    if (logits.bias.hides_all(a, t, j0, count)) return;
    logits.compute(a, c.score, t, j0, count, loaded, nullptr);
    online_softmax(logits.S, count, w, sums.is_fresh, logits.top, sums.largest, sums.total, x.rescale);
    if (c.dropout.probability > 0) drop(a, c.dropout, t, j0, count, logits.S);
    if (!sums.is_fresh) scale_rows(sums.out, a.Dv, w, x.rescale);
    logits.values.load(a, t, j0, loaded);
    logits.values.sum(t, count, logits.S, sums.out, !sums.is_fresh);
    sums.is_fresh = false;
}
static void finish_sums(const Forward& c, ForwardSpace& x, const Tile& t, const RunningSums& sums) {
    const Attention& a = c.a;
    store_lse(a, t, sums.largest, sums.total, c.lse + (t.b * a.H + t.h) * a.N + t.first);
    finish_rows(sums.largest, sums.total, t.width, {x.rescale, x.factor});
    scale_rows(sums.out, a.Dv, t.width, x.factor);
    store_tile(sums.out, t, a.Dv, 1.f, c.out, a.dtype, x.logits.S);  // S is free now
}
// The tiles [first, last) of one key head: the running sums of an online softmax, block by block
static void forward_sweep(const Forward& c, ForwardSpace& x, Size first, Size last) {
    const Attention& a = c.a;
    const Size visible = visible_keys(a, tile_of_item(a, first).b);
    const auto each = [&](const auto& f) {
        for (Size item = first; item < last; ++item) f(tile_of_item(a, item), x.sums[item - first]);
    };
    each([&](const Tile& t, RunningSums& sums) { start_sums(c, t, sums); });
    by_blocks(a, visible, [&](Size j0, Size loaded) {
        each([&](const Tile& t, RunningSums& sums) {
            const Size count = least(loaded, t.keys(a, visible) - j0);
            if (count <= 0) return;  // under the causal mask
            if (j0 == 0 || last - first > 1) x.logits.load_queries(a, c.score, t);
            add_block(c, x, t, sums, j0, count, loaded);
        });
    });
    each([&](const Tile& t, const RunningSums& sums) { finish_sums(c, x, t, sums); });
}
static void forward_task(ForwardCall& call, ForwardSpace& x, Size task) {
    const Attention& a = call.c.a;
    const Size items = a.B * a.H * tiles_of(a);
    by_sweeps(a, share(items, task, call.tasks), share(items, task + 1, call.tasks), LANES, ForwardSpace::most_tiles(a),
              [&](Size first, Size last) { forward_sweep(call.c, x, first, last); });
}

}  // namespace
}  // namespace ISA
