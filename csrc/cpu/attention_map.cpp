// One (B, N, M) map of all heads: A, or relu(A * dA) with dA = dO V^T (Chefer et al., ICCV 2021, eq. 5).
//
// Bound: multiply-adds, D (and Dv) per entry of each head; then one exponential. The tiles of four heads are reduced at once, in
// the cache, so each entry of the map is written to memory once; dA is taken up while it is in registers. Beyond MOST_KEYS keys
// the statistics of all heads' rows come first, and the products and exponentials are made twice.
// Measured: rows attention_map of benchmarks/results/cpu.json.
#include "attention.h"

namespace ISA {
namespace {

enum Reduction : Size { MEAN = 0, MAX = 1, MIN = 2 };
static const Size HEADS = 4;  // so many heads' tiles are reduced at once: the map's own tile is written once for all of them
static const Size CHUNK = 64;  // keys of a tile that are reduced and written to the map while they are in the first cache

struct MapCall {
    Attention a;  // with value for the rule "gradient"
    Rows grad_output;
    Size gradient, reduction, row_normalize;
    float* map;  // (B, N, M)
    Tile tile(Size item, Size tiles) const { return tile_at(a, item / tiles, 0, item % tiles); }
};

// One thread's tiles, (block of keys, width) each: of HEADS heads the logits, which become e^(logit - shift) and then that times dA; of
// all heads the map
struct MapTiles {
    Keys keys;
    float *rows, *query, *grad_output;  // transposed: (D, width), (Dv, width)
    float *heads, *S, *dA, *map, *mask;  // S: the tile of the head at hand; dA is written where Dv is more than DEPTH
    Size size;  // of a tile
    float *top, *largest, *total, *rescale;  // (LANES)
    float *shift, *factor, *ones;  // (H, LANES), (H, LANES), (LANES)

    void plan(const MapCall& c, Memory& memory) {
        const Attention& a = c.a;
        keys.plan(a, memory);
        rows = memory.take(LANES * most(a.D, a.Dv)), query = memory.take(LANES * a.D), grad_output = memory.take(LANES * a.Dv);
        size = LANES * a.key_block();
        heads = memory.take(size * least(a.H, HEADS)), map = memory.take(size);
        dA = memory.take(c.gradient ? size : 0), mask = memory.take(2 * GROUP * LANES);
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

// Shift and factor of the rows of head t.h over all keys, the factor over the number of heads for a mean; S keeps e^(logit - shift) of the last block
static void map_statistics(const MapCall& c, MapTiles& x, const Tile& t, Size keys) {
    const Size block = c.a.key_block();
    for (Size j0 = 0; j0 < keys || j0 == 0; j0 += block) {
        const Size count = least(block, keys - j0);
        map_logits(c, x, t, j0, count);
        online_softmax(x.S, count, t.width, j0 == 0, x.top, x.largest, x.total, x.rescale);
    }
    float* factor = x.factor + t.h * LANES;
    finish_rows(x.largest, x.total, t.rows, t.width, {x.shift + t.h * LANES, factor}, nullptr);
    for (Size i = 0; c.reduction == MEAN && i < t.width; ++i) factor[i] /= c.a.H;
}

// The first argument where either is NaN
template <Size REDUCTION>
INLINE Vector reduced(Vector before, Vector x) {
    if (REDUCTION == MEAN) return before + x;
    const Vector either = REDUCTION == MAX ? maximum(before, x) : minimum(before, x);
    return before != before ? before : either;  // a NaN stays
}

// map = the reduction of map, if `again`, and of COUNT heads' tiles, each lane by its factor
template <Size REDUCTION, int COUNT>
static void take_up(const float* tiles, Size size, Size n, Size w, const float* factor, bool again, float* map) {
    for (Size j = 0; j < n; j += w)
        for (Size i = 0; i < w; i += VL) {
            const float* e = tiles + j + i;
            Vector x = load(e) * load(factor + i);
            if (again) x = reduced<REDUCTION>(load(map + j + i), x);
            for (int h = 1; h < COUNT; ++h) x = reduced<REDUCTION>(x, load(e + h * size) * load(factor + h * LANES + i));
            store(map + j + i, x);
        }
}
template <Size REDUCTION>
static void take_up_heads(Size count, const float* tiles, Size size, Size n, Size w, const float* factor, bool again,
                          float* map) {
    if (count == HEADS) return take_up<REDUCTION, HEADS>(tiles, size, n, w, factor, again, map);
    for (Size h = 0; h < count; ++h) take_up<REDUCTION, 1>(tiles + h * size, size, n, w, factor + h * LANES, again || h > 0, map);
}

// The map's rows of a tile and the keys [j0, j0 + count)
static void map_block(const MapCall& c, MapTiles& x, Tile t, Size j0, Size count) {
    const Attention& a = c.a;
    const Size w = t.width;
    const auto take = c.reduction == MEAN ? take_up_heads<MEAN> : c.reduction == MAX ? take_up_heads<MAX> : take_up_heads<MIN>;
    for (Size first = 0; first < a.H; first += HEADS) {
        const Size some = least(HEADS, a.H - first);
        for (t.h = first; t.h < first + some; ++t.h) {
            x.S = x.heads + (t.h - first) * x.size;
            if (a.M <= MOST_KEYS) {
                map_statistics(c, x, t, count);
            } else {
                map_logits(c, x, t, j0, count);
                probabilities(x.S, count, w, {x.shift + t.h * LANES, x.ones});
            }
            if (!c.gradient) continue;
            load_tile(c.grad_output, a.dtype, t, a.Dv, 1.f, x.rows, a.Dv, x.grad_output);
            product<false>(
                count, w, a.Dv, x.keys.value, x.keys.value_stride, x.grad_output, w, x.dA, w, false, TakeGradient{x.S, w});
        }
        for (Size j = 0; j < count; j += CHUNK) {
            const Size n = least(CHUNK, count - j);
            take(some, x.heads + j * w, x.size, n * w, w, x.factor + first * LANES, first > 0, x.map + j * w);
            if (first + some == a.H) transpose(x.map + j * w, w, n, t.rows, c.map + (t.b * a.N + t.first) * a.M + j0 + j, a.M);
        }
    }
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
    x.S = x.heads;
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
    // by turns, to and fro: under the causal mask the later rows take longer
    for (Size turn = 0; turn * call.tasks < call.items; ++turn) {
        const Size item = turn * call.tasks + (turn % 2 ? call.tasks - 1 - task : task);
        if (item < call.items) map_tile(call.c, x, call.c.tile(item, tiles_of(call.c.a)));
    }
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
