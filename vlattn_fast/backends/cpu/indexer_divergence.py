"""indexer_divergence by csrc/cpu/indexer_divergence.cpp. Its second derivatives are streaming's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast.backends.cpu.attention_divergence import empty_gradients, side_of
from vlattn_fast.backends.native import address, kernel, strided
from vlattn_fast.backends.streaming.indexer_divergence import IndexerDivergenceBackwardInputs, IndexerDivergenceInputs

_run = kernel("indexer_divergence")


def forward(inputs: IndexerDivergenceInputs) -> Tensor:
    """D (B, N)."""
    divergence = inputs.query.new_empty(inputs.query.shape[0], inputs.query.shape[2], dtype=torch.float32)
    _call(inputs, divergence=address(divergence))
    return divergence


def backward(inputs: IndexerDivergenceBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of streaming's FIELDS; None for a side that needs none. With need_attention there is no given
    log-sum-exp."""
    grad = inputs.grad.float().contiguous()
    query, key = empty_gradients((inputs.query, inputs.key), inputs.need_attention)
    indexer = inputs.index_query, inputs.index_key, inputs.index_weights
    index_query, index_key, index_weights = empty_gradients(indexer, inputs.need_index)
    _call(
        inputs,
        grad=address(grad),
        grad_queries=(strided(query), strided(index_query)),
        grad_keys=(strided(key), strided(_of_a_head(index_key))),
        grad_weights=strided(_in_columns(index_weights)),
    )
    if index_weights is not None and inputs.index_query.shape[3] == 0:  # the kernel has nothing of this side to go through
        index_weights.zero_()
    return query, key, None, index_query, index_key, index_weights


def _call(inputs: Any, **members: Any) -> None:
    index_key, weights, indices = _of_a_head(inputs.index_key), _in_columns(inputs.index_weights), inputs.topk_indices
    own = side_of(inputs, inputs.query, inputs.key, inputs.scale)
    other = side_of(inputs, inputs.index_query, index_key, 1.0)
    if indices is not None:
        indices = indices.long().contiguous()
    lse = None if inputs.teacher_lse is None else inputs.teacher_lse.contiguous()
    members |= {"topk_indices": address(indices), "chosen": -1 if indices is None else indices.shape[2], "lse": address(lse)}
    _run(sides=(own[0], other[0]), head_mean=True, weights=strided(weights), **members)


def _of_a_head(key: Tensor | None) -> Any:
    """(B, 1, M, Di)"""
    return None if key is None else key[:, None]


def _in_columns(weights: Tensor | None) -> Any:
    """(B, Hi, N, 1)"""
    return None if weights is None else weights[..., None]
