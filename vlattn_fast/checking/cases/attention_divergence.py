"""Calls of attention_divergence."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlattn_fast.backends.reference.attention_divergence import KINDS
from vlattn_fast.checking.cases._attention import plain, verified, without_second_sample
from vlattn_fast.checking.cases._dice import DIMS, Dice, attention_inputs
from vlattn_fast.checking.cases._example import FLOATS, Example, Sizes, Tensors, normal
from vlattn_fast.ops.attention_divergence import attention_divergence


def _sides(sizes: Sizes) -> Tensors:
    own, other = plain(sizes), plain(sizes._replace(head_dim=sizes.value_dim))
    pairs = {"query": own["query"], "key": own["key"]}
    return pairs | {"other_query": other["query"], "other_key": other["key"]}


def examples(sizes: Sizes) -> Iterator[Example]:
    floats = {"scale": FLOATS, "other_scale": FLOATS}
    yield Example(attention_divergence, "", _sides(sizes), floats=floats)
    mean = {"kind": "js", "head_mean": True, "beta": 0.3}
    yield Example(attention_divergence, "means", _sides(sizes), mean, floats={"beta": FLOATS})


def verify(generator: torch.Generator, sizes: Sizes) -> Iterator[Example]:
    qkv, key_mask = verified(generator, sizes)
    randn, b, h = normal(generator), sizes.batch, sizes.heads
    sides = {"query": qkv["query"], "key": qkv["key"]}
    sides |= {"other_query": randn(b, h, sizes.queries, 24), "other_key": randn(b, h, sizes.keys, 24)}
    for kind in KINDS:
        yield Example(attention_divergence, kind, sides, {"kind": kind, "key_mask": without_second_sample(key_mask)})
    more = {"other_query": randn(b, 2 * h, sizes.queries, 8), "other_key": randn(b, h, sizes.keys, 8)}
    means = {"kind": "js", "beta": 0.3, "head_mean": True, "enable_gqa": True, "scale": 0.3, "other_scale": -0.7}
    yield Example(attention_divergence, "means of other heads", sides | more, means)


def draw(dice: Dice, dtype: torch.dtype) -> Example:
    tensors, options = attention_inputs(dice, dtype, value=False)
    (batch, heads, queries, _), (_, key_heads, keys, _) = tensors["query"].shape, tensors["key"].shape
    options |= {"kind": dice.pick("kind", KINDS), "beta": dice.pick("beta", (0.5, 0.5, 0.1, 0.9))}
    options["head_mean"] = dice.pick("head_mean", (False, True))
    mask = options.get("attn_mask")
    shared = mask is None or mask.dim() < 3 or mask.shape[-3] == 1
    factor = dice.pick("other heads", (1, 1, 2)) if options["head_mean"] and shared else 1
    dim, padding = dice.pick("other D", DIMS), options.get("key_mask")
    other_key = dice.randn(batch, key_heads, keys, dim)
    if padding is not None:
        other_key = torch.where(padding[:, None, :, None], other_key, torch.nan)
    tensors["other_query"] = dice.laid_out("other_query", dice.randn(batch, factor * heads, queries, dim), dtype)
    tensors["other_key"] = dice.laid_out("other_key", other_key, dtype, repeated=padding is None)
    options |= {"other_scale": dice.pick("other scale", (None, None, 0.125, -0.5)), "enable_gqa": factor * heads != key_heads}
    if options["scale"] == 0.0:  # some of whose derivatives are nothing but rounding
        options["scale"] = 1.5
    # the sign of A - A' may be rounding's
    return Example(attention_divergence, "", tensors, options, differentiable=options["kind"] != "total_variation")


def host(sizes: Sizes) -> Iterator[Example]:
    yield Example(attention_divergence, "", _sides(sizes))
