// score_attention of every core score: out and the log-sum-exp, and the gradients of queries, keys, values and the units' vector.
// The backward pass also is relevancy_attention's and relevancy_step: r Abar with or without these gradients.
//
// Bound: multiply-adds of the tile products (two forward, five backward, two for r Abar alone) for dot products; divisions, one for
// four hidden units, for additive and Hadamard scores. Tricks: query rows lie along the lanes, so softmax needs no sums over lanes,
// and float32 keys and values are read where they lie. r Abar is a product of the tile max(P dP, 0), which the backward pass holds,
// with r: one more row of multiply-adds beside 5 D of them.
// Backward, a task takes the tiles of query rows of one key head after the other, and sums that head's gradients of keys and values.
// Heads that several tasks share are summed at the end (shared_sums.h).
// Measured: rows score_attention and relevancy_attention of benchmarks/results/cpu.json.
#include "backward_tile.h"
#include "few_rows.h"
#include "panels.h"

namespace ISA {
namespace {

// ---- gradients of keys and values, and r Abar, when a unit (a key head's tiles; a sample's for r Abar) is done

// Where a single tile writes the sums of a key head (`once`), they lie in the gradient tensor itself, if it is float32 in whole
// vectors. Where several tiles add to them, they lie together: rows far apart would drive one another out of the cache. Rows from
// `filled` on start at 0.
static void start_sums(const Attention& a, const StridedTensor& grad, Size size, bool once, Size b, Size head, Size filled,
                       Sums& sums) {
    if (once && a.dtype == FLOAT32 && size == sums.stride) sums = {(float*)grad.data + grad.at(b, head, 0), grad.stride_n};
    for (Size j = filled; size > 0 && j < a.M; ++j) memset(sums.row(j), 0, round_up(size, VL) * sizeof(float));
}
static void write_keys(const Attention& a, const StridedTensor& to, const Sums& from, Size size, Size b, Size head, Size first,
                       Size last) {
    for (Size j = first; j < last; ++j) store_key(a, b, head, j, from.row(j), size, to);
}
static void write_result(const Relevancy& v, const Attention& a, const float* from, Size b, Size first, Size last) {
    const Size stride = round_up(v.T, VL);
    for (Size n = 0; n < v.T; ++n)
        for (Size j = first; j < last; ++j) {
            const Size at = (b * v.T + n) * a.M + j;
            v.result[at] = from[j * stride + n] + (v.direct ? v.direct[at] : 0.f);
        }
}
// Before the first tile of a task: what its query heads sum up over all keys
static void clear_units(const Attention& a, Gradients& g) {
    memset(g.logits.units.by_key, 0, UnitTile::padded(a.D) * round_up(a.key_block(), VL) * sizeof(float));
    memset(g.logits.units.by_weight, 0, UnitTile::padded(a.D) * sizeof(float));
    memset(g.grad_vector, 0, a.H * a.D * sizeof(float));
}
// Where the task sums the gradients of key head `unit`: the first tile overwrites them where it sees all visible keys and the score
// has no hidden units.
static void start_key_head(const BackwardCall& call, Gradients& g, Size task, Size unit) {
    const Backward& c = call.c;
    const Attention& a = c.a;
    const Size b = unit / a.Hkv, head = unit % a.Hkv;
    g.fresh = !a.masks.is_causal && !c.score.sums_units();
    const Size filled = g.fresh ? visible_keys(a, b) : 0;
    const bool once = g.fresh && call.keys.unit == 1;
    g.grad_key = {call.keys.at(task, unit), call.key_stride};
    g.grad_value = {call.values.at(task, unit), call.value_stride};
    start_sums(a, c.grad_key, a.D, once, b, head, filled, g.grad_key);
    start_sums(a, c.grad_value, a.Dv, once, b, head, filled, g.grad_value);
    memset(g.by_key_norm, 0, a.M * sizeof(float));
}
static void finish_key_head(const BackwardCall& call, Gradients& g, Size task, Size unit) {
    const Backward& c = call.c;
    const Attention& a = c.a;
    const Size b = unit / a.Hkv, head = unit % a.Hkv;
    if (c.score.kind == COSINE) finish_cosine_keys(call, g, b, head);
    if (!call.keys.alone(task, unit)) return;  // join_task writes it
    write_keys(a, c.grad_key, g.grad_key, a.D, b, head, 0, a.M);
    write_keys(a, c.grad_value, g.grad_value, a.Dv, b, head, 0, a.M);
}

static void backward_task(BackwardCall& call, Gradients& g, Size task) {
    const Backward& c = call.c;
    const Attention& a = c.a;
    const bool inputs = call.inputs(), carries = c.relevancy.rows && !call.sums_rows;
    const Size tiles = tiles_of(a), first = call.keys.start[task], last = call.keys.start[task + 1];
    if (inputs && c.score.sums_units()) clear_units(a, g);
    for (Size item = first; item < last;) {
        const Size unit = item / call.keys.unit, end = least(last, (unit + 1) * call.keys.unit), b = unit / a.Hkv;
        if (inputs) start_key_head(call, g, task, unit);
        if (carries) g.carried_out = call.carried.at(task, b);
        if (carries && (item == first || item == b * call.carried.unit))
            memset(g.carried_out, 0, call.carried.floats * sizeof(float));
        for (; item < end;) {  // the query heads of the key head
            const Size from = item % tiles, to = least(tiles, from + end - item);
            backward_head(call, g, b, item / tiles % a.H, from, to);
            item += to - from;
        }
        if (inputs) finish_key_head(call, g, task, unit);
        if (carries && item == (b + 1) * call.carried.unit && call.carried.alone(task, b))
            write_result(c.relevancy, a, g.carried_out, b, 0, a.M);
    }
    if (call.vector_parts) memcpy(call.vector_parts + task * a.H * a.D, g.grad_vector, a.H * a.D * sizeof(float));
}

// The units that several tasks have; each task takes a range of the keys.
static void join_task(BackwardCall& call, Size task) {
    const Backward& c = call.c;
    const Attention& a = c.a;
    if (call.inputs()) {
        call.keys.join(task, a.M, [&](Size unit, float* sums, Size first, Size last) {
            write_keys(a, c.grad_key, {sums, call.key_stride}, a.D, unit / a.Hkv, unit % a.Hkv, first, last);
        });
        call.values.join(task, a.M, [&](Size unit, float* sums, Size first, Size last) {
            write_keys(a, c.grad_value, {sums, call.value_stride}, a.Dv, unit / a.Hkv, unit % a.Hkv, first, last);
        });
    }
    if (c.relevancy.rows)
        call.carried.join(task, a.M, [&](Size b, const float* sums, Size first, Size last) {
            write_result(c.relevancy, a, sums, b, first, last);
        });
}

static bool place_sums(BackwardCall& call, Size tasks, Memory& memory) {
    const Attention& a = call.c.a;
    const Relevancy& v = call.c.relevancy;
    return memory.place([&] {
        if (call.inputs()) call.keys.plan(memory), call.values.plan(memory);
        if (v.rows) call.carried.plan(memory);
        if (call.c.grad_vector) call.vector_parts = memory.take(tasks * a.H * a.D);
        if (v.rows && v.row_normalize) call.row_sums = memory.take(a.B * a.H * a.N);
    });
}
static void join_vector(const BackwardCall& call, Size tasks) {
    float* sums = call.c.grad_vector;
    for (Size i = 0, n = call.c.a.H * call.c.a.D; i < n; ++i) {
        sums[i] = 0;
        for (Size task = 0; task < tasks; ++task) sums[i] += call.vector_parts[task * n + i];
    }
}
static Size score_attention_backward(const Backward& c) {
    const Attention& a = c.a;
    if (a.B * a.H * a.N == 0) return DONE;
    const Size tiles = a.group() * tiles_of(a), items = a.B * a.Hkv * tiles;
    const Size tasks = least(thread_count(), items), key_stride = round_up(a.D, VL), value_stride = round_up(a.Dv, VL);
    Memory starts, memory;
    const Size* start = cut(items, tasks, starts);
    if (!start) return NO_MEMORY;
    const SharedSums keys = {start, tasks, tiles, a.M * key_stride}, values = {start, tasks, tiles, a.M * value_stride};
    const SharedSums carried = {start, tasks, a.Hkv * tiles, a.M * round_up(c.relevancy.T, VL)};
    BackwardCall call = {c, keys, values, carried, key_stride, value_stride};
    if (!place_sums(call, tasks, memory)) return NO_MEMORY;
    if (call.row_sums) {
        memset(call.row_sums, 0, a.B * a.H * a.N * sizeof(float));
        call.sums_rows = true;
        if (run_with_space(tasks, call, backward_task) != DONE) return NO_MEMORY;
        call.sums_rows = false;
    }
    if (run_with_space(tasks, call, backward_task) != DONE) return NO_MEMORY;
    const bool joins = call.inputs() && (call.keys.any() || call.values.any());
    if (joins || (c.relevancy.rows && call.carried.any())) run(tasks, call, join_task);
    if (c.grad_vector) join_vector(call, tasks);
    return DONE;
}

static Size score_attention_forward(const Forward& c) {
    if (is_few_rows(c)) return few_rows_forward(c);
#if TILES
    if (takes_panels(c)) return panels_forward(c);
#endif
    const Attention& a = c.a;
    const Size items = a.B * a.H * tiles_of(a);
    ForwardCall call = {c, least(thread_count(), items)};
    return items > 0 ? run_with_space(call.tasks, call, forward_task) : DONE;
}

}  // namespace
}  // namespace ISA

OPERATOR(score_attention_forward, Forward)
OPERATOR(score_attention_backward, Backward)
