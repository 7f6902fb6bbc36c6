"""indexer_divergence in Triton: how far an indexer is from the mean of the heads' attention; forward and backward.

Shapes: query (B, H, N, D), key (B, Hk, M, D), index_query (B, Hi, N, Di), index_key (B, M, Di), index_weights (B, Hi, N);
divergence (B, N).
Roofline: issue-bound. A matrix product a pair for each head of both sides and pass.
Trick: it is attention_divergence's KL of means, of which one side is one map of Hi heads: its kernels give the divergence and the
gradients of query and key, and for strips of rows, of bounded memory, dI = A' - A. The two kernels here take it from there:
dw_ih = sum_j dI_ij relu(z_hij), and dz_hij = w_ih dI_ij where z_hij > 0. Not measured on a device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast.backends.streaming.attention_divergence import AttentionDivergenceBackwardInputs
from vlattn_fast.backends.streaming.indexer_divergence import IndexerDivergenceBackwardInputs, IndexerDivergenceInputs
from vlattn_fast.kernels._chosen_keys import chosen_once, fill_rows, indexer_gradients, store_row, terms_of_chosen, with_logits
from vlattn_fast.kernels._configurations import configuration
from vlattn_fast.kernels._device import on_device
from vlattn_fast.kernels._tiles import (
    LOG2_E,
    aligned,
    block_and_head,
    cdiv,
    heads_of,
    key_range,
    launched,
    load_tile,
    masks_at,
    relu,
    row_products,
    store_sums,
    zero_sums,
)
from vlattn_fast.kernels.attention_divergence import (
    Side,
    add_small,
    call_of,
    divergences,
    fill_strip,
    gradients,
    index_logits,
    index_queries,
    keys_of,
    rows_of_strips,
    side_of,
)


class _Chosen(NamedTuple):
    """The chosen keys (B, N, K), each once, and the arguments that the kernels which gather them share."""

    keys: Tensor
    call: dict[str, Any]


@on_device
def forward(inputs: IndexerDivergenceInputs) -> Tensor:
    """D (B, N)."""
    query = inputs.query
    rows = query.shape[0], query.shape[2]
    if 0 in (*rows, inputs.key.shape[2]):
        return query.new_zeros(rows, dtype=torch.float32)
    of_means = _of_means(inputs)
    attention, indexer, chosen = _sides(of_means, inputs)
    if chosen is not None:
        return terms_of_chosen(chosen.call, attention, indexer, chosen.keys, None)
    return divergences(of_means, attention, indexer, "kl")[:, 0]


@on_device
def backward(inputs: IndexerDivergenceBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of streaming's FIELDS; None for a side that needs none. There is a query and a key; with need_attention no
    given log-sum-exp, and no chosen keys."""
    made: list[Tensor | None] = [None] * 6
    of_means = _of_means(inputs, inputs.grad)
    attention, indexer, chosen = _sides(of_means, inputs)
    if inputs.need_attention:
        made[:2] = gradients(of_means, attention, indexer, "kl", 0.5, inputs.scale, None)[:2]
    if inputs.need_index and chosen is not None:
        by_logit = terms_of_chosen(chosen.call, attention, indexer, chosen.keys, inputs.grad.float().contiguous())
        grads = _no_gradients(of_means)
        indexer_gradients(chosen.call, indexer, chosen.keys, by_logit, grads)
        made[3:] = grads
    elif inputs.need_index:
        made[3:] = _of_indexer(of_means, attention, indexer)
    return tuple(made)


def _of_means(
    inputs: IndexerDivergenceInputs | IndexerDivergenceBackwardInputs, grad: Tensor | None = None
) -> AttentionDivergenceBackwardInputs:
    """The call as one of attention_divergence."""
    return AttentionDivergenceBackwardInputs(
        grad=inputs.query if grad is None else grad,  # a forward pass has none
        query=aligned(inputs.query),
        key=aligned(inputs.key),
        other_query=aligned(inputs.index_query),
        other_key=aligned(inputs.index_key[:, None]),
        attn_mask=inputs.attn_mask,
        key_mask=inputs.key_mask,
        kind="kl",
        beta=0.5,
        head_mean=True,
        is_causal=inputs.is_causal,
        scale=inputs.scale,
        other_scale=1.0,
        divergence=None,
        need_own=True,
        need_other=True,
        backend=inputs.backend,
    )


def _sides(
    inputs: AttentionDivergenceBackwardInputs, of: IndexerDivergenceInputs | IndexerDivergenceBackwardInputs
) -> tuple[Side, Side, _Chosen | None]:
    """The attention and the indexer, over all keys or the chosen ones, with each row's largest logit and weight."""
    query, lse, indexer = inputs.query, of.teacher_lse, _indexer(inputs, of.index_weights)
    if of.topk_indices is None:
        attention = side_of(inputs, query, inputs.key, inputs.scale, lse)
        call, config = _call(inputs, attention, indexer, "rows")
        _rows_kernel[(cdiv(query.shape[2], config["BLOCK_Q"]) * query.shape[0],)](**call, indexer=indexer)
        return attention, indexer, None
    zeros = query.new_zeros(query.shape[:3], dtype=torch.float32)  # in their place comes what the kernel finds
    attention = side_of(inputs, query, inputs.key, inputs.scale, zeros if lse is None else lse)
    call, _ = _call(inputs, attention, indexer, "chosen")
    chosen = _Chosen(chosen_once(of.topk_indices, inputs.key.shape[2]), call)
    for side in (attention, indexer) if lse is None else (indexer,):
        fill_rows(call, side, chosen.keys)
    return attention, indexer, chosen


def _indexer(inputs: AttentionDivergenceBackwardInputs, weights: Tensor) -> Side:
    """With places for each row's largest logit and weight."""
    query, key = inputs.other_query, inputs.other_key
    batch, heads, num_q, _ = query.shape
    largest, weight = query.new_empty((2, batch, num_q), dtype=torch.float32)
    return Side(heads_of(query), heads_of(key), largest, weight, heads, max(1, heads), LOG2_E, weights.contiguous())


def _no_gradients(inputs: AttentionDivergenceBackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros for those of index_query, index_key and index_weights."""
    query, key = inputs.other_query, inputs.other_key
    grad_q, grad_k = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key[:, 0]))
    return grad_q, grad_k, query.new_zeros(query.shape[:3])


def _of_indexer(inputs: AttentionDivergenceBackwardInputs, attention: Side, indexer: Side) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of index_query, index_key and index_weights."""
    query, key = inputs.other_query, inputs.other_key
    (batch, heads, num_q, _), num_k = query.shape, key.shape[2]
    grad_q, grad_k, grad_weights = _no_gradients(inputs)
    of_means, config_r = call_of(inputs, indexer, attention, "reverse_kl", 0.5, "terms")
    call, config = _call(inputs, attention, indexer, "backward_q")
    call_k, config_k = _call(inputs, attention, indexer, "backward_kv")
    grad = inputs.grad.float().contiguous()
    rows = rows_of_strips(num_q, num_k)
    parts = [grad_k] if rows == num_q else [torch.zeros_like(grad_k, dtype=torch.float32) for _ in range(2)]
    for first in range(0, num_q, rows):
        size = min(rows, num_q - first)
        strip = query.new_zeros((batch, size, num_k), dtype=torch.float32)
        fill_strip(of_means, config_r, (strip,), first, size)
        part = {"p_strip": strip, "p_grad": grad, "first": first, "rows": size}
        if heads > 0:
            grid = (cdiv(size, config["BLOCK_Q"]) * batch * heads,)
            _backward_q_kernel[grid](**call, **part, indexer=indexer, p_grad_q=grad_q, p_grad_factors=grad_weights)
        grid = (cdiv(num_k, config_k["BLOCK_KV"]) * batch,)
        _backward_kv_kernel[grid](**call_k, **part, indexer=indexer, p_grad_k=parts[-1])
        if len(parts) > 1:
            parts[0] += parts[1]
    return grad_q, parts[0].to(key.dtype), grad_weights


def _call(
    inputs: AttentionDivergenceBackwardInputs, attention: Side, indexer: Side, kernel: str
) -> tuple[dict[str, Any], dict[str, int]]:
    """The named arguments that a kernel here shares with the others, and its configuration. C.D counts the indexer's features."""
    call, _ = call_of(inputs, indexer, attention, "reverse_kl", 0.5, "terms")
    query = inputs.other_query
    size = max(query.shape[3], inputs.query.shape[3]) if kernel == "chosen" else query.shape[3]
    facts = {"dtype": query.dtype, "size": size, "masked": inputs.attn_mask is not None}
    config = configuration("indexer_divergence", kernel, **facts)
    return launched({name: call[name] for name in ("masks", "N", "M", "C")}, config), config


@triton.jit
def _rows_kernel(indexer, masks, N, M, C: tl.constexpr):
    """Of each row i the largest logit, and exp of it over their sum: the largest weight. Infinity and 0 in a row without keys."""
    i_q, _, i_b, _, _ = block_and_head(tl.cdiv(N, C.BLOCK_Q), 1, 1)
    o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    _, end = key_range(i_q, M, True, C.CAUSAL, C.BLOCK_Q, C.BLOCK_KV)
    at_head = masks_at(masks, i_b, 0, M)
    b_max = tl.full([C.BLOCK_Q], -3.4028234e38, dtype=tl.float32)  # the least number: -inf - -inf would be NaN
    b_sum = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    for start in range(0, end, C.BLOCK_KV):
        o_kv = start + tl.arange(0, C.BLOCK_KV)
        b_s = index_logits(indexer, at_head, i_b, start, o_q, o_kv, N, M, C.D, C.BLOCK_D, C.FOLDED, C)
        b_max, b_sum = with_logits(b_max, b_sum, b_s, indexer.scale_log2, C.FOLDED)
    store_row(indexer, i_b * N + o_q, o_q < N, b_max, b_sum)


@triton.jit
def _backward_q_kernel(indexer, masks, p_strip, p_grad, p_grad_q, p_grad_factors, N, M, first, rows, C: tl.constexpr):
    """dQ and dw of a tile of queries of one head, `rows` from the `first` on, from dI / dD [rows,M] in the strip."""
    i, i_bh, i_b, i_h, _ = block_and_head(tl.cdiv(rows, C.BLOCK_Q), indexer.H, 1)
    i_q = first // C.BLOCK_Q + i
    o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    _, end = key_range(i_q, M, True, C.CAUSAL, C.BLOCK_Q, C.BLOCK_KV)
    at_head = masks_at(masks, i_b, 0, M)
    t_q, b_factor = index_queries(indexer, i_b, i_h, o_q, N, C.D, C.BLOCK_D)
    b_grad = tl.load(p_grad + i_b * N + o_q, mask=o_q < N, other=0.0)
    b_by_factor = tl.zeros([C.BLOCK_Q, C.BLOCK_KV], dtype=tl.float32)
    b_sums = zero_sums(indexer.q.p.dtype.element_ty, C.BLOCK_Q, C.D, C.BLOCK_D)
    for start in range(0, end, C.BLOCK_KV):
        o_kv = start + tl.arange(0, C.BLOCK_KV)
        t_k = keys_of(indexer, at_head, i_b, i_b * 0, o_kv, M, C.D, C.BLOCK_D, C.KEY_MASK)
        b_z = row_products(t_q, t_k, C.D, C.PRECISION)
        b_di = load_tile(p_strip + i_b * rows * M, M, o_q - first, o_kv, rows, M) * b_grad[:, None]
        b_by_factor += b_di * relu(b_z)
        b_sums = add_small(b_sums, tl.where(b_z <= 0.0, 0.0, b_di * b_factor[:, None]), t_k, C.D, C.PRECISION)
    store_sums(p_grad_q + i_bh * N * C.D, C.D, o_q, tl.arange(0, C.BLOCK_D), N, C.D, b_sums)
    tl.store(p_grad_factors + i_bh * N + o_q, tl.sum(b_by_factor, axis=1).to(p_grad_factors.dtype.element_ty), mask=o_q < N)


@triton.jit
def _backward_kv_kernel(indexer, masks, p_strip, p_grad, p_grad_k, N, M, first, rows, C: tl.constexpr):
    """dK of a tile of keys, over the heads and over `rows` queries from the `first` on."""
    i_kv, _, i_b, _, _ = block_and_head(tl.cdiv(M, C.BLOCK_KV), 1, 1)
    o_kv = i_kv * C.BLOCK_KV + tl.arange(0, C.BLOCK_KV)
    t_k = keys_of(indexer, masks_at(masks, i_b, 0, M), i_b, i_b * 0, o_kv, M, C.D, C.BLOCK_D, C.KEY_MASK)
    begin = tl.maximum(first, i_kv * C.BLOCK_KV // C.BLOCK_Q * C.BLOCK_Q) if C.CAUSAL else first
    b_sums = zero_sums(indexer.q.p.dtype.element_ty, C.BLOCK_KV, C.D, C.BLOCK_D, True)
    for h in range(indexer.H):
        for start in range(begin, first + rows, C.BLOCK_Q):
            o_q = start + tl.arange(0, C.BLOCK_Q)
            t_q, b_factor = index_queries(indexer, i_b, i_b * 0 + h, o_q, N, C.D, C.BLOCK_D)
            b_z = row_products(t_q, t_k, C.D, C.PRECISION)
            b_grad = tl.load(p_grad + i_b * N + o_q, mask=o_q < N, other=0.0)
            b_di = load_tile(p_strip + i_b * rows * M, M, o_q - first, o_kv, rows, M) * (b_grad * b_factor)[:, None]
            b_sums = add_small(b_sums, tl.trans(tl.where(b_z <= 0.0, 0.0, b_di)), t_q, C.D, C.PRECISION)
    store_sums(p_grad_k + i_b * M * C.D, C.D, o_kv, tl.arange(0, C.BLOCK_D), M, C.D, b_sums)
