// One (B, N, M) map of all heads: A, or relu(A * dA) with dA = dO V^T (Chefer et al., ICCV 2021, eq. 5).
//
// Bound: multiply-adds, D (and Dv) per entry of each head; then one exponential. The heads are reduced in a tile that stays in the
// cache, so each entry of the map is written to memory once. Beyond MOST_KEYS keys the statistics of all heads' rows come first, and
// the products and exponentials are made twice. Not yet measured: no row is stored.
#include "attention.h"

namespace ISA {
namespace {

enum Reduction : Size { MEAN = 0, MAX = 1, MIN = 2 };

struct MapCall {
    Attention a;  // with value for the rule "gradient"
    Rows grad_output;
    Size gradient, reduction, row_normalize;
    float* map;  // (B, N, M)
    Tile tile(Size item, Size tiles) const { return tile_at(a, item / tiles, 0, item % tiles); }
};

// One thread's tiles: of a head the logits S and dA, of all heads the map; (block of keys, width) each
struct MapTiles {
    Keys keys;
    float *rows, *query, *grad_output;  // transposed: (D, width), (Dv, width)
    float *S, *dA, *map, *mask;
    float *top, *largest, *total, *rescale;  // (LANES)
    float *shift, *factor, *ones;      // (H, LANES), (H, LANES), (LANES)

    void plan(const MapCall& c, Memory& memory) {
        const Attention& a = c.a;
        keys.plan(a, memory);
        rows = memory.take(LANES * most(a.D, a.Dv)), query = memory.take(LANES * a.D), grad_output = memory.take(LANES * a.Dv);
        S = memory.take(LANES * a.key_block()), map = memory.take(LANES * a.key_block());
        dA = memory.take(c.gradient ? LANES * a.key_block() : 0), mask = memory.take(2 * GROUP * LANES);
        top = memory.take(LANES), largest = memory.take(LANES), total = memory.take(LANES), rescale = memory.take(LANES);
        shift = memory.take(a.H * LANES), factor = memory.take(a.H * LANES), ones = memory.take(LANES);
    }
};

// S = the logits of head t.h and the keys [j0, j0 + count)
static void map_logits(const MapCall& c, MapTiles& x, const Tile& t, Size j0, Size count) {
    const Attention& a = c.a;
    load_tile(a.query, a.dtype, t, a.D, (float)a.scale, x.rows, a.D, x.query);
    load_keys(a, x.keys, t.b, t.h / a.group(), j0, count);
    dot_logits(a, t, x.keys, j0, count, x.query, x.S, x.mask, x.top);
}

// Shift and factor of the rows of head t.h over all keys; S keeps e^(logit - shift) of the last block
static void map_statistics(const MapCall& c, MapTiles& x, const Tile& t, Size keys) {
    const Size block = c.a.key_block();
    for (Size j0 = 0; j0 < keys || j0 == 0; j0 += block) {
        const Size count = least(block, keys - j0);
        map_logits(c, x, t, j0, count);
        online_softmax(x.S, count, t.width, j0 == 0, x.top, x.largest, x.total, x.rescale);
    }
    finish_rows(x.largest, x.total, t.rows, t.width, {x.shift + t.h * LANES, x.factor + t.h * LANES}, nullptr);
}

// The first argument where either is NaN
template <Size REDUCTION>
INLINE Vector reduced(Vector before, Vector x) {
    if (REDUCTION == MEAN) return before + x;
    const Vector either = REDUCTION == MAX ? maximum(before, x) : minimum(before, x);
    return before != before ? before : either;  // a NaN stays
}

// map = the reduction of map, but for the first head, with E * factor, or with relu(E * factor * dA)
template <Size REDUCTION, bool GRADIENT>
static void take_up(const float* E, const float* dA, Size count, Size w, const float* factor, bool first, float* map) {
    for (Size i = 0; i < w; i += VL) {
        const Vector by = load(factor + i);
        for (Size n = i; n < count * w; n += w) {
            Vector x = load(E + n) * by;
            if (GRADIENT) x = maximum(Vector{}, x * load(dA + n));
            store(map + n, first ? x : reduced<REDUCTION>(load(map + n), x));
        }
    }
}
typedef void (*TakeUp)(const float*, const float*, Size, Size, const float*, bool, float*);
static const TakeUp TAKE_UP[3][2] = {{take_up<MEAN, false>, take_up<MEAN, true>},
                                     {take_up<MAX, false>, take_up<MAX, true>},
                                     {take_up<MIN, false>, take_up<MIN, true>}};

// The map's rows of a tile and the keys [j0, j0 + count)
static void map_block(const MapCall& c, MapTiles& x, Tile t, Size j0, Size count) {
    const Attention& a = c.a;
    const Size w = t.width;
    for (t.h = 0; t.h < a.H; ++t.h) {
        const float *shift = x.shift + t.h * LANES, *factor = x.factor + t.h * LANES;
        if (a.M <= MOST_KEYS) {
            map_statistics(c, x, t, count);
        } else {
            map_logits(c, x, t, j0, count);
            probabilities(x.S, count, w, {(float*)shift, x.ones});
        }
        if (c.reduction == MEAN)
            for (Size i = 0; i < w; ++i) x.total[i] = factor[i] / a.H;
        if (c.gradient) {
            load_tile(c.grad_output, a.dtype, t, a.Dv, 1.f, x.rows, a.Dv, x.grad_output);
            product<false>(count, w, a.Dv, x.keys.value, x.keys.value_stride, x.grad_output, w, x.dA, w, false);
        }
        TAKE_UP[c.reduction][c.gradient](x.S, x.dA, count, w, c.reduction == MEAN ? x.total : factor, t.h == 0, x.map);
    }
    for (Size i = 0; i < t.rows; i += VL)
        transpose(x.map + i, w, count, least(VL, t.rows - i), c.map + (t.b * a.N + t.first + i) * a.M + j0, a.M);
}

static void normalize(float* row, Size n) {  // a row of zeros stays
    Vector total = Vector{};
    float rest = 0;
    Size j = 0;
    for (; j + VL <= n; j += VL) total += load(row + j);
    for (; j < n; ++j) rest += row[j];
    rest += sum(total);
    if (rest == 0) return;
    for (j = 0; j < n; ++j) row[j] /= rest;
}

static void map_tile(const MapCall& c, MapTiles& x, Tile t) {
    const Attention& a = c.a;
    const Size block = a.key_block(), keys = t.keys(a, visible_keys(a, t.b));
    if (a.M > MOST_KEYS)
        for (t.h = 0; t.h < a.H; ++t.h) map_statistics(c, x, t, keys);
    for (Size j0 = 0; j0 < keys; j0 += block) map_block(c, x, t, j0, least(block, keys - j0));
    for (Size i = 0; i < t.rows; ++i) {
        float* row = c.map + (t.b * a.N + t.first + i) * a.M;
        memset(row + keys, 0, (a.M - keys) * sizeof(float));
        if (c.row_normalize) normalize(row, keys);
    }
}

struct MapRun {
    const MapCall& c;
    Size items, tasks;
    bool failed;
};
static void map_task(MapRun& call, Size task) {
    MapTiles x;
    Memory memory;
    x.plan(call.c, memory);
    if (!memory.allocate()) {
        call.failed = true;
        return;
    }
    x.plan(call.c, memory);
    for (Size i = 0; i < LANES; ++i) x.ones[i] = 1;
    // by turns: under the causal mask the later rows take longer
    for (Size item = task; item < call.items; item += call.tasks) map_tile(call.c, x, call.c.tile(item, tiles_of(call.c.a)));
    memory.release();
}

static Size attention_map(const MapCall& c) {
    MapRun call = {c, c.a.M > 0 ? c.a.B * tiles_of(c.a) : 0, 0, false};
    call.tasks = least(thread_count(), call.items);
    if (call.items > 0) run(call.tasks, call, map_task);
    return call.failed ? NO_MEMORY : DONE;
}

}  // namespace
}  // namespace ISA
OPERATOR(attention_map, MapCall)
