"""Calls of indexer_divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import blocks_of_keys
from vlattn_fast.backends import reference
from vlattn_fast.backends.reference.indexer_divergence import chosen_keys
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


def _with_lse(call: dict[str, Any], detached: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The formula's log-sum-exp of the attention over the same keys, from scores in this dtype at least."""
    query, key = (call[name].to(torch.promote_types(call[name].dtype, dtype)) for name in ("query", "key"))
    mask, block = call.get("attn_mask"), call.get("key_block", 1)
    if "topk_indices" in call:
        kept = chosen_keys(call["topk_indices"], -(-key.shape[2] // block)).repeat_interleave(block, -1)[..., : key.shape[2]]
        mask = torch.ones_like(kept) if mask is None else mask
        mask = mask & kept if mask.dtype == torch.bool else mask.masked_fill(~kept, -torch.inf)
    masks = {name: call[name] for name in ("key_mask", "is_causal", "scale", "enable_gqa") if name in call}
    lse = reference.score_attention(query, key, key, attn_mask=mask, return_lse=True, **masks)[1]
    return {**call, "teacher_lse": lse.detach() if detached else lse}


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
    options: dict[str, Any] = {"topk_indices": chosen, "enable_gqa": True}
    yield Example(indexer_divergence, "chosen keys", tensors | shared, options)
    yield Example(indexer_divergence, "chosen keys, given lse", tensors | shared, options, complete=_with_lse)
    options = {"key_block": 3, "topk_indices": chosen // 3}
    blocks = {"index_key": tensors["index_key"][:, ::3]}
    yield Example(indexer_divergence, "blocks of keys", tensors | blocks, options)


def draw(dice: Dice, dtype: torch.dtype) -> Example:
    tensors, options = attention_inputs(dice, dtype, value=False)
    (batch, heads, queries, _), (_, key_heads, keys, _) = tensors["query"].shape, tensors["key"].shape
    mask, padding = options.get("attn_mask"), options.get("key_mask")
    if mask is not None and mask.dim() == 4:
        options["attn_mask"] = mask[:, :1]
    index_heads, dim = dice.pick("index heads", (1, 2, 4)), dice.pick("index D", DIMS)

    def halves(*shape: int) -> Tensor:  # products are exact, so that all dtypes agree on the sign, which relu needs
        return dice.randn(*shape).mul(2).round() / 2

    block = dice.pick("key_block", (1, 1, 1, 1, 1, 2, 5))
    blocks = -(-keys // block)
    seen = padding if padding is None else blocks_of_keys(padding, block, False).any(-1)
    index_key = poison(halves(batch, 1, blocks, dim), seen)[:, 0]
    tensors["index_query"] = dice.laid_out("index_query", halves(batch, index_heads, queries, dim), dtype)
    tensors["index_key"] = dice.laid_out("index_key", index_key, dtype, repeated=False)  # equal keys cancel
    tensors["index_weights"] = dice.laid_out("index_weights", dice.randn(batch, index_heads, queries) / dim**0.5, dtype)
    count = dice.pick("chosen keys", (None, None, 1, 5, 40))
    if count is not None:
        options["topk_indices"] = _chosen(batch, queries, blocks, count, dice.generator)
    options["enable_gqa"] = heads != key_heads
    if options["scale"] == 0.0:  # some of whose derivatives are nothing but rounding
        options["scale"] = 1.5
    lse = dice.pick("teacher_lse", (None, None, "a constant", "a function"))
    # in float64, so that it has the rounding of no backend's scores
    complete = dict if lse is None else partial(_with_lse, detached=lse == "a constant", dtype=torch.float64)
    return Example(indexer_divergence, "", tensors, options | {"key_block": block}, complete=complete)


def host(sizes: Sizes) -> Iterator[Example]:
    yield Example(indexer_divergence, "", _required(sizes))
