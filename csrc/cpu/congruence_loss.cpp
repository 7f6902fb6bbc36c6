// congruence_loss: head-mean maps of the blocks LL, VV, LV, VL, the divergence of each direction, and the gradients.
//
// Bound: multiply-adds. Forward: the scores of all four blocks; backward: three times those of the blocks that have gradients.
// Tricks: the real tokens of a sample alone are taken up, so nothing below knows of masks. The forward pass's maps are kept for
// the backward pass (O((L + V)^2) a sample, no head axis), which then computes each head once. Maps lie as (keys, rows), so that
// a lane is a row: no sum over lanes, and every product of maps but one reads them as they lie.
// Measured: rows congruence_loss of benchmarks/results/cpu.json.
#include "products.h"
#include "rows.h"

namespace ISA {
namespace {

enum Kind : Size { CACR = 0, SINGULAR = 1, DISTRIBUTED = 2 };
enum : int { LL = 0, VV = 1, LV = 2, VL_BLOCK = 3 };
static const int ROW_SIDE[4] = {0, 1, 0, 1}, KEY_SIDE[4] = {0, 1, 1, 0};  // 0 = text, 1 = image
static const Size TILE = 64, GROUP = 16;  // rows of a tile, at most and a multiple of which
static const Size SPAN = 64;              // so many numbers are added in a row; then sums of sums

struct CongruenceLoss {
    Size dtype, B, H, D, lengths[2], kind, directions[2];  // of text and image; whether their directions count
    double scale;
    Rows queries[4], keys[4];  // of the four blocks
    const uint8_t* masks[2];   // (B, L), (B, V), 0 = padding; null for none
    float* maps;               // (B, (L + V) (L' + V')), lengths with a dash rounded up to odd multiples of GROUP
    float* loss;               // (B)
    const float* grad_loss;    // (B)
    void *grad_queries[4], *grad_keys[4];  // (B, H, N, D) of the blocks that have gradients
};

// The real tokens of one side of a sample
struct Tokens {
    const int32_t* at;  // null where they are the first `count`
    Size count;
    Size operator[](Size i) const { return at ? at[i] : i; }
};

struct Workspace {
    float *keys, *rows, *transposed, *S, *E, *T, *cross, *grad_query, *grad_keys;
    void plan(const CongruenceLoss& c, Memory& memory) {
        const Size longest = most(c.lengths[0], c.lengths[1]), padded = round_up(c.D, GROUP);
        keys = memory.take(longest * c.D);
        rows = memory.take(TILE * padded), transposed = memory.take(TILE * c.D);
        S = memory.take(longest * TILE), E = memory.take(longest * TILE), T = memory.take(longest * TILE);
        cross = memory.take(TILE * round_up(longest, GROUP));
        grad_query = memory.take(TILE * c.D), grad_keys = memory.take(longest * padded);
    }
};

struct Job {
    const CongruenceLoss& c;
    int32_t* tokens;  // (B, L + V)
    Size* counts;     // (B, 2); a negative count: the tokens are the first ones
    float* losses;    // (B, 2) of both directions
    float* grads;     // (samples, 2, ...) gradients at the maps from both directions
    Workspace* workspaces;
    Size first, samples;  // of the batch that are at work
    Size next;            // item

    // the stride of a map: an odd number of groups, so that its rows do not fall onto one set of the cache
    Size padded(int side) const { return (c.lengths[side] + GROUP - 1) / (2 * GROUP) * (2 * GROUP) + GROUP; }
    Size map_size() const { return (c.lengths[0] + c.lengths[1]) * (padded(0) + padded(1)); }
    Size offset(int block) const {
        Size at = 0;
        for (int n = 0; n < block; ++n) at += c.lengths[KEY_SIDE[n]] * padded(ROW_SIDE[n]);
        return at;
    }
    float* map(Size b, int block) const { return c.maps + b * map_size() + offset(block); }
    float* grad(Size b, int direction, int block) const {
        return grads + ((b - first) * 2 + direction) * map_size() + offset(block);
    }
    Tokens of(Size b, int side) const {
        const Size count = counts[b * 2 + side];
        const int32_t* at = tokens + b * (c.lengths[0] + c.lengths[1]) + side * c.lengths[0];
        return {count < 0 ? nullptr : at, count < 0 ? -count - 1 : count};
    }
    bool empty(Size b) const { return of(b, 0).count == 0 || of(b, 1).count == 0 || c.H == 0; }
    bool used(int block) const {  // by the directions that count
        if (block == LV || block == VL_BLOCK) return c.kind == DISTRIBUTED || c.directions[block - LV];
        return c.kind != DISTRIBUTED || c.directions[block];
    }
    Size take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }  // no result depends on who takes an item
};

struct RowTile {
    Size first, rows, width;
};
INLINE Size row_tiles(Size n) { return (n + TILE - 1) / TILE; }
INLINE RowTile row_tile(Size n, Size index) {
    const Size groups = (n + GROUP - 1) / GROUP, tiles = row_tiles(n);
    const Size first = share(groups, index, tiles) * GROUP, last = least(share(groups, index + 1, tiles) * GROUP, n);
    return {first, last - first, round_up(last - first, GROUP)};
}

// ln(1 + x) to a few ulp for x > -1: the rounding of 1 + x is made good by the factor
INLINE Vector log1p_all(Vector x) {
    const Vector u = x + 1.f, rounded = u - 1.f;
    return rounded == Vector{} ? x : log_all(u) * (x / rounded);
}

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

static const float* load_keys(const Job& job, int block, Size b, Size h, float* copy, Size& stride) {
    const CongruenceLoss& c = job.c;
    const Rows& x = c.keys[block];
    const Tokens tokens = job.of(b, KEY_SIDE[block]);
    if (!tokens.at && c.dtype == FLOAT32) {
        stride = x.stride_n;
        return (const float*)x.data + x.at(b, h, 0);
    }
    stride = c.D;
    for (Size j = 0; j < tokens.count; ++j) widen(element(x.data, c.dtype, x.at(b, h, tokens[j])), c.dtype, c.D, copy + j * c.D);
    return copy;
}

// S: the scores (keys, width) of a tile of rows. The scaled queries stay in `rows` (width, stride) with zeros around them.
static void scores(const Job& job, int block, Size b, Size h, const RowTile& t, const float* K, Size stride, Workspace& w) {
    const CongruenceLoss& c = job.c;
    const Rows& x = c.queries[block];
    const Tokens tokens = job.of(b, ROW_SIDE[block]);
    const Size padded = round_up(c.D, GROUP);
    const float scale = (float)c.scale;
    for (Size i = 0; i < t.rows; ++i) {
        float* row = w.rows + i * padded;
        widen(element(x.data, c.dtype, x.at(b, h, tokens[t.first + i])), c.dtype, c.D, row);
        for (Size d = 0; d < c.D; ++d) row[d] *= scale;
        memset(row + c.D, 0, (padded - c.D) * sizeof(float));
    }
    memset(w.rows + t.rows * padded, 0, (t.width - t.rows) * padded * sizeof(float));
    transpose(w.rows, padded, t.width, c.D, w.transposed, t.width);
    product<false>(job.of(b, KEY_SIDE[block]).count, t.width, c.D, K, stride, w.transposed, t.width, w.S, t.width, false);
}

INLINE Vector top_of(const float* S, Size M, Size w) {
    Vector top = load(S);
    for (Size j = 1; j < M; ++j) top = maximum(top, load(S + j * w));
    return top;
}
// S becomes e^(S - top), for one vector of rows; their sum
INLINE Vector exponentials(float* S, Size M, Size w, Vector top) {
    Vector total = {};
    for (Size j0 = 0; j0 < M; j0 += SPAN) {
        Vector part = {};
        for (Size j = j0; j < least(j0 + SPAN, M); ++j) {
            const Vector e = exp_negative(load(S + j * w) - top);
            store(S + j * w, e);
            part += e;
        }
        total += part;
    }
    return total;
}

// ---- maps

// map (M, width) += softmax(S) / H
static void add_softmax(float* S, Size M, Size w, Size H, bool first, float* map, Size ld) {
    for (Size i = 0; i < w; i += VL) {
        const Vector total = exponentials(S + i, M, w, top_of(S + i, M, w)), factor = 1.f / (total * (float)H);
        for (Size j = 0; j < M; ++j) {
            float* to = map + j * ld + i;
            const Vector p = load(S + j * w + i) * factor;
            store(to, first ? p : load(to) + p);
        }
    }
}

// The largest log-softmax of the heads so far, `map`, and the sum of e^(log-softmax - largest), `sums`. E is scratch.
static void add_log_softmax(const float* S, Size M, Size w, bool first, float* map, Size ld, float* sums, float* E) {
    memcpy(E, S, M * w * sizeof(float));
    for (Size i = 0; i < w; i += VL) {
        const Vector top = top_of(S + i, M, w), lse = log_all(exponentials(E + i, M, w, top));
        for (Size j = 0; j < M; ++j) {
            float *largest = map + j * ld + i, *sum = sums + j * w + i;
            const Vector x = (load(S + j * w + i) - top) - lse;
            const Vector before = first ? x : load(largest), total = first ? Vector{} : load(sum);
            const Vector e = exp_negative(-absolute(x - before));  // 1 at first
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

// The first largest key of each row, as a number
static void first_largest(const float* map, Size M, Size w, float* index) {
    for (Size i = 0; i < w; i += VL) {
        Vector best = load(map + i), at = {};
        for (Size j = 1; j < M; ++j) {
            const Vector x = load(map + j * w + i);
            const Integers above = x > best;
            best = above ? x : best, at = above ? splat((float)j) : at;
        }
        store(index + i, at);
    }
}

static void map_of_tile(Job& job, Size b, int block, const RowTile& t, Workspace& w) {
    const CongruenceLoss& c = job.c;
    const Size M = job.of(b, KEY_SIDE[block]).count, ld = job.padded(ROW_SIDE[block]);
    const bool cross = block == LV || block == VL_BLOCK, picks = c.kind == SINGULAR && cross, logs = c.kind == SINGULAR && !cross;
    float* map = job.map(b, block) + t.first;
    for (Size h = 0; h < c.H; ++h) {
        Size stride;
        const float* K = load_keys(job, block, b, h, w.keys, stride);
        scores(job, block, b, h, t, K, stride, w);
        if (logs)
            add_log_softmax(w.S, M, t.width, h == 0, map, ld, w.T, w.E);
        else if (picks)
            add_softmax(w.S, M, t.width, c.H, h == 0, w.T, t.width);
        else
            add_softmax(w.S, M, t.width, c.H, h == 0, map, ld);
    }
    if (logs) finish_log_sum(M, t.width, map, ld, w.T);
    if (picks) first_largest(w.T, M, t.width, map);  // in place of the block's map
}

static void maps_task(Job& job, Size task) {
    const CongruenceLoss& c = job.c;
    const Size tiles = row_tiles(most(c.lengths[0], c.lengths[1])), items = c.B * 4 * tiles;
    for (Size item = job.take(); item < items; item = job.take()) {
        const Size b = item / (4 * tiles), tile = item % tiles;
        const int block = item / tiles % 4;
        const Size n = job.of(b, ROW_SIDE[block]).count;
        if (job.empty(b) || !job.used(block) || tile >= row_tiles(n)) continue;
        map_of_tile(job, b, block, row_tile(n, tile), job.workspaces[task]);
    }
}

// ---- divergence of a direction

// One direction of a sample: p (n, n) is the map of its own block, t what the others say. Gradients are null in the forward pass.
struct Direction {
    Size n, m, ld_n, ld_m;  // tokens of the own and of the other side; strides of maps whose rows they are
    const float *own, *other;  // (n, n), (m, m)
    const float *cross, *back;  // keys of the other side and own rows, (m, n); the reverse (n, m)
    float *grad_own, *grad_other, *grad_cross, *grad_back;
    float weight;  // of a row in the gradient
};

// What the other side predicts for the rows of a tile, T (n, width), for CACR and IAIS singular before a softmax.
static void target_of_tile(Size kind, Size H, const Direction& x, const RowTile& t, Workspace& w) {
    const float* cross = x.cross + t.first;
    if (kind == CACR) {  // X other X^T with X = cross
        product<false>(x.m, t.width, x.m, x.other, x.ld_m, cross, x.ld_n, w.S, t.width, false);
        product<true>(x.n, t.width, x.m, x.cross, x.ld_n, w.S, t.width, w.T, t.width, false);
    } else if (kind == DISTRIBUTED) {  // cross back
        product<false>(x.n, t.width, x.m, x.back, x.ld_m, cross, x.ld_n, w.T, t.width, false);
    } else {  // other[c_i, c_k], which is kept as ln of H times it
        const float log_heads = logf((float)H);
        for (Size k = 0; k < x.n; ++k) {
            const float* from = x.other + (Size)x.cross[k] * x.ld_m;
            float* to = w.T + k * t.width;
            for (Size i = 0; i < t.width; ++i) to[i] = from[(Size)cross[least(i, t.rows - 1)]];
            for (Size i = 0; i < t.width; i += VL) store(to + i, exp_negative(load(to + i) - log_heads));
        }
    }
}

// CACR and IAIS singular: sym(p, softmax(T)) of each row into `value`; p is softmax(own), or for IAIS singular e^(own - ln H).
// With gradients, grad_own becomes that at `own` and T the one at T. d = ln p - ln t; no term is negative.
static void softmax_divergence(bool singular, Size H, const Direction& x, const RowTile& tile, float* T, float* E, float* value) {
    const Size w = tile.width;
    const Vector lowest = splat(-87.f);  // there e^d - 1 is -1
    const float heads = singular ? logf((float)H) : 0.f;
    for (Size i = 0; i < w; i += VL) {
        const float* own = x.own + tile.first + i;
        // What all keys have in common cancels in d. It is taken off before the two are subtracted from each other, and for IAIS singular
        // ln H first, which is exact where it matters: for p near 1.
        const Vector own_0 = singular ? splat(heads) : load(own), t_0 = singular ? Vector{} : load(T + i);
        const auto gap = [&](Size k, Vector t) { return (load(own + k * x.ld_n) - own_0) - (t - t_0); };
        // So it is in the sum of e^t: where all keys have one t, the plain sum is off by ulps, in all rows alike.
        const Vector e_0 = exp_bounded(load(T + i));
        Vector total = {}, moment = {};
        for (Size k = 0; k < x.n; ++k) {
            const Vector t = load(T + k * w + i), e = exp_bounded(t);  // t lies in [0, 1]
            store(E + k * w + i, e);
            total += e - e_0;
            if (!singular) moment += e * expm1_bounded(gap(k, t));
        }
        total += e_0 * (float)x.n;
        const Vector inverse = 1.f / total, shift = singular ? log_all(total) : -log1p_all(moment * inverse);
        Vector sum = {}, sum_p = {}, sum_t = {};
        for (Size k = 0; k < x.n; ++k) {
            const Vector t = load(E + k * w + i) * inverse, d = gap(k, load(T + k * w + i)) + shift;
            const Vector difference = t * expm1_bounded(maximum(lowest, d));  // p - t
            sum += difference * d;
            sum_p += (t + difference) * d + difference, sum_t += t * d + difference;
        }
        store(value + i, sum);
        if (!x.grad_own) continue;
        for (Size k = 0; k < x.n; ++k) {
            float *at = T + k * w + i, *grad_own = x.grad_own + tile.first + k * x.ld_n + i;
            const Vector t = load(E + k * w + i) * inverse, d = gap(k, load(at)) + shift;
            const Vector difference = t * expm1_bounded(maximum(lowest, d));
            // for IAIS singular d may be -100, and the rounding of t + difference as much too large
            const Vector p = singular ? exp_negative(load(own + k * x.ld_n) - heads) : t + difference;
            store(grad_own, x.weight * (singular ? p * d + difference : p * d + difference - p * sum_p));
            store(at, -x.weight * (t * d + difference - t * sum_t));
        }
    }
}

// IAIS distributed: t (ln t - ln(p + eps)) + p (ln p - ln(t + eps)), with ln x - ln(x + eps) = -ln(1 + eps / x)
static void plain_divergence(const Direction& x, const RowTile& tile, float* T, float* value) {
    const Size w = tile.width;
    const Vector tiny = splat(1.17549435e-38f);  // 0 ln 0 = 0
    const float eps = 1e-6f;
    for (Size i = 0; i < w; i += VL) {
        Vector sum = {};
        for (Size k = 0; k < x.n; ++k) {
            const Size at = tile.first + k * x.ld_n + i;
            const Vector p = load(x.own + at), t = load(T + k * w + i), safe_p = maximum(tiny, p), safe_t = maximum(tiny, t);
            const Vector first_p = log_all(p + eps), first_t = log_all(t + eps);
            if (!x.grad_own) {
                sum += (t - p) * (first_t - first_p) - t * log1p_all(eps / safe_t) - p * log1p_all(eps / safe_p);
                continue;
            }
            store(x.grad_own + at, x.weight * (log_all(safe_p) - first_t + (p - t + eps) / (p + eps)));
            store(T + k * w + i, x.weight * (log_all(safe_t) - first_p + (t - p + eps) / (t + eps)));
        }
        store(value + i, sum);
    }
}

// From the gradient at T: those at the maps that T was made of. `add`: another tile came before.
static void target_backward(Size kind, const Direction& x, const RowTile& t, bool add, Workspace& w) {
    const Size m = round_up(x.m, GROUP);
    if (kind == SINGULAR) {
        // First the keys that picked the same token are added for each row, then the rows, as the formula does: where every token
        // picks the same one, all n^2 numbers fall onto one weight and cancel, and one long sum has several times the error.
        float* sums = w.S;  // (m, width), of which only rows that are picked are used
        for (Size k = 0; k < x.n; ++k) memset(sums + (Size)x.cross[k] * t.width, 0, t.width * sizeof(float));
        for (Size k = 0; k < x.n; ++k) {
            float* to = sums + (Size)x.cross[k] * t.width;
            for (Size i = 0; i < t.width; i += VL) store(to + i, load(to + i) + load(w.T + k * t.width + i));
        }
        for (Size k = 0; k < x.n; ++k) {
            float *from = sums + (Size)x.cross[k] * t.width, *to = x.grad_other + (Size)x.cross[k] * x.ld_m;
            for (Size i = 0; i < t.rows; ++i) to[(Size)x.cross[t.first + i]] += from[i];
            memset(from, 0, t.width * sizeof(float));  // once for all keys that picked it
        }
        return;
    }
    transpose(x.cross + t.first, x.ld_n, x.m, t.rows, w.cross, m);  // (rows, m)
    for (Size i = 0; i < t.rows; ++i) memset(w.cross + i * m + x.m, 0, (m - x.m) * sizeof(float));
    if (kind == CACR) {
        product<false>(x.m, t.width, x.n, x.cross, x.ld_n, w.T, t.width, w.S, t.width, false);
        product<false>(x.m, m, t.rows, w.S, t.width, w.cross, m, x.grad_other, x.ld_m, add);
    } else {
        product<true>(x.m, t.width, x.n, x.back, x.ld_m, w.T, t.width, x.grad_cross + t.first, x.ld_n, false);
        product<false>(x.n, m, t.rows, w.T, t.width, w.cross, m, x.grad_back, x.ld_m, add);
    }
}

static Direction direction_of(const Job& job, Size b, int side, bool gradients) {
    const int own = side, other = 1 - side, cross = LV + side, back = VL_BLOCK - side;
    Direction x = {job.of(b, own).count,
                   job.of(b, other).count,
                   job.padded(own),
                   job.padded(other),
                   job.map(b, own),
                   job.map(b, other),
                   job.map(b, cross),
                   job.map(b, back),
                   nullptr,
                   nullptr,
                   nullptr,
                   nullptr,
                   0.f};
    if (!gradients) return x;
    x.grad_own = job.grad(b, side, own), x.grad_other = job.grad(b, side, other);
    x.grad_cross = job.grad(b, side, cross), x.grad_back = job.grad(b, side, back);
    x.weight = job.c.grad_loss[b] / (float)x.n;
    return x;
}

// The loss of a direction of a sample, or its gradients at the maps.
static float divergence(Job& job, Size b, int side, bool gradients, Workspace& w) {
    const Size kind = job.c.kind;
    const Direction x = direction_of(job, b, side, gradients);
    if (gradients && kind == SINGULAR) memset(x.grad_other, 0, x.m * x.ld_m * sizeof(float));
    double loss = 0;
    for (Size tile = 0; tile < row_tiles(x.n); ++tile) {
        const RowTile t = row_tile(x.n, tile);
        float value[TILE];
        target_of_tile(kind, job.c.H, x, t, w);
        if (kind == DISTRIBUTED)
            plain_divergence(x, t, w.T, value);
        else
            softmax_divergence(kind == SINGULAR, job.c.H, x, t, w.T, w.E, value);
        for (Size i = 0; i < t.rows; ++i) loss += value[i];
        if (gradients) target_backward(kind, x, t, tile > 0, w);
    }
    return (float)(loss / x.n);
}

template <bool GRADIENTS>
static void divergence_task(Job& job, Size task) {
    for (Size item = job.take(); item < job.samples * 2; item = job.take()) {
        const Size b = job.first + item / 2;
        const int side = item % 2;
        const bool counts = job.c.directions[side] && !job.empty(b);
        const float loss = counts ? divergence(job, b, side, GRADIENTS, job.workspaces[task]) : 0.f;
        if (!GRADIENTS) job.losses[b * 2 + side] = loss;
    }
}

// ---- gradients of queries and keys

// S (scores) becomes the gradient at the scores, from the gradients G at the head-mean map (one or two, to be added).
static void scores_backward(float* S, Size M, Size w, Size H, const float* G0, const float* G1, Size ld) {
    const float share_of_head = 1.f / H;
    for (Size i = 0; i < w; i += VL) {
        const Vector top = top_of(S + i, M, w);
        Vector total = {}, dot = {};
        for (Size j0 = 0; j0 < M; j0 += SPAN) {
            Vector part = {}, part_dot = {};
            for (Size j = j0; j < least(j0 + SPAN, M); ++j) {
                float* s = S + j * w + i;
                const Vector e = exp_negative(load(s) - top), g = load(G0 + j * ld + i);
                store(s, e);
                part += e, part_dot += e * (G1 ? g + load(G1 + j * ld + i) : g);
            }
            total += part, dot += part_dot;
        }
        const Vector inverse = 1.f / total, mean = dot * inverse, factor = inverse * share_of_head;
        for (Size j = 0; j < M; ++j) {
            float* s = S + j * w + i;
            const Vector g = load(G0 + j * ld + i);
            store(s, load(s) * factor * ((G1 ? g + load(G1 + j * ld + i) : g) - mean));
        }
    }
}

// The same from gradients L at the logarithm of the sum over heads, `map`, and G at the mean, each of which may be null. They are
// not added before the last step: where P is 1, its share of G is exactly 0, and L may be thousands of times smaller.
static void scores_backward_log(float* S, Size M, Size w, Size H, const float* L, const float* G, const float* map, Size ld,
                                float* E) {
    const float share_of_head = 1.f / H;
    memcpy(E, S, M * w * sizeof(float));
    for (Size i = 0; i < w; i += VL) {
        const Vector top = top_of(S + i, M, w), total = exponentials(E + i, M, w, top), lse = log_all(total);
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
            store(s, G ? by_log + p * (load(G + j * ld + i) - mean) * share_of_head : by_log);
        }
    }
}

static void* gradient_row(const CongruenceLoss& c, void* data, int side, Size b, Size h, Size n) {
    return (void*)element(data, c.dtype, ((b * c.H + h) * c.lengths[side] + n) * c.D);
}
// Zeros at padding, or in all rows
static void clear_rows(const Job& job, void* data, int side, Size b, Size h, bool all) {
    const CongruenceLoss& c = job.c;
    const Tokens tokens = job.of(b, side);
    const Size first = all || tokens.at ? 0 : tokens.count, rows = c.lengths[side] - first;
    // an empty tensor has no pointer
    if (rows * c.D > 0) memset(gradient_row(c, data, side, b, h, first), 0, rows * c.D * (c.dtype == FLOAT32 ? 4 : 2));
}

// of_own, of_other: gradients at the map from the directions of the block's rows and of the other side; null where there is none
static void gradients_of_head(Job& job, Size b, int block, Size h, const float* of_own, const float* of_other, Workspace& w) {
    const CongruenceLoss& c = job.c;
    const int rows = ROW_SIDE[block], columns = KEY_SIDE[block];
    const Tokens row_tokens = job.of(b, rows), key_tokens = job.of(b, columns);
    const Size M = key_tokens.count, ld = job.padded(rows), padded = round_up(c.D, GROUP);
    Size stride;
    const float* K = load_keys(job, block, b, h, w.keys, stride);
    for (Size tile = 0; tile < row_tiles(row_tokens.count); ++tile) {
        const RowTile t = row_tile(row_tokens.count, tile);
        scores(job, block, b, h, t, K, stride, w);
        const float *own = of_own ? of_own + t.first : nullptr, *other = of_other ? of_other + t.first : nullptr;
        if (c.kind == SINGULAR)
            scores_backward_log(w.S, M, t.width, c.H, own, other, job.map(b, block) + t.first, ld, w.E);
        else
            scores_backward(w.S, M, t.width, c.H, own ? own : other, own ? other : nullptr, ld);
        product<false>(M, padded, t.rows, w.S, t.width, w.rows, padded, w.grad_keys, padded, tile > 0);
        product<true>(c.D, t.width, M, K, stride, w.S, t.width, w.grad_query, t.width, false);
        transpose(w.grad_query, t.width, c.D, t.rows, w.rows, padded);
        for (Size i = 0; i < t.rows; ++i) {
            float* row = w.rows + i * padded;
            for (Size d = 0; d < c.D; ++d) row[d] *= (float)c.scale;
            narrow(row, c.D, c.dtype, gradient_row(c, c.grad_queries[block], rows, b, h, row_tokens[t.first + i]));
        }
    }
    for (Size j = 0; j < M; ++j)
        narrow(w.grad_keys + j * padded, c.D, c.dtype, gradient_row(c, c.grad_keys[block], columns, b, h, key_tokens[j]));
}

static void gradients_task(Job& job, Size task) {
    const CongruenceLoss& c = job.c;
    const int blocks = c.kind == DISTRIBUTED ? 4 : 2;
    for (Size item = job.take(); item < job.samples * blocks * c.H; item = job.take()) {
        const Size b = job.first + item / (blocks * c.H), h = item % c.H;
        const int block = item / c.H % blocks, rows = ROW_SIDE[block], columns = KEY_SIDE[block];
        // of IAIS distributed the own block belongs to its direction alone
        const bool own = c.directions[rows], other = c.directions[1 - rows] && !(c.kind == DISTRIBUTED && block < LV);
        const bool none = job.empty(b) || !(own || other);
        clear_rows(job, c.grad_queries[block], rows, b, h, none);
        clear_rows(job, c.grad_keys[block], columns, b, h, none);
        if (none) continue;
        const float* of_own = own ? job.grad(b, rows, block) : nullptr;
        const float* of_other = other ? job.grad(b, 1 - rows, block) : nullptr;
        gradients_of_head(job, b, block, h, of_own, of_other, job.workspaces[task]);
    }
}

// ---- the operator

static void start(Job& job, void (*task)(Job&, Size), Size threads) {
    job.next = 0;
    run(threads, job, task);
}

static const Size CHUNK = 1 << 20;  // numbers of gradients at maps, at most, or those of a sample for each thread

// The job's workspaces, taken from `memory`; false where there is not enough.
static bool prepare(Job& job, Memory& memory, Size threads, bool gradients) {
    const CongruenceLoss& c = job.c;
    job.first = 0, job.samples = c.B;
    if (gradients) job.samples = least(c.B, most(threads, CHUNK / (2 * job.map_size() + 1)));
    for (int pass = 0; pass < 2; ++pass) {
        if (pass == 1 && !memory.allocate()) return false;
        job.counts = (Size*)memory.take(c.B * 4);
        job.tokens = (int32_t*)memory.take(c.B * (c.lengths[0] + c.lengths[1]));
        job.losses = memory.take(c.B * 2);
        job.grads = gradients ? memory.take(job.samples * 2 * job.map_size()) : nullptr;
        job.workspaces = (Workspace*)memory.take(threads * sizeof(Workspace) / sizeof(float));
        for (Size n = 0; n < threads; ++n) {
            Workspace w;
            w.plan(c, memory);
            if (pass == 1) job.workspaces[n] = w;
        }
    }
    list_tokens(job);
    return true;
}

static Size congruence_loss_forward(const CongruenceLoss& c) {
    const Size threads = thread_count();
    Job job = {c, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 0, 0};
    Memory memory;
    if (!prepare(job, memory, threads, false)) return NO_MEMORY;
    start(job, maps_task, threads);
    start(job, divergence_task<false>, threads);
    for (Size b = 0; b < c.B; ++b) c.loss[b] = job.losses[b * 2] + job.losses[b * 2 + 1];
    memory.release();
    return DONE;
}

static Size congruence_loss_backward(const CongruenceLoss& c) {
    const Size threads = thread_count();
    Job job = {c, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 0, 0};
    Memory memory;
    if (!prepare(job, memory, threads, true)) return NO_MEMORY;
    for (const Size step = job.samples; job.first < c.B; job.first += step) {
        job.samples = least(step, c.B - job.first);
        start(job, divergence_task<true>, threads);
        start(job, gradients_task, threads);
    }
    memory.release();
    return DONE;
}

}  // namespace
}  // namespace ISA

OPERATOR(congruence_loss_forward, CongruenceLoss)
OPERATOR(congruence_loss_backward, CongruenceLoss)
