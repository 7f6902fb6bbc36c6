"""The core scores of one tile in Triton, and their gradients. streaming/_scores.py is the same in PyTorch.

Scores that sum over hidden units (additive, Hadamard with tanh or sigmoid) are loops of outer products into a tile in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def precomputed_at(p, i_bh, rows, A, UNITS: tl.constexpr):
    """The output of `_prepare` at its batch and head.

    For scores over hidden units: (hidden units, rows), the first padded to an even number; for cosine the rows alone. Rows are
    padded to a multiple of 128, as many as the largest tile has, so that tiles are loaded without a mask.
    """
    return p + i_bh * ((A + 1) // 2 * 2 if UNITS else 1) * ((rows + 127) // 128 * 128)


@triton.jit
def row_norm_and_bound(b_x, p_pre, o_row, SCORE: tl.constexpr):
    """For a tile [row,A]: 1 / |x| of each row for cosine, and `largest_magnitude`."""
    if SCORE == "cosine":
        b_row = tl.load(p_pre + o_row)
    else:
        b_row = tl.zeros_like(o_row).to(tl.float32)
    return b_row, largest_magnitude(b_x, SCORE)


@triton.jit
def largest_magnitude(b_x, SCORE: tl.constexpr):
    """The largest |x| of a tile, for additive scores.

    It is inf where an entry is NaN or above 22. Up to 22, e^2x is finite, and so is its product with another one.
    """
    if SCORE == "additive":
        b_x = tl.abs(b_x.to(tl.float32))
        return tl.max(tl.max(tl.where(b_x <= 22.0, b_x, float("inf")), axis=1), axis=0)
    else:
        return 0.0


@triton.jit
def norm_backward(b_x, b_inverse, b_along):
    """The part of cosine's gradient that goes through |x|: x / |x|^2 sum_j grad_ij score_ij, [row,A].

    It is 0 for a zero vector, as in autograd.
    """
    b_inverse = tl.where(b_inverse == float("inf"), 0.0, b_inverse)
    return b_x.to(tl.float32) * (b_along * b_inverse * b_inverse)[:, None]


@triton.jit
def slope_for_unit_rows(b_slope, b_weight, b_column, dtype: tl.constexpr):
    """Cosine's slope min(1 / (|x| |y|), 1 / eps) over the row's weight min(1 / |x|, 1 / eps), which multiplies the sum over y.

    Beside a zero vector the slope is 1e8, and its product with a gradient would overflow in float16. There 1 / |y| is infinite
    for zero vectors alone, and these add nothing.
    """
    b_slope *= (1.0 / b_weight)[:, None]
    if dtype == tl.float16:
        b_slope = tl.where((b_column == float("inf"))[None, :], 0.0, b_slope)
    return b_slope


@triton.jit
def _reciprocal(x, PRECISION: tl.constexpr):
    """1 / x for x in [1, 2^126]. One instruction, where a division takes several. At most an ulp off."""
    if PRECISION == "widen":
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def keep_layout(b, UNITS: tl.constexpr, PRECISION: tl.constexpr):
    """b, kept in the layout that it has, for scores over hidden units.

    Without this the compiler carries the layouts of what follows back to the masks, and fails at their single bits (Triton 3.6
    and 3.9). Masks of these scores are therefore computed apart, passed through here and added.
    """
    if UNITS and PRECISION != "widen":
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [b], dtype=tl.float32, is_pure=False, pack=1)
    else:
        return b


@triton.jit
def _sigmoid(x, FAST: tl.constexpr, PRECISION: tl.constexpr):
    """The logistic function and its slope.

    FAST takes tanh in one instruction. Its error of 2^-11 is a quarter of what bfloat16 rounds.
    """
    if FAST:
        s = 0.5 + 0.5 * _fast_tanh(0.5 * x, PRECISION)
        slope = s - s * s
    else:
        e = tl.exp2(tl.abs(x) * -1.4426950408889634)  # at most 1: nothing overflows, nothing cancels
        r = _reciprocal(1.0 + e, PRECISION)
        s = tl.where(x < 0.0, e * r, r)
        slope = e * r * r
    return s, slope


@triton.jit
def _tanh(x, FAST: tl.constexpr, PRECISION: tl.constexpr):
    """tanh and its slope."""
    if FAST:
        t = _fast_tanh(x, PRECISION)
        slope = 1.0 - t * t
    else:
        e = tl.exp2(tl.abs(x) * -2.8853900817779268)
        r = _reciprocal(1.0 + e, PRECISION)
        t = (1.0 - e) * r
        t = tl.where(x < 0.0, -t, t)
        slope = 4.0 * e * r * r
    return t, slope


@triton.jit
def _fast_tanh(x, PRECISION: tl.constexpr):
    if PRECISION == "widen":
        return 2.0 / (1.0 + tl.exp(tl.clamp(-2.0 * x, -80.0, 80.0))) - 1.0
    else:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def activate(b_x, b_row, b_column, parameter, SCORE: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr):
    """The scores of a tile of dot products, and the slopes that their gradients are multiplied by."""
    b_s, b_slope = b_x, b_x
    if SCORE == "cosine":
        b_slope = tl.minimum(b_row[:, None] * b_column[None, :], parameter)
        b_s = b_x * b_slope
    if SCORE == "dot_relu":
        b_s = tl.maximum(b_x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_slope = tl.where(b_x > 0.0, 1.0, 0.0)
    if SCORE == "dot_leaky_relu":
        b_s = tl.where(b_x >= 0.0, b_x, parameter * b_x)
        b_slope = tl.where(b_x > 0.0, 1.0, parameter)
    if SCORE == "dot_tanh":
        b_s, b_slope = _tanh(b_x, FAST, PRECISION)
    if SCORE == "dot_sigmoid":
        b_s, b_slope = _sigmoid(b_x, FAST, PRECISION)
    return b_s, b_slope


@triton.jit
def sum_units(
    p_x,
    p_y,
    p_pre_x,
    p_pre_y,
    p_u,
    o_x,
    o_y,
    stride_x,
    stride_y,
    X,
    Y,
    A,
    bound,
    SCORE: tl.constexpr,
    EXACT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The scores [x,y] that are sums over hidden units. Either side may be the queries.

    `bound` is the sum of both sides' `largest_magnitude`. It decides how additive scores combine their exponentials.
    """
    if SCORE == "additive":
        if bound <= 20.0:
            b_s = _sum_pairs(
                p_x, p_y, p_pre_x, p_pre_y, p_u, o_x, o_y, stride_x, stride_y, X, Y, A, SCORE, "product", EXACT, FAST, PRECISION
            )
        elif bound < float("inf"):
            b_s = _sum_pairs(
                p_x,
                p_y,
                p_pre_x,
                p_pre_y,
                p_u,
                o_x,
                o_y,
                stride_x,
                stride_y,
                X,
                Y,
                A,
                SCORE,
                "clamped product",
                EXACT,
                FAST,
                PRECISION,
            )
        else:
            b_s = _sum_pairs(
                p_x, p_y, p_pre_x, p_pre_y, p_u, o_x, o_y, stride_x, stride_y, X, Y, A, SCORE, "sum", EXACT, FAST, PRECISION
            )
    else:
        b_s = _sum_pairs(
            p_x, p_y, p_pre_x, p_pre_y, p_u, o_x, o_y, stride_x, stride_y, X, Y, A, SCORE, "", EXACT, FAST, PRECISION
        )
    return b_s


@triton.jit
def _sum_pairs(
    p_x,
    p_y,
    p_pre_x,
    p_pre_y,
    p_u,
    o_x,
    o_y,
    stride_x,
    stride_y,
    X,
    Y,
    A,
    SCORE: tl.constexpr,
    METHOD: tl.constexpr,
    EXACT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sum over pairs of hidden units, w1/d1 + w2/d2 = (w1 d2 + w2 d1) / (d1 d2), with one reciprocal for both.

    Denominators are at most 1 + e^40. tanh = 2/d - 1, and the constant is summed apart. EXACT takes (2 - d)/d instead, since the
    constant may be much larger than the score.
    """
    # zeros from a tensor core product have the layout of the products that follow: each thread loads few rows and columns, and
    # the tile stays in its threads
    b_s = tl.dot(tl.zeros([o_x.shape[0], 16], dtype=tl.float16), tl.zeros([16, o_y.shape[0]], dtype=tl.float16))
    constant = 0.0
    for a in tl.range(0, A, 2, loop_unroll_factor=1 if EXACT else 2):
        w1 = tl.load(p_u + a).to(tl.float32)
        w2 = tl.load(p_u + a + 1, mask=a + 1 < A, other=0.0).to(tl.float32)
        b_d1 = _denominator(p_x, p_y, p_pre_x, p_pre_y, o_x, o_y, stride_x, stride_y, X, Y, A, a, SCORE, METHOD)
        b_d2 = _denominator(p_x, p_y, p_pre_x, p_pre_y, o_x, o_y, stride_x, stride_y, X, Y, A, a + 1, SCORE, METHOD)
        b_r = _reciprocal(b_d1 * b_d2, PRECISION)
        if EXACT and SCORE != "hadamard_sigmoid":
            b_s += (w1 * (2.0 - b_d1) * b_d2 + w2 * (2.0 - b_d2) * b_d1) * b_r
        else:
            b_s += (w1 * b_d2 + w2 * b_d1) * b_r
            constant += w1 + w2
    if SCORE != "hadamard_sigmoid" and not EXACT:
        b_s = 2.0 * b_s - constant
    return b_s


@triton.jit
def _denominator(p_x, p_y, p_pre_x, p_pre_y, o_x, o_y, stride_x, stride_y, X, Y, A, a, SCORE: tl.constexpr, METHOD: tl.constexpr):
    """1 / logistic, [x,y], of hidden unit a."""
    i_a = tl.full([], a, tl.int64)
    if METHOD == "sum":
        b_x = tl.load(p_x + o_x.to(tl.int64) * stride_x + i_a, mask=o_x < tl.where(i_a < A, X, 0), other=0.0).to(tl.float32)
        b_y = tl.load(p_y + o_y.to(tl.int64) * stride_y + i_a, mask=o_y < tl.where(i_a < A, Y, 0), other=0.0).to(tl.float32)
        b_e = (b_x[:, None] + b_y[None, :]) * -2.8853900817779268
        b_d = 1.0 + tl.exp2(tl.minimum(b_e, 57.7078, propagate_nan=tl.PropagateNan.ALL))
    else:
        b_x = tl.load(p_pre_x + i_a * ((X + 127) // 128 * 128) + o_x)
        b_y = tl.load(p_pre_y + i_a * ((Y + 127) // 128 * 128) + o_y)
        b_d = b_x[:, None] * b_y[None, :]
        if SCORE == "additive":
            b_d += 1.0
            if METHOD == "clamped product":
                b_d = tl.minimum(b_d, 2.3538526683701998e17)  # e^40
        else:
            b_d = 1.0 + tl.exp2(tl.minimum(b_d, 57.7078, propagate_nan=tl.PropagateNan.ALL))
    return b_d


@triton.jit
def units_backward(
    b_dx,
    b_du,
    b_ds,
    b_x,
    p_scratch,
    p_y,
    stride_y,
    o_a,
    start,
    Y,
    A,
    SCORE: tl.constexpr,
    FAST: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):
    """b_dx [x,A] plus sum_y b_ds [x,y] slope(x,y), before the weight of the unit; with VECTOR also b_du plus sum_y b_ds act(x,y).

    One column of b_ds at a time is multiplied with one row of y, for all hidden units, in registers. Triton cannot index
    registers. So the columns go through scratch memory [y,x], which only this program uses and which stays in its cache. With
    more than one stage the compiler may load columns before these barriers.
    """
    o_x = tl.arange(0, BLOCK_X)
    o_y = tl.arange(0, BLOCK_Y)
    tl.debug_barrier()  # the last tile has been read
    tl.store(p_scratch + o_y[None, :] * BLOCK_X + o_x[:, None], b_ds)
    tl.debug_barrier()
    b_x = b_x.to(tl.float32)
    for i_y in range(start, tl.minimum(Y, start + BLOCK_Y)):
        b_y = tl.load(p_y + tl.full([], i_y, tl.int64) * stride_y + o_a, mask=o_a < A, other=0.0).to(tl.float32)  # [A]
        b_g = tl.load(p_scratch + (i_y - start) * BLOCK_X + o_x)  # [x]
        if SCORE == "hadamard_sigmoid":
            b_t, b_slope = _sigmoid(b_x * b_y[None, :], FAST, PRECISION)
        else:
            b_z = b_x + b_y[None, :] if SCORE == "additive" else b_x * b_y[None, :]
            b_t, b_slope = _tanh(b_z, FAST, PRECISION)
        if SCORE != "additive":
            b_slope *= b_y[None, :]
        b_dx += b_g[:, None] * b_slope
        if VECTOR:
            b_du += b_g[:, None] * b_t
    return b_dx, b_du
