"""indexer_divergence in O(N + M) memory with plain PyTorch: attention_divergence's KL of means with an indexer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vlattn_fast.backends.streaming._forward_mode import Named, derivatives
from vlattn_fast.backends.streaming.attention_divergence import Divergence, Side, products


class IndexerDivergenceInputs(NamedTuple):
    """query (B, H, N, D), key (B, Hkv, M, D), teacher_lse (B, H, N), index_query (B, Hi, N, Di), index_key (B, M', Di),
    index_weights (B, Hi, N), topk_indices int (B, N, K), attn_mask broadcastable to (B, 1, N, M), key_mask (B, M); M' blocks of
    key_block keys."""

    query: Tensor
    key: Tensor
    teacher_lse: Tensor | None
    index_query: Tensor
    index_key: Tensor
    index_weights: Tensor
    topk_indices: Tensor | None
    attn_mask: Tensor | None
    key_mask: Tensor | None
    is_causal: bool
    scale: float
    key_block: int
    backend: str


class IndexerDivergenceBackwardInputs(NamedTuple):
    """grad (B, N), the gradient of the divergence. need_attention, need_index: which side gets gradients."""

    grad: Tensor
    query: Tensor
    key: Tensor
    teacher_lse: Tensor | None
    index_query: Tensor
    index_key: Tensor
    index_weights: Tensor
    topk_indices: Tensor | None
    attn_mask: Tensor | None
    key_mask: Tensor | None
    is_causal: bool
    scale: float
    key_block: int
    need_attention: bool
    need_index: bool
    backend: str


FIELDS = "query", "key", "teacher_lse", "index_query", "index_key", "index_weights"
_Inputs = IndexerDivergenceInputs | IndexerDivergenceBackwardInputs


def forward(inputs: IndexerDivergenceInputs) -> Tensor:
    """D (B, N)."""
    return _divergence(inputs).forward()[:, 0]


def backward(inputs: IndexerDivergenceBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of `FIELDS`; None for a side that needs none."""
    tensors = {field: x for field in FIELDS if (x := getattr(inputs, field)) is not None}
    needs = inputs.need_attention, inputs.need_index
    made = _divergence(inputs).gradients(inputs.grad[:, None], [*tensors.values()], needs)
    by_field = dict(zip(tensors, made, strict=True))
    return tuple(map(by_field.get, FIELDS))


jvp, second = derivatives(forward, backward, (IndexerDivergenceInputs, IndexerDivergenceBackwardInputs), FIELDS)


def _divergence(inputs: _Inputs) -> Divergence:
    own = products(inputs.query, inputs.key, inputs.scale, inputs.teacher_lse)
    other = _indexer(inputs.index_query, inputs.index_key, inputs.index_weights, inputs.key_block > 1)
    return Divergence(inputs, (own, other), "kl", 0.5, head_mean=True, chosen=inputs.topk_indices, block=inputs.key_block)


def _indexer(query: Tensor, key: Tensor, weights: Tensor, of_blocks: bool) -> Side:
    """One map of several heads, which share a key: sum_h w_ih relu(q_h . k_j)."""

    def scores(x: Named) -> Tensor:
        products = x["index_query"] @ x["index_key"][:, None].mT
        return (x["index_weights"][..., None] * products.relu()).sum(1, keepdim=True)

    tensors = {"index_query": query, "index_key": key, "index_weights": weights}
    return Side(tensors, {"index_query": 3, "index_key": 1, "index_weights": 3}, 1, 1 + query.shape[1], scores, of_blocks)
