// The way back through Abar, the (B, N, M) map of all heads: from the gradient of Abar those of query, key, value, grad_output and
// lse, for attention_map and relevancy_step. The gradient is a map (attention_map), or r^T u with the gradient u of r Abar
// (relevancy_step); then r has a gradient, too: u Abar^T.
//
// Bound: multiply-adds of six products a head: A and dA are made again, and the gradient of each goes to two inputs. A tile has
// all keys of its rows and takes one head after the other, so the gradient of Abar is made once, and a row's softmax is closed
// before its gradient begins. Where heads are ranked, rows divided by their sums or r alone has a gradient, the heads are gone
// through twice: first for the map. Both times A and dA come from the same instructions, so that the head that was taken is equal
// to the map's number bit by bit.
// Keys and values belong to all tiles of a sample: shared_sums.h adds up what the tasks have. Few key heads at a time keep these
// sums small.
// Measured in turns with the same tiles in PyTorch (streaming/_abar.py) on a busy machine, with one thread, 2 samples, 12 heads of
// 64 numbers and 197 to 1,024 tokens, in float32 and bfloat16: 2.0 to 3.5 times as fast.
#include "forward.h"
#include "shared_sums.h"

namespace ISA {
namespace {

static const Size MOST_SUMS = 1 << 24;  // numbers (64 MB) that the tasks' sums take together, unless one key head has more

struct AbarBackward {
    Attention a;  // with value for the rule "gradient"
    Score score;  // a function of dot products
    StridedTensor grad_output;
    Size gradient, reduction, row_normalize;
    const double* lse;  // (B, H, N) natural log-sum-exp of the caller, or null; it may count keys that are not here
    const float* grad;  // (B, N, M) of Abar; null where it is rows^T grad_result
    const float *rows, *grad_result;  // r (B, T, N) and u (B, T, M)
    Size T, needs_inputs;
    float* grad_rows;  // (B, T, N), or null where it is not needed
    StridedTensor grad_query, grad_key, grad_value, grad_grad_output;
    float* grad_lse;  // (B, H, N); null where the log-sum-exp counts as computed from query and key
    float* grad_row_bias;  // as row_bias, or null
    FIELDS(a, score, grad_output, gradient, reduction, row_normalize, lse, grad, rows, grad_result, T, needs_inputs, grad_rows,
           grad_query, grad_key, grad_value, grad_grad_output, grad_lse, grad_row_bias)
    bool ranks() const { return reduction != MEAN; }
    // whether the map must be there before any head has its gradient
    bool map_first() const { return ranks() || row_normalize || !needs_inputs; }
};

struct AbarCall {
    const AbarBackward& c;
    // The items are tiles, sample by sample; the sums are the gradients of a sample's keys and values, in one row for each key
    SharedSums sums;
    Size lanes, key_stride, stride;  // of a tile; of a key's part of a row, and of the row
    Size head, heads;  // the key heads [head, head + heads) are at work
};
static Size row_count(const AbarCall& call) { return call.c.needs_inputs ? call.heads * call.c.a.M : 0; }

// One thread's tiles, (keys, width) each, of one head after the other
struct AbarTiles {
    Logits logits;
    WholeRows whole;  // later whole.S holds the gradients of the logits
    float *dA, *saved;  // later the gradients of dA; what `bend` reads
    Pair* rounded_tile;  // of a block of these gradients; null where products take no pairs
    float *grad, *abar, *ranked;  // of all heads: the gradient of the map; the map; how many heads have its number
    float *grad_output, *grad_output_transposed;  // (LANES, Dv rounded up), (Dv, width); or pairs, as Logits::rows
    float* rows;  // (T, width) of r and later of its gradient
    float* divisor;  // (LANES)
    float* by_bias;  // a table (attention.h)
    float *grad_input, *scratch;  // (D or Dv, LANES)

    void plan(const AbarCall& call, Memory& memory) {
        const AbarBackward& c = call.c;
        const Attention& a = c.a;
        const Size size = a.M * call.lanes, widest = most(a.D, a.Dv);
        logits.pairs = Logits::takes_pairs(a, c.score);
        logits.plan(a, c.score, memory, logits.pairs);
        scratch = logits.S, rounded_tile = logits.pairs ? (Pair*)memory.take(a.key_block() * LANES / 2) : nullptr;
        whole.plan(size, memory);
        dA = memory.take(c.gradient ? size : 0), grad = memory.take(size);
        saved = c.score.bends() ? memory.take(size) : nullptr;
        abar = memory.take(c.map_first() || c.grad_rows ? size : 0), ranked = memory.take(c.ranks() ? size : 0);
        grad_output = memory.take(LANES * round_up(a.Dv, VL)), grad_output_transposed = memory.take(LANES * a.Dv);
        rows = memory.take(c.T * LANES), grad_input = memory.take(widest * LANES);
        divisor = memory.take(LANES), by_bias = memory.take(c.grad_row_bias ? table_size(a) : 0);
    }
};

// ---- one head

// x.whole and x.dA of head t.h
static void load_head(const AbarCall& call, AbarTiles& x, const Tile& t, Size keys) {
    const AbarBackward& c = call.c;
    const Attention& a = c.a;
    const Size w = t.width;
    x.logits.load_queries(a, c.score, t);
    x.whole.compute(x.logits, a, c.score, t, keys, keys, x.saved);
    take_caller_lse(a, t, c.lse, {x.whole.shift, x.whole.factor});
    if (!c.gradient) return;
    x.logits.load_rows(c.grad_output, a.dtype, t, a.Dv, 1.f, x.grad_output, x.grad_output_transposed);
    by_blocks(a, keys, [&](Size j0, Size count) {
        x.logits.value_products(a, t, j0, count, count, x.grad_output_transposed, x.dA + j0 * w);
    });
}

// The head is taken up into the map: the sum over the heads, or the largest or smallest number and how many heads have it. NaN stays.
static void take_up(const AbarBackward& c, const AbarTiles& x, Size size, Size w, bool first) {
    const Vector sign = splat(c.reduction == MIN ? -1.f : 1.f), one = splat(1.f);
    for (Size n = 0; n < size; n += w)
        for (Size i = 0; i < w; i += VL) {
            const Size at = n + i;
            const Vector p = load(x.whole.S + at) * load(x.whole.factor + i);
            const Vector each = contribution(c.gradient, p, c.gradient ? load(x.dA + at) : p);
            const Vector before = first ? Vector{} : load(x.abar + at);
            if (!c.ranks()) {
                store(x.abar + at, before + each);
            } else if (first) {
                store(x.abar + at, each), store(x.ranked + at, one);
            } else {
                const Integers better = (each * sign > before * sign) | (each != each);
                const Vector heads = load(x.ranked + at);
                store(x.abar + at, better ? each : before);
                store(x.ranked + at, better ? one : each == before ? heads + one : heads);
            }
        }
}

struct PairGradients {
    Vector p, of_p, of_dA;
};
// A of a pair, and the gradients of A and dA from that of the map
INLINE PairGradients pair_gradients(bool is_gradient, bool ranks, const AbarTiles& x, Size at, Vector factor) {
    const Vector p = load(x.whole.S + at) * factor, dA = is_gradient ? load(x.dA + at) : p;
    const Vector each = contribution(is_gradient, p, dA);
    Vector grad = load(x.grad + at);
    if (ranks) grad = each == load(x.abar + at) ? grad : Vector{};
    if (!is_gradient) return {p, grad, grad};
    grad = each > Vector{} ? grad : Vector{};
    return {p, grad * dA, grad * p};
}
// Through the softmax: the gradients of the logits take the place of x.whole.S, those of dA that of x.dA.
static void head_gradients(const AbarBackward& c, const AbarTiles& x, const Tile& t, Size keys) {
    const Size w = t.width;
    const bool is_gradient = c.gradient, ranks = c.ranks();
    float of_lse[LANES];
    for (Size i = 0; i < w; i += VL) {
        const Vector factor = load(x.whole.factor + i);
        Vector total = sum_over(keys, [&](Size j) {  // of A and its gradient
            const PairGradients pair = pair_gradients(is_gradient, ranks, x, j * w + i, factor);
            return pair.p * pair.of_p;
        });
        store(of_lse + i, -total);
        if (c.grad_lse) total = Vector{};
        for (Size j = 0; j < keys; ++j) {
            const PairGradients pair = pair_gradients(is_gradient, ranks, x, j * w + i, factor);
            // not p (of_p - total): a fused multiply-add would not round of_p, and where A is 1 the gradient is 0
            store(x.whole.S + j * w + i, pair.p * pair.of_p - pair.p * total);
            if (is_gradient) store(x.dA + j * w + i, pair.of_dA);
        }
    }
    if (c.grad_lse) memcpy(c.grad_lse + (t.b * c.a.H + t.h) * c.a.N + t.first, of_lse, t.rows * sizeof(float));
}

// From `grad`, the gradient of the products of the tile's rows and the keys of x, which here counts `factor` times: that of the
// rows, to `to`, and that of the keys, added to sums (keys, call.stride). rows_at (LANES, stride) are the rows.
static void product_gradients(const AbarCall& call, const AbarTiles& x, const Tile& t, Size keys, float row_factor, float factor,
                              KeyRows& loaded, float* grad, const float* rows_at, float* sums, const StridedTensor& to) {
    const Attention& a = call.c.a;
    memset(x.grad_input, 0, loaded.size * t.width * sizeof(float));
    by_blocks(a, keys, [&](Size j0, Size count) {
        loaded.load(a, t, j0, count);
        loaded.gradients(t, count, factor, grad + j0 * t.width, x.rounded_tile, rows_at, sums + j0 * call.stride, call.stride,
                         true, x.grad_input);
    });
    store_tile(x.grad_input, t, loaded.size, row_factor, to, a.dtype, x.scratch);
}

static void bias_gradients(const AbarBackward& c, AbarTiles& x, const Tile& t, Size keys) {
    GroupBias& bias = x.logits.bias;
    memset(x.by_bias, 0, table_size(c.a) * sizeof(float));
    by_blocks(c.a, keys, [&](Size j0, Size count) {
        bias.load_keys(c.a, t.b, j0, count);
        sum_by_group(x.whole.S + j0 * t.width, bias.rows, count, t.width, x.by_bias);
    });
    store_table(c.a, t, x.by_bias, c.grad_row_bias);
}

// ---- one tile

// The gradient of the map in a tile
static void load_gradient(const AbarBackward& c, const AbarTiles& x, const Tile& t, Size keys) {
    const Attention& a = c.a;
    const Size w = t.width;
    if (t.rows < w) memset(x.grad, 0, keys * w * sizeof(float));
    if (c.grad) return transpose(c.grad + (t.b * a.N + t.first) * a.M, a.M, t.rows, keys, x.grad, w);
    memset(x.rows, 0, c.T * w * sizeof(float));
    for (Size n = 0; n < c.T; ++n) memcpy(x.rows + n * w, c.rows + (t.b * c.T + n) * a.N + t.first, t.rows * sizeof(float));
    if (keys > 0) tile_product<true>(t, keys, c.T, c.grad_result + t.b * c.T * a.M, a.M, x.rows, x.grad, false);
}

// The gradient of the map becomes that of what each head brings to it, through the division by x.divisor: the number of heads of a
// mean, or the rows' sums. A zero row stays zero, also one whose sum is subnormal, as in load_carried.
static void divide_gradient(const AbarBackward& c, const AbarTiles& x, Size keys, Size w) {
    for (Size i = 0; i < w; i += VL) {
        Vector divisor = splat(c.ranks() ? 1.f : (float)c.a.H), of_sum = Vector{};
        if (c.row_normalize) {
            const auto each = [&](Size j) { return load(x.abar + j * w + i); };
            const Vector total = sum_over(keys, each);
            divisor = total < splat(FLT_MIN) ? splat(1.f) : total;
            of_sum = sum_over(keys, [&](Size j) { return each(j) * load(x.grad + j * w + i); }) / divisor;
        }
        store(x.divisor + i, divisor);
        for (Size j = 0; j < keys; ++j) {
            const Size at = j * w + i;
            const Vector grad = (load(x.grad + at) - of_sum) / divisor;
            store(x.grad + at, c.ranks() ? grad / load(x.ranked + at) : grad);
        }
    }
}

// u Abar^T for the tile's rows, from the map or, with `add`, some more heads of it
static void write_grad_rows(const AbarBackward& c, const AbarTiles& x, const Tile& t, Size keys, bool add) {
    const Attention& a = c.a;
    tile_product<false>(t, c.T, keys, c.grad_result + t.b * c.T * a.M, a.M, x.abar, x.rows, false);
    for (Size n = 0; n < c.T; ++n) {
        float* row = c.grad_rows + (t.b * c.T + n) * a.N + t.first;
        for (Size i = 0; i < t.rows; ++i) row[i] = (add ? row[i] : 0.f) + x.rows[n * t.width + i] / x.divisor[i];
    }
}

static void tile_gradients(const AbarCall& call, AbarTiles& x, Tile t, float* sums) {
    const AbarBackward& c = call.c;
    const Attention& a = c.a;
    const Size w = t.width, keys = t.keys(a, visible_keys(a, t.b)), group = a.group();
    load_gradient(c, x, t, keys);
    for (t.h = 0; c.map_first() && t.h < a.H; ++t.h) load_head(call, x, t, keys), take_up(c, x, keys * w, w, t.h == 0);
    divide_gradient(c, x, keys, w);
    const Size first = call.head * group;
    for (t.h = first; c.needs_inputs && t.h < first + call.heads * group; ++t.h) {
        load_head(call, x, t, keys);
        if (c.grad_rows && !c.map_first()) take_up(c, x, keys * w, w, t.h == first);
        head_gradients(c, x, t, keys);
        if (c.grad_row_bias) bias_gradients(c, x, t, keys);
        if (c.score.bends()) bend(c.score, (float)a.scale, x.whole.S, keys * w, x.saved);
        float* of_head = sums + (t.h / group - call.head) * a.M * call.stride;
        Logits& l = x.logits;
        product_gradients(call, x, t, keys, l.row_factor(c.score, a.scale), l.product_factor(c.score, a.scale), l.keys, x.whole.S,
                          l.rows, of_head, c.grad_query);
        if (c.gradient)
            product_gradients(
                call, x, t, keys, 1.f, 1.f, l.values, x.dA, x.grad_output, of_head + call.key_stride, c.grad_grad_output);
    }
    if (c.grad_rows && (!c.map_first() || call.head == 0)) write_grad_rows(c, x, t, keys, call.head > 0);
}

// ---- all tiles

// The gradients of the sample's keys and values, from the rows [first, last) of its sums
static void write_sums(const AbarCall& call, Size b, const float* sums, Size first, Size last) {
    const AbarBackward& c = call.c;
    for (Size row = first; row < last; ++row) {
        const Size head = call.head + row / c.a.M, j = row % c.a.M;
        store_key(c.a, b, head, j, sums + row * call.stride, c.a.D, c.grad_key);
        if (c.gradient) store_key(c.a, b, head, j, sums + row * call.stride + call.key_stride, c.a.Dv, c.grad_value);
    }
}
static void add_item(const AbarCall& call, AbarTiles& x, Size item, float* sums) {
    const Size tiles = call.sums.unit;
    tile_gradients(call, x, tile_at(call.c.a, item / tiles, 0, item % tiles, call.lanes), sums);
}

static Size abar_backward(const AbarBackward& c) {
    const Attention& a = c.a;
    const Size threads = thread_count();
    Size lanes = lanes_of_map(a);
    while (lanes > GROUP && a.B * tiles_of(a, lanes) < threads) lanes -= GROUP;
    const Size tiles = tiles_of(a, lanes), items = a.B * tiles;
    if (items * a.H == 0) return DONE;
    // A part has the gradients of all key heads: parts that suit any number of threads would cost a tenth of the time.
    const Size parts = least(tiles, threads / greatest_divisor(a.B, threads)), tasks = least(threads, a.B * parts);
    const Size key_stride = round_up(a.D, VL), stride = key_stride + round_up(a.Dv, VL), of_head = most(a.M * stride, 1);
    const Size heads = c.needs_inputs ? least(a.Hkv, most(1, MOST_SUMS / (tasks * of_head))) : a.Hkv;
    Memory starts, memory;
    const Size* start = cut(items, tiles, parts, tasks, starts);
    AbarCall call = {c, {start, tasks, tiles, parts, 0}, lanes, key_stride, stride, 0, heads};
    call.sums.floats = row_count(call) * stride;
    if (!start || !memory.place([&] { call.sums.plan(memory); })) return NO_MEMORY;
    for (; call.head < a.Hkv; call.head += heads) {
        call.heads = least(heads, a.Hkv - call.head), call.sums.floats = row_count(call) * stride;
        if (run_and_join<AbarTiles>(tasks, call) != DONE) return NO_MEMORY;
    }
    return DONE;
}

}  // namespace
}  // namespace ISA

OPERATOR(abar_backward, AbarBackward)
