// Head-mean maps of the blocks LL, VV, LV, VL of congruence_loss, and from gradients at them those of queries and keys.
//
// Products of bfloat16 heads are those of pairs (pairs.h), for which gradients of scores are rounded. Maps stay float32.
#pragma once
#include "pairs.h"

namespace ISA {
namespace {

enum Kind : Size { CACR = 0, SINGULAR = 1, DISTRIBUTED = 2 };
enum : int { LL = 0, VV = 1, LV = 2, VL_BLOCK = 3 };
static const int ROW_SIDE[4] = {0, 1, 0, 1}, KEY_SIDE[4] = {0, 1, 1, 0};  // 0 = text, 1 = image
static const Size TILE = 64;  // rows of a tile at most
static const Size TOGETHER = 1 << 16;  // numbers of keys and of a tile of maps, at most
static const Size SPAN = 64;  // so many numbers are added in a row; then sums of sums

struct CongruenceLoss {
    Size dtype, B, H, D, lengths[2], kind, as_they_are, directions[2];  // of text and image; whether their directions count
    double scale;
    StridedTensor queries[4], keys[4];  // of the four blocks
    const uint8_t* masks[2];   // (B, L), (B, V), 0 = padding; null for none
    float* loss;       // (B)
    float* gradients;  // of each sample's loss: (B, H, N, D) of the queries, then of the keys, of blocks that have any; or null
    FIELDS(dtype, B, H, D, lengths, kind, as_they_are, directions, scale, queries, keys, masks, loss, gradients)
};

static bool takes_pairs(const CongruenceLoss& c) { return pairs_pay(c.dtype, least(c.D, least(c.lengths[0], c.lengths[1]))); }

// The real tokens of one side of a sample
struct Tokens {
    const int32_t* at;  // null where they are the first `count`
    Size count;
    Size operator[](Size i) const { return at ? at[i] : i; }
};

// Real tokens of a head as float32 rows of D rounded up: the tensor itself where it can be read as it is, else a copy; or a copy as
// rows of pairs
struct TokenRows {
    const void* data;
    Size stride;
    const float* numbers() const { return (const float*)data; }
    const Pair* pairs() const { return (const Pair*)data; }
};

// A number rounded up to an odd number of groups: rows of such a stride do not fall onto one set of the cache.
INLINE Size odd_groups(Size n) { return (n + GROUP - 1) / (2 * GROUP) * (2 * GROUP) + GROUP; }

struct Workspace {
    float *keys, *rows, *transposed, *S, *E, *T, *cross, *grad_query, *grad_keys;
    // of pairs: of two keys, (half(keys), padded), and of two rows, (half(TILE), padded); of a tile of gradients, of two rows,
    // (keys, half(TILE)), and of two keys, (half(keys), TILE), and the latter transposed
    Pair *key_pairs, *row_pairs, *along, *across, *turned;
    void plan(const CongruenceLoss& c, Memory& memory) {
        const Size longest = most(c.lengths[0], c.lengths[1]), padded = round_up(c.D, GROUP);
        keys = memory.take(longest * padded);
        rows = memory.take(TILE * padded), transposed = memory.take(TILE * c.D);
        S = memory.take((longest + 1) * TILE), E = memory.take(longest * TILE), T = memory.take(longest * TILE);
        cross = memory.take(TILE * odd_groups(longest));
        grad_query = memory.take(TILE * padded), grad_keys = memory.take(longest * padded);
        if (!takes_pairs(c)) return;
        key_pairs = (Pair*)memory.take(half(longest) * padded), row_pairs = (Pair*)memory.take(half(TILE) * padded);
        along = (Pair*)memory.take(longest * half(TILE)), across = (Pair*)memory.take(half(longest) * TILE);
        turned = (Pair*)memory.take(half(longest) * TILE);
    }
};

struct Job {
    const CongruenceLoss& c;
    bool pairs = takes_pairs(c);
    Size tasks;
    Size* taken;  // (tasks, GROUP): of the items of each task's share. No two tasks' numbers lie in one line of the cache.
    int32_t* tokens;  // (B, L + V)
    Size* counts;  // (B, 2); a negative count: the tokens are the first ones
    float* losses;  // (B, 2) of both directions
    float* maps;  // (samples, (L + V) (L' + V')), lengths with a dash rounded up to odd multiples of GROUP
    float* grads;  // (samples, 2, ...) gradients at the maps from both directions
    float* kept;  // (samples, heads_kept, ...) weights of the blocks that have gradients
    Size heads_kept;
    Workspace* workspaces;
    Queue* whole;  // samples that a task does by itself
    Size first, samples;  // of the batch that are at work
    explicit Job(const CongruenceLoss& c) : c(c), tasks(thread_count()), samples(least(c.B, tasks)) {}

    Job alone(Size task) const {  // of a task that does samples by itself
        Job job = *this;
        job.tasks = job.samples = 1, job.taken += task * GROUP, job.workspaces += task;
        job.maps += task * map_size(), job.grads += task * 2 * grad_size();
        job.kept += task * heads_kept * weights_size(blocks());
        return job;
    }

    void run_tasks(void (*task)(Job&, Size)) {
        memset(taken, 0, tasks * GROUP * sizeof(Size));
        run(tasks, *this, task);
    }
    // f(item) for each item: a task takes those of its share, which belong to samples that its cache holds, and then what other tasks
    // have left. No result depends on who takes an item.
    template <class F> void for_items(Size items, Size task, const F& f) {
        for (Size n = 0; n < tasks; ++n) {
            const Size at = (task + n) % tasks, last = share(items, at + 1, tasks);
            Size* count = taken + at * GROUP;
            for (Size item; (item = share(items, at, tasks) + __atomic_fetch_add(count, 1, __ATOMIC_RELAXED)) < last;) f(item);
        }
    }

    Size depth() const { return pairs ? half(c.D) : c.D; }  // of the products of queries and keys
    Size padded(int side) const { return odd_groups(c.lengths[side]); }  // the stride of a map
    Size map_size() const { return (c.lengths[0] + c.lengths[1]) * (padded(0) + padded(1)); }
    Size offset(int block) const {
        Size at = 0;
        for (int n = 0; n < block; ++n) at += c.lengths[KEY_SIDE[n]] * padded(ROW_SIDE[n]);
        return at;
    }
    int blocks() const { return c.kind == DISTRIBUTED ? 4 : 2; }  // that have gradients
    Size grad_size() const { return c.kind == DISTRIBUTED ? map_size() : offset(LV); }
    Size gradients_size() const { return blocks() * c.B * c.H * (c.lengths[0] + c.lengths[1]) * c.D; }
    Size weights_size(int blocks) const {  // of a head
        Size size = 0;
        for (int n = 0; n < blocks; ++n) size += (c.lengths[KEY_SIDE[n]] + 1) * round_up(c.lengths[ROW_SIDE[n]], GROUP);
        return size;
    }
    float* map(Size b, int block) const { return maps + (b - first) * map_size() + offset(block); }
    float* grad(Size b, int direction, int block) const {
        return grads + ((b - first) * 2 + direction) * grad_size() + offset(block);
    }
    Tokens of(Size b, int side) const {
        const Size count = counts[b * 2 + side];
        const int32_t* at = tokens + b * (c.lengths[0] + c.lengths[1]) + side * c.lengths[0];
        return {count < 0 ? nullptr : at, count < 0 ? -count - 1 : count};
    }
    bool empty(Size b) const { return of(b, 0).count == 0 || of(b, 1).count == 0 || c.H == 0; }
    bool logs(int block) const { return c.kind == SINGULAR && !c.as_they_are && block < LV; }
    // where the weights of a tile stay until its gradients are made; null where they are computed again
    float* kept_weights(Size b, int block, Size h, const RowTile& t) const {
        if (h >= heads_kept || block >= blocks()) return nullptr;
        const Size before = ((b - first) * heads_kept + h) * weights_size(blocks()) + weights_size(block);
        return kept + before + t.first * (c.lengths[KEY_SIDE[block]] + 1);
    }
    bool used(int block) const {  // by the directions that count
        if (block == LV || block == VL_BLOCK) return c.kind == DISTRIBUTED || c.directions[block - LV];
        return c.kind != DISTRIBUTED || c.directions[block];
    }
};

// ---- queries and keys of a block

static void list_tokens(Job& job) {
    const CongruenceLoss& c = job.c;
    for (Size b = 0; b < c.B; ++b)
        for (int side = 0; side < 2; ++side) {
            const Size length = c.lengths[side];
            const uint8_t* mask = c.masks[side] ? c.masks[side] + b * length : nullptr;
            int32_t* at = job.tokens + b * (c.lengths[0] + c.lengths[1]) + side * c.lengths[0];
            Size count = 0;
            for (Size i = 0; mask && i < length; ++i)
                if (mask[i]) at[count++] = (int32_t)i;
            const bool first_ones = !mask || count == 0 || at[count - 1] == count - 1;
            job.counts[b * 2 + side] = !mask ? -length - 1 : first_ones ? -count - 1 : count;
        }
}

// Whether the tokens' rows are float32 numbers in whole vectors, one after the other
INLINE bool lies_ready(const CongruenceLoss& c, const Tokens& tokens) {
    return !tokens.at && c.dtype == FLOAT32 && c.D % GROUP == 0;
}
// The tokens [first, first + count); `copy` holds as many rows.
static TokenRows load_rows(const Job& job, const StridedTensor& x, const Tokens& tokens, Size b, Size h, Size first, Size count,
                           float* copy) {
    const CongruenceLoss& c = job.c;
    if (lies_ready(c, tokens)) return {(const float*)x.data + x.at(b, h, first), x.stride_n};
    const Size padded = round_up(c.D, GROUP), n = half(c.D);
    if (job.pairs) {
        for (Size i = 0; i < count; ++i)
            fill_pairs(element(x.data, c.dtype, x.at(b, h, tokens[first + i])), c.D, (Pair*)copy + i * n);
        return {copy, n};
    }
    for (Size i = 0; i < count; ++i) {
        float* row = copy + i * padded;
        widen(element(x.data, c.dtype, x.at(b, h, tokens[first + i])), c.dtype, c.D, row);
        memset(row + c.D, 0, (padded - c.D) * sizeof(float));
    }
    return {copy, padded};
}
static TokenRows load_keys(const Job& job, int block, Size b, Size h, float* copy) {
    const Tokens tokens = job.of(b, KEY_SIDE[block]);
    return load_rows(job, job.c.keys[block], tokens, b, h, 0, tokens.count, copy);
}

// The queries of a tile of rows. w.transposed: (depth, width), with zeros behind the last row.
static TokenRows load_queries(const Job& job, int block, Size b, Size h, const RowTile& t, Workspace& w) {
    return load_rows(job, job.c.queries[block], job.of(b, ROW_SIDE[block]), b, h, t.first, t.rows, w.rows);
}
static void transpose_queries(const Job& job, const TokenRows& Q, const RowTile& t, Workspace& w) {
    if (job.pairs) count_packed(job.depth() * t.width * sizeof(Pair));
    transpose(Q.numbers(), Q.stride, t.rows, job.depth(), w.transposed, t.width);
    for (Size d = 0; d < job.depth(); ++d)
        for (Size i = t.rows; i < t.width; ++i) w.transposed[d * t.width + i] = 0;
}

// S: weights (keys, width) of the transposed queries, which are e^(score - the largest one of the row), and behind them the row's
// sum. The own blocks of IAIS singular take logarithms: scores, and the largest.
static void weights(const Job& job, int block, const RowTile& t, Size M, const TokenRows& K, const Workspace& w, float* S) {
    const CongruenceLoss& c = job.c;
    float* last = S + M * t.width;
    for (Size i = 0; i < t.width; i += VL) store(last + i, splat(-INFINITY));
    const auto finish = scaled((float)c.scale, StoreAndTop{last});
    const auto multiply = [&](const auto* keys, const auto* queries) {
        product<false>(M, t.width, job.depth(), keys, K.stride, queries, t.width, S, t.width, false, finish);
    };
    if (job.pairs) multiply(K.pairs(), (const Pair*)w.transposed);
    else multiply(K.numbers(), w.transposed);
    if (job.logs(block)) return;
    for (Size i = 0; i < t.width; i += VL) store(last + i, exponentials(S + i, M, t.width, load(last + i), S + i));
}

// ---- maps

// map (M, width) += weights / their sum / H
static void add_softmax(const float* S, Size M, Size w, Size H, bool first, float* map, Size ld) {
    for (Size i = 0; i < w; i += VL) {
        const Vector factor = 1.f / (load(S + M * w + i) * (float)H);
        for (Size j = 0; j < M; ++j) {
            float* to = map + j * ld + i;
            const Vector p = load(S + j * w + i) * factor;
            store(to, first ? p : load(to) + p);
        }
    }
}

// The largest log-softmax of the heads so far, `map`, and the sum of e^(log-softmax - largest), `sums`. E is scratch.
static void add_log_softmax(const float* S, Size M, Size w, bool first, float* map, Size ld, float* sums, float* E) {
    for (Size i = 0; i < w; i += VL) {
        const Vector top = load(S + M * w + i), lse = log_all(exponentials(S + i, M, w, top, E + i));
        for (Size j = 0; j < M; ++j) {
            float *largest = map + j * ld + i, *sum = sums + j * w + i;
            const Vector x = (load(S + j * w + i) - top) - lse;
            const Vector before = first ? x : load(largest), total = first ? Vector{} : load(sum);
            const Vector e = exp_negative(x == before ? Vector{} : -absolute(x - before));  // 1 at first, also of -Inf
            store(sum, x > before ? total * e + 1.f : total + e);
            store(largest, maximum(before, x));
        }
    }
}
// map = ln sum_h P_h. ln H is subtracted later: here that would round, and the share of a head that has all of it is exact so.
static void finish_log_sum(Size M, Size w, float* map, Size ld, const float* sums) {
    for (Size j = 0; j < M; ++j)
        for (Size i = 0; i < w; i += VL) {
            float* to = map + j * ld + i;
            store(to, load(to) + log_all(load(sums + j * w + i)));
        }
}

// The first largest key of each row, as a number, in place of the map's first row
static void first_largest(float* map, Size M, Size w, Size ld) {
    for (Size i = 0; i < w; i += VL) {
        Vector best = load(map + i), at = {};
        for (Size j = 1; j < M; ++j) {
            const Vector x = load(map + j * ld + i);
            const Integers above = x > best;
            best = above ? x : best, at = above ? splat((float)j) : at;
        }
        store(map + i, at);
    }
}

INLINE bool same(const StridedTensor& x, const StridedTensor& y) {
    return x.data == y.data && x.stride_b == y.stride_b && x.stride_h == y.stride_h && x.stride_n == y.stride_n;
}

// A tile of rows in the maps of the blocks `first`, `first` + `step`, ..., which all have these rows
static void maps_of_tile(Job& job, Size b, int first, int step, const RowTile& t, Workspace& w) {
    const CongruenceLoss& c = job.c;
    const Size ld = job.padded(ROW_SIDE[first]);
    for (Size h = 0; h < c.H; ++h) {
        int transposed = -1;  // the block whose queries are
        for (int block = first; block < 4; block += step) {
            if (!job.used(block)) continue;
            if (transposed < 0 || !same(c.queries[transposed], c.queries[block]))
                transpose_queries(job, load_queries(job, block, b, h, t, w), t, w);
            transposed = block;
            const Size M = job.of(b, KEY_SIDE[block]).count;
            float *map = job.map(b, block) + t.first, *kept = job.kept_weights(b, block, h, t), *S = kept ? kept : w.S;
            weights(job, block, t, M, load_keys(job, block, b, h, w.keys), w, S);
            if (job.logs(block)) add_log_softmax(S, M, t.width, h == 0, map, ld, w.T, w.E);
            else add_softmax(S, M, t.width, c.H, h == 0, map, ld);
            if (h + 1 < c.H) continue;
            if (job.logs(block)) finish_log_sum(M, t.width, map, ld, w.T);
            else if (c.kind == SINGULAR && block >= LV) first_largest(map, M, t.width, ld);
        }
    }
}

static void maps_task(Job& job, Size task) {
    const CongruenceLoss& c = job.c;
    // A tile's two blocks share their queries, where no task is left without a sample and keys and maps of both fit the second cache.
    const bool together = job.samples >= job.tasks && (c.lengths[0] + c.lengths[1]) * (c.D + TILE) <= TOGETHER;
    const int parts = together ? 1 : 2;
    const Size tiles = row_tiles(most(c.lengths[0], c.lengths[1]), TILE), of_sample = parts * 2 * tiles;
    job.for_items(job.samples * of_sample, task, [&](Size item) {
        const Size b = job.first + item / of_sample, tile = item % tiles;
        const int block = item % of_sample / tiles;
        const Size n = job.of(b, ROW_SIDE[block]).count;
        if (job.empty(b) || tile >= row_tiles(n, TILE)) return;
        maps_of_tile(job, b, block, 2 * parts, row_tile(n, TILE, tile), job.workspaces[task]);
    });
}

// ---- gradients of queries and keys

// S (weights) becomes the gradient at the scores, times `scale`, from the gradients G at the head-mean map (one or two, to be added).
static void scores_backward(float* S, Size M, Size w, Size H, float scale, const float* G0, const float* G1, Size ld) {
    const float share_of_head = scale / H;
    for (Size i = 0; i < w; i += VL) {
        const auto gradient = [&](Size j) {
            const Vector g = load(G0 + j * ld + i);
            return G1 ? g + load(G1 + j * ld + i) : g;
        };
        const Vector dot = sum_over<SPAN>(M, [&](Size j) { return load(S + j * w + i) * gradient(j); });
        const Vector inverse = 1.f / load(S + M * w + i), mean = dot * inverse, factor = inverse * share_of_head;
        for (Size j = 0; j < M; ++j) {
            float* s = S + j * w + i;
            store(s, load(s) * factor * (gradient(j) - mean));
        }
    }
}

// The same from gradients L at the logarithm of the sum over heads, `map`, and G at the mean, each of which may be null. They are
// not added before the last step: where P is 1, its share of G is exactly 0, and L may be thousands of times smaller.
static void scores_backward_log(float* S, Size M, Size w, Size H, float scale, const float* L, const float* G, const float* map,
                                Size ld, float* E) {
    const float share_of_head = 1.f / H;
    for (Size i = 0; i < w; i += VL) {
        const Vector top = load(S + M * w + i), total = exponentials(S + i, M, w, top, E + i), lse = log_all(total);
        Vector sum = {}, dot = {};
        for (Size j = 0; j < M; ++j) {
            const Size at = j * ld + i;
            float* s = S + j * w + i;
            // the part of this head in the sum, from logarithms that are rounded as those of the sum were
            const Vector l = L ? exp_negative((load(s) - top) - lse - load(map + at)) * load(L + at) : Vector{};
            store(s, l);
            sum += l;
            if (G) dot += load(E + j * w + i) * load(G + at);
        }
        const Vector inverse = 1.f / total, mean = dot * inverse;
        for (Size j = 0; j < M; ++j) {
            float* s = S + j * w + i;
            const Vector p = load(E + j * w + i) * inverse, by_log = load(s) - p * sum;
            store(s, (G ? by_log + p * (load(G + j * ld + i) - mean) * share_of_head : by_log) * scale);
        }
    }
}

// Where the gradient of a token's query or key lies
static float* gradient_of(const CongruenceLoss& c, int blocks, int block, bool keys, Size b, Size h, Size n) {
    const auto side = [=](int n) { return n < blocks ? ROW_SIDE[n] : KEY_SIDE[n - blocks]; };
    const int number = keys ? blocks + block : block;
    Size before = 0;
    for (int n = 0; n < number; ++n) before += c.lengths[side(n)];
    return c.gradients + (before * c.B * c.H + (b * c.H + h) * c.lengths[side(number)] + n) * c.D;
}

// grad_query (rows, padded) = that of a tile's queries, and grad_keys (M, padded) = that of the keys, or += with `add`, from S (M, width)
static void products_backward(const Job& job, const RowTile& t, Size M, const float* S, const TokenRows& Q, const TokenRows& K,
                              float* grad_query, float* grad_keys, bool add, const Workspace& w) {
    const Size padded = round_up(job.c.D, GROUP), width = t.width;
    if (!job.pairs) {
        product<false>(M, padded, t.rows, S, width, Q.numbers(), Q.stride, grad_keys, padded, add);
        product<true>(t.rows, padded, M, S, width, K.numbers(), K.stride, grad_query, padded, false);
        return;
    }
    round_tile(S, t.rows, width, M, 1.f, w.along, w.across);
    transpose((const float*)w.across, width, half(M), width, (float*)w.turned, half(M));
    pair_all_rows(Q.pairs(), Q.stride, t.rows, job.c.D, w.row_pairs, padded);
    if (!add) pair_all_rows(K.pairs(), K.stride, M, job.c.D, w.key_pairs, padded);  // for the head's other tiles, too
    product<false>(M, padded, half(t.rows), w.along, width / 2, w.row_pairs, padded, grad_keys, padded, add);
    product<false>(t.rows, padded, half(M), w.turned, half(M), w.key_pairs, padded, grad_query, padded, false);
}

// of_own, of_other: gradients at the map from the directions of the block's rows and of the other side; null where there is none
static void gradients_of_head(Job& job, Size b, int block, Size h, const float* of_own, const float* of_other, Workspace& w) {
    const CongruenceLoss& c = job.c;
    const int rows = ROW_SIDE[block], columns = KEY_SIDE[block], blocks = job.blocks();
    const Tokens row_tokens = job.of(b, rows), key_tokens = job.of(b, columns);
    const Size M = key_tokens.count, ld = job.padded(rows), padded = round_up(c.D, GROUP);
    const float scale = (float)c.scale;
    const TokenRows K = load_keys(job, block, b, h, w.keys);
    const bool whole = c.D == padded, keys_ready = whole && !key_tokens.at, rows_ready = whole && !row_tokens.at;
    float* grad_keys = keys_ready ? gradient_of(c, blocks, block, true, b, h, 0) : w.grad_keys;
    for (Size tile = 0; tile < row_tiles(row_tokens.count, TILE); ++tile) {
        const RowTile t = row_tile(row_tokens.count, TILE, tile);
        float* grad_query = rows_ready ? gradient_of(c, blocks, block, false, b, h, t.first) : w.grad_query;
        float *kept = job.kept_weights(b, block, h, t), *S = kept ? kept : w.S;
        const TokenRows Q = load_queries(job, block, b, h, t, w);
        if (!kept) transpose_queries(job, Q, t, w), weights(job, block, t, M, K, w, S);
        const float *own = of_own ? of_own + t.first : nullptr, *other = of_other ? of_other + t.first : nullptr;
        if (job.logs(block)) scores_backward_log(S, M, t.width, c.H, scale, own, other, job.map(b, block) + t.first, ld, w.E);
        else scores_backward(S, M, t.width, c.H, scale, own ? own : other, own ? other : nullptr, ld);
        products_backward(job, t, M, S, Q, K, grad_query, grad_keys, tile > 0, w);
        for (Size i = 0; !rows_ready && i < t.rows; ++i)
            memcpy(gradient_of(c, blocks, block, false, b, h, row_tokens[t.first + i]), grad_query + i * padded,
                   c.D * sizeof(float));
    }
    for (Size j = 0; !keys_ready && j < M; ++j)
        memcpy(gradient_of(c, blocks, block, true, b, h, key_tokens[j]), grad_keys + j * padded, c.D * sizeof(float));
}

static void gradients_task(Job& job, Size task) {
    const CongruenceLoss& c = job.c;
    const int blocks = job.blocks();
    job.for_items(job.samples * blocks * c.H, task, [&](Size item) {
        const Size b = job.first + item / (blocks * c.H), h = item % c.H;
        const int block = item / c.H % blocks, rows = ROW_SIDE[block];
        // of IAIS distributed the own block belongs to its direction alone
        const bool own = c.directions[rows], other = c.directions[1 - rows] && !(c.kind == DISTRIBUTED && block < LV);
        const bool none = job.empty(b) || !(own || other);
        for (int keys = 0; keys < 2; ++keys) {  // zeros at padding, or in all rows
            const int side = keys ? KEY_SIDE[block] : rows;
            const Tokens tokens = job.of(b, side);
            const Size from = none || tokens.at ? 0 : tokens.count, bytes = (c.lengths[side] - from) * c.D * sizeof(float);
            if (bytes > 0) memset(gradient_of(c, blocks, block, keys, b, h, from), 0, bytes);
        }
        if (none) return;
        const float* of_own = own ? job.grad(b, rows, block) : nullptr;
        const float* of_other = other ? job.grad(b, 1 - rows, block) : nullptr;
        gradients_of_head(job, b, block, h, of_own, of_other, job.workspaces[task]);
    });
}

}  // namespace
}  // namespace ISA
