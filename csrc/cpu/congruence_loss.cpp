// congruence_loss: head-mean maps of the blocks LL, VV, LV, VL, the divergence of each direction, and the gradients.
//
// In a direction a side's own map p (n, n) is compared with what the other side says, t, row by row [names below]:
//     cacr:              t = softmax(X other X^T), p = softmax(own)          X = cross                      [cacr_target]
//     iais_singular:     t = softmax(other[c_i, c_k]), p = own               c_i: the key that row i picked [singular_target]
//     iais_distributed:  t = X Y, p = own                                    Y = back                       [distributed_target]
//     value = sum_k (p - t) (ln p - ln t)                                    [softmax_divergence, plain_divergence]
// With normalize="none", `as_they_are`, p = own and t has no softmax.
//
// Bound: multiply-adds: the scores of all four blocks, and twice those of the blocks that have gradients. The gradient is linear in
// that of the loss, so it is made together with the loss, and the backward pass only multiplies it.
// Tricks: the real tokens of a sample alone are taken up, so nothing below knows of masks. The weights of as many heads as are a few
// megabytes stay until the gradients are made; those of other heads are computed again. Maps lie as (keys, rows), so that a lane is
// a row: no sum over lanes, and every product of maps but one reads them as they lie. The scale and the largest score of a row are
// taken while scores are in registers. A task does a sample whole, so that it stays in the task's cache.
// Measured: rows congruence_loss of benchmarks/results/cpu.json.
#include "congruence_maps.h"

namespace ISA {
namespace {

// ---- divergence of a direction

// One direction of a sample: p (n, n) is the map of its own block, t what the others say. Gradients are null in the forward pass.
struct Direction {
    Size n, m, ld_n, ld_m;  // tokens of the own and of the other side; strides of maps whose rows they are
    const float *own, *other;  // (n, n), (m, m)
    const float *cross, *back;  // keys of the other side and own rows, (m, n); the reverse (n, m)
    float *grad_own = nullptr, *grad_other = nullptr, *grad_cross = nullptr, *grad_back = nullptr;
    float weight = 0;  // of a row in the gradient
};

// T (n, width): the other side's prediction for the rows of a tile, for CACR and IAIS singular before a softmax
static void cacr_target(const Direction& x, const RowTile& t, Workspace& w) {  // X other X^T with X = cross
    const float* cross = x.cross + t.first;
    // the rows of a map lie on a page each: together they stay in the first cache
    for (Size k = 0; k < x.m; ++k) memcpy(w.E + k * t.width, cross + k * x.ld_n, t.width * sizeof(float));
    product<false>(x.m, t.width, x.m, x.other, x.ld_m, w.E, t.width, w.S, t.width, false);
    product<true>(x.n, t.width, x.m, x.cross, x.ld_n, w.S, t.width, w.T, t.width, false);
}
static void distributed_target(const Direction& x, const RowTile& t, Workspace& w) {  // cross back
    product<false>(x.n, t.width, x.m, x.back, x.ld_m, x.cross + t.first, x.ld_n, w.T, t.width, false);
}
static void singular_target(bool logs, Size H, const Direction& x, const RowTile& t,
                            Workspace& w) {  // other[c_i, c_k], with `logs` from ln of H times it
    const float *cross = x.cross + t.first, log_heads = logf((float)H);
    for (Size k = 0; k < x.n; ++k) {
        const float* from = x.other + (Size)x.cross[k] * x.ld_m;
        float* to = w.T + k * t.width;
        for (Size i = 0; i < t.width; ++i) to[i] = from[(Size)cross[least(i, t.rows - 1)]];
        for (Size i = 0; logs && i < t.width; i += VL) store(to + i, exp_negative(load(to + i) - log_heads));
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
        // A part that all keys have in common cancels in d. It is taken off before the two are subtracted from each other, and for IAIS
        // singular ln H first, which is exact where it matters: for p near 1.
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

// IAIS distributed: t (ln t - ln(p + eps)) + p (ln p - ln(t + eps)), with ln x - ln(x + eps) = -ln(1 + eps / x).
// As they are: (p - t) (ln(p + eps) - ln(t + eps)), from ln(1 + y) of y >= 0, so that it is never negative and keeps its digits near 0.
static void plain_divergence(bool as_they_are, const Direction& x, const RowTile& tile, float* T, float* value) {
    const Size w = tile.width;
    const Vector tiny = splat(FLT_MIN);  // 0 ln 0 = 0
    const float eps = 1e-6f;
    for (Size i = 0; i < w; i += VL) {
        Vector sum = {};
        for (Size k = 0; k < x.n; ++k) {
            const Size at = tile.first + k * x.ld_n + i;
            const Vector p = load(x.own + at), t = load(T + k * w + i);
            if (as_they_are) {
                const Vector gap = p - t, size = log1p_all(absolute(gap) / (minimum(p, t) + eps));
                const Vector d = gap < Vector{} ? -size : size;
                sum += gap * d;
                if (!x.grad_own) continue;
                store(x.grad_own + at, x.weight * (d + gap / (p + eps)));
                store(T + k * w + i, -x.weight * (d + gap / (t + eps)));
                continue;
            }
            const Vector safe_p = maximum(tiny, p), safe_t = maximum(tiny, t);
            const Vector first_p = log_all(p + eps), first_t = log_all(t + eps);
            sum += (t - p) * (first_t - first_p) - t * log1p_all(eps / safe_t) - p * log1p_all(eps / safe_p);
            if (!x.grad_own) continue;
            store(x.grad_own + at, x.weight * (log_all(safe_p) - first_t + (p - t + eps) / (p + eps)));
            store(T + k * w + i, x.weight * (log_all(safe_t) - first_p + (t - p + eps) / (t + eps)));
        }
        store(value + i, sum);
    }
}

// From the gradient at T: the one at the weights that IAIS singular has picked. First the keys that picked the same token are
// added for each row, then the rows, as the formula does: where every token picks the same one, all n^2 numbers fall onto one
// weight and cancel, and one long sum has several times the error.
static void singular_backward(const Direction& x, const RowTile& t, Workspace& w) {
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
}
// From the gradient at T: those at the maps that T was made of. `add`: another tile came before.
static void target_backward(Size kind, const Direction& x, const RowTile& t, bool add, Workspace& w) {
    if (kind == SINGULAR) return singular_backward(x, t, w);
    const Size m = round_up(x.m, GROUP), ld = odd_groups(x.m);
    transpose(x.cross + t.first, x.ld_n, x.m, t.rows, w.cross, ld);  // (rows, m)
    for (Size i = 0; i < t.rows; ++i) memset(w.cross + i * ld + x.m, 0, (m - x.m) * sizeof(float));
    if (kind == CACR) {
        product<false>(x.m, t.width, x.n, x.cross, x.ld_n, w.T, t.width, w.S, t.width, false);
        product<false>(x.m, m, t.rows, w.S, t.width, w.cross, ld, x.grad_other, x.ld_m, add);
    } else {
        product<true>(x.m, t.width, x.n, x.back, x.ld_m, w.T, t.width, x.grad_cross + t.first, x.ld_n, false);
        product<false>(x.n, m, t.rows, w.T, t.width, w.cross, ld, x.grad_back, x.ld_m, add);
    }
}

static Direction direction_of(const Job& job, Size b, int side) {
    const int own = side, other = 1 - side, cross = LV + side, back = VL_BLOCK - side;
    Direction x = {job.of(b, own).count, job.of(b, other).count, job.padded(own),   job.padded(other),
                   job.map(b, own),      job.map(b, other),      job.map(b, cross), job.map(b, back)};
    if (!job.c.gradients) return x;
    x.grad_own = job.grad(b, side, own), x.grad_other = job.grad(b, side, other);
    if (job.c.kind == DISTRIBUTED) x.grad_cross = job.grad(b, side, cross), x.grad_back = job.grad(b, side, back);
    x.weight = 1.f / x.n;
    return x;
}

// The loss of a direction of a sample, and its gradients at the maps
static float divergence(Job& job, Size b, int side, Workspace& w) {
    const Size kind = job.c.kind, as_they_are = job.c.as_they_are;
    const Direction x = direction_of(job, b, side);
    if (job.c.gradients && kind == SINGULAR) memset(x.grad_other, 0, x.m * x.ld_m * sizeof(float));
    double loss = 0;
    for (Size tile = 0; tile < row_tiles(x.n, TILE); ++tile) {
        const RowTile t = row_tile(x.n, TILE, tile);
        float value[TILE];
        if (kind == CACR) cacr_target(x, t, w);
        else if (kind == DISTRIBUTED) distributed_target(x, t, w);
        else singular_target(!as_they_are, job.c.H, x, t, w);
        if (kind == DISTRIBUTED || as_they_are) plain_divergence(as_they_are, x, t, w.T, value);
        else softmax_divergence(kind == SINGULAR, job.c.H, x, t, w.T, w.E, value);
        for (Size i = 0; i < t.rows; ++i) loss += value[i];
        if (job.c.gradients) target_backward(kind, x, t, tile > 0, w);
    }
    return (float)(loss / x.n);
}

static void divergence_task(Job& job, Size task) {
    job.for_items(job.samples * 2, task, [&](Size item) {
        const Size b = job.first + item / 2;
        const int side = item % 2;
        const bool counts = job.c.directions[side] && !job.empty(b);
        job.losses[b * 2 + side] = counts ? divergence(job, b, side, job.workspaces[task]) : 0.f;
    });
}

// ---- the operator

static const Size KEPT = 1 << 20;  // numbers of weights that are kept for a sample, at most

// false where there is not enough memory
static bool prepare(Job& job, Memory& memory) {
    const CongruenceLoss& c = job.c;
    const Size weights = job.weights_size(job.blocks()), grads = c.gradients ? 2 * job.grad_size() : 0;
    job.heads_kept = c.gradients ? least(c.H, KEPT / most(weights, 1)) : 0;
    const bool placed = memory.place([&] {
        job.counts = (Size*)memory.take(c.B * 4);
        job.tokens = (int32_t*)memory.take(c.B * (c.lengths[0] + c.lengths[1]));
        job.losses = memory.take(c.B * 2);
        job.maps = memory.take(job.samples * job.map_size());
        job.grads = memory.take(job.samples * grads);
        job.kept = memory.take(job.samples * job.heads_kept * weights);
        job.taken = (Size*)memory.take(2 * job.tasks * GROUP);
        job.workspaces = memory.take_spaces<Workspace>(job.tasks, [&](Workspace& w) { w.plan(c, memory); });
    });
    if (placed) list_tokens(job);
    return placed;
}

static void run_samples(Job& job) {  // those at work
    job.run_tasks(maps_task);
    job.run_tasks(divergence_task);
    if (job.c.gradients) job.run_tasks(gradients_task);
}
static void whole_samples_task(Job& job, Size task) {
    Job alone = job.alone(task);
    while ((alone.first = job.whole->take()) < job.first) run_samples(alone);
}

static Size congruence_loss(const CongruenceLoss& c) {
    Job job(c);
    Memory memory;
    if (!prepare(job, memory)) return NO_MEMORY;
    if (c.gradients) take_large_pages(c.gradients, job.gradients_size() * sizeof(float));
    // A task does whole samples, which stay in its cache. Of those that are fewer than tasks each does a part.
    job.samples = c.B % job.tasks, job.first = c.B - job.samples;
    Queue whole;
    job.whole = &whole;
    if (job.first > 0) run(job.tasks, job, whole_samples_task);
    if (job.samples > 0) run_samples(job);
    for (Size b = 0; b < c.B; ++b) c.loss[b] = job.losses[b * 2] + job.losses[b * 2 + 1];
    return DONE;
}

}  // namespace
}  // namespace ISA

OPERATOR(congruence_loss, CongruenceLoss)
