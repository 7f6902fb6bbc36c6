// The largest value of a float64 mask, and of the bias that is added to it, in each row, over the keys that the other masks let the
// row see. Softmax does not change where
// a row's mask is shifted by a constant, and the rest fits float32: see add_float64_mask in attention.h.
//
// Bound: memory, one read of the mask; only for float64 masks.
#include "attention.h"

namespace ISA {
namespace {

struct MaskShifts {
    Attention a;  // without query, key and value
    double* shifts;  // (B, H, N): 0 where a row sees no key
    FIELDS(a, shifts)
};

static double largest_of_row(const Attention& a, Size b, Size h, Size n) {
    const Masks& m = a.masks;
    const double* mask = (const double*)m.mask + b * m.stride_b + h * m.stride_h + n * m.stride_n;
    const uint8_t* visible = m.keys ? m.keys + b * a.M : nullptr;
    const float* bias = m.row_bias ? m.row_bias + ((b * a.H + h) * a.N + n) * m.groups : nullptr;
    double largest = -INFINITY;
    for (Size j = 0; j < (m.is_causal ? least(n + 1, a.M) : a.M); ++j) {
        const Size group = bias ? m.group_of(b * a.M + j) : 0;
        const double x = sum_of_biases(mask[j * m.stride_m], bias && group < m.groups ? bias[group] : 0.f);
        if (x > largest && (!visible || visible[j])) largest = x;
    }
    return largest == -INFINITY ? 0. : largest;
}

struct MaskShiftsRun {
    const MaskShifts& c;
    Size rows, tasks;
};
static void mask_shifts_task(MaskShiftsRun& call, Size task) {
    const Attention& a = call.c.a;
    for (Size row = share(call.rows, task, call.tasks); row < share(call.rows, task + 1, call.tasks); ++row)
        for (Size b = row / a.N, n = row % a.N, h = 0; h < a.H; ++h) {
            double* shift = call.c.shifts + (b * a.H + h) * a.N + n;
            const bool same = h > 0 && a.masks.stride_h == 0 && !a.masks.row_bias;
            *shift = same ? shift[-a.N] : largest_of_row(a, b, h, n);
        }
}
static Size mask_shifts(const MaskShifts& c) {
    const Size rows = c.a.B * c.a.N;
    MaskShiftsRun call = {c, rows, least(thread_count(), rows)};
    run(call.tasks, call, mask_shifts_task);
    return DONE;
}

}  // namespace
}  // namespace ISA
OPERATOR(mask_shifts, MaskShifts)
