"""indexer_divergence in O(N + M) memory with plain PyTorch: attention_divergence's KL of means, one side of which is an indexer.

With I_ij = sum_h w_ih relu(z_hij), z = q_h . k_j, A' = softmax(I): dD/dI = A' - A, dI/dw_h = relu(z_h), dI/dz_h = w_h [z_h > 0].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype, expand_heads, fold_heads
from vlattn_fast.backends.inputs import derivative_inputs
from vlattn_fast.backends.streaming._forward_mode import tangents_of
from vlattn_fast.backends.streaming._tiles import Masks
from vlattn_fast.backends.streaming.attention_divergence import Products, Tile, divergences, gradients, tiles_of, zeros_like


class IndexerDivergenceInputs(NamedTuple):
    """query (B, H, N, D), key (B, Hkv, M, D), index_query (B, Hi, N, Di), index_key (B, M, Di), index_weights (B, Hi, N),
    topk_indices int (B, N, K), attn_mask broadcastable to (B, 1, N, M), key_mask (B, M)."""

    query: Tensor
    key: Tensor
    index_query: Tensor
    index_key: Tensor
    index_weights: Tensor
    topk_indices: Tensor | None
    attn_mask: Tensor | None
    key_mask: Tensor | None
    is_causal: bool
    scale: float
    backend: str


class IndexerDivergenceBackwardInputs(NamedTuple):
    """grad (B, N), the gradient of the divergence. need_attention, need_index: which side gets gradients."""

    grad: Tensor
    query: Tensor
    key: Tensor
    index_query: Tensor
    index_key: Tensor
    index_weights: Tensor
    topk_indices: Tensor | None
    attn_mask: Tensor | None
    key_mask: Tensor | None
    is_causal: bool
    scale: float
    need_attention: bool
    need_index: bool
    backend: str


FIELDS = "query", "key", "index_query", "index_key", "index_weights"
IndexerDivergenceJvpInputs, IndexerDivergenceSecondInputs = derivative_inputs(
    IndexerDivergenceBackwardInputs, FIELDS, grads=("grad",)
)
_Inputs = IndexerDivergenceInputs | IndexerDivergenceBackwardInputs


class _Indexer(NamedTuple):
    """One map of several heads, which share a key."""

    query: Tensor
    key: Tensor
    weights: Tensor

    @property
    def heads(self) -> int:
        return 1

    @property
    def maps(self) -> int:
        return 1 + self.query.shape[1]

    def scores(self, b: slice, h: slice, i: slice) -> Tensor:
        products = self._products(b, i)
        weights = self.weights[b, :, i, None].to(products.dtype)
        return (weights * products.relu()).sum(1, keepdim=True)

    def zeros(self) -> list[Tensor]:
        return zeros_like(*self)

    def add_gradients(self, made: list[Tensor], by_score: Tensor, b: slice, h: slice, i: slice) -> None:
        by_query, by_key, by_weights = made
        products = self._products(b, i)
        by_weights[b, :, i] = (by_score * products.relu()).sum(-1)
        by_product = by_score * self.weights[b, :, i, None].to(products.dtype)
        by_product = by_product.masked_fill(products <= 0, 0.0)
        by_query[b, :, i] = by_product @ self.key[b, None].to(products.dtype)
        by_key[b] += (by_product.mT @ self.query[b, :, i].to(products.dtype)).sum(1)

    def _products(self, b: slice, i: slice) -> Tensor:
        dtype = compute_dtype(self.query)
        return self.query[b, :, i].to(dtype) @ self.key[b, None].to(dtype).mT


def forward(inputs: IndexerDivergenceInputs) -> Tensor:
    """D (B, N)."""
    query = inputs.query
    shape = query.shape[0], 1, query.shape[2]
    return divergences(_tiles(inputs, _sides(inputs)), query, shape, "kl", 0.5)[:, 0]


def backward(inputs: IndexerDivergenceBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, index_query, index_key and index_weights; None for a side that needs none."""
    sides, needs = _sides(inputs), (inputs.need_attention, inputs.need_index)
    by_attention, by_index = gradients(_tiles(inputs, sides), sides, needs, inputs.grad[:, None], "kl", 0.5)
    made: list[Tensor | None] = [None] * 5
    if by_attention is not None:
        made[:2] = by_attention[0], fold_heads(by_attention[1], inputs.key.shape[1])
    if by_index is not None:
        made[2:] = by_index
    return tuple([None if x is None else x.to(inputs.query.dtype) for x in made])


def jvp(inputs: NamedTuple) -> tuple[Tensor | None, ...]:
    """The tangent of the divergence."""
    return tangents_of(lambda x: (forward(x),), inputs, IndexerDivergenceInputs, FIELDS)


def second(inputs: NamedTuple) -> tuple[Tensor | None, ...]:
    """The gradients of that tangent's product with `grad`: the tangents of the backward pass."""

    def of_both(x: IndexerDivergenceBackwardInputs) -> tuple[Tensor | None, ...]:
        return backward(x._replace(need_attention=True, need_index=True))

    return tangents_of(of_both, inputs, IndexerDivergenceBackwardInputs, FIELDS)


def _sides(inputs: _Inputs) -> tuple[Products, _Indexer]:
    attention = Products(inputs.query, expand_heads(inputs.key, inputs.query.shape[1]), inputs.scale)
    return attention, _Indexer(inputs.index_query, inputs.index_key, inputs.index_weights)


def _tiles(inputs: _Inputs, sides: tuple[Products, _Indexer]) -> Iterator[Tile]:
    masks = Masks(inputs.attn_mask, inputs.key_mask, None, None, inputs.is_causal)
    return tiles_of(sides, masks, inputs.query, inputs.key.shape[2], head_mean=True, chosen=inputs.topk_indices)
