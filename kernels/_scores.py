"""The core scores of one tile in Triton, and their gradients. streaming/_scores.py is the same in PyTorch.

Scores that sum over hidden units (additive, Hadamard with tanh or sigmoid) are loops of outer products into a tile in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast.kernels._group_bias import FLOAT_MASK, BiasProduct
from vlattn_fast.kernels._tiles import (
    FEATURES,
    LOG2_E,
    Dropout,
    Heads,
    MaskPointers,
    Tile,
    extended,
    head_at,
    mask_tile,
    masks_at,
    part_of,
    real_tokens,
    row_products,
    tile_of,
)


class ScoreCall(NamedTuple):
    """All kernels of score_attention and its backward pass take it, as x. p_pres: what `_prepare` has made of query and key.
    product: where the constant MASK is GROUP_PRODUCT. grad and scale are there in the backward pass."""

    q: Heads
    k: Heads
    v: Heads
    p_pres: tuple[Tensor, Tensor]
    masks: MaskPointers
    dropout: Dropout | None
    H: int
    N: int
    M: int
    scale_log2: float
    parameter: float
    product: BiasProduct | None = None
    grad: Heads | None = None
    scale: float = 0.0
    end: None = None


def query_factor(score: str, dtype: torch.dtype) -> float:
    """What `_prepare` multiplies queries with. Where y is a product of query and key they carry the factor of 1 / (1 + 2^(factor
    y)), or in bfloat16 of tanh(factor y)."""
    fast = dtype == torch.bfloat16
    return {"hadamard_tanh": 1.0 if fast else -2.0 * LOG2_E, "hadamard_sigmoid": 0.5 if fast else -LOG2_E}.get(score, 1.0)


@triton.jit
def precomputed_at(p, i_bh, rows, A, UNITS: tl.constexpr):
    """The output of `_prepare` at its batch and head.

    For scores over hidden units: (hidden units, rows), the first padded to an even number, and behind them the `largest_entries`
    of the rows, and those of their differences from the first row; for cosine the rows alone. Rows are padded to a multiple of
    128, as many as the largest tile has, so that tiles are loaded without a mask.
    """
    return p + i_bh * ((A + 1) // 2 * 2 + 2 if UNITS else 1) * ((rows + 127) // 128 * 128)


@triton.jit
def head_of(x, i_bh, i_b, i_h, i_hk, C: tl.constexpr):
    """Where query, key and value of a head begin, and what is precomputed of query and key; and the head's masks."""
    p_q, p_k, p_v = head_at(x.q, i_b, i_h, C.A), head_at(x.k, i_b, i_hk, C.A), head_at(x.v, i_b, i_h // C.GROUP_V, C.DV)
    p_pre_q = precomputed_at(x.p_pres[0], i_bh, x.N, C.A, C.UNITS)
    p_pre_k = precomputed_at(x.p_pres[1], i_b * (x.H // C.GROUP_K) + i_hk, x.M, C.A, C.UNITS)
    return p_q, p_k, p_v, p_pre_q, p_pre_k, masks_at(x.masks, i_b, i_h, x.M)


@triton.jit
def inverse_norm(p_pre, o_row, SCORE: tl.constexpr):
    """1 / |x| of each row, for cosine."""
    if SCORE == "cosine":
        b_inverse = tl.load(p_pre + o_row)  # padded: no mask
    else:
        b_inverse = tl.zeros_like(o_row).to(tl.float32)
    return b_inverse


@triton.jit
def largest_argument(p_q, p_k, p_pre_q, p_pre_k, p_keys, N, M, C: tl.constexpr):
    """A bound of tanh's arguments in a head, where tiles choose by it.

    Tiles of one head all choose the same: scores of the forward and of the backward pass must not differ by more than rounding.
    """
    bound = 0.0
    if C.SCORE == "additive" or (C.SCORE == "hadamard_tanh" and not C.FAST):
        largest_q = _largest_magnitude(p_pre_q, p_keys, N, 0, C.A, False)
        largest_k = _largest_magnitude(p_pre_k, p_keys, M, 0, C.A, C.KEY_MASK)
        bound = largest_q + largest_k if C.SCORE == "additive" else largest_q * largest_k
    if C.SCORE == "additive":
        # queries and keys may cancel: a sum differs from that of the first rows by no more than both differences
        o_a = tl.arange(0, C.BLOCK_A)
        m_a = o_a < tl.where(tl.minimum(N, M) > 0, C.A, 0)  # without rows there is no first one
        b_q = tl.load(p_q + o_a, mask=m_a, other=0.0).to(tl.float32)
        b_k = tl.load(p_k + o_a, mask=m_a, other=0.0).to(tl.float32)
        spread = _largest_magnitude(p_pre_q, p_keys, N, 1, C.A, False)
        spread += _largest_magnitude(p_pre_k, p_keys, M, 1, C.A, C.KEY_MASK)
        nearer = tl.max(tl.abs(b_q + b_k), axis=0) + spread
        bound = tl.where(nearer <= 1.0, nearer, bound)  # else what is precomputed must not be clamped
    return bound


@triton.jit
def _largest_magnitude(p_pre, p_mask, rows, WHICH: tl.constexpr, A: tl.constexpr, MASKED: tl.constexpr):
    """The largest of the rows' `largest_entries`, those of padding left out. WHICH: of the rows, or of the differences."""
    p_pre += tl.full([], (A + 1) // 2 * 2 + WHICH, tl.int64) * ((rows + 127) // 128 * 128)  # behind the units
    b_largest = tl.zeros([128], dtype=tl.float32)
    for start in range(0, rows, 128):
        o_row = start + tl.arange(0, 128)
        b_largest = tl.maximum(b_largest, tl.load(p_pre + o_row, mask=real_tokens(p_mask, o_row, rows, MASKED), other=0.0))
    return tl.max(b_largest, axis=0)


@triton.jit
def largest_entries(b_x):
    """The largest |x| of each row of a tile [row,A].

    It is inf where an entry is NaN or above 22. Up to 22, e^2x is finite, and so is its product with another one.
    """
    b_x = tl.abs(b_x)
    return tl.max(tl.where(b_x <= 22.0, b_x, float("inf")), axis=1)


@triton.jit
def is_direct(bound, SCORE: tl.constexpr):
    """Whether tiles take tanh of each argument, by their `largest_argument`.

    That is slow, and right for all arguments. The other ways lose the digits of small ones, and do not take infinite ones.
    """
    if SCORE == "additive":
        return (bound <= 1.0) | (bound == float("inf"))
    else:
        return bound <= 2.0


@triton.jit
def weights_summed(p_u, o_a, A):
    """The largest magnitude of a head's vector [A], or 1 where all are next to nothing; and the vector's sum.

    Weights are divided by the largest, so that their reciprocals are not too large.
    """
    b_u = tl.load(p_u + o_a, mask=o_a < A, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(b_u), axis=0)
    return tl.where(largest < 1e-30, 1.0, largest), tl.sum(b_u, axis=0)


@triton.jit
def norm_backward(b_x, b_inverse, b_along):
    """The part of cosine's gradient that goes through |x|: x / |x|^2 sum_j grad_ij score_ij, [row,A].

    It is 0 for a zero vector, as in autograd.
    """
    b_inverse = tl.where(b_inverse == float("inf"), 0.0, b_inverse)  # 0 times infinity would be NaN
    return b_x.to(tl.float32) * (b_along * b_inverse * b_inverse)[:, None]


@triton.jit
def along_norms(b_sums, b_weight, x, b_inverse, b_along, SIZE: tl.constexpr):
    """Cosine's gradient of a tile x [x,SIZE] from the sums of `add_products`."""
    b_grad = ()
    for i in tl.static_range(len(b_sums)):
        b_part = part_of(x, i * FEATURES, SIZE)
        b_grad = extended(b_grad, b_sums[i] * b_weight[:, None] - norm_backward(b_part, b_inverse, b_along * b_weight))
    return b_grad


@triton.jit
def weights_of_rows(b_inv_row, p_columns, columns, parameter, SCORE: tl.constexpr, HALF: tl.constexpr = False):
    """From the inverse norms of a tile's rows and of all columns that it meets, for cosine: the rows' weights min(1 / |x|, 1 /
    eps), which `activate` leaves out, and whether the clamp acts on some pair. For other scores 1, and no.

    `columns` is a multiple of 128, since padding has the norm 1. HALF: also where a column is so short that a gradient over its
    norm could overflow in float16 (`lengthened`).
    """
    b_weight, clamped = tl.full(b_inv_row.shape, 1.0, dtype=tl.float32), False
    if SCORE == "cosine":
        b_weight = tl.minimum(b_inv_row, parameter)
        b_largest = tl.zeros([128], dtype=tl.float32)
        for start in range(0, columns, 128):
            b_largest = tl.maximum(b_largest, tl.load(p_columns + start + tl.arange(0, 128)))  # of the shortest column
        largest_row = tl.max(b_inv_row, axis=0)
        largest_column = tl.max(b_largest, axis=0)
        clamped = (largest_row > parameter) | (largest_row * largest_column > parameter)
        if HALF:
            clamped |= largest_column > 256.0
    return b_weight, clamped


@triton.jit
def times_slope(b_x, b_inv_row, b_inv_column, b_weight, parameter, CLAMPED: tl.constexpr, LENGTHENED: tl.constexpr):
    """b_x [row,column] times cosine's slope min(1 / (|x| |y|), 1 / eps) over the row's weight. Without a clamp that is 1 / |y|.

    LENGTHENED: for a product with the columns' vectors as `lengthened` gives them.
    """
    if CLAMPED:
        b_x *= tl.minimum(b_inv_row[:, None] * b_inv_column[None, :], parameter) * (1.0 / b_weight)[:, None]
        if LENGTHENED:
            b_x *= tl.minimum(1.0 / b_inv_column, 1.0)[None, :]
    else:
        b_x *= b_inv_column[None, :]
    return b_x


@triton.jit
def lengthened(t, norms, LENGTHENED: tl.constexpr):
    """A tile [column,A] that meets gradients which `times_slope` has multiplied: in float16 its vectors have at least length 1.

    Their slope is 1 / |y|, and 1e8 beside a zero vector. A gradient times that overflows in float16, and times zero it is NaN.
    A vector of length 1 and a gradient without the slope have the same product. Zero vectors stay.
    """
    if LENGTHENED:
        _, b_inv_column, _ = norms
        b_longer = tl.where(b_inv_column == float("inf"), 1.0, tl.maximum(b_inv_column, 1.0))
        return Tile((t.b.to(tl.float32) * b_longer[:, None]).to(tl.float16), t.p, t.stride, t.o_row, t.m_row)
    else:
        return t


@triton.jit
def sum_unclamped(b_x, b_inv_row, b_inv_column, parameter):
    """The sum [row] of b_x [row,column] over the pairs on which the clamp does not act."""
    return tl.sum(tl.where(b_inv_row[:, None] * b_inv_column[None, :] <= parameter, b_x, 0.0), axis=1)


@triton.jit
def through_score(
    b_x, b_along, b_s, b_slope, norms, parameter, SCORE: tl.constexpr, CLAMPED: tl.constexpr, LENGTHENED: tl.constexpr = False
):
    """b_x [row,column] times the slope of the score, what `add_products` takes; and for cosine b_along [row], to which b_x times
    the score is added (see `norm_backward`).

    b_s, b_slope: of `activate`. norms: the inverse norms of rows and columns and the rows' weights. Without a clamp b_along is a
    sum of products, `rows_times_sums`, and is not added here. For a dot product nothing changes.
    """
    b_inv_row, b_inv_column, b_weight = norms
    if SCORE == "cosine":
        if CLAMPED:
            b_along += sum_unclamped(b_x * b_s, b_inv_row, b_inv_column, parameter)
        b_x = times_slope(b_x, b_inv_row, b_inv_column, b_weight, parameter, CLAMPED, LENGTHENED)
    elif SCORE != "dot":
        b_x = times_activation(b_x, b_slope, SCORE)
    return b_x, b_along


@triton.jit
def reciprocal(x, PRECISION: tl.constexpr):
    """1 / x for |x| in [2^-126, 2^126]. One instruction, where a division takes several. At most an ulp off."""
    if PRECISION == "widen":
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def keep_layout(b, UNITS: tl.constexpr, PRECISION: tl.constexpr):
    """b, kept in the layout that it has, for scores over hidden units.

    Without this the compiler carries the layouts of what follows back to the masks, and fails at their single bits (Triton 3.6
    and 3.9). MaskPointers of these scores are therefore computed apart, passed through here and added.
    """
    if UNITS and PRECISION != "widen":
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [b], dtype=tl.float32, is_pure=False, pack=1)
    else:
        return b


@triton.jit
def add_masks(b_s, b_masked, C: tl.constexpr):
    """Scores over hidden units, and what masks have made of zeros: -inf masks a pair, whatever its score. See `keep_layout`.

    The minimum of anything and NaN is the first, and takes no single bits; in the interpreter of Triton 3.6 it is NaN.
    """
    if C.PRECISION == "widen":
        return tl.where(b_masked == float("-inf"), float("-inf"), b_s + b_masked)
    if C.MASK >= FLOAT_MASK:
        b_s += keep_layout(b_masked, True, C.PRECISION)
    b_limit = tl.where(b_masked == float("-inf"), float("-inf"), float("nan"))
    return tl.minimum(b_s, keep_layout(b_limit, True, C.PRECISION))


@triton.jit
def masked_logits(b_logit, pairs, EDGE: tl.constexpr, C: tl.constexpr):
    """`mask_tile` of any score. Those over hidden units take an attn_mask apart: see `keep_layout`."""
    if C.UNITS and C.MASK != 0:
        return add_masks(b_logit, mask_tile(tl.zeros_like(b_logit), pairs, C, EDGE), C)
    else:
        return mask_tile(b_logit, pairs, C, EDGE)


@triton.jit
def one_a_thread(o, PRECISION: tl.constexpr):
    """Neighbouring offsets that the compiler does not know to be aligned, so that threads load and keep one each."""
    if PRECISION != "widen":
        zero = tl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [tl.num_programs(0)], dtype=tl.int32, is_pure=True, pack=1)
        return o + zero
    else:
        return o


@triton.jit
def _sigmoid(x, FAST: tl.constexpr, PRECISION: tl.constexpr):
    """The logistic function and its slope.

    FAST takes tanh in one instruction. Its error of 2^-11 is a quarter of what bfloat16 rounds.
    """
    if FAST:
        t, _ = _tanh(0.5 * x, FAST, PRECISION)
        s = 0.5 + 0.5 * t
        slope = s - s * s
    else:
        e = tl.exp2(tl.abs(x) * -1.4426950408889634)  # at most 1: nothing overflows, nothing cancels
        r = reciprocal(1.0 + e, PRECISION)
        s = tl.where(x < 0.0, e * r, r)
        slope = e * r * r
    return s, slope


@triton.jit
def _tanh(x, FAST: tl.constexpr, PRECISION: tl.constexpr):
    """tanh and its slope. FAST: see `_sigmoid`."""
    if FAST and PRECISION != "widen":
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
        slope = 1.0 - t * t
    else:
        e = tl.exp2(tl.abs(x) * -2.8853900817779268)
        r = reciprocal(1.0 + e, PRECISION)
        t = (1.0 - e) * r
        slope = 4.0 * e * r * r
        # 1 - e has few digits where x is small (the coefficients are those of Cephes' tanhf)
        xx = x * x
        p = ((-5.70498872745e-3 * xx + 2.06390887954e-2) * xx - 5.37397155531e-2) * xx + 1.33314422036e-1
        p = (p * xx - 3.33332819422e-1) * xx
        t = tl.where(xx < 0.390625, p * x + x, tl.where(x < 0.0, -t, t))
    return t, slope


@triton.jit
def softcapped(b_x, parameter, C: tl.constexpr):
    """tanh(parameter x) and its slope. A scale of 50, say, stands in front of it: so the fast tanh would not do."""
    b_s, b_slope = _tanh(b_x * parameter, False, C.PRECISION)
    return b_s, b_slope * parameter


@triton.jit
def activate(b_x, norms, parameter, CLAMPED: tl.constexpr, C: tl.constexpr):
    """The scores of a tile of dot products, and the slopes that `times_activation` takes.

    Cosine: norms are those of `through_score`, the scores are divided by the rows' weights, and `times_slope` has the slopes.
    """
    b_s, b_slope = b_x, b_x
    if C.SCORE == "cosine":
        b_inv_row, b_inv_column, b_weight = norms
        b_s = times_slope(b_x, b_inv_row, b_inv_column, b_weight, parameter, CLAMPED, False)
    elif C.SCORE == "dot_relu":
        b_s = tl.maximum(b_x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif C.SCORE == "dot_leaky_relu":
        b_s = tl.where(b_x >= 0.0, b_x, parameter * b_x)
        b_slope = tl.where(b_x > 0.0, 1.0, parameter)
    elif C.SCORE == "dot_tanh":
        b_s, b_slope = _tanh(b_x, C.FAST, C.PRECISION)
    elif C.SCORE == "dot_sigmoid":
        b_s, b_slope = _sigmoid(b_x, C.FAST, C.PRECISION)
    elif C.SCORE == "dot_softcap":
        b_s, b_slope = softcapped(b_x, parameter, C)
    else:
        tl.static_assert(C.SCORE == "dot", "activate has no formula for this kind of score")
    return b_s, b_slope


@triton.jit
def scores_of_tile(x, head, p_u, o_q, o_kv, C: tl.constexpr):
    """The scores [q,kv] of a tile, of any kind. head: of `head_of`; p_u: its vector, for scores over hidden units."""
    p_q, p_k, _, p_pre_q, p_pre_k, masks = head
    o_a = tl.arange(0, C.BLOCK_A)
    if C.UNITS:
        bound = largest_argument(p_q, p_k, p_pre_q, p_pre_k, masks.p_keys, x.N, x.M, C)
        largest, total = weights_summed(p_u, o_a, C.A)
        of_q, of_k = (p_q, p_pre_q, o_q, x.q.stride_n, x.N), (p_k, p_pre_k, o_kv, x.k.stride_n, x.M)
        b_s = sum_units(of_q, of_k, p_u, bound, largest, total, C)
    else:
        t_q = tile_of(p_q, x.q.stride_n, o_q, x.N, C.A, C.BLOCK_A)
        t_k = tile_of(p_k, x.k.stride_n, o_kv, x.M, C.A, C.BLOCK_A)
        b_x = row_products(t_q, t_k, C.A, C.PRECISION)
        b_s = activate_all(b_x, p_pre_q, p_pre_k, o_q, o_kv, x.parameter, C)
    return b_s


@triton.jit
def activate_all(b_x, p_pre_q, p_pre_k, o_q, o_kv, parameter, C: tl.constexpr):
    """The scores of a tile [q,kv] of dot products, of cosine, too: each pair with its clamp."""
    b_inv_q, b_inv_k = inverse_norm(p_pre_q, o_q, C.SCORE), inverse_norm(p_pre_k, o_kv, C.SCORE)
    b_s, _ = activate(b_x, (b_inv_q, b_inv_k, tl.full(o_q.shape, 1.0, dtype=tl.float32)), parameter, True, C)
    return b_s


@triton.jit
def times_activation(b_y, b_slope, SCORE: tl.constexpr):
    """b_y times the slopes of `activate`. ReLU's are the dot products: where ReLU is 0 so is the result, whatever b_y."""
    if SCORE == "dot_relu":
        return tl.where(b_slope <= 0.0, 0.0, b_y)
    return b_y * b_slope


@triton.jit
def sum_units(x, y, p_u, bound, largest, total, C: tl.constexpr):
    """The scores [x,y] that are sums over hidden units. Either side may be the queries.

    A side is (its rows, what is precomputed for them, the tile's offsets, the stride of rows, how many there are). `bound` is
    `largest_argument`. It decides from what tanh is taken. `largest` and `total`: see `weights_summed`.
    """
    return _by_method(_sum_pairs, (x, y, p_u, largest, total), bound, C)


@triton.jit
def _by_method(sums: tl.constexpr, operands, bound, C: tl.constexpr):
    """`sums` of the operands, by the way to tanh that all tiles of a head take: see `largest_argument`."""
    if C.SCORE != "hadamard_tanh" and C.SCORE != "hadamard_sigmoid":
        tl.static_assert(C.SCORE == "additive", "hidden units have no formula for this kind of score")
    if C.SCORE != "additive" and C.FAST:
        b_sums = sums(*operands, "direct", C)
    elif C.SCORE == "hadamard_sigmoid":
        b_sums = sums(*operands, "", C)
    elif is_direct(bound, C.SCORE):
        b_sums = sums(*operands, "direct", C)
    elif C.SCORE == "hadamard_tanh":
        b_sums = sums(*operands, "", C)
    elif bound <= 20.0:
        b_sums = sums(*operands, "product", C)
    else:
        b_sums = sums(*operands, "clamped product", C)
    return b_sums


@triton.jit
def _sum_pairs(x, y, p_u, largest, total, METHOD: tl.constexpr, C: tl.constexpr):
    """The sum over pairs of hidden units with one reciprocal for both.

    w1/d1 + w2/d2 = (D w2 + d2) / (D d2) with D = d1/w1, which costs no more than d1. The weights are those over the largest, and
    w1 is at least 1e-10. Where D d2 overflows, both terms are below 1e-11 and become 0. tanh = 2/d - 1, and the constant is
    summed apart. EXACT takes (2 - d)/d instead, since the constant may be much larger than the score, and
    (w1 d2 + w2 d1) / (d1 d2). "direct" takes tanh of each argument; logistic(y) is (1 + tanh(y/2)) / 2.
    """
    # zeros from a tensor core product have the layout of the products that follow: each thread loads few rows and columns, and
    # the tile stays in its threads. With tl.zeros additive scores in bfloat16 take 3,302 instructions of PTX for 2,181 in the
    # forward pass on sm_90, and 254 registers for 212 (D = 64, Triton 3.9); backward they spill 624 bytes for 576.
    b_s = tl.dot(tl.zeros([x[2].shape[0], 16], dtype=tl.float16), tl.zeros([16, y[2].shape[0]], dtype=tl.float16))
    shrink = 1.0 / largest
    for a in tl.range(0, C.A, 2, loop_unroll_factor=1 if C.EXACT else 2):
        w1 = tl.load(p_u + a).to(tl.float32)
        w2 = tl.load(p_u + a + 1, mask=a + 1 < C.A, other=0.0).to(tl.float32)
        if METHOD == "direct":
            b_t1, _ = _tanh(_argument(x, y, a, C), C.FAST, C.PRECISION)
            b_t2, _ = _tanh(_argument(x, y, a + 1, C), C.FAST, C.PRECISION)
            b_s += w1 * b_t1  # one multiply-add each
            b_s += w2 * b_t2
        else:
            inverse = 1.0
            if not C.EXACT:
                w1, w2 = w1 * shrink, w2 * shrink
                inverse = reciprocal(tl.where(tl.abs(w1) < 1e-10, 1e-10, w1), C.PRECISION)
            b_d1 = _denominator(x, y, a, inverse, METHOD)  # D, or d1 where EXACT
            b_d2 = _denominator(x, y, a + 1, 1.0, METHOD)
            b_r = reciprocal(b_d1 * b_d2, C.PRECISION)
            if not C.EXACT:
                b_s += (w2 * b_d1 + b_d2) * b_r  # w1 / d1 + w2 / d2
            elif C.SCORE == "hadamard_sigmoid":
                b_s += (w1 * b_d2 + w2 * b_d1) * b_r
            else:
                # (2 - d) / d is tanh without a constant that would cancel
                b_s += (w1 * (2.0 - b_d1) * b_d2 + w2 * (2.0 - b_d2) * b_d1) * b_r
    # the constant of each unit, summed apart: total is the sum of the weights
    if METHOD == "direct":
        if C.SCORE == "hadamard_sigmoid":
            b_s = 0.5 * (b_s + total)
    elif not C.EXACT:
        if C.SCORE == "hadamard_sigmoid":
            b_s *= largest
        else:
            b_s = (2.0 * largest) * b_s - total
    return b_s


@triton.jit
def _argument(x, y, a, C: tl.constexpr):
    """The argument [x,y] of tanh of hidden unit a."""
    if C.SCORE == "additive":
        b_y = _unit(x, C.A, a)[:, None] + _unit(y, C.A, a)[None, :]
    elif C.FAST:
        b_y = _product(x, y, a, 1.0)
    else:
        b_y = _unit(x, C.A, a)[:, None] * _unit(y, C.A, a)[None, :]
    return b_y


@triton.jit
def _product(x, y, a, factor):
    """[x,y]: what is precomputed of x and y for hidden unit a, multiplied, times the factor."""
    _, p_pre_x, o_x, _, X = x
    _, p_pre_y, o_y, _, Y = y
    i_a = tl.full([], a, tl.int64)
    b_x = tl.load(p_pre_x + i_a * ((X + 127) // 128 * 128) + o_x)
    b_y = tl.load(p_pre_y + i_a * ((Y + 127) // 128 * 128) + o_y)
    return (b_x * factor)[:, None] * b_y[None, :]


@triton.jit
def _denominator(x, y, a, factor, METHOD: tl.constexpr):
    """1 / logistic times the factor, [x,y], of hidden unit a."""
    if METHOD == "product":
        b_d = _product(x, y, a, factor) + factor
    else:
        b_e = _product(x, y, a, 1.0)
        if METHOD == "clamped product":
            b_e = tl.minimum(b_e, 2.3538526683701998e17)  # e^40
        else:
            b_e = tl.exp2(tl.minimum(b_e, 57.7078, propagate_nan=tl.PropagateNan.ALL))  # at most e^40; a NaN stays one
        b_d = b_e * factor + factor
    return b_d


@triton.jit
def _unit(side, A, a):
    """Hidden unit a of the rows of one side; 0 beyond them and beyond A."""
    p_rows, _, o_row, stride, rows = side
    i_a = tl.full([], a, tl.int64)
    return tl.load(p_rows + o_row.to(tl.int64) * stride + i_a, mask=o_row < tl.where(i_a < A, rows, 0), other=0.0).to(tl.float32)


@triton.jit
def twice_exponential(b_x):
    """e^-2x of x clamped to [-22, 22] (`largest_entries` reports the clamp).

    It is 2^n e^rest: a rounded large exponent would show where terms cancel.
    """
    b_y = tl.clamp(b_x, -22.0, 22.0) * -2.0
    b_power = tl.floor(b_y * 1.4426950408889634 + 0.5)
    b_rest = (b_y - b_power * 0.693145751953125) - b_power * 1.42860682030941723212e-6  # ln 2 in two parts, the first short
    return tl.exp2(b_rest * 1.4426950408889634) * tl.exp2(b_power)


@triton.jit
def units_backward(b_dk, b_du, keys, queries, p_ds, offsets, bound, BLOCK_KV: tl.constexpr, C: tl.constexpr):
    """The gradients of one tile of pairs by way of the hidden units, before the factors of `units_factors`: b_dk, b_du and p_dq.

    keys: where they lie and which are real, [k,gA]. queries: the first, their stride, their gradient and how many there are.
    b_dk [k,g,A] and b_du [g,A] are the gradients of keys and vector. p_ds [q,kv] holds those of the scores. offsets: o_k, o_g and
    o_a. `bound`: see `sum_units`.
    """
    return _by_method(_backward_pairs, (b_dk, b_du, keys, queries, p_ds, offsets, BLOCK_KV), bound, C)


@triton.jit
def sum_of_rest(b_ds, bound, C: tl.constexpr):
    """The sum [kv] of a tile's gradients [kv,q] that `units_factors` has a factor for. Tiles that take tanh itself need none."""
    b_sum = tl.sum(b_ds, axis=1)
    if C.SCORE != "hadamard_sigmoid":
        b_sum = tl.where(is_direct(bound, C.SCORE), 0.0, b_sum)
    return b_sum


@triton.jit
def _backward_pairs(b_dk, b_du, keys, queries, p_ds, offsets, BLOCK_KV: tl.constexpr, METHOD: tl.constexpr, C: tl.constexpr):
    """Queries by twos, which share a reciprocal.

    A thread holds one hidden unit of a group of keys. The gradient of a query is thus summed over keys within threads and added
    in memory, which only this program writes. The groups take the queries in parts, each another one, and meet in between.
    Padding has no gradient, and 1 for its units where they are multiplied: 0 times infinity would be NaN. So has NaN, whose pairs
    have the gradient NaN: two queries share a reciprocal.
    """
    p_k, m_k = keys
    p_q, stride_q, p_dq, rows = queries
    o_k, o_g, o_a = offsets
    GROUPS: tl.constexpr = b_dk.shape[1]
    PAD: tl.constexpr = 0.0 if C.SCORE == "additive" else 1.0
    b_k = tl.load(p_k, mask=m_k, other=PAD).to(tl.float32)
    b_at_k = _key_term(tl.where(b_k == b_k, b_k, PAD), C.SCORE, METHOD, C.EXACT, C.FAST)
    b_at_k = tl.reshape(b_at_k, b_dk.shape)  # [k,g,A]
    m_a = (o_a < C.A)[None, :]
    b_units = tl.zeros_like(b_dk)
    for part in range(0, GROUPS):
        tl.debug_barrier()  # the groups' sums of the last part are in memory
        o_1 = (o_g + part) % GROUPS * 2  # [g]
        p_q1 = p_q + o_1.to(tl.int64)[:, None] * stride_q + o_a[None, :]  # [g,A]
        p_dq1 = p_dq + o_1[:, None] * C.A + o_a[None, :]
        p_ds1 = p_ds + o_1[None, :] * BLOCK_KV + o_g[None, :] * b_dk.shape[0] + o_k[:, None]  # [k,g]
        for _ in range(0, rows, 2 * GROUPS):
            m_1, m_2 = (o_1 < rows)[:, None] & m_a, (o_1 + 1 < rows)[:, None] & m_a
            b_q1 = tl.load(p_q1, mask=m_1, other=PAD).to(tl.float32)
            b_q2 = tl.load(p_q1 + stride_q, mask=m_2, other=PAD).to(tl.float32)
            b_q1, b_q2 = tl.where(b_q1 == b_q1, b_q1, PAD), tl.where(b_q2 == b_q2, b_q2, PAD)  # NaN as padding
            b_dq1, b_dq2 = tl.load(p_dq1, mask=m_a, other=0.0), tl.load(p_dq1 + C.A, mask=m_a, other=0.0)
            b_ds1, b_ds2 = tl.load(p_ds1)[:, :, None], tl.load(p_ds1 + BLOCK_KV)[:, :, None]
            b_at1, b_at2 = _query_term(b_q1, METHOD, C.EXACT)[None, :, :], _query_term(b_q2, METHOD, C.EXACT)[None, :, :]
            b_t1, b_t2, b_slope1, b_slope2 = _values_and_slopes(b_at_k, b_at1, b_at2, METHOD, C)
            b_units += b_ds1 * b_t1
            b_units += b_ds2 * b_t2
            if C.SCORE == "additive":  # y = q + k: both gradients are the slope's
                b_dk += b_slope1 * b_ds1
                b_dk += b_slope2 * b_ds2
                b_sum1, b_sum2 = _sum_of_products(b_slope1, b_ds1), _sum_of_products(b_slope2, b_ds2)
            else:  # y = q k: the key's has the factor q, the query's the factor k
                b_slope1 *= b_ds1
                b_slope2 *= b_ds2
                b_dk += b_slope1 * b_q1[None, :, :]
                b_dk += b_slope2 * b_q2[None, :, :]
                b_sum1, b_sum2 = _sum_of_products(b_slope1, b_at_k), _sum_of_products(b_slope2, b_at_k)
            # no atomics: in this part no other group has these queries, and no other program this memory
            tl.store(p_dq1, b_dq1 + b_sum1, mask=m_a)
            tl.store(p_dq1 + C.A, b_dq2 + b_sum2, mask=m_a)
            o_1 += 2 * GROUPS
            p_q1 += tl.full([], 2 * GROUPS, tl.int64) * stride_q
            p_dq1 += 2 * GROUPS * C.A
            p_ds1 += 2 * GROUPS * BLOCK_KV
    return b_dk, b_du + tl.sum(b_units, axis=0)


@triton.jit
def _values_and_slopes(b_at_k, b_at1, b_at2, METHOD: tl.constexpr, C: tl.constexpr):
    """For the pairs of keys with two queries: the score function of a hidden unit, and its slope, [k,g,A] each.

    b_at_k, b_at1, b_at2: of `_key_term` and `_query_term`. `units_factors` and `sum_of_rest` have what is left to do: most ways
    give logistic(2y) and its slope, where tanh(y) = 2 logistic(2y) - 1.
    """
    if METHOD == "direct":
        if C.SCORE == "additive":
            b_y1, b_y2 = b_at_k + b_at1, b_at_k + b_at2
        else:
            b_y1, b_y2 = b_at_k * b_at1, b_at_k * b_at2
            if not C.FAST:  # without `_product_factor`
                b_y1, b_y2 = b_y1 * -0.34657359027997264, b_y2 * -0.34657359027997264
        b_t1, b_slope1 = _tanh(b_y1, C.FAST, C.PRECISION)
        b_t2, b_slope2 = _tanh(b_y2, C.FAST, C.PRECISION)
        if C.SCORE == "additive" or not C.FAST:  # as other tiles have them
            b_slope1, b_slope2 = 0.25 * b_slope1, 0.25 * b_slope2
            if not C.EXACT:
                b_t1, b_t2 = 0.5 * b_t1, 0.5 * b_t2
    else:
        b_e1, b_e2 = _exponential(b_at_k, b_at1, C.SCORE, METHOD), _exponential(b_at_k, b_at2, C.SCORE, METHOD)
        b_d1, b_d2 = 1.0 + b_e1, 1.0 + b_e2
        b_r = reciprocal(b_d1 * b_d2, C.PRECISION)  # one for both: 1 / d1 = d2 / (d1 d2)
        b_t1, b_t2 = b_r * b_d2, b_r * b_d1  # the logistic function
        if C.EXACT:
            # e / (1 + e)^2 and (1 - e) / (1 + e) have no difference of numbers that are nearly 1
            b_slope1, b_slope2 = b_e1 * b_t1 * b_t1, b_e2 * b_t2 * b_t2
            if C.SCORE != "hadamard_sigmoid":
                b_t1, b_t2 = (1.0 - b_e1) * b_t1, (1.0 - b_e2) * b_t2
        else:
            b_slope1, b_slope2 = b_t1 - b_t1 * b_t1, b_t2 - b_t2 * b_t2
    return b_t1, b_t2, b_slope1, b_slope2


@triton.jit
def _sum_of_products(b_x, b_y):
    """The sum [g,A] of b_x [k,g,A] times b_y [k,g,A or 1] over k.

    Four terms at a time, by multiply-adds. `tl.sum` adds products two by two, which takes more instructions.
    """
    if b_x.shape[0] < 4:
        b_sum = tl.sum(b_x * b_y, axis=0)
    else:
        b_x1, b_x2, b_x3, b_x4 = _quarters(b_x)
        b_y1, b_y2, b_y3, b_y4 = _quarters(tl.broadcast_to(b_y, b_x.shape))
        b_sum = tl.sum(b_x1 * b_y1 + b_x2 * b_y2 + b_x3 * b_y3 + b_x4 * b_y4, axis=0)
    return b_sum


@triton.jit
def _quarters(b_x):
    """[k,g,A] as four of [k/4,g,A]."""
    b_x = tl.reshape(b_x, [b_x.shape[0] // 4, 2, 2, b_x.shape[1], b_x.shape[2]])
    b_even, b_odd = tl.split(tl.permute(b_x, (0, 1, 3, 4, 2)))
    b_x1, b_x3 = tl.split(tl.permute(b_even, (0, 2, 3, 1)))
    b_x2, b_x4 = tl.split(tl.permute(b_odd, (0, 2, 3, 1)))
    return b_x1, b_x2, b_x3, b_x4


@triton.jit
def _query_term(b_y, METHOD: tl.constexpr, EXACT: tl.constexpr):
    """The operand for a query: the query itself, or for products of exponentials e^-2y."""
    if METHOD == "product" or METHOD == "clamped product":
        if EXACT:
            b_y = twice_exponential(b_y)
        else:
            b_y = tl.exp2(b_y * -2.8853900817779268)
    return b_y


@triton.jit
def _key_term(b_x, SCORE: tl.constexpr, METHOD: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr):
    """The operand for a key. In products the key carries the factor."""
    if SCORE == "additive":
        b_x = _query_term(b_x, METHOD, EXACT)
    else:
        b_x *= _product_factor(SCORE, FAST)
    return b_x


@triton.jit
def _product_factor(SCORE: tl.constexpr, FAST: tl.constexpr):
    """The factor that makes a product of query and key the exponent of `_exponential`, or with FAST tanh's argument."""
    if FAST:
        factor = 1.0 if SCORE == "hadamard_tanh" else 0.5
    else:
        factor = -2.8853900817779268 if SCORE == "hadamard_tanh" else -1.4426950408889634
    return factor


@triton.jit
def _exponential(b_x, b_y, SCORE: tl.constexpr, METHOD: tl.constexpr):
    """e, where the logistic function is 1 / (1 + e), from `_key_term` and `_query_term`."""
    b_e = b_x * b_y
    if METHOD == "clamped product":
        b_e = tl.minimum(b_e, 2.3538526683701998e17)
    elif SCORE != "additive":
        b_e = tl.exp2(tl.minimum(b_e, 57.7078, propagate_nan=tl.PropagateNan.ALL))
    return b_e


@triton.jit
def units_factors(SCORE: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr):
    """Factors of the sums of `units_backward`: of keys, of queries, of the vector; and that of the sum of the scores' gradients,
    which is added to the vector's gradient.

    The sums are over the slopes of the logistic function, a quarter of tanh's at half the argument.
    """
    TANH: tl.constexpr = FAST and SCORE != "additive"  # then the slopes are tanh's
    if SCORE == "hadamard_sigmoid":
        key = 0.25 if TANH else 1.0
        vector = 0.5 if TANH else 1.0
        rest = 0.5 if TANH else 0.0
    else:
        key = 1.0 if TANH else 4.0
        vector = 1.0 if TANH or EXACT else 2.0
        rest = 0.0 if TANH or EXACT else -1.0
    query = key if SCORE == "additive" else key / _product_factor(SCORE, FAST)
    return key, query, vector, rest
