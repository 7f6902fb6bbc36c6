// One (B, N, M) map of all heads: A, or relu(A * dA) with dA = dO V^T (Chefer et al., ICCV 2021, eq. 5); or r times it, for
// relevancy_step and relevancy_attention where rows of r are many: the heads of a tile are reduced first, and the map is not written.
//
// Bound: multiply-adds, D (and Dv) per entry of each head; then one exponential. A tile has all keys of its rows, so products and
// exponentials are made once; beyond MOST_KEYS keys it has fewer rows. The tiles of several heads are reduced at
// once, in the cache, so each entry of the map is written to memory once; dA is taken up while it is in registers. Where a sample
// has few tiles, the heads of a tile are cut into parts, whose reductions are joined: so threads can share a tile, and its bits do
// not depend on whether they do. Few queries would fill few lanes of a tile: there vectors run along the features of products, and
// along the keys (few_rows.h).
// Measured: rows attention_map of benchmarks/results/cpu.json.
#include "few_rows.h"
#include "shared_sums.h"

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
    float* map;  // (B, N, M), or null where r Abar is what counts
    const float *rows, *direct;  // r (B, T, N); (B, T, M), what is added to r Abar, or null
    Size T;
    float* result;  // (B, T, M)
    FIELDS(a, score, grad_output, gradient, reduction, row_normalize, lse, map, rows, direct, T, result)
    Size lanes() const { return lanes_of_map(a); }
    // How many heads' tiles there are at once: fewer where rows are long, as lanes
    Size heads() const { return least(a.H, a.M > MOST_KEYS ? 1 : HEADS); }
    Size tiles() const { return tiles_of(a, lanes()); }
    Tile tile(Size item) const { return tile_at(a, item / tiles(), 0, item % tiles(), lanes()); }
    bool few() const { return a.N <= FEW_QUERIES && score.is_product(); }
    // Into how many parts the heads of a tile are cut, by the sizes of a sample alone: a power of two, which most threads share
    Size parts() const {
        Size count = 1;
        while (6 * count <= a.H && 2 * count * (few() ? 1 : tiles()) <= 8) count *= 2;
        return count;
    }
    Size part(Size n) const { return share(a.H, n, parts()); }  // its first head
    Size size() const { return few() ? a.N * round_up(a.M, GROUP) : lanes() * a.M; }  // of a tile
};

// One thread's tiles, (keys, width) each: of some heads, and of the map, of which a chunk is enough where these are all heads
struct MapTiles {
    Logits logits;
    float *rows, *grad_output;  // of dO: (LANES, Dv rounded up), (Dv, width); or pairs, as Logits::rows
    float *heads, *dA, *map;  // dA is written where Dv is more than DEPTH
    float* carried;  // (LANES, T rounded up): r of the tile's rows
    float* joined;  // (parts, size), or null where there is one part or threads share tiles
    Size size;  // of a tile
    float *largest, *rescale, *factor, *shifts;  // (LANES), factor (H, LANES), shifts (blocks of keys, LANES)
    double* total;  // (LANES)

    template <class Run> void plan(const Run& call, Memory& memory) {
        const MapCall& c = call.c;
        const Attention& a = c.a;
        logits.pairs = Logits::takes_pairs(a, c.score);
        logits.plan(a, c.score, memory, false);
        rows = memory.take(LANES * round_up(a.Dv, VL)), grad_output = memory.take(LANES * a.Dv);
        size = c.size(), joined = call.joins() ? memory.take(c.parts() * size) : nullptr;
        heads = memory.take(size * c.heads()), map = memory.take(c.heads() < a.H || c.result ? size : CHUNK * LANES);
        carried = memory.take(c.result ? LANES * round_up(c.T, VL) : 0);
        dA = memory.take(c.gradient ? LANES * a.key_block() : 0);
        largest = memory.take(LANES), rescale = memory.take(LANES), factor = memory.take(a.H * LANES);
        total = memory.take_doubles(LANES), shifts = memory.take((a.M / a.key_block() + 1) * LANES);
    }
};

// The tile S of head t.h: e^(logit - shift), with the shift that each block of keys has in x.shifts; and its rows' factors, over the
// number of heads for a mean
static void map_head(const MapCall& c, MapTiles& x, const Tile& t, Size keys, float* S) {
    const Attention& a = c.a;
    const Size w = t.width;
    x.logits.load_queries(a, c.score, t);
    by_blocks(a, keys, [&](Size j0, Size count) {
        x.logits.S = S + j0 * w;
        x.logits.compute(a, c.score, t, j0, count, count, nullptr);
        online_softmax(S + j0 * w, count, w, j0 == 0, x.logits.top, x.largest, x.total, x.rescale);
        memcpy(x.shifts + j0 / a.key_block() * LANES, x.largest, w * sizeof(float));
    });
    float* factor = x.factor + t.h * LANES;
    finish_rows(x.largest, x.total, w, {x.largest, factor});
    take_caller_lse(a, t, c.lse, {x.largest, factor});
    for (Size i = 0; c.reduction == MEAN && i < w; ++i) factor[i] /= a.H;
}
// A block of S, `count` keys from j0, times dA
static void times_gradient(const MapCall& c, MapTiles& x, const Tile& t, Size j0, Size count, float* S) {
    const Attention& a = c.a;
    if (j0 == 0) x.logits.load_rows(c.grad_output, a.dtype, t, a.Dv, 1.f, x.rows, x.grad_output);
    x.logits.value_products(a, t, j0, count, count, x.grad_output, x.dA, TakeGradient{S, t.width});
}
// The factors of the rows in a block of keys, whose shift may not be the largest logit of all keys
static const float* factors_of_block(const MapCall& c, MapTiles& x, const Tile& t, Size h, Size j0) {
    const float *factor = x.factor + h * LANES, *shift = x.shifts + j0 / c.a.key_block() * LANES;
    if (c.heads() > 1) return factor;  // there is one block
    for (Size i = 0; i < t.width; i += VL)
        store(x.rescale + i, load(factor + i) * exp_negative(load(shift + i) - load(x.largest + i)));
    return x.rescale;
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

// The reduction of the heads [begin, end_head) of a tile, to `joined` (keys, width); where that is null, to the map
static void map_tile(const MapCall& c, MapTiles& x, Tile t, Size begin, Size end_head, float* joined) {
    const Attention& a = c.a;
    const Size w = t.width, heads = c.heads(), keys = t.keys(a, visible_keys(a, t.b));
    for (Size first = begin; first < end_head && keys > 0; first += heads) {
        const Size some = least(heads, end_head - first);
        for (t.h = first; t.h < first + some; ++t.h) map_head(c, x, t, keys, x.heads + (t.h - first) * x.size);
        by_blocks(a, keys, [&](Size j0, Size count) {
            for (t.h = first; c.gradient && t.h < first + some; ++t.h)
                times_gradient(c, x, t, j0, count, x.heads + (t.h - first) * x.size + j0 * w);
            const float* factors = factors_of_block(c, x, t, first, j0);
            for (Size j = j0; j < j0 + count; j += CHUNK) {
                const Size n = least(CHUNK, j0 + count - j);
                float* map = joined ? joined + j * w : x.map + (heads < a.H ? j * w : 0);
                take_up_heads(c.reduction, some, x.heads + j * w, x.size, n * w, w, factors, first > begin, map);
                if (!joined && first + some == end_head)
                    transpose(map, w, n, t.rows, c.map + (t.b * a.N + t.first) * a.M + j, a.M);
            }
        });
    }
    if (!joined) finish_map(c, t, keys);
}

struct MapRun {
    const MapCall& c;
    Size items, tasks;
    float* joined;  // (items, parts, size) where threads share tiles; null where each tile is one task's
    bool joins() const { return c.parts() > 1 && !joined; }  // whether a task joins the parts of its tiles
};

// ---- few queries: vectors run along the features of products, then along the keys

// One thread's rows: of some heads that share a key head, with one number for each key, and of the map
struct FewRows {
    RowBias bias;
    // (rows, D or Dv rounded up), (rows, stride), (rows, stride), with rows rounded up to BLOCK_ROWS; (N, stride)
    float *inputs, *heads, *dA, *map, *joined;  // joined: as MapTiles
    static Size stride(const Attention& a) { return round_up(a.M, GROUP); }
    static Size heads_at_once(const Attention& a) { return most(1, least(a.group(), FEW_QUERIES / a.N)); }
    void plan(const MapRun& call, Memory& memory) {
        const Attention& a = call.c.a;
        const Size rows = round_up(heads_at_once(a) * a.N, BLOCK_ROWS);
        inputs = memory.take(rows * round_up(most(a.D, a.Dv), 2 * VL)), heads = memory.take(rows * stride(a));
        map = memory.take(a.N * stride(a)), joined = call.joins() ? memory.take(call.c.parts() * call.c.size()) : nullptr;
        dA = memory.take(call.c.gradient ? rows * stride(a) : 0);
        bias.plan(a, memory);
    }
};

// S (heads * N, stride) = the rows of `heads` heads from h of `x` times `factor`, by the keys' or values' rows of their head
static void products_of_heads(const Attention& a, const StridedTensor& x, float factor, const StridedTensor& keys, Size size,
                              Size b, Size h, Size heads, Size count, float* inputs, float* S) {
    with_numbers(a.dtype, [&](auto e) {
        using E = decltype(e);
        const Size rows = heads * a.N, stride = round_up(size, E::STEP), to_next = FewRows::stride(a);
        typename E::Number* query = (typename E::Number*)inputs;
        memset(query, 0, round_up(rows, BLOCK_ROWS) * stride * sizeof(*query));
        for (Size r = 0; r < rows; ++r)
            E::load_query(element(x.data, a.dtype, x.at(b, h + r / a.N, r % a.N)), size, factor, query + r * stride);
        const RowsInPlace all = rows_in_place(a, keys, b, h / a.group(), 0), none = {};
        few_products<E>(
            query, stride, rows, size, all, count, fetches_rows(a, rows) ? all.from(CHUNK_OF_KEYS) : none, S, to_next);
        for (Size r = 0; r < rows; ++r) E::scale_products(S + r * to_next, count, factor);
    });
}

// Scores S of a row become e^(logit - shift); its factor is returned. `row` is a tile of this row alone.
static float softmax_of_row(const MapCall& c, const Tile& row, Size keys, RowBias& bias, float* S) {
    const Attention& a = c.a;
    const Size padded = round_up(keys, GROUP);
    float largest_of[GROUP], rescale[GROUP], factor;
    double total[GROUP] = {};
    for (Size j = keys; j < padded; ++j) S[j] = 0.f;
    if (c.score.bends()) activate(c.score, (float)a.scale, S, padded, nullptr);
    mask_row(a, row.b, row.h, row.first, 0, keys, bias, S);
    for (Size j = keys; j < padded; ++j) S[j] = -INFINITY;
    softmax_of_keys(S, padded, true, largest_of, total, rescale);
    for (Size i = 1; i < GROUP; ++i) total[0] += total[i];
    finish_rows(largest_of, total, 1, {largest_of, &factor});
    take_caller_lse(a, row, c.lse, {largest_of, &factor});
    return c.reduction == MEAN ? factor / a.H : factor;
}

// `heads` heads from h, which share a key head, are taken up into x.map, `again` if they are not the first.
static void few_rows_of_heads(const MapCall& c, FewRows& x, Size b, Size h, Size heads, Size keys, bool again) {
    const Attention& a = c.a;
    const Size stride = FewRows::stride(a), padded = round_up(keys, GROUP);
    const uint8_t* visible = a.masks.keys ? a.masks.keys + b * a.M : nullptr;
    x.bias.load_heads(a, b, h, heads, 0, keys);
    products_of_heads(a, a.query, c.score.bends() ? 1.f : (float)a.scale, a.key, a.D, b, h, heads, keys, x.inputs, x.heads);
    if (c.gradient) products_of_heads(a, c.grad_output, 1.f, a.value, a.Dv, b, h, heads, keys, x.inputs, x.dA);
    for (Size r = 0; r < heads * a.N; ++r) {
        float *S = x.heads + r * stride, *dA = x.dA + r * stride, factors[GROUP];
        const float factor = softmax_of_row(c, {b, h + r / a.N, r % a.N, 1, GROUP}, keys, x.bias, S);
        for (float& each : factors) each = factor;
        for (Size j = 0; c.gradient && visible && j < keys; ++j)
            if (!visible[j]) dA[j] = 0.f;  // padding may hold NaN
        for (Size j = keys; c.gradient && j < padded; ++j) dA[j] = 0.f;
        for (Size j = 0; c.gradient && j < padded; j += VL) store(S + j, maximum(Vector{}, load(S + j) * load(dA + j)));
        take_up_heads(c.reduction, 1, S, 0, padded, GROUP, factors, again || r >= a.N, x.map + r % a.N * stride);
    }
}

// ---- all tiles

// The parts of a tile, (parts, size), to the map
static void join_tile(const MapCall& c, const Tile& t, const float* parts) {
    alignas(64) float map[CHUNK * LANES], one[LANES];
    for (float& x : one) x = 1.f;
    const Size w = t.width, keys = t.keys(c.a, visible_keys(c.a, t.b));
    for (Size j = 0; j < keys; j += CHUNK) {
        const Size n = least(CHUNK, keys - j);
        for (Size part = 0; part < c.parts(); ++part)
            take_up_heads(c.reduction, 1, parts + part * c.size() + j * w, 0, n * w, w, one, part > 0, map);
        transpose(map, w, n, t.rows, c.map + (t.b * c.a.N + t.first) * c.a.M + j, c.a.M);
    }
    finish_map(c, t, keys);
}
static void map_task(MapRun& call, MapTiles& x, Size task) {
    const MapCall& c = call.c;
    // by turns, to and fro: under the causal mask the later rows take longer
    const Size parts = call.joined ? c.parts() : 1, items = call.items * parts;
    for (Size turn = 0; turn * call.tasks < items; ++turn) {
        const Size item = turn * call.tasks + (turn % 2 ? call.tasks - 1 - task : task), part = item % parts;
        if (item >= items) continue;
        const Tile t = c.tile(item / parts);
        if (call.joined) map_tile(c, x, t, c.part(part), c.part(part + 1), call.joined + item * c.size());
        else if (!x.joined) map_tile(c, x, t, 0, c.a.H, nullptr);
        for (Size n = 0; x.joined && n < c.parts(); ++n) map_tile(c, x, t, c.part(n), c.part(n + 1), x.joined + n * c.size());
        if (x.joined) join_tile(c, t, x.joined);
    }
}
static void join_task(MapRun& call, Size task) {
    const MapCall& c = call.c;
    for (Size item = share(call.items, task, call.tasks); item < share(call.items, task + 1, call.tasks); ++item)
        join_tile(c, c.tile(item), call.joined + item * c.parts() * c.size());
}

// A sample's few rows (N, stride) to the map, or r times them to the result
static void write_few_rows(const MapCall& c, Size b, float* rows) {
    const Attention& a = c.a;
    const Tile t = {b, 0, 0, a.N, GROUP};
    const Size keys = t.keys(a, visible_keys(a, b)), stride = FewRows::stride(a), bytes = a.M * sizeof(float);
    for (Size n = 0; c.map && n < a.N; ++n) memcpy(c.map + (b * a.N + n) * a.M, rows + n * stride, keys * sizeof(float));
    if (c.map) return finish_map(c, t, keys);
    for (Size n = 0; c.row_normalize && n < a.N; ++n) normalize(rows + n * stride, keys);
    for (Size k = b * c.T; k < (b + 1) * c.T; ++k) {
        float* to = c.result + k * a.M;
        if (c.direct) memcpy(to, c.direct + k * a.M, bytes);
        else memset(to, 0, bytes);
        for (Size n = 0; n < a.N; ++n)
            for (Size j = 0; j < keys; ++j) to[j] += c.rows[k * a.N + n] * rows[n * stride + j];
    }
}
// Part `part` of the heads of sample b, to `map`
static void few_rows_of_part(const MapCall& c, FewRows& x, Size b, Size part, float* map) {
    const Size keys = Tile{b, 0, 0, c.a.N, GROUP}.keys(c.a, visible_keys(c.a, b)), first = c.part(part), last = c.part(part + 1);
    x.map = map;
    for (Size h = first, heads; h < last; h += heads) {
        heads = least(FewRows::heads_at_once(c.a), least(last - h, c.a.group() - h % c.a.group()));
        few_rows_of_heads(c, x, b, h, heads, keys, h > first);
    }
}
// The parts of a sample, (parts, size), joined in the first of them
static void join_few_rows(const MapCall& c, Size b, float* parts) {
    alignas(64) float one[GROUP];
    for (float& x : one) x = 1.f;
    for (Size part = 1; part < c.parts(); ++part)
        take_up_heads(c.reduction, 1, parts + part * c.size(), 0, c.size(), GROUP, one, true, parts);
    write_few_rows(c, b, parts);
}
static void few_rows_task(MapRun& call, FewRows& x, Size task) {
    const MapCall& c = call.c;
    const Size parts = call.joined ? c.parts() : 1, items = call.items * parts;
    float* map = x.joined ? x.joined : x.map;
    for (Size item = share(items, task, call.tasks); item < share(items, task + 1, call.tasks); ++item) {
        if (call.joined) few_rows_of_part(c, x, item / parts, item % parts, call.joined + item * c.size());
        for (Size n = 0; !call.joined && n < c.parts(); ++n) few_rows_of_part(c, x, item, n, map + n * c.size());
        if (!call.joined) join_few_rows(c, item, map);
    }
}
static void join_few_rows_task(MapRun& call, Size task) {
    for (Size b = share(call.items, task, call.tasks); b < share(call.items, task + 1, call.tasks); ++b)
        join_few_rows(call.c, b, call.joined + b * call.c.parts() * call.c.size());
}

// ---- r Abar

struct CarryRun {
    const MapCall& c;
    Size parts;  // of each tile's heads
    SharedSums sums;  // the items are parts of tiles, sample by sample; the sums are r Abar of a sample, (M, T rounded up)
    static bool joins() { return false; }
};

// r of the tile's rows as (rows, T rounded up), for row_normalize over the sums of the rows of `map` (keys, width). A zero row stays
// zero, also one whose sum is subnormal.
static void load_carried(const MapCall& c, const Tile& t, const float* map, Size keys, float* carried) {
    const Size stride = round_up(c.T, VL), w = t.width;
    memset(carried, 0, t.rows * stride * sizeof(float));
    transpose(c.rows + t.b * c.T * c.a.N + t.first, c.a.N, c.T, t.rows, carried, stride);
    for (Size i = 0; c.row_normalize && i < t.rows; i += VL) {
        const Vector total = sum_over(keys, [&](Size j) { return load(map + j * w + i); });
        for (Size n = i; n < least(i + VL, t.rows); ++n) {
            const Vector sum = splat(total[n - i] < FLT_MIN ? 1.f : total[n - i]);
            for (Size k = 0; k < stride; k += VL) store(carried + n * stride + k, load(carried + n * stride + k) / sum);
        }
    }
}
static Size row_count(const CarryRun& call) { return call.c.a.M; }
static void write_sums(const CarryRun& call, Size b, const float* sums, Size first, Size last) {
    const MapCall& c = call.c;
    const Size stride = round_up(c.T, VL), M = c.a.M;
    transpose(sums + first * stride, stride, last - first, c.T, c.result + b * c.T * M + first, M);
    for (Size n = b * c.T; c.direct && n < (b + 1) * c.T; ++n)
        for (Size j = first; j < last; ++j) c.result[n * M + j] += c.direct[n * M + j];
}

static void add_item(const CarryRun& call, MapTiles& x, Size item, float* sums) {
    const MapCall& c = call.c;
    const Tile t = c.tile(item / call.parts);
    const Size keys = t.keys(c.a, visible_keys(c.a, t.b)), part = item % call.parts, H = c.a.H, stride = round_up(c.T, VL);
    map_tile(c, x, t, share(H, part, call.parts), share(H, part + 1, call.parts), x.map);
    load_carried(c, t, x.map, keys, x.carried);
    product<false>(keys, stride, t.rows, x.map, t.width, x.carried, stride, sums, stride, true);
}

static Size carry_rows(const MapCall& c) {
    const Attention& a = c.a;
    const Size parts = c.row_normalize ? 1 : c.parts();  // rows are divided by their sums over all heads
    const Size unit = c.tiles() * parts, parts_of_sums = least(unit, 8), tasks = least(thread_count(), a.B * parts_of_sums);
    Memory starts, memory;
    const Size* start =
        cut(a.B * unit, unit, parts_of_sums, tasks, starts, [&](Size item) {  // under the causal mask the later rows take longer
            const Tile t = c.tile(item / parts);
            return t.keys(a, visible_keys(a, t.b)) + 1;
        });
    CarryRun call = {c, parts, {start, tasks, unit, parts_of_sums, a.M * round_up(c.T, VL)}};
    if (!start || !memory.place([&] { call.sums.plan(memory); })) return NO_MEMORY;
    return run_and_join<MapTiles>(tasks, call);
}

// Whether threads share tiles: where the slowest of them then has less to do
static bool shares_tiles(Size items, Size parts, Size threads) {
    const Size whole = (items + threads - 1) / threads * parts, shared = (items * parts + threads - 1) / threads;
    return 5 * shared < 4 * whole;  // to join them later costs something
}
static Size attention_map(const MapCall& c) {
    const Attention& a = c.a;
    const bool few = c.few();
    const Size items = a.M > 0 ? a.B * (few ? 1 : c.tiles()) : 0, threads = thread_count();
    if (items == 0 || a.H * a.N == 0) return DONE;
    if (c.result && !few) return carry_rows(c);
    if (c.map) take_large_pages(c.map, a.B * a.N * a.M * sizeof(float));
    const bool shares = shares_tiles(items, c.parts(), threads);
    MapRun call = {c, items, least(threads, items * (shares ? c.parts() : 1)), nullptr};
    Memory memory;
    if (shares && !memory.place([&] { call.joined = memory.take(items * c.parts() * c.size()); })) return NO_MEMORY;
    const Size result = few ? run_with_space(call.tasks, call, few_rows_task) : run_with_space(call.tasks, call, map_task);
    call.tasks = least(call.tasks, items);
    if (shares && result == DONE) run(call.tasks, call, few ? join_few_rows_task : join_task);
    return result;
}

}  // namespace
}  // namespace ISA
OPERATOR(attention_map, MapCall)
