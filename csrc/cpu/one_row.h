// The forward pass of a single query, as a decoder has it: plain dot products, and no dropout.
//
// Bound: keys and values are read once, in their own dtype; a tile would fill one lane of its vectors. Here vectors run along the
// features of products and along the keys of the softmax. Where there are fewer heads than threads, the keys of a head are shared
// out, and the parts are joined as blocks of an online softmax are.
#pragma once
#include "forward.h"

namespace ISA {
namespace {

template <Size DTYPE> struct Numbers {
    const uint16_t* p;
    explicit Numbers(const void* data) : p((const uint16_t*)data) {}
    Numbers operator+(Size n) const { return Numbers(p + n); }
    float at(Size n) const { return DTYPE == BFLOAT16 ? as_float((uint32_t)p[n] << 16) : half_to_float(p[n]); }
    METHOD Vector vector(Size n) const {
        if (DTYPE == BFLOAT16) {
            typedef uint16_t Halves __attribute__((vector_size(VL * 2), aligned(2), may_alias));
            return (Vector)(__builtin_convertvector(*(const Halves*)(p + n), Words) << 16);
        }
        float x[VL];
        widen(p + n, FLOAT16, VL, x);
        return load(x);
    }
};
template <> struct Numbers<FLOAT32> {
    const float* p;
    explicit Numbers(const void* data) : p((const float*)data) {}
    Numbers operator+(Size n) const { return Numbers(p + n); }
    float at(Size n) const { return p[n]; }
    METHOD Vector vector(Size n) const { return load(p + n); }
};

// S (count) = the query (D) times each key
template <int ROWS, class Row> INLINE void products_with_keys(const float* query, Size D, Row keys, Size stride, float* S) {
    Vector total[ROWS] = {};
    const Size whole = D / VL * VL;
    for (Size d = 0; d < whole; d += VL)
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) total[i] += (keys + i * stride).vector(d) * load(query + d);
    if constexpr (ROWS == 4) sums_of_four(total, S);
    else
        for (int i = 0; i < ROWS; ++i) S[i] = sum(total[i]);
    for (Size d = whole; d < D; ++d)
        for (int i = 0; i < ROWS; ++i) S[i] += (keys + i * stride).at(d) * query[d];
}

// S (number, to_next) = the rows (number, D) times each of `count` keys
template <class Row>
INLINE void products_of_rows(const float* rows, Size number, Size D, Row keys, Size stride, Size count, float* S, Size to_next) {
    Size j = 0;
    for (; j + 4 <= count; j += 4)
        for (Size n = 0; n < number; ++n) products_with_keys<4>(rows + n * D, D, keys + j * stride, stride, S + n * to_next + j);
    for (; j < count; ++j)
        for (Size n = 0; n < number; ++n) products_with_keys<1>(rows + n * D, D, keys + j * stride, stride, S + n * to_next + j);
}

// `online_softmax` of one row, whose lanes are keys: all have the largest logit of the block.
static void softmax_of_keys(float* S, Size padded, bool first, float* largest_of, double* total, float* rescale) {
    float top[GROUP];
    find_top(S, padded / GROUP, GROUP, top);
    for (Size i = 1; i < GROUP; ++i) top[0] = larger(top[0], top[i]);
    for (Size i = 1; i < GROUP; ++i) top[i] = top[0];
    online_softmax(S, padded / GROUP, GROUP, first, top, largest_of, total, rescale);
}

// out (VECTORS * VL) += the values' rows, each times its P; a sum of sums. Padding is left out, NaN and all.
template <int VECTORS, class Row>
INLINE void weighted_values(const float* P, const uint8_t* visible, Size count, Row values, Size stride, float* out) {
    for (Size first = 0; first < count; first += DEPTH) {
        Vector total[VECTORS] = {};
        for (Size j = first; j < least(first + DEPTH, count); ++j) {
            if (visible && !visible[j]) continue;
            const Vector p = splat(P[j]);
#pragma GCC unroll 8
            for (int n = 0; n < VECTORS; ++n) total[n] += (values + j * stride).vector(n * VL) * p;
        }
        for (int n = 0; n < VECTORS; ++n) store(out + n * VL, load(out + n * VL) + total[n]);
    }
}
template <class Row>
static void add_values(const float* P, const uint8_t* visible, Size count, Row values, Size stride, Size Dv, float* out) {
    Size d = 0;
    for (; d + 8 * VL <= Dv; d += 8 * VL) weighted_values<8>(P, visible, count, values + d, stride, out + d);
    for (; d + 4 * VL <= Dv; d += 4 * VL) weighted_values<4>(P, visible, count, values + d, stride, out + d);
    for (; d + VL <= Dv; d += VL) weighted_values<1>(P, visible, count, values + d, stride, out + d);
    for (; d < Dv; ++d) {
        float total = 0;
        for (Size j = 0; j < count; ++j)
            if (!visible || visible[j]) total += (values + j * stride).at(d) * P[j];
        out[d] += total;
    }
}

// The scores S (count) of row n become logits: `mask_tile` of one row, without is_causal.
static void mask_row(const Attention& a, Size b, Size h, Size n, Size j0, Size count, float* S) {
    const Masks& m = a.masks;
    const Size base = b * m.stride_b + h * m.stride_h + n * m.stride_n + j0 * m.stride_m;
    const double shift = m.dtype == FLOAT64 && m.mask ? *a.mask_shifts(b, h, n) : 0;
    for (Size j = 0; m.mask && j < count; ++j) {
        const Size at = base + j * m.stride_m;
        if (m.dtype == BOOL) {
            S[j] = *(const uint8_t*)element(m.mask, BOOL, at) ? S[j] : -INFINITY;
        } else if (m.dtype == FLOAT64) {
            S[j] = masked_by_float64(S[j], ((const double*)m.mask)[at], shift);
        } else {
            float x;
            widen(element(m.mask, m.dtype, at), m.dtype, 1, &x);
            S[j] = x == -INFINITY ? x : S[j] + x;
        }
    }
    for (Size j = 0; m.keys && j < count; ++j)
        if (!m.keys[b * a.M + j0 + j]) S[j] = -INFINITY;
}

// Sums of the keys that one part has: e^(logit - largest), and these times the values
struct Part {
    float largest;
    double total;
    float* out;
};

struct OneRowCall {
    const Forward& c;
    Size pieces, tasks;  // pieces: parts of a head
    Part* parts;
    bool failed;
};

template <Size DTYPE>
static void sum_part(const Attention& a, Size b, Size h, Size first, Size last, const float* query, float* S, Part& part) {
    const Size head = h / a.group();
    float largest_of[GROUP], rescale[GROUP];
    double total[GROUP] = {};
    memset(part.out, 0, a.Dv * sizeof(float));
    for (Size i = 0; i < GROUP; ++i) largest_of[i] = -INFINITY;
    for (Size j0 = first; j0 < last; j0 += BLOCK_KEYS) {
        const Size count = least(BLOCK_KEYS, last - j0), padded = round_up(count, GROUP);
        const Numbers<DTYPE> keys(element(a.key.data, DTYPE, a.key.at(b, head, j0)));
        const Numbers<DTYPE> values(element(a.value.data, DTYPE, a.value.at(b, head, j0)));
        products_of_rows(query, 1, a.D, keys, a.key.stride_n, count, S, 0);
        for (Size j = count; j < padded; ++j) S[j] = -INFINITY;
        mask_row(a, b, h, 0, j0, count, S);
        softmax_of_keys(S, padded, j0 == first, largest_of, total, rescale);
        for (Size d = 0; j0 > first && d < a.Dv; ++d) part.out[d] *= rescale[0];
        add_values(S, a.masks.keys ? a.masks.keys + b * a.M + j0 : nullptr, count, values, a.value.stride_n, a.Dv, part.out);
    }
    part.largest = largest_of[0], part.total = 0;
    for (Size i = 0; i < GROUP; ++i) part.total += total[i];
}

static void one_row_task(OneRowCall& call, Size task) {
    const Attention& a = call.c.a;
    float *query, *S;
    Memory memory;
    if (!memory.place([&] { query = memory.take(a.D), S = memory.take(BLOCK_KEYS); })) {
        call.failed = true;
        return;
    }
    const Size items = a.B * a.H * call.pieces;
    for (Size item = share(items, task, call.tasks); item < share(items, task + 1, call.tasks); ++item) {
        const Size head = item / call.pieces, b = head / a.H, h = head % a.H, piece = item % call.pieces;
        const Size keys = a.masks.is_causal ? least(1, visible_keys(a, b)) : visible_keys(a, b);
        const Size first = share(keys, piece, call.pieces), last = share(keys, piece + 1, call.pieces);
        widen(element(a.query.data, a.dtype, a.query.at(b, h, 0)), a.dtype, a.D, query);
        for (Size d = 0; d < a.D; ++d) query[d] *= (float)a.scale;
        Part& part = call.parts[item];
        if (a.dtype == FLOAT32) sum_part<FLOAT32>(a, b, h, first, last, query, S, part);
        else if (a.dtype == BFLOAT16) sum_part<BFLOAT16>(a, b, h, first, last, query, S, part);
        else sum_part<FLOAT16>(a, b, h, first, last, query, S, part);
    }
}

// The parts of one head are joined in the first.
static void join_parts(const Attention& a, Part* parts, Size count) {
    Part& all = parts[0];
    for (Size n = 1; n < count; ++n) {
        const Part& part = parts[n];
        const float top = larger(part.largest, all.largest);
        const float shift = top == -INFINITY ? 0.f : top, by = expf(all.largest - shift), by_part = expf(part.largest - shift);
        for (Size d = 0; d < a.Dv; ++d) all.out[d] = all.out[d] * by + part.out[d] * by_part;
        all.total = all.total * by + part.total * by_part, all.largest = top;
    }
}

static Size one_row_forward(const Forward& c) {
    const Attention& a = c.a;
    const Size heads = a.B * a.H, few = most(a.M / 2048, 1);  // keys that pay for a part
    const Size pieces = heads > 0 ? least(few, (thread_count() + heads - 1) / heads) : 1;
    OneRowCall call = {c, pieces, least(thread_count(), heads * pieces), nullptr, false};
    Memory memory;
    const bool placed = memory.place(
        [&] { call.parts = memory.take_spaces<Part>(heads * pieces, [&](Part& part) { part.out = memory.take(a.Dv); }); });
    if (!placed) return NO_MEMORY;
    if (heads > 0) run(call.tasks, call, one_row_task);
    for (Size head = 0; !call.failed && head < heads; ++head) {
        Part& part = call.parts[head * pieces];
        join_parts(a, &part, pieces);
        const Tile t = {head / a.H, head % a.H, 0, 1, GROUP};
        store_lse(a, t, &part.largest, &part.total, c.lse + head);
        float factor, unused;
        finish_rows(&part.largest, &part.total, 1, {&unused, &factor});
        for (Size d = 0; d < a.Dv; ++d) part.out[d] *= factor;
        narrow(part.out, a.Dv, a.dtype, (void*)element(c.out.data, a.dtype, c.out.at(t.b, t.h, 0)));
    }
    return call.failed ? NO_MEMORY : DONE;
}
// Whether a call is one
static bool is_one_row(const Forward& c) { return c.a.N == 1 && c.score.kind == DOT && c.dropout.probability == 0; }

}  // namespace
}  // namespace ISA
