// The softmax of the rows of a tile with what statistics of attention sum up beside it, block by block of keys.
//
// Query row i, key j. In brackets: the names below.
//     x_ij = S_ij - max_j S_ij,  e_ij = e^x_ij,  P_ij = e_ij / sum_j e_ij          [sweep: largest, total, factor]
//     entropy_i = log(sum_j e_ij) - (sum_j e_ij x_ij) / (sum_j e_ij)               [weighted; entropy]
#pragma once
#include "scores.h"

namespace ISA {
namespace {

// The logits of a tile, and what its rows sum up; all (LANES) but S
struct RowSums {
    float* S;
    // sum e; sum e w with the weights w of `sweep`; sum e grad_received: float64, since alike terms are all rounded the same way
    double *total, *weighted, *received;
    float* largest;  // of the logits
    float *weight, *factor;  // the row's weight, and 0 beyond the tile; 1 / total, 0 if masked
    int32_t* argmax;
    void plan(Size numbers, Memory& memory) {  // of S
        S = memory.take(numbers);
        total = memory.take_doubles(LANES), weighted = memory.take_doubles(LANES), received = memory.take_doubles(LANES);
        largest = memory.take(LANES), weight = memory.take(LANES), factor = memory.take(LANES);
        argmax = (int32_t*)memory.take(LANES);
    }
    void start(Size width) {
        for (Size i = 0; i < width; ++i) largest[i] = -INFINITY, total[i] = weighted[i] = received[i] = 0, argmax[i] = -1;
    }
    float entropy(Size i) const { return factor[i] == 0 ? 0.f : (float)(log(total[i]) - weighted[i] / total[i]); }
    float max_logit(Size i) const {
        return factor[i] == 0 ? -INFINITY : factor[i] != factor[i] && largest[i] != INFINITY ? NAN : largest[i];
    }
};

static const float LOWEST = -87.33f;  // where exp is 0: there x is bounded, since 0 * Inf is NaN

// What a sweep adds up of a vector of rows, as RowSums names it
struct SweepSums {
    Vector total = {}, weighted = {}, received = {};
    METHOD void add(const SweepSums& x) { total += x.total, weighted += x.weighted, received += x.received; }
    METHOD void add_to(const RowSums& r, Size i) const {
        for (int n = 0; n < VL; ++n)
            r.total[i + n] += total[n], r.weighted[i + n] += weighted[n], r.received[i + n] += received[n];
    }
};
// Forward the weight of e is x.
struct EntropySweep {
    METHOD void start(const RowSums&, Size) {}
    METHOD Vector drift(Size, Vector moved) const { return moved; }
    METHOD void take(Size, Size, Vector, Vector bounded, Vector e, SweepSums& sums) const { sums.weighted += e * bounded; }
    METHOD void finish(const RowSums&, Size, Vector, Vector) const {}
};
// Forward the first key that has the largest logit is found as well.
struct ForwardSweep : EntropySweep {
    Size first;  // key
    Integers found;
    METHOD ForwardSweep(Size first) : first(first) {}
    METHOD void start(const RowSums&, Size) { found = Integers{} + INT32_MAX; }
    METHOD void take(Size i, Size j, Vector x, Vector bounded, Vector e, SweepSums& sums) {
        EntropySweep::take(i, j, x, bounded, e, sums);
        const Integers here = x == Vector{} ? Integers{} + (int32_t)(first + j) : Integers{} + INT32_MAX;
        found = here < found ? here : found;
    }
    METHOD void finish(const RowSums& r, Size i, Vector before, Vector top) const {
        Integers argmax;
        memcpy(&argmax, r.argmax + i, sizeof argmax);
        argmax = top > before ? found : argmax;
        memcpy(r.argmax + i, &argmax, sizeof argmax);
    }
};
INLINE Vector larger_than_all(Vector top, const float* S, Size count, Size w) {
    Size j = 0;
    for (; j + 4 <= count; j += 4) {
        const float* s = S + j * w;
        top = maximum(top, maximum(maximum(load(s), load(s + w)), maximum(load(s + 2 * w), load(s + 3 * w))));
    }
    for (; j < count; ++j) top = maximum(top, load(S + j * w));
    return top;
}
// Where the largest logit has risen, each x changes by `change`, which is not positive, and each weight of e by `drift`.
INLINE void rescale_sums(const RowSums& r, Size i, Vector change, Vector drift) {
    const Vector by = exp_negative(change);
    for (int n = 0; n < VL; ++n) {
        r.weighted[i + n] = (r.weighted[i + n] + drift[n] * r.total[i + n]) * by[n];
        r.total[i + n] *= by[n], r.received[i + n] *= by[n];
    }
}
// Some keys are taken up in a tile's sums: short sums in float32, then float64. E becomes e^(logit - largest); it may be S.
template <class Sweep> static void sweep(const RowSums& r, Size count, Size w, Sweep each, float* E) {
    const Vector nothing = splat(-INFINITY), lowest = splat(LOWEST);
    for (Size i = 0; i < w; i += VL) {
        const Vector before = load(r.largest + i), top = larger_than_all(before, r.S + i, count, w);
        const Vector shift = top == nothing ? Vector{} : top;
        each.start(r, i);
        rescale_sums(r, i, before - shift, each.drift(i, maximum(lowest, before - shift)));
        SweepSums sums;
        for (Size chunk = 0; chunk < count; chunk += SHORT_SUM) {
            SweepSums some;
            for (Size j = chunk; j < least(chunk + SHORT_SUM, count); ++j) {
                const Vector x = load(r.S + j * w + i) - shift, e = exp_negative(x);
                store(E + j * w + i, e);
                some.total += e;
                each.take(i, j, x, maximum(lowest, x), e, some);
            }
            sums.add(some);
            if (chunk % BLOCK_KEYS != BLOCK_KEYS - SHORT_SUM && chunk + SHORT_SUM < count) continue;
            sums.add_to(r, i);
            sums = {};
        }
        each.finish(r, i, before, top);
        store(r.largest + i, top);
    }
}
// After the last sweep: factor, and `largest` becomes what the exponentials are shifted by
static void finish_sweeps(const RowSums& r, Size w) {
    for (Size i = 0; i < w; ++i) {
        const bool masked = r.largest[i] == -INFINITY && r.total[i] == 0;
        r.factor[i] = masked ? 0.f : 1.f / (float)r.total[i];
        if (masked) r.largest[i] = 0;
    }
}
// S = e^(logit - largest), once more
static void exponentials(const RowSums& r, Size count, Size w) {
    for (Size i = 0; i < w; i += VL) {
        const Vector shift = load(r.largest + i);
        for (Size n = i; n < count * w; n += w) store(r.S + n, exp_negative(load(r.S + n) - shift));
    }
}

}  // namespace
}  // namespace ISA
