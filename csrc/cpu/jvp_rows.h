// What score_attention_jvp sums up for query rows, and how pairs are weighed (formulas: score_attention_jvp.cpp).
#pragma once
#include "forward.h"

namespace ISA {
namespace {

struct Jvp {
    Attention a;
    Score score;  // a dot product
    Dropout dropout;
    StridedTensor out, by_query, by_key, by_value;
    const double* lse;  // (B, H, N), as `out` of the forward pass
    const float* by_row_bias;  // as row_bias, or null
    StridedTensor to_out;
    double* to_lse;  // (B, H, N)
    FIELDS(a, score, dropout, out, by_query, by_key, by_value, lse, by_row_bias, to_out, to_lse)
};
struct JvpCall {
    const Jvp& c;
    Size tasks;
};

// What the rows of a tile take from block to block of keys
struct JvpRows {
    float* to_out;  // (Dv, width)
    float *shift, *centre;  // (lanes) each; the centre is NaN until a key has some weight, and 0 in a row without a key
    double *total, *mean;
    void plan(Size numbers, Size lanes, Memory& memory) {
        to_out = memory.take(numbers), shift = memory.take(lanes), centre = memory.take(lanes);
        total = memory.take_doubles(lanes), mean = memory.take_doubles(lanes);
    }
    JvpRows lanes(Size first) const { return {to_out, shift + first, centre + first, total + first, mean + first}; }
    // Before the first block; to_out holds so many numbers. `lost` as in statistics_of_lse, which is the result, too
    bool start(const Jvp& c, const Tile& t, Size numbers, bool* lost) const {
        float factor[LANES];  // `total` takes its place
        const bool any = statistics_of_lse(c.a, c.lse, LARGEST_OWN_LSE, t, {shift, factor}, lost);
        memset(to_out, 0, numbers * sizeof(float));
        for (Size i = 0; i < t.width; ++i) centre[i] = shift[i] == INFINITY ? 0.f : NAN, total[i] = mean[i] = 0;
        return any;
    }
};

// GROUP rows and `count` keys, a multiple of KEYS: exponential(j, p, shift) gives E, tangent(j, p) gives x, and put(j, p, E, W) takes
// those of KEYS keys from j on, of part p of the group. Where E is 0, W is so whatever x is.
template <int KEYS, class Exponential, class Tangent, class Put>
static void weigh(Size count, const JvpRows& r, const Exponential& exponential, const Tangent& tangent, const Put& put) {
    const Vector nothing = {}, one = splat(1.f);
    Vector shift[PARTS], centre[PARTS], total[PARTS] = {}, mean[PARTS] = {};
    for (int p = 0; p < PARTS; ++p) shift[p] = load(r.shift + p * VL), centre[p] = load(r.centre + p * VL);
    for (Size chunk = 0; chunk < count; chunk += SHORT_SUM) {
        const Size end = least(chunk + SHORT_SUM, count);
        Vector of_total[PARTS] = {}, of_mean[PARTS] = {};
        for (int p = 0; p < PARTS; ++p) {
            if (sum(centre[p] != centre[p] ? one : nothing) == 0) continue;
            Vector weight = {}, weighted = {};
            for (Size j = chunk; j < end; ++j) {
                const Vector e = exponential(j, p, shift[p]);
                weight += e, weighted += e == nothing ? nothing : e * tangent(j, p);
            }
            centre[p] = centre[p] != centre[p] ? weighted / weight : centre[p];
        }
        for (Size j = chunk; j < end; j += KEYS)
            for (int p = 0; p < PARTS; ++p) {
                Vector e[KEYS], w[KEYS];
                for (int n = 0; n < KEYS; ++n) {
                    e[n] = exponential(j + n, p, shift[p]);
                    w[n] = e[n] == nothing ? nothing : e[n] * (tangent(j + n, p) - centre[p]);
                    of_total[p] += e[n], of_mean[p] += w[n];
                }
                put(j, p, e, w);
            }
        for (int p = 0; p < PARTS; ++p) total[p] += of_total[p], mean[p] += of_mean[p];
    }
    for (int p = 0; p < PARTS; ++p) {
        store(r.centre + p * VL, centre[p]);
        for (int n = 0; n < VL; ++n) r.total[p * VL + n] += total[p][n], r.mean[p * VL + n] += mean[p][n];
    }
}

// Writes the rows of a tile; `scratch` holds (LANES + 1) * Dv.
static void finish_rows(const Jvp& c, const Tile& t, const JvpRows& r, float* scratch) {
    const Attention& a = c.a;
    float* out = scratch + t.width * a.Dv;
    transpose(r.to_out, t.width, a.Dv, t.width, scratch, a.Dv);
    for (Size i = 0; i < t.rows; ++i) {
        const bool masked = r.total[i] == 0;
        const double mean = masked ? 0. : r.mean[i] / r.total[i];
        const float by = masked ? 0.f : (float)(1 / r.total[i]), less = (float)mean;
        float* row = scratch + i * a.Dv;
        widen(element(c.out.data, a.dtype, c.out.at(t.b, t.h, t.first + i)), a.dtype, a.Dv, out);
        for (Size d = 0; d < a.Dv; ++d) row[d] = masked ? 0.f : row[d] * by - less * out[d];
        narrow(row, a.Dv, a.dtype, (void*)element(c.to_out.data, a.dtype, c.to_out.at(t.b, t.h, t.first + i)));
        c.to_lse[(t.b * a.H + t.h) * a.N + t.first + i] = r.centre[i] + mean;
    }
}

}  // namespace
}  // namespace ISA
