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
#include "backward_panels.h"
#include "few_rows.h"

namespace ISA {
namespace {

// Before the first tile of a task
static void clear_units(const Attention& a, Gradients& g) {
    memset(g.logits.units.by_key, 0, UnitTile::padded(a.D) * round_up(a.key_block(), VL) * sizeof(float));
    memset(g.logits.units.by_weight, 0, UnitTile::padded(a.D) * sizeof(float));
}
static void backward_task(BackwardCall& call, Gradients& g, Size task) {
    const Backward& c = call.c;
    const Attention& a = c.a;
    const Size tiles = tiles_of(a);
    if (call.inputs() && c.score.sums_units()) clear_units(a, g);
    by_key_heads(call, g, task, [&](Size unit, Size item, Size end) {
        const Size b = unit / a.Hkv, of_heads = a.group() * a.D;
        float* by_vector = g.grad_vector + unit % a.Hkv * of_heads;
        float* part =
            call.vector_parts ? call.vector_parts + (unit * call.keys.parts + call.keys.part_of(item)) * of_heads : nullptr;
        memset(g.by_key_norm, 0, a.M * sizeof(float)), memset(by_vector, 0, of_heads * sizeof(float));
        while (item < end) {  // the query heads of the key head
            const Size from = item % tiles, to = least(tiles, from + end - item);
            backward_head(call, g, b, item / tiles % a.H, from, to);
            item += to - from;
        }
        if (call.inputs() && c.score.kind == COSINE) finish_cosine_keys(call, g, b, unit % a.Hkv);
        if (part) memcpy(part, by_vector, of_heads * sizeof(float));
    });
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

static bool place_sums(BackwardCall& call, Memory& memory) {
    const Attention& a = call.c.a;
    return memory.place([&] {
        if (call.inputs()) call.keys.plan(memory), call.values.plan(memory);
        if (call.c.relevancy.rows) call.carried.plan(memory);
        if (call.c.grad_vector) call.vector_parts = memory.take(a.B * call.keys.parts * a.H * a.D);
    });
}
static void join_vector(const BackwardCall& call) {
    const Attention& a = call.c.a;
    const Size of_heads = a.group() * a.D, parts = call.keys.parts;
    memset(call.c.grad_vector, 0, a.H * a.D * sizeof(float));
    for (Size n = 0; n < a.B * a.Hkv * parts; ++n)
        for (Size i = 0; i < of_heads; ++i)
            call.c.grad_vector[n / parts % a.Hkv * of_heads + i] += call.vector_parts[n * of_heads + i];
}
// The one place that says which calls take panels: those of the forward pass that have rows to fill a tile, and a log-sum-exp
static bool takes_panels(const Backward& c) {
#if TILES
    return takes_panels(c.a, c.score, c.dropout) && c.a.N >= TILE_SIDE && c.lse_source != NO_LSE && c.grad_query.data;
#else
    (void)c;
    return false;
#endif
}
// One pass: the sums of Abar's rows into `row_sums`, or all else
static Size backward_pass(const Backward& c, float* row_sums, bool sums_rows) {
    const Attention& a = c.a;
    const bool panels = takes_panels(c) && !sums_rows;
    const Size lanes = panels ? 2 * TILE_SIDE : LANES, tiles = a.group() * tiles_of(a, lanes), items = a.B * a.Hkv * tiles;
    // panels are packed again for each part, and one sweep has 2,048 rows (packed_tiles.h)
    const Size parts = least(tiles, parts_of_rows(a.group() * a.N, a.Hkv, panels ? 1024 : 288)),
               tasks = least(thread_count(), a.B * a.Hkv * parts);
    const Size key_stride = round_up(a.D, VL), value_stride = round_up(a.Dv, VL);
    Memory starts, memory;
    const Size* start = cut(items, tiles, parts, tasks, starts);
    if (!start) return NO_MEMORY;
    const SharedSums keys = {start, tasks, tiles, parts, a.M * key_stride};
    const SharedSums values = {start, tasks, tiles, parts, a.M * value_stride};
    const SharedSums carried = {start, tasks, a.Hkv * tiles, a.Hkv * parts, a.M * round_up(c.relevancy.T, VL)};
    BackwardCall call = {c, keys, values, carried, key_stride, value_stride, nullptr, row_sums, sums_rows};
    if (!place_sums(call, memory)) return NO_MEMORY;
    Size result;
#if TILES
    if (panels) result = run_with_space(tasks, call, backward_panels_task);
    else
#endif
        result = run_with_space(tasks, call, backward_task);
    if (result != DONE || sums_rows) return result;
    const bool joins = call.inputs() && (call.keys.any() || call.values.any());
    if (joins || (c.relevancy.rows && call.carried.any())) run(tasks, call, join_task);
    if (c.grad_vector) join_vector(call);
    return DONE;
}
static Size score_attention_backward(const Backward& c) {
    const Size rows = c.a.B * c.a.H * c.a.N;
    if (rows == 0) return DONE;
    if (!c.relevancy.rows || !c.relevancy.row_normalize) return backward_pass(c, nullptr, false);
    Memory memory;
    float* row_sums = nullptr;
    if (!memory.place([&] { row_sums = memory.take(rows); })) return NO_MEMORY;
    memset(row_sums, 0, rows * sizeof(float));
    const Size result = backward_pass(c, row_sums, true);
    return result == DONE ? backward_pass(c, row_sums, false) : result;
}

static Size score_attention_forward(const Forward& c) {
    if (is_few_rows(c)) return few_rows_forward(c);
#if TILES
    if (takes_panels(c.a, c.score, c.dropout)) return panels_forward(c);
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

// Whether r @ Abar alone is computed by attention_map, which sums the heads' maps before r passes them, and not head by head
EXPORT int64_t SYMBOL(ISA, carries_by_map)(int64_t rows, int64_t queries) { return rows > 2 || queries <= ISA::FEW_QUERIES; }

// The names of the scores' kinds, for those who fill a Score
EXPORT void SYMBOL(ISA, score_kinds)(char* text, int64_t size) { snprintf(text, size, "%s", ISA::SCORE_KINDS); }
