// The weights a and b (B, N) of relevancy_residual: the shares of two tensors x and o (B, N, C) by |sum_c g x| and |sum_c g o|, by
// their L2 norms, or by sum_c |g x| and sum_c |g o|. PyTorch reads each tensor several times, and widens those of 16 bits.
//
// Bound: memory, one read of x, o and g.
// Trick: one sweep, rows shared out among threads. Times beside torch.compile's: benchmarks/relevancy_residual.py.
#include "rows.h"

namespace ISA {
namespace {

enum Weighting : Size { CONTRIBUTION, NORM, MAGNITUDE };  // in the order of BY_ROWS in the formula's file

struct Rows {  // (B, N, C) with a last stride of 1; strides count elements
    const void* data;
    Size stride_b, stride_n;
    FIELDS(data, stride_b, stride_n)
};
struct ResidualWeights {
    Size dtype, B, N, C, weighting;
    Rows residual, branch, grad;
    float *a, *b;  // (B, N)
    FIELDS(dtype, B, N, C, weighting, residual, branch, grad, a, b)
};

// VL numbers from the i-th of a row on, or where it has fewer, these and zeros
template <Size DTYPE> INLINE Vector numbers(const void* row, Size i, Size C) {
    if constexpr (DTYPE == FLOAT32) {
        const float* p = (const float*)row + i;
        return i + VL <= C ? load(p) : load_some(p, C - i);
    } else {
        const uint16_t* p = (const uint16_t*)row + i;
        return widened(i + VL <= C ? load(p) : load_some(p, C - i), DTYPE == BFLOAT16);
    }
}

struct Sums {
    Vector x, o;
    METHOD void add(Vector more_x, Vector more_o) { x += more_x, o += more_o; }
};
template <Size DTYPE, Size WEIGHTING> static void weigh_row(const ResidualWeights& c, Size b, Size n) {
    const auto row = [&](const Rows& rows) { return element(rows.data, DTYPE, b * rows.stride_b + n * rows.stride_n); };
    const void *x = row(c.residual), *o = row(c.branch), *g = row(c.grad);
    Sums total = {};
    for (Size first = 0; first < c.C; first += SHORT_SUM * VL) {  // as in sum_over
        Sums part = {};
        for (Size i = first; i < least(first + SHORT_SUM * VL, c.C); i += VL) {
            const Vector of_x = numbers<DTYPE>(x, i, c.C), of_o = numbers<DTYPE>(o, i, c.C);
            if (WEIGHTING == NORM) {
                part.add(of_x * of_x, of_o * of_o);
            } else {
                const Vector of_g = numbers<DTYPE>(g, i, c.C), by_x = of_g * of_x, by_o = of_g * of_o;
                WEIGHTING == MAGNITUDE ? part.add(absolute(by_x), absolute(by_o)) : part.add(by_x, by_o);
            }
        }
        total.add(part.x, part.o);
    }
    const float sum_x = sum(total.x), sum_o = sum(total.o);
    const float by_x = WEIGHTING == NORM ? sqrtf(sum_x) : fabsf(sum_x), by_o = WEIGHTING == NORM ? sqrtf(sum_o) : fabsf(sum_o);
    const float a = by_x + by_o == 0.f ? 0.5f : by_x / (by_x + by_o);
    c.a[b * c.N + n] = a, c.b[b * c.N + n] = 1.f - a;
}

static const Size NUMBERS_OF_A_TASK = 1 << 16;  // of each tensor at least: for fewer two threads take as long as one

struct WeightsRun {
    const ResidualWeights& c;
    void (*weigh)(const ResidualWeights&, Size b, Size n);
    Size rows, tasks;
};
static void weigh_rows(WeightsRun& call, Size task) {
    for (Size row = share(call.rows, task, call.tasks); row < share(call.rows, task + 1, call.tasks); ++row)
        call.weigh(call.c, row / call.c.N, row % call.c.N);
}
static Size residual_weights(const ResidualWeights& c) {
    const auto chosen = [&](auto dtype) {
        return c.weighting == NORM        ? weigh_row<dtype.value, NORM>
               : c.weighting == MAGNITUDE ? weigh_row<dtype.value, MAGNITUDE>
                                          : weigh_row<dtype.value, CONTRIBUTION>;
    };
    const auto weigh = c.dtype == FLOAT32    ? chosen(Constant<FLOAT32>{})
                       : c.dtype == BFLOAT16 ? chosen(Constant<BFLOAT16>{})
                                             : chosen(Constant<FLOAT16>{});
    const Size rows = c.B * c.N;
    WeightsRun call = {c, weigh, rows, least(thread_count(), most(1, rows * c.C / NUMBERS_OF_A_TASK))};
    run(call.tasks, call, weigh_rows);
    return DONE;
}

}  // namespace
}  // namespace ISA
OPERATOR(residual_weights, ResidualWeights)
