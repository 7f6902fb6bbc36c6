"""Tangents of score_attention, forward mode, for scores that are functions of a product q k^T: one sweep over the keys.

    x_ij    = scale score'(q_i k_j) (dq_i k_j + q_i dk_j) + dbias_i of the key's group, the tangent of the logits
    mean_i  = sum_j P_ij (x_ij - c_i)
    dout_i  = sum_j F_ij P_ij ((x_ij - c_i) v_j + dv_j) - mean_i out_i
    dlse_i  = mean_i + c_i

P comes from the log-sum-exp, as in the backward pass; F are dropout's factors. The forward pass has left out_i = sum_j F_ij P_ij
v_j, so there are five products for its two. Any c_i gives these tangents. It is the mean of x_ij over the first tile in which the
row sees keys: what all x of a row have in common would take digits of their differences, which are all that dout has of them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast._ground.tensors import empty_rows_first
from vlattn_fast.kernels._configurations import Config
from vlattn_fast.kernels._group_bias import FLOAT_MASK, add_group_bias, groups_of_rows, groups_of_tile
from vlattn_fast.kernels._products_backward import RowStats
from vlattn_fast.kernels._scores import activate, head_of, times_activation
from vlattn_fast.kernels._tiles import (
    FEATURES,
    ROW_MULTIPLE,
    Heads,
    MaskPointers,
    Pairs,
    Range,
    add_products,
    aligned,
    cdiv,
    edge_block,
    extended,
    head_at,
    head_tile,
    heads_of,
    keep_factor,
    key_range,
    key_tile,
    keys_at,
    launched,
    masks_and_kind,
    masks_at,
    part_of,
    power_tile,
    row_products,
    row_shift,
    rows_and_head,
    steps_of,
    store_sums,
    tile_of,
    with_bias,
    zero_sums,
)


class Tangents(NamedTuple):
    """Those of query, key and value, and of the bias of groups, prepared as a bias is; None without one."""

    q: Heads
    k: Heads
    v: Heads
    bias: MaskPointers | None
    end: None = None


def tangents_of(inputs: Any) -> Tangents:
    """Those of `score_attention_jvp`."""
    of_bias = None
    if inputs.row_bias_tangent is not None and inputs.row_bias_tangent.shape[3] > 0:
        natural = inputs.row_bias_tangent * math.log(2.0)  # a prepared bias is in base 2
        x = inputs.attention
        of_bias, _ = masks_and_kind(x._replace(attn_mask=None, key_mask=None, row_bias=natural), x.query)
    q, k, v = (heads_of(aligned(each)) for each in (inputs.query_tangent, inputs.key_tangent, inputs.value_tangent))
    return Tangents(q, k, v, of_bias)


def launch(
    call: dict[str, Any], config: Config, tangents: Tangents, lse: Tensor, out: Tensor, coarse: RowStats | None
) -> tuple[Tensor, Tensor]:
    """The tangents of out, laid out (B, N, H, Dv) as it is, and of lse.

    call: named arguments of a launch, as score_attention describes them, with the scale. coarse: under a float mask, shift and
    total of each row.
    """
    x, constants = call["x"], call["C"]
    query = x.q.p
    batch, heads, num_q, _ = query.shape
    out_tangent = empty_rows_first(query, heads, num_q, constants.DV)
    lse_tangent = torch.empty_like(lse)
    if lse.numel() > 0:
        _jvp_kernel[(cdiv(num_q, config["BLOCK_Q"]) * batch * heads,)](
            **launched(call, config, BLOCK_EDGE=edge_block(x.M, config["BLOCK_KV"], constants.CAUSAL)),
            tangents=tangents,
            out=heads_of(out),
            p_lse=lse,
            stats=coarse,
            p_out_tangent=out_tangent,
            p_lse_tangent=lse_tangent,
        )
    return out_tangent, lse_tangent


@triton.jit
def _jvp_kernel(x, tangents, out, p_lse, stats, p_out_tangent, p_lse_tangent, C: tl.constexpr):
    """dout and dlse of a tile of queries i of one head, as the top of this file defines them.

    A row without keys has the shift infinity, so that its P, and with it its tangents, are 0. In float32 (EXACT) all sums over P
    are divided by the sum of P, which undoes the rounding of lse; under a float mask by the total in `stats`.
    """
    H, N, M = x.H, x.N, x.M
    i_q, i_bh, i_b, i_h, i_hk = rows_and_head(tl.cdiv(N, C.BLOCK_Q), H, C.GROUP_K, M * (2 * (C.A + C.DV)), C.CAUSAL)
    p_q, p_k, p_v, _, _, masks = head_of(x, i_bh, i_b, i_h, i_hk, C)
    p_dk, p_dv = head_at(tangents.k, i_b, i_hk, C.A), head_at(tangents.v, i_b, i_h // C.GROUP_V, C.DV)
    o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    o_d = tl.arange(0, C.BLOCK_DV)
    t_q = tile_of(p_q, x.q.stride_n, o_q, N, C.A, C.BLOCK_A)
    t_dq = head_tile(tangents.q, i_b, i_h, o_q, N, C.A, C.BLOCK_A)
    b_shift, b_total = _shift_and_total(stats, p_lse, i_bh, o_q, N, C)
    b_one = tl.full([C.BLOCK_Q], 1.0, dtype=tl.float32)
    b_centre = tl.where(b_shift == float("inf"), 0.0, float("inf"))  # infinity: there is none yet
    uncentred = tl.full([], 1, tl.int32)
    b_mean = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    b_sum = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    b_out = zero_sums(x.v.p.dtype.element_ty, C.BLOCK_Q, C.DV, C.BLOCK_DV)
    whole, end = key_range(i_q, M, False, C.CAUSAL, C.BLOCK_Q, C.BLOCK_KV)
    special, seen, b_parts = groups_of_rows(x, masks, i_bh, i_q * C.BLOCK_Q, o_q, C.MASK)
    keys = Range(0, whole, whole, end, seen)
    for EDGE in tl.static_range(2):
        steps = steps_of(keys, EDGE, C.BLOCK_KV, C)
        for step in range(steps.begin, steps.end, steps.size):
            start, o_kv = keys_at(step, steps, EDGE, C)
            t_k = key_tile(p_k, x.k.stride_n, masks.p_keys, o_kv, M if EDGE else None, C.A, C.BLOCK_A, C.KEY_MASK)
            t_dk = key_tile(p_dk, tangents.k.stride_n, masks.p_keys, o_kv, M if EDGE else None, C.A, C.BLOCK_A, C.KEY_MASK)
            t_v = key_tile(p_v, x.v.stride_n, masks.p_keys, o_kv, M if EDGE else None, C.DV, C.BLOCK_DV, C.KEY_MASK)
            t_dv = key_tile(p_dv, tangents.v.stride_n, masks.p_keys, o_kv, M if EDGE else None, C.DV, C.BLOCK_DV, C.KEY_MASK)
            b_x = row_products(t_q, t_k, C.A, C.PRECISION)  # [q,kv]
            b_x = with_bias(b_x, b_parts, x, i_b, start, C)
            of_tile = groups_of_tile(masks, start, M, o_kv.shape[0], C.MASK)
            b_s, b_slope = activate(b_x, None, x.parameter, EDGE, C)
            pairs = Pairs(masks, start, o_q, o_kv, N, M)
            b_p = power_tile(b_s, b_one * x.scale_log2, b_shift, pairs, special, of_tile, C, EDGE)
            b_dx = row_products(t_dq, t_k, C.A, C.PRECISION)
            b_dx += row_products(t_q, t_dk, C.A, C.PRECISION)
            b_dx = _tangents_of_logits(b_dx, b_slope, x, tangents.bias, i_b, i_h, pairs, C)
            if uncentred != 0:
                b_centre, uncentred = _centred(b_centre, b_dx, b_p)
            b_dp = _tangents_of_powers(b_dx, b_p, b_centre, EDGE, C)
            b_mean += tl.sum(b_dp, axis=1)
            if C.EXACT:
                b_sum += tl.sum(b_p, axis=1)
            if x.dropout is not None:
                b_factor = keep_factor(x.dropout, i_bh, o_q, o_kv, N)
                b_p, b_dp = b_p * b_factor, b_dp * b_factor
            b_out = add_products(b_out, b_dp, t_v, C.DV, C.PRECISION)
            b_out = add_products(b_out, b_p, t_dv, C.DV, C.PRECISION)
    if C.EXACT:
        b_total = tl.where(b_sum > 0.0, b_sum, 1.0)
    b_mean /= b_total
    t_out = head_tile(out, i_b, i_h, o_q, N, C.DV, C.BLOCK_DV)
    b_out = _around_mean(b_out, b_mean, b_total, t_out, C.DV)
    store_sums(p_out_tangent + (i_b * N * H + i_h) * C.DV, H * C.DV, o_q, o_d, N, C.DV, b_out)
    tl.store(p_lse_tangent + i_bh * N + o_q, b_mean + _or_zero(b_centre), mask=o_q < N)


@triton.jit
def _shift_and_total(stats, p_lse, i_bh, o_q, N, C: tl.constexpr):
    """The shift of each row [q], and what its P have to be divided by."""
    if C.MASK >= FLOAT_MASK:  # there lse may be so large that its rounding shows (`is_coarse`)
        o_row = i_bh * (tl.cdiv(N, ROW_MULTIPLE) * ROW_MULTIPLE) + o_q
        return tl.load(stats.shift + o_row), tl.load(stats.total + o_row)
    else:
        return row_shift(p_lse + i_bh * N, o_q, N), tl.full(o_q.shape, 1.0, dtype=tl.float32)


@triton.jit
def _tangents_of_logits(b_dx, b_slope, x, bias, i_b, i_h, pairs, C: tl.constexpr):
    """x_ij [q,kv], from the products dq_i k_j + q_i dk_j."""
    if C.SCORE != "dot":
        b_dx = times_activation(b_dx, b_slope, C.SCORE)
    b_dx *= x.scale
    if bias is not None:
        _, start, o_q, o_kv, N, M = pairs
        b_dx = add_group_bias(b_dx, Pairs(masks_at(bias, i_b, i_h, M), start, o_q, o_kv, N, M), False, False)
    return b_dx


@triton.jit
def _or_zero(b_centre):
    return tl.where(b_centre == float("inf"), 0.0, b_centre)


@triton.jit
def _centred(b_centre, b_dx, b_p):
    """c_i [q], where rows that have none yet take it from a tile; and whether a row that sees keys has none still."""
    m_seen = b_p != 0.0
    b_number = tl.sum(m_seen.to(tl.float32), axis=1)
    b_mean = tl.sum(tl.where(m_seen, b_dx, 0.0), axis=1) / tl.where(b_number > 0.0, b_number, 1.0)
    b_mean = tl.where(tl.abs(b_mean) < float("inf"), b_mean, 0.0)  # an infinite or NaN tangent is for the sums to show
    b_centre = tl.where((b_centre == float("inf")) & (b_number > 0.0), b_mean, b_centre)
    return b_centre, tl.max((b_centre == float("inf")).to(tl.int32), axis=0)


@triton.jit
def _tangents_of_powers(b_dx, b_p, b_centre, EDGE: tl.constexpr, C: tl.constexpr):
    """P_ij (x_ij - c_i) [q,kv]; 0 where P is, whatever stands in tangents of masked keys."""
    b_dx -= _or_zero(b_centre)[:, None]
    if EDGE or C.KEY_MASK or C.MASK != 0:
        b_dx = tl.where(b_p == 0.0, 0.0, b_dx)
    return b_p * b_dx


@triton.jit
def _around_mean(b_sums, b_mean, b_total, t_out, DV: tl.constexpr):
    """The sums over their total, less mean_i out_i."""
    b_tangents = ()
    for i in tl.static_range(len(b_sums)):
        b_part = part_of(t_out, i * FEATURES, DV).to(tl.float32)
        b_tangents = extended(b_tangents, b_sums[i] / b_total[:, None] - b_mean[:, None] * b_part)
    return b_tangents
