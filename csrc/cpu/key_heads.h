// Where a task of the backward pass adds up the gradients of a key head and r Abar of a sample, and how these are written.
#pragma once
#include "backward_tile.h"

namespace ISA {
namespace {

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
// Where the task sums the gradients of a key head's part that begins at `item`: the first tile overwrites them where it sees all
// visible keys and the score has no hidden units.
static void start_key_head(const BackwardCall& call, UnitSums& g, Size task, Size item) {
    const Backward& c = call.c;
    const Attention& a = c.a;
    const Size unit = item / call.keys.unit, b = unit / a.Hkv, head = unit % a.Hkv;
    g.fresh = !a.masks.is_causal && !c.score.sums_units();
    const Size filled = g.fresh ? visible_keys(a, b) : 0;
    const bool once = g.fresh && call.keys.unit == 1;
    g.grad_key = {call.keys.at(task, item), call.key_stride};
    g.grad_value = {call.values.at(task, item), call.value_stride};
    start_sums(a, c.grad_key, a.D, once, b, head, filled, g.grad_key);
    start_sums(a, c.grad_value, a.Dv, once, b, head, filled, g.grad_value);
}
// After the part that ends before item `end`
static void finish_key_head(const BackwardCall& call, const UnitSums& g, Size task, Size end) {
    const Backward& c = call.c;
    const Attention& a = c.a;
    const Size unit = (end - 1) / call.keys.unit, b = unit / a.Hkv, head = unit % a.Hkv;
    float *keys = call.keys.add_part(task, end), *values = call.values.add_part(task, end);
    if (!keys) return;  // the unit goes on, or join_task writes it
    const bool whole = call.keys.parts == 1;  // and may lie in the gradient itself
    write_keys(a, c.grad_key, whole ? g.grad_key : Sums{keys, call.key_stride}, a.D, b, head, 0, a.M);
    write_keys(a, c.grad_value, whole ? g.grad_value : Sums{values, call.value_stride}, a.Dv, b, head, 0, a.M);
}

// pass(unit, first, last) adds the items [first, last), a part of a key head, to its sums, and r Abar to those of the sample's part.
template <class Pass> static void by_key_heads(const BackwardCall& call, UnitSums& g, Size task, const Pass& pass) {
    const Backward& c = call.c;
    const bool inputs = call.inputs(), carries = c.relevancy.rows && !call.sums_rows;
    const Size first = call.keys.start[task], last = call.keys.start[task + 1];
    for (Size item = first, end; item < last; item = end) {
        end = call.keys.end_of_part(item);
        if (inputs) start_key_head(call, g, task, item);
        if (carries) g.carried_out = call.carried.at(task, item), memset(g.carried_out, 0, call.carried.floats * sizeof(float));
        pass(item / call.keys.unit, item, end);
        if (inputs) finish_key_head(call, g, task, end);
        if (const float* sums = carries ? call.carried.add_part(task, end) : nullptr)
            write_result(c.relevancy, c.a, sums, item / call.carried.unit, 0, c.a.M);
    }
}

}  // namespace
}  // namespace ISA
