"""indexer_divergence over the keys that sparse attention chose: a program for each query, whose rows are heads.

Shapes: chosen (B, N, K), keys in rising order, each once, and M where there is none; the others as in indexer_divergence.py.
Roofline: bound by the reads of keys, K D for each key head and query, twice forward.
Trick: heads that share a key head are the rows of a product, so that a gathered key is read once for them. The gradient of
index_key is summed by key, over places that are sorted by it: the same bits each time. Not measured on a device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast.kernels._tiles import (
    Pairs,
    below_max,
    cdiv,
    mask_logits,
    masks_at,
    relu,
    row_products,
    rows_at,
    store_sums,
    tile_of,
    zero_sums,
)
from vlattn_fast.kernels.attention_divergence import Side, add_small, difference, index_queries, keys_of, kl, largest_of

BLOCK = 16  # of heads, in each line of the table of launches: what a product has at least


def chosen_once(topk_indices: Tensor, keys: int) -> Tensor:
    """Indices (B, N, K) of any order -> int32, each once in rising order, and `keys` for none."""
    inside = (topk_indices >= 0) & (topk_indices < keys)
    chosen = torch.where(inside, topk_indices, keys).int().sort(-1).values
    again = torch.zeros_like(inside)
    again[..., 1:] = chosen[..., 1:] == chosen[..., :-1]
    return chosen.masked_fill(again, keys)


def fill_rows(call: dict[str, Any], side: Side, chosen: Tensor) -> None:
    """The largest logit and weight of each row of a side, into its p_max and p_weight."""
    batch, queries, count = chosen.shape
    blocks = 1 if side.p_factors is not None else blocks_of_heads(side)
    _chosen_rows_kernel[(batch * queries * blocks,)](**call, side=side, p_chosen=chosen, blocks=blocks, K=count)


def terms_of_chosen(call: dict[str, Any], attention: Side, indexer: Side, chosen: Tensor, grad: Tensor | None) -> Tensor:
    """D (B, N); or, with its gradient, that of the indexer's logits (B, N, K)."""
    batch, queries, count = chosen.shape
    result = torch.zeros((batch, queries) if grad is None else chosen.shape, dtype=torch.float32, device=chosen.device)
    sides = {"attention": attention, "indexer": indexer, "p_chosen": chosen, "p_grad": grad, "blocks": blocks_of_heads(attention)}
    _chosen_terms_kernel[(batch * queries,)](**call, **sides, p_result=result, K=count)
    return result


def indexer_gradients(
    call: dict[str, Any], indexer: Side, chosen: Tensor, by_logit: Tensor, grads: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Into `grads` those of index_query, index_key (B, M, D) and index_weights, from those of the logits (B, N, K)."""
    batch, queries, count = chosen.shape
    grad_q, grad_k, grad_weights = grads
    keys = grad_k.shape[1]
    logits = {"indexer": indexer, "p_by_logit": by_logit, "K": count}
    if grad_q.numel() > 0:
        blocks = blocks_of_heads(indexer)
        to = {"p_chosen": chosen, "p_grad_q": grad_q, "p_grad_factors": grad_weights, "blocks": blocks}
        _chosen_backward_q_kernel[(batch * queries * blocks,)](**call, **logits, **to)
    ordered, places = chosen.flatten(1).sort(dim=1, stable=True)
    every = torch.arange(keys, dtype=ordered.dtype, device=ordered.device).repeat(batch, 1)
    ends = torch.searchsorted(ordered, every, right=True)
    to = {"p_places": places, "p_ends": ends, "p_grad_k": grad_k}
    _chosen_backward_k_kernel[(batch * keys,)](**call, **logits, **to)


def blocks_of_heads(side: Side) -> int:
    """Of all heads; those of a block share a key head."""
    return side.H // max(1, side.GROUP_K) * cdiv(side.GROUP_K, BLOCK)


@triton.jit
def with_logits(b_max, b_sum, b_s, scale_log2, FOLDED: tl.constexpr):
    """The largest logit of each row, and the sum of the powers below it, with a further tile of logits [row,kv]."""
    b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
    b_sum *= tl.exp2(tl.sum(below_max(b_max[:, None], b_new, scale_log2, FOLDED), axis=1))
    return b_new, b_sum + tl.sum(tl.exp2(below_max(b_s, b_new, scale_log2, FOLDED)), axis=1)


@triton.jit
def store_row(side, o_row, m_row, b_max, b_sum):
    """Of each row the largest logit, and its weight; infinity and 0 in a row without keys."""
    empty = b_sum == 0.0
    tl.store(side.p_max + o_row, tl.where(empty, float("inf"), b_max), mask=m_row)
    tl.store(side.p_weight + o_row, tl.where(empty, 0.0, tl.div_rn(1.0, tl.where(empty, 1.0, b_sum))), mask=m_row)


@triton.jit
def _query_of(N, blocks):
    """The sample, the query and the block of heads of this program."""
    i = tl.program_id(0).to(tl.int64)
    return i // blocks // N, i // blocks % N, i % blocks


@triton.jit
def _keys_at(p_chosen, i_b, i_q, start, N, M, K, BLOCK_KV: tl.constexpr):
    o = start + tl.arange(0, BLOCK_KV)
    return tl.load(p_chosen + (i_b * N + i_q) * K + o, mask=o < K, other=M)


@triton.jit
def _heads_at(side, i_b, i_q, i, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """The i-th block of heads [heads,D] of one query, the first of them, and how many of them there are."""
    blocks = tl.cdiv(side.GROUP_K, ROWS)
    within_group = i % blocks * ROWS
    first = i // blocks * side.GROUP_K + within_group
    p_q = rows_at(side.q.p, i_b * side.q.stride_b + i_q * side.q.stride_n + first * side.q.stride_h, D)
    count = side.GROUP_K - within_group
    return tile_of(p_q, side.q.stride_h, tl.arange(0, ROWS), count, D, BLOCK_D), first, count


@triton.jit
def _rows_at(side, i_b, i_q, i, N, C: tl.constexpr):
    """The rows of p_max and p_weight of one query: of the i-th block of heads, or the one of an indexer. And which there are."""
    if side.p_factors is None:
        _, first, count = _heads_at(side, i_b, i_q, i, C.OTHER_D, C.OTHER_BLOCK_D, C.BLOCK_Q)
        o_h = tl.arange(0, C.BLOCK_Q)
        return (i_b * side.H + first + o_h) * N + i_q, o_h < count
    else:
        o_h = tl.arange(0, 1)
        return i_b * N + i_q + o_h, o_h < 1


@triton.jit
def _index_heads(side, i_b, i_q, i, N, C: tl.constexpr):
    """The i-th block of an indexer's heads [heads,D] of one query, their factors [heads], and where these stand."""
    t_q, first, count = _heads_at(side, i_b, i_q, i, C.D, C.BLOCK_D, C.BLOCK_Q)
    o_h = tl.arange(0, C.BLOCK_Q)
    o_factor = (i_b * side.H + first + o_h) * N + i_q
    return t_q, tl.load(side.p_factors + o_factor, mask=o_h < count, other=0.0).to(tl.float32), o_factor, o_h < count


@triton.jit
def _logits(side, masks, i_b, i_q, i, o_kv, N, M, C: tl.constexpr):
    """Logits of `_rows_at` [heads,kv] or [1,kv] for `below_max`; -inf for masked pairs and where there is no key."""
    if side.p_factors is None:
        t_q, first, count = _heads_at(side, i_b, i_q, i, C.OTHER_D, C.OTHER_BLOCK_D, C.BLOCK_Q)
        t_k = keys_of(side, masks, i_b, first, o_kv, M, C.OTHER_D, C.OTHER_BLOCK_D, C.KEY_MASK)
        b_s = row_products(t_q, t_k, C.OTHER_D, C.PRECISION)
        if C.OTHER_FOLDED:
            b_s *= side.scale_log2
        o_q = tl.where(tl.arange(0, C.BLOCK_Q) < count, i_q, N).to(tl.int32)  # rows beyond: 0 times infinity is NaN
    else:
        t_k = keys_of(side, masks, i_b, i_b * 0, o_kv, M, C.D, C.BLOCK_D, C.KEY_MASK)
        b_s = tl.zeros([1, C.BLOCK_KV], dtype=tl.float32)
        for block in range(tl.cdiv(side.H, C.BLOCK_Q)):
            t_q, b_factor, _, m_head = _index_heads(side, i_b, i_q, block, N, C)
            b_terms = b_factor[:, None] * relu(row_products(t_q, t_k, C.D, C.PRECISION))
            b_s += tl.sum(tl.where(m_head[:, None], b_terms, 0.0), axis=0)[None, :]
        if C.FOLDED:
            b_s *= side.scale_log2
        o_q = (tl.arange(0, 1) * 0 + i_q).to(tl.int32)
    return mask_logits(b_s, Pairs(masks, 0, o_q, o_kv, N, M), C.MASK, C.KEY_MASK, C.CAUSAL)


@triton.jit
def _logs(side, masks, i_b, i_q, i, o_kv, N, M, C: tl.constexpr):
    """log2 A of `_logits`."""
    FOLDED: tl.constexpr = C.OTHER_FOLDED if side.p_factors is None else C.FOLDED
    o_row, m_row = _rows_at(side, i_b, i_q, i, N, C)
    b_max, b_largest = largest_of(side, o_row, m_row)
    b_s = _logits(side, masks, i_b, i_q, i, o_kv, N, M, C)
    return below_max(b_s, b_max, side.scale_log2, FOLDED) + b_largest[:, None]


@triton.jit
def _chosen_rows_kernel(side, masks, p_chosen, blocks, N, M, K, C: tl.constexpr):
    """Of each row the largest logit, and exp of it over their sum: the largest weight. Infinity and 0 in a row without keys."""
    FOLDED: tl.constexpr = C.OTHER_FOLDED if side.p_factors is None else C.FOLDED
    ROWS: tl.constexpr = C.BLOCK_Q if side.p_factors is None else 1
    i_b, i_q, i = _query_of(N, blocks)
    at_head = masks_at(masks, i_b, 0, M)
    b_max = tl.full([ROWS], -3.4028234e38, dtype=tl.float32)  # the least number: -inf - -inf would be NaN
    b_sum = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, K, C.BLOCK_KV):
        o_kv = _keys_at(p_chosen, i_b, i_q, start, N, M, K, C.BLOCK_KV)
        b_s = _logits(side, at_head, i_b, i_q, i, o_kv, N, M, C)
        b_max, b_sum = with_logits(b_max, b_sum, b_s, side.scale_log2, FOLDED)
    o_row, m_row = _rows_at(side, i_b, i_q, i, N, C)
    store_row(side, o_row, m_row, b_max, b_sum)


@triton.jit
def _chosen_terms_kernel(attention, indexer, masks, p_chosen, p_grad, p_result, blocks, N, M, K, C: tl.constexpr):
    """Of one query, with the attention A of the heads' mean and the indexer's A': the sum of KL's terms; or with its gradient,
    of each key that of the logit, A' - A. blocks: of heads."""
    i_b, i_q, _ = _query_of(N, 1)
    at_head = masks_at(masks, i_b, 0, M)
    b_sum = tl.zeros([C.BLOCK_KV], dtype=tl.float32)
    for start in range(0, K, C.BLOCK_KV):
        o_kv = _keys_at(p_chosen, i_b, i_q, start, N, M, K, C.BLOCK_KV)
        b_high = tl.full([C.BLOCK_KV], -3.0e38, dtype=tl.float32)  # finite: -inf - -inf would be NaN
        b_heads = tl.zeros([C.BLOCK_KV], dtype=tl.float32)  # below a largest power of its own, so that no weight underflows
        for block in range(blocks):
            b_log = _logs(attention, at_head, i_b, i_q, block, o_kv, N, M, C)
            b_new = tl.maximum(b_high, tl.max(b_log, axis=0))
            b_heads = b_heads * tl.exp2(b_high - b_new) + tl.sum(tl.exp2(b_log - b_new[None, :]), axis=0)
            b_high = b_new
        empty = b_heads == 0.0
        b_a = tl.where(empty, float("-inf"), b_high + tl.log2(tl.where(empty, 1.0, b_heads / attention.H)))
        b_b = tl.sum(_logs(indexer, at_head, i_b, i_q, 0, o_kv, N, M, C), axis=0)  # of its one row
        b_p, b_q = tl.exp2(b_a), tl.exp2(b_b)
        if p_grad is None:
            b_sum += kl(b_p, b_q, difference(b_a, b_b))
        else:
            o = start + tl.arange(0, C.BLOCK_KV)
            b_grad = tl.load(p_grad + i_b * N + i_q)
            tl.store(p_result + (i_b * N + i_q) * K + o, tl.where(empty, 0.0, (b_q - b_p) * b_grad), mask=o < K)
    if p_grad is None:
        tl.store(p_result + i_b * N + i_q, tl.sum(b_sum, axis=0))


@triton.jit
def _chosen_backward_q_kernel(indexer, masks, p_chosen, p_by_logit, p_grad_q, p_grad_factors, blocks, N, M, K, C: tl.constexpr):
    """dQ and dw of a block of heads of one query, from dI [K]."""
    i_b, i_q, i = _query_of(N, blocks)
    at_head = masks_at(masks, i_b, 0, M)
    t_q, b_factor, o_factor, m_head = _index_heads(indexer, i_b, i_q, i, N, C)
    b_by_factor = tl.zeros([C.BLOCK_Q, C.BLOCK_KV], dtype=tl.float32)
    b_sums = zero_sums(indexer.q.p.dtype.element_ty, C.BLOCK_Q, C.D, C.BLOCK_D)
    for start in range(0, K, C.BLOCK_KV):
        o_kv = _keys_at(p_chosen, i_b, i_q, start, N, M, K, C.BLOCK_KV)
        o = start + tl.arange(0, C.BLOCK_KV)
        b_di = tl.load(p_by_logit + (i_b * N + i_q) * K + o, mask=o < K, other=0.0)[None, :]
        t_k = keys_of(indexer, at_head, i_b, i_b * 0, o_kv, M, C.D, C.BLOCK_D, C.KEY_MASK)
        b_z = row_products(t_q, t_k, C.D, C.PRECISION)
        b_by_factor += b_di * relu(b_z)
        b_sums = add_small(b_sums, tl.where(b_z <= 0.0, 0.0, b_di * b_factor[:, None]), t_k, C.D, C.PRECISION)
    o_d = tl.arange(0, C.BLOCK_D)
    first = (i_b * indexer.H + i * C.BLOCK_Q) * N + i_q
    store_sums(p_grad_q + first * C.D, N * C.D, tl.arange(0, C.BLOCK_Q), o_d, indexer.H - i * C.BLOCK_Q, C.D, b_sums)
    b_factors = tl.sum(b_by_factor, axis=1)
    tl.store(p_grad_factors + o_factor, b_factors.to(p_grad_factors.dtype.element_ty), mask=m_head)


@triton.jit
def _chosen_backward_k_kernel(indexer, masks, p_places, p_ends, p_by_logit, p_grad_k, N, M, K, C: tl.constexpr):
    """dK of one key, over the places of the queries that chose it, in the order of these. p_places: sorted by key."""
    i_b, i_k, _ = _query_of(M, 1)
    at_head = masks_at(masks, i_b, 0, M)
    end = tl.load(p_ends + i_b * M + i_k)
    begin = tl.load(p_ends + i_b * M + i_k - 1, mask=i_k > 0, other=0)
    o_kv = (tl.arange(0, 16) * 0 + i_k).to(tl.int32)  # as many as a product has at least
    t_k = keys_of(indexer, at_head, i_b, i_b * 0, o_kv, M, C.D, C.BLOCK_D, C.KEY_MASK)
    b_sum = tl.zeros([C.BLOCK_Q, C.BLOCK_D], dtype=tl.float32)
    for start in range(begin, end, C.BLOCK_Q):
        o = start + tl.arange(0, C.BLOCK_Q)
        o_place = tl.load(p_places + i_b * N * K + o, mask=o < end, other=0)
        o_q = tl.where(o < end, o_place // K, N)
        b_di = tl.load(p_by_logit + i_b * N * K + o_place, mask=o < end, other=0.0)
        for h in range(indexer.H):
            t_q, b_factor = index_queries(indexer, i_b, i_b * 0 + h, o_q, N, C.D, C.BLOCK_D)
            b_z = tl.sum(row_products(t_q, t_k, C.D, C.PRECISION), axis=1) * (1.0 / 16.0)  # of 16 equal keys
            b_sum += tl.where(b_z <= 0.0, 0.0, b_di * b_factor)[:, None] * t_q.b.to(tl.float32)
    o_d = tl.arange(0, C.BLOCK_D)
    b_grad = tl.sum(b_sum, axis=0).to(p_grad_k.dtype.element_ty)
    tl.store(p_grad_k + (i_b * M + i_k) * C.D + o_d, b_grad, mask=o_d < C.D)
