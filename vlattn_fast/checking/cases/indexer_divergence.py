"""Calls of indexer_divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.checking.cases._attention import plain, verified, without_second_sample
from vlattn_fast.checking.cases._dice import DIMS, Dice, attention_inputs, poison
from vlattn_fast.checking.cases._example import FLOATS, Example, Sizes, Tensors, normal
from vlattn_fast.ops.indexer_divergence import indexer_divergence

INDEX_HEADS = 3


def _indexer(sizes: Sizes, randn: Callable[..., Tensor] = torch.randn) -> Tensors:
    b, n, m, dim = sizes.batch, sizes.queries, sizes.keys, sizes.value_dim
    shapes = {"index_query": (b, INDEX_HEADS, n, dim), "index_key": (b, m, dim), "index_weights": (b, INDEX_HEADS, n)}
    return {name: randn(*shape) for name, shape in shapes.items()}


def _required(sizes: Sizes) -> Tensors:
    qkv = plain(sizes)
    return {"query": qkv["query"], "key": qkv["key"], **_indexer(sizes)}


def _chosen(batch: int, queries: int, keys: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Some indices of keys twice, some of none."""
    return torch.randint(-1, keys, (batch, queries, count), generator=generator)


def _with_chosen(tensors: Tensors) -> dict[str, Any]:
    """Three keys before each query, one of them twice; for the first queries fewer."""
    query = tensors["index_query"] if tensors["query"].is_nested else tensors["query"]
    steps = torch.tensor([0, 1, 1, 3], device=query.device)
    indices = torch.arange(query.shape[2], device=query.device)[:, None] - steps
    return {**tensors, "topk_indices": indices.expand(query.shape[0], -1, -1)}


def examples(sizes: Sizes) -> Iterator[Example]:
    floats = {"scale": FLOATS}
    yield Example(indexer_divergence, "", _required(sizes), floats=floats)
    yield Example(indexer_divergence, "chosen keys", _required(sizes), {"is_causal": True}, _with_chosen)


def verify(generator: torch.Generator, sizes: Sizes) -> Iterator[Example]:
    qkv, key_mask = verified(generator, sizes)
    tensors = {"query": qkv["query"], "key": qkv["key"], **_indexer(sizes, normal(generator))}
    yield Example(indexer_divergence, "padding", tensors, {"key_mask": without_second_sample(key_mask)})
    yield Example(indexer_divergence, "causal", tensors, {"is_causal": True})
    chosen = _chosen(sizes.batch, sizes.queries, sizes.keys, 9, generator)
    shared = {"key": qkv["key"][:, :1], "index_query": tensors["index_query"][:, :1]}
    shared |= {"index_weights": tensors["index_weights"][:, :1]}
    yield Example(indexer_divergence, "chosen keys", tensors | shared, {"topk_indices": chosen, "enable_gqa": True})


def draw(dice: Dice, dtype: torch.dtype) -> Example:
    tensors, options = attention_inputs(dice, dtype, value=False)
    (batch, heads, queries, _), (_, key_heads, keys, _) = tensors["query"].shape, tensors["key"].shape
    mask, padding = options.get("attn_mask"), options.get("key_mask")
    if mask is not None and mask.dim() == 4:
        options["attn_mask"] = mask[:, :1]
    index_heads, dim = dice.pick("index heads", (1, 2, 4)), dice.pick("index D", DIMS)

    def halves(*shape: int) -> Tensor:  # products are exact, so that all dtypes agree on the sign, which relu needs
        return dice.randn(*shape).mul(2).round() / 2

    index_key = poison(halves(batch, 1, keys, dim), padding)[:, 0]
    tensors["index_query"] = dice.laid_out("index_query", halves(batch, index_heads, queries, dim), dtype)
    tensors["index_key"] = dice.laid_out("index_key", index_key, dtype, repeated=padding is None)
    tensors["index_weights"] = dice.laid_out("index_weights", dice.randn(batch, index_heads, queries) / dim**0.5, dtype)
    count = dice.pick("chosen keys", (None, None, 1, 5, 40))
    if count is not None:
        options["topk_indices"] = _chosen(batch, queries, keys, count, dice.generator)
    options["enable_gqa"] = heads != key_heads
    if options["scale"] == 0.0:  # some of whose derivatives are nothing but rounding
        options["scale"] = 1.5
    return Example(indexer_divergence, "", tensors, options)


def host(sizes: Sizes) -> Iterator[Example]:
    yield Example(indexer_divergence, "", _required(sizes))
