// One (B, N, M) map of all heads: A, or relu(A * dA) with dA = dO V^T (Chefer et al., ICCV 2021, eq. 5).
//
// Bound: multiply-adds, D (and Dv) per entry of each head; then one exponential. A tile has all keys of its rows, so products and
// exponentials are made once; beyond MOST_KEYS keys it has fewer rows. The tiles of several heads are reduced at
// once, in the cache, so each entry of the map is written to memory once; dA is taken up while it is in registers. Where tiles are
// too few for the threads, the heads of a tile are shared out, and their reductions are joined at the end.
// Measured: rows attention_map of benchmarks/results/cpu.json.
#include "scores.h"

namespace ISA {
namespace {

static const Size HEADS = 4;  // so many heads' tiles are reduced at once: the map's own tile is written once for all of them
static const Size CHUNK = 64;  // keys of a tile that are reduced and written to the map while they are in the first cache

struct MapCall {
    Attention a;  // with value for the rule "gradient"
    Score score;  // a function of dot products
    StridedTensor grad_output;
    Size gradient, reduction, row_normalize;
    const double* lse;  // (B, H, N) natural log-sum-exp of the caller, or null; it may count keys that are not here
    float* map;  // (B, N, M)
    FIELDS(a, score, grad_output, gradient, reduction, row_normalize, lse, map)
    Size lanes() const { return lanes_of_map(a); }
    // How many heads' tiles there are at once: fewer where rows are long, as lanes
    Size heads() const { return least(a.H, a.M > MOST_KEYS ? 1 : HEADS); }
    Size tiles() const { return tiles_of(a, lanes()); }
    Tile tile(Size item) const { return tile_at(a, item / tiles(), 0, item % tiles(), lanes()); }
};

// One thread's tiles, (keys, width) each: of some heads, and of the map, of which a chunk is enough where these are all heads
struct MapTiles {
    Keys keys, values;
    float *rows, *query, *grad_output;  // transposed: (D, width), (Dv, width)
    float *heads, *dA, *map, *mask;  // dA is written where Dv is more than DEPTH
    Size size;  // of a tile
    float *top, *largest, *shift, *rescale, *factor;  // (LANES), factor (H, LANES)
    double* total;  // (LANES)

    void plan(const MapCall& c, Memory& memory) {
        const Attention& a = c.a;
        keys.plan(a, a.D, memory), values.plan(a, a.Dv, memory);
        rows = memory.take(LANES * most(a.D, a.Dv)), query = memory.take(LANES * a.D), grad_output = memory.take(LANES * a.Dv);
        size = c.lanes() * a.M;
        heads = memory.take(size * c.heads()), map = memory.take(c.heads() < a.H ? size : CHUNK * LANES);
        dA = memory.take(c.gradient ? LANES * a.key_block() : 0), mask = memory.take(2 * GROUP * LANES);
        top = memory.take(LANES), largest = memory.take(LANES), shift = memory.take(LANES);
        total = memory.take_doubles(LANES), rescale = memory.take(LANES), factor = memory.take(a.H * LANES);
    }
};

// The tile S of head t.h: e^(logit - shift), then that times dA; and its rows' factors, over the number of heads for a mean
static void map_head(const MapCall& c, MapTiles& x, const Tile& t, Size keys, float* S) {
    const Attention& a = c.a;
    const Size w = t.width, head = t.h / a.group(), block = a.key_block();
    const bool bends = c.score.bends();
    load_tile(a.query, a.dtype, t, a.D, bends ? 1.f : (float)a.scale, x.rows, a.D, x.query);
    for (Size i = 0; i < w; ++i) x.largest[i] = -INFINITY;
    for (Size j0 = 0; j0 < keys; j0 += block) {
        const Size count = least(block, keys - j0);
        load_keys(a, a.key, a.D, x.keys, t.b, head, j0, count);
        if (bends) bent_logits(a, c.score, t, x.keys, j0, count, x.query, S + j0 * w, x.mask, x.top);
        else dot_logits(a, t, x.keys, j0, count, x.query, S + j0 * w, x.mask, x.top);
        for (Size i = 0; i < w; i += VL) store(x.largest + i, maximum(load(x.largest + i), load(x.top + i)));
    }
    for (Size j0 = 0; j0 < keys; j0 += block)
        online_softmax(S + j0 * w, least(block, keys - j0), w, j0 == 0, x.largest, x.shift, x.total, x.rescale);
    float* factor = x.factor + t.h * LANES;
    finish_rows(x.shift, x.total, w, {x.shift, factor});
    take_caller_lse(a, t, c.lse, {x.shift, factor});
    for (Size i = 0; c.reduction == MEAN && i < w; ++i) factor[i] /= a.H;
    if (!c.gradient) return;
    load_tile(c.grad_output, a.dtype, t, a.Dv, 1.f, x.rows, a.Dv, x.grad_output);
    for (Size j0 = 0; j0 < keys; j0 += block) {
        const Size count = least(block, keys - j0);
        load_keys(a, a.value, a.Dv, x.values, t.b, head, j0, count);
        tile_product<false>(
            t, count, a.Dv, x.values.rows, x.values.stride, x.grad_output, x.dA, false, TakeGradient{S + j0 * w, w});
    }
}

// The first argument where either is NaN
template <Size REDUCTION> INLINE Vector reduced(Vector before, Vector x) {
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
static void take_up_heads(Size reduction, Size count, const float* tiles, Size size, Size n, Size w, const float* factor,
                          bool again, float* map) {
    const auto take = reduction == MEAN ? take_up_heads<MEAN> : reduction == MAX ? take_up_heads<MAX> : take_up_heads<MIN>;
    take(count, tiles, size, n, w, factor, again, map);
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

// The rows of tile t in the map: zeros beyond `keys`, and divided by their sums for row_normalize
static void finish_map(const MapCall& c, const Tile& t, Size keys) {
    const Attention& a = c.a;
    for (Size i = 0; i < t.rows; ++i) {
        float* row = c.map + (t.b * a.N + t.first + i) * a.M;
        memset(row + keys, 0, (a.M - keys) * sizeof(float));
        if (c.row_normalize) normalize(row, keys);
    }
}

// The reduction of the heads [begin, end) of a tile, to `joined` (keys, width); where that is null, to the map
static void map_tile(const MapCall& c, MapTiles& x, Tile t, Size begin, Size end, float* joined) {
    const Attention& a = c.a;
    const Size w = t.width, heads = c.heads(), keys = t.keys(a, visible_keys(a, t.b));
    for (Size first = begin; first < end && keys > 0; first += heads) {
        const Size some = least(heads, end - first);
        for (t.h = first; t.h < first + some; ++t.h) map_head(c, x, t, keys, x.heads + (t.h - first) * x.size);
        for (Size j = 0; j < keys; j += CHUNK) {
            const Size n = least(CHUNK, keys - j);
            float* map = joined ? joined + j * w : x.map + (heads < a.H ? j * w : 0);
            take_up_heads(c.reduction, some, x.heads + j * w, x.size, n * w, w, x.factor + first * LANES, first > begin, map);
            if (!joined && first + some == end) transpose(map, w, n, t.rows, c.map + (t.b * a.N + t.first) * a.M + j, a.M);
        }
    }
    if (!joined) finish_map(c, t, keys);
}

struct MapRun {
    const MapCall& c;
    Size items, parts, tasks;  // each tile's heads are shared out over `parts`
    float* joined;  // (items, parts, tile); null where there is one part
    bool failed;
    Size tile_size() const { return c.lanes() * c.a.M; }
};
static void map_task(MapRun& call, Size task) {
    MapTiles x;
    Memory memory;
    if (!memory.place([&] { x.plan(call.c, memory); })) {
        call.failed = true;
        return;
    }
    // by turns, to and fro: under the causal mask the later rows take longer
    const Size items = call.items * call.parts;
    for (Size turn = 0; turn * call.tasks < items; ++turn) {
        const Size item = turn * call.tasks + (turn % 2 ? call.tasks - 1 - task : task), part = item % call.parts;
        if (item < items)
            map_tile(call.c, x, call.c.tile(item / call.parts), share(call.c.a.H, part, call.parts),
                     share(call.c.a.H, part + 1, call.parts), call.joined ? call.joined + item * call.tile_size() : nullptr);
    }
}
// The parts of the task's tiles, joined
static void join_task(MapRun& call, Size task) {
    const MapCall& c = call.c;
    alignas(64) float map[CHUNK * LANES], one[LANES];
    for (float& x : one) x = 1.f;
    for (Size item = share(call.items, task, call.tasks); item < share(call.items, task + 1, call.tasks); ++item) {
        const Tile t = c.tile(item);
        const Size w = t.width, keys = t.keys(c.a, visible_keys(c.a, t.b));
        for (Size j = 0; j < keys; j += CHUNK) {
            const Size n = least(CHUNK, keys - j);
            for (Size part = 0; part < call.parts; ++part) {
                const float* tile = call.joined + (item * call.parts + part) * call.tile_size();
                take_up_heads(c.reduction, 1, tile + j * w, 0, n * w, w, one, part > 0, map);
            }
            transpose(map, w, n, t.rows, c.map + (t.b * c.a.N + t.first) * c.a.M + j, c.a.M);
        }
        finish_map(c, t, keys);
    }
}

// Into how many parts the heads of each tile are shared out: few, so that the slowest of the threads has the fewest heads
static Size parts_of(Size items, Size heads, Size threads) {
    Size best = 1, fewest = (items + threads - 1) / threads * heads;
    for (Size parts = 2; parts <= least(heads, threads); ++parts) {
        const Size here = (items * parts + threads - 1) / threads * ((heads + parts - 1) / parts);
        if (5 * here < 4 * fewest) best = parts, fewest = here;  // to join them costs something
    }
    return best;
}

static Size attention_map(const MapCall& c) {
    const Size items = c.a.M > 0 ? c.a.B * c.tiles() : 0, threads = thread_count();
    if (items == 0) return DONE;
    const Size parts = parts_of(items, c.a.H, threads);
    MapRun call = {c, items, parts, least(threads, items * parts), nullptr, false};
    Memory memory;
    if (parts > 1 && !memory.place([&] { call.joined = memory.take(items * parts * call.tile_size()); })) return NO_MEMORY;
    run(call.tasks, call, map_task);
    call.tasks = least(call.tasks, items);
    if (parts > 1 && !call.failed) run(call.tasks, call, join_task);
    return call.failed ? NO_MEMORY : DONE;
}

}  // namespace
}  // namespace ISA
OPERATOR(attention_map, MapCall)
