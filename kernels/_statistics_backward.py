"""The backward pass of attention_statistics.

Two passes, no atomics. The query-major one comes first: it computes dQ, the gradient of row_weight, and of each row sum P dP,
which the key-major one needs for dK. That sum follows from the statistics themselves, but for the part of `received`: for that
one the query-major kernel goes over the keys once more.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast.kernels._configurations import configuration
from vlattn_fast.kernels._group_bias import add_group_sums, gradient_blocks, groups_of_tile, seeing_queries, store_group_sums
from vlattn_fast.kernels._key_groups import dot_members, groups_of, member
from vlattn_fast.kernels._scores import softcapped
from vlattn_fast.kernels._tiles import (
    Pairs,
    below_max,
    block_and_head,
    cdiv,
    dot,
    edge_block,
    first_sums,
    head_at,
    head_tile,
    key_tile,
    keys_at,
    keys_of_queries,
    launched,
    load_tile,
    mask_logits,
    mask_tile,
    masks_at,
    queries_of_keys,
    steps_of,
    store_tile,
    tile_of,
    within,
)


def queries(
    call: dict[str, Any], facts: dict[str, Any], mass: Tensor, mean_x: Tensor, row_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of the query, (B, H, N) float32 of each head's row_weight, garbage without one of `received`, and of
    row_bias. It also fills the last of call["p_rows"]."""
    query = call["x"].q.p
    batch, heads, num_q, _ = query.shape
    grad_q = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_weight = torch.empty_like(call["p_rows"][3])
    grad_bias, blocks = gradient_blocks(row_bias)
    for p_grad_bias, first_group, block_g in blocks if grad_weight.numel() > 0 else ():
        config = configuration("attention_statistics", "backward_q", **facts)
        _backward_q_kernel[(cdiv(num_q, config["BLOCK_Q"]) * batch * heads,)](
            **launched(call, config, BLOCK_G=block_g, BLOCK_EDGE=edge_block(call["x"].M, config["BLOCK_KV"], call["C"].CAUSAL)),
            p_mass=mass,
            p_mean_x=mean_x,
            p_grad_weight=grad_weight,
            p_grad_q=grad_q,
            p_grad_bias=p_grad_bias,
            first_group=first_group,
        )
    return grad_q, grad_weight, grad_bias


def keys(call: dict[str, Any], facts: dict[str, Any]) -> Tensor:
    """The gradient of the key, after `queries`."""
    key = call["x"].k.p
    batch, heads, num_kv, _ = key.shape
    grad_k = torch.empty_like(key, memory_format=torch.contiguous_format)
    if grad_k.numel() > 0:
        config = configuration("attention_statistics", "backward_kv", **facts)
        edge = edge_block(call["x"].N, config["BLOCK_Q"], call["C"].CAUSAL)
        grid = (cdiv(num_kv, config["BLOCK_KV"]) * batch * heads,)
        _backward_kv_kernel[grid](**launched(call, config, BLOCK_EDGE=edge), p_grad_k=grad_k)
    return grad_k


@triton.jit
def _backward_q_kernel(
    x, p_grads, p_rows, p_mass, p_mean_x, p_grad_weight, p_grad_q, p_grad_bias, first_group, scale, C: tl.constexpr
):
    """dQ of a tile of queries i of one head, and of each row what the key-major kernel needs beside the statistics.

    x_ij    = the base-2 logit - row_max_i         P_ij  = 2^x_ij maximum_i
    dP_ij   = dmass_i[group of j] + dmaximum_i [j = argmax_i] + w_i dreceived_j - ln 2 dentropy_i x_ij
    delta_i = sum_j P_ij dP_ij = sum_g dmass_ig mass_ig + dmaximum_i maximum_i + w_i dw_i - ln 2 dentropy_i mean_x_i
    dw_i    = sum_j P_ij dreceived_j, for which the keys are read once more
    dS_ij   = P_ij (dP_ij - delta_i)               dq_i  = scale sum_j dS_ij slope_ij k_j
    dbias_ig = sum_j dS_ij [j in group g], of BLOCK_G groups
    `minus_delta` is -delta times `maximum`. Its terms are those of dP, summed in the same order, so that a row with one key gets
    0 exactly. Terms that are the same for all keys of a row are in neither: they cancel.
    """
    q, k, groups, weight, masks, H, GROUP_K, N, M, G, scale_log2, parameter = x
    p_argmax, p_row_max, p_maximum, p_minus_delta = p_rows
    i_q, i_bh, i_b, i_h, i_hk = block_and_head(tl.cdiv(N, C.BLOCK_Q), H, GROUP_K)
    p_k = head_at(k, i_b, i_hk, C.D)
    masks = masks_at(masks, i_b, i_h, M)
    p_groups = groups[0] + i_b * groups[1]
    p_grad_mass, p_grad_entropy, p_grad_maximum, p_grad_received = p_grads
    p_grad_mass += i_bh * N * G
    p_grad_received += i_bh * M
    o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    o_d = tl.arange(0, C.BLOCK_D)
    o_row, m_row = i_bh * N + o_q, o_q < N
    b_q = head_tile(q, i_b, i_h, o_q, N, C.D, C.BLOCK_D).b  # [q,D]
    b_max = tl.load(p_row_max + o_row, mask=m_row, other=float("inf"))
    p_of_rows = p_maximum, p_grad_entropy, p_grad_maximum, p_argmax, weight
    rows, b_first = _grad_rows(p_of_rows, o_q, o_row, m_row, C)
    b_maximum, b_ge, b_gm, b_w = rows
    keys = keys_of_queries(i_q, o_q, masks, N, M, C)
    b_sum_terms = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    if C.MAXIMUM:
        b_sum_terms = b_gm * b_maximum
    if C.MASS:
        p_row_mass = p_mass + i_bh * N * G
        b_sum_terms = _add_sum_mass(b_sum_terms, p_grad_mass, p_row_mass, b_maximum, o_q, N, G, C)
    if C.RECEIVED:
        b_received = _grad_weight(x, b_q, b_max, p_k, p_grad_received, masks, o_q, keys, C)
        b_received *= b_maximum
        b_sum_terms += b_w * b_received
        if C.WEIGHT:
            tl.store(p_grad_weight + o_row, b_received, mask=m_row)
    b_minus_delta = -b_sum_terms  # negative, since it is the first term of dP - delta
    if C.ENTROPY:
        b_minus_delta += b_ge * tl.load(p_mean_x + o_row, mask=m_row, other=0.0)
    tl.store(p_minus_delta + o_row, b_minus_delta, mask=m_row)
    b_dq = first_sums(b_q.dtype, C.BLOCK_Q, C.BLOCK_D)
    if C.BLOCK_G > 0:
        b_bias = tl.zeros([C.BLOCK_Q, C.BLOCK_G], dtype=tl.float32)
    for EDGE in tl.static_range(2):
        steps = steps_of(keys, EDGE, C.BLOCK_KV, C)
        for step in range(steps.begin, steps.end, steps.size):
            start, o_kv = keys_at(step, steps, EDGE, C)
            b_k = key_tile(p_k, k.stride_n, masks.p_keys, o_kv, M if EDGE else None, C.D, C.BLOCK_D, C.KEY_MASK).b  # [kv,D]
            b_s, b_slope = scores_of(dot(b_q, tl.trans(b_k), C.PRECISION), parameter, scale_log2, C)  # [q,kv]
            b_s = mask_tile(b_s, Pairs(masks, start, o_q, o_kv, N, M), C, EDGE)
            b_here = tl.arange(0, o_kv.shape[0])[None, :] == (b_first - start)[:, None]  # o_kv would take more instructions
            p_of_head, of_pairs = (p_grad_mass, p_grad_received, p_groups), (o_q, o_kv, N, M, G)
            b_ds = _grad_score(b_s, b_max, b_minus_delta, rows, b_here, p_of_head, of_pairs, scale_log2, EDGE == 1, C)
            if C.BLOCK_G > 0:
                b_bias = add_group_sums(
                    b_bias, b_ds, masks, groups_of_tile(masks, start, M, o_kv.shape[0], C.MASK), o_kv, M, first_group
                )
            if parameter is not None:
                b_ds *= b_slope
            b_dq += dot(b_ds.to(b_k.dtype), b_k, C.PRECISION)
    store_tile(p_grad_q + i_bh * N * C.D, C.D, o_q, o_d, N, C.D, b_dq * scale)
    if C.BLOCK_G > 0:
        store_group_sums(p_grad_bias, masks, i_bh, o_q, N, first_group, b_bias)


@triton.jit
def _backward_kv_kernel(x, p_grads, p_rows, p_grad_k, scale, C: tl.constexpr):
    """dK of a tile of keys j, over all queries i of the GROUP_K query heads that share it, with dS as in `_backward_q_kernel`:

    dk_j = scale sum_i dS_ij slope_ij q_i
    """
    q, k, groups, weight, masks, H, GROUP_K, N, M, G, scale_log2, parameter = x
    p_argmax, p_row_max, p_maximum, p_minus_delta = p_rows
    i_kv, _, i_b, i_hk, _ = block_and_head(tl.cdiv(M, C.BLOCK_KV), H // GROUP_K, 1)
    p_groups = groups[0] + i_b * groups[1]
    p_grad_mass, p_grad_entropy, p_grad_maximum, p_grad_received = p_grads
    o_kv = i_kv * C.BLOCK_KV + tl.arange(0, C.BLOCK_KV)
    o_d = tl.arange(0, C.BLOCK_D)
    b_k = head_tile(k, i_b, i_hk, o_kv, M, C.D, C.BLOCK_D).b  # [kv,D]
    b_dk = first_sums(b_k.dtype, C.BLOCK_KV, C.BLOCK_D, True)  # EACH: else Triton 3.9, too, makes copies of the one number here
    for head in range(0, GROUP_K):
        i_h = i_hk * GROUP_K + head
        i_bh = i_b * H + i_h
        of_head = masks_at(masks, i_b, i_h, M)
        seeing = seeing_queries(of_head, i_kv * C.BLOCK_KV, N, M, C.BLOCK_KV, C.MASK)
        queries = queries_of_keys(i_kv, seeing, N, C, False)
        for EDGE in tl.static_range(1 if C.CAUSAL else 2):
            steps = steps_of(queries, EDGE, C.BLOCK_Q, C)
            # Edges in one stage: a tile that mma and wgmma both read has one buffer, into which stages would copy the next
            # tile while a product reads it (triton-lang/triton pull request 7110)
            for start in tl.range(steps.begin, steps.end, steps.size, num_stages=1 if EDGE else None):
                o_q = start + tl.arange(0, C.BLOCK_EDGE if EDGE else C.BLOCK_Q)
                o_row, m_row = i_bh * N + o_q, within(o_q, N if EDGE or C.CAUSAL else None)
                o_last = tl.minimum(o_q, N - 1) if EDGE or C.CAUSAL else o_q  # as `_received_kernel` takes rows beyond N
                b_q = head_tile(q, i_b, i_h, o_last, None, C.D, C.BLOCK_D).b  # [q,D]
                b_s, b_slope = scores_of(dot(b_q, tl.trans(b_k), C.PRECISION), parameter, scale_log2, C)  # [q,kv]
                if C.MASK != 0 or C.CAUSAL:  # the key padding mask is applied after the loop
                    pairs = Pairs(of_head, i_kv * C.BLOCK_KV, o_q, o_kv, N, M)
                    b_s = mask_logits(b_s, pairs, C.MASK, False, C.CAUSAL)
                p_of_rows = p_maximum, p_grad_entropy, p_grad_maximum, p_argmax, weight
                rows, b_first = _grad_rows(p_of_rows, o_q, o_row, m_row, C)
                b_max = tl.load(p_row_max + o_row, mask=m_row, other=float("inf"))
                b_minus_delta = tl.load(p_minus_delta + o_row, mask=m_row, other=0.0)
                p_of_head = p_grad_mass + i_bh * N * G, p_grad_received + i_bh * M, p_groups
                of_tile = b_s, b_max, b_minus_delta, rows, o_kv[None, :] == b_first[:, None], p_of_head
                b_ds = _grad_score(*of_tile, (o_q, o_kv, N if EDGE or C.CAUSAL else None, M, G), scale_log2, True, C)
                if parameter is not None:
                    b_ds *= b_slope
                b_dk += dot(tl.trans(b_ds).to(b_q.dtype), b_q, C.PRECISION)
    b_dk *= scale  # once a key, not once a pair
    if C.KEY_MASK:  # here and not in the loop: rows of dK are keys
        b_dk = tl.where((tl.load(masks.p_keys + i_b * M + o_kv, mask=o_kv < M, other=0) != 0)[:, None], b_dk, 0.0)
    store_tile(p_grad_k + (i_b * (H // GROUP_K) + i_hk) * M * C.D, C.D, o_kv, o_d, M, C.D, b_dk)


@triton.jit
def _grad_weight(x, b_q, b_max, p_k, p_grad_received, masks, o_q, keys, C: tl.constexpr):
    """sum_j 2^x_ij dreceived_j of a tile of queries, [q]. keys: their `Range`."""
    N, M, stride_k, scale_log2, parameter = x.N, x.M, x.k.stride_n, x.scale_log2, x.parameter
    b_received = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    for EDGE in tl.static_range(2):
        b_sum = tl.zeros([C.BLOCK_Q, C.BLOCK_EDGE if EDGE else C.BLOCK_KV], dtype=tl.float32)  # over its columns once, at the end
        steps = steps_of(keys, EDGE, C.BLOCK_KV, C)
        for step in range(steps.begin, steps.end, steps.size):
            start, o_kv = keys_at(step, steps, EDGE, C)
            b_k = tile_of(p_k, stride_k, o_kv, M if EDGE else None, C.D, C.BLOCK_D).b  # [kv,D]
            b_s, _ = scores_of(dot(b_q, tl.trans(b_k), C.PRECISION), parameter, scale_log2, C)  # [q,kv]
            b_s = mask_tile(b_s, Pairs(masks, start, o_q, o_kv, N, M), C, EDGE)
            b_e = tl.exp2(below_max(b_s, b_max, scale_log2, C.FOLDED))
            b_sum += b_e * _column(p_grad_received, o_kv, M if EDGE else None)[None, :]
        b_received += tl.sum(b_sum, axis=1)
    return b_received


@triton.jit
def scores_of(b_products, parameter, scale_log2, C: tl.constexpr):
    """Scores [q,kv] of products, in the unit of `below_max`, and where they are capped the slopes to them, without the scale."""
    b_s, b_slope = b_products, b_products
    if parameter is not None:
        b_s, b_slope = softcapped(b_s, parameter, C)
    if C.FOLDED:
        b_s *= scale_log2
    return b_s, b_slope


@triton.jit
def _grad_rows(p_rows, o_q, o_row, m_row, C: tl.constexpr):
    """(maximum, grad_entropy of entropies in base 2, grad_maximum, weight) and argmax of rows; zeros for what is absent.

    Gradients and weight come times `maximum`, which every probability of a row has as a factor.
    """
    p_maximum, p_grad_entropy, p_grad_maximum, p_argmax, p_weight = p_rows
    b_maximum = tl.load(p_maximum + o_row, mask=m_row, other=0.0)
    b_ge, b_gm, b_w = o_q * 0.0, o_q * 0.0, o_q * 0.0  # [q] float32
    b_first = o_q * 0 - 1  # no key
    if C.ENTROPY:  # times ln 2, since x is in base 2
        b_ge = tl.load(p_grad_entropy + o_row, mask=m_row, other=0.0) * 0.6931471805599453 * b_maximum
    if C.MAXIMUM:
        b_gm = tl.load(p_grad_maximum + o_row, mask=m_row, other=0.0) * b_maximum
        b_first = tl.load(p_argmax + o_row, mask=m_row, other=-1).to(tl.int32)
    if C.RECEIVED:
        b_w = b_maximum
        if C.WEIGHT:
            b_w = tl.load(p_weight + o_row, mask=m_row, other=0.0) * b_maximum
    return (b_maximum, b_ge, b_gm, b_w), b_first


@triton.jit
def _grad_score(b_s, b_max, b_minus_delta, rows, b_here, p_grads, pairs, scale_log2, EDGE: tl.constexpr, C: tl.constexpr):
    """dS / scale = P (dP - sum P dP) for a tile [q,kv] of logits. All that makes dP comes times `maximum`.

    rows: of `_grad_rows`. b_here [q,kv]: whether a key is the argmax. p_grads: of mass and received, and the groups. pairs: the
    tile's queries and keys, N (see `within`), M and G. EDGE: some of the keys may not exist.
    """
    b_maximum, b_ge, b_gm, b_w = rows
    p_grad_mass, p_grad_received, p_groups = p_grads
    o_q, o_kv, N, M, G = pairs
    b_x = below_max(b_s, b_max, scale_log2, C.FOLDED)
    if C.ENTROPY:  # x 2^x must be 0 where x = -inf: 2^-160 is 0. Without the entropy's x, 2^-inf is 0 by itself
        b_x = tl.maximum(b_x, -160.0, propagate_nan=tl.PropagateNan.ALL)
    b_dp = b_minus_delta[:, None]
    if C.MASS or C.MAXIMUM or C.RECEIVED:
        b_terms = tl.zeros([o_q.shape[0], o_kv.shape[0]], dtype=tl.float32)
        if C.MAXIMUM:
            b_terms = tl.where(b_here, b_gm[:, None], 0.0)
        if C.MASS:
            b_terms = _add_grad_mass(b_terms, p_grad_mass, b_maximum, p_groups, o_q, o_kv, N, M, G, C)
        if C.RECEIVED:
            b_terms += b_w[:, None] * _column(p_grad_received, o_kv, M if EDGE else None)[None, :]
        b_dp = b_dp + b_terms
    if C.ENTROPY:
        b_dp = b_dp - b_ge[:, None] * b_x
    return tl.exp2(b_x) * b_dp


@triton.jit
def _add_grad_mass(b_dp, p_grad_mass, b_maximum, p_groups, o_q, o_kv, N, M, G, C: tl.constexpr):
    """b_dp [q,kv] and grad_mass of each query for the group of each key, 0 without a group. C.FEW groups are added one by one."""
    if C.FEW > 0:
        for g in tl.static_range(C.FEW):
            b_one = tl.load(p_grad_mass + o_q.to(tl.int64) * G + g, mask=within(o_q, N), other=0.0) * b_maximum
            b_dp += b_one[:, None] * member(p_groups, o_kv, M, g)[None, :]
    else:
        b_group = groups_of(p_groups, o_kv, M, G)
        b_tile = tl.zeros([o_q.shape[0], o_kv.shape[0]], dtype=tl.float32)
        for start in range(0, G, 16):  # 16 is the least that a matrix instruction takes
            o_g = start + tl.arange(0, 16)
            b_some = load_tile(p_grad_mass, G, o_q, o_g, N, G)  # [q,G]
            b_tile += dot_members(b_some, o_g[:, None] == b_group[None, :], tl.bfloat16, C.SPLIT, C.PRECISION)
        b_dp += b_tile * b_maximum[:, None]
    return b_dp


@triton.jit
def _add_sum_mass(b_sum, p_grad_mass, p_mass, b_maximum, o_q, N, G, C: tl.constexpr):
    """b_sum [q] and the sum of P times what `_add_grad_mass` adds, with gradients rounded as there."""
    if C.FEW > 0:
        for g in tl.static_range(C.FEW):
            b_one = tl.load(p_grad_mass + o_q.to(tl.int64) * G + g, mask=o_q < N, other=0.0) * b_maximum
            b_sum += b_one * tl.load(p_mass + o_q.to(tl.int64) * G + g, mask=o_q < N, other=0.0)
    else:
        b_all = tl.zeros([o_q.shape[0]], dtype=tl.float32)
        for start in range(0, G, 16):
            o_g = start + tl.arange(0, 16)
            b_some = load_tile(p_grad_mass, G, o_q, o_g, N, G)  # [q,G]
            b_same = tl.arange(0, 16)[:, None] == tl.arange(0, 16)[None, :]
            # times the identity: rounded as the products of `_add_grad_mass` round them, so that the sum cancels
            b_some = dot_members(b_some, b_same, tl.bfloat16, C.SPLIT, C.PRECISION)
            b_all += tl.sum(b_some * load_tile(p_mass, G, o_q, o_g, N, G), axis=1)
        b_sum += b_all * b_maximum
    return b_sum


@triton.jit
def _column(p, o_kv, M):
    """[kv]; `M` as in `within`."""
    return tl.load(p + o_kv, mask=within(o_kv, M), other=0.0)
