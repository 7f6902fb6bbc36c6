"""Calls of attention_statistics, and of token_scores, which is made of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vlattn_fast.checking.cases._attention import grouped, plain, verified
from vlattn_fast.checking.cases._dice import VALUES, Dice, attention_inputs, group_bias, softcap_and_sink
from vlattn_fast.checking.cases._example import FLOATS, Example, Sizes, Tensors, normal
from vlattn_fast.ops.attention_statistics import attention_statistics
from vlattn_fast.ops.token_scores import token_scores


def _required(sizes: Sizes) -> Tensors:
    tensors = plain(sizes)
    return {name: tensors[name] for name in ("query", "key")}


def _in_two_groups(t: Tensors) -> dict[str, Any]:
    like = t["query"] if t["key"].is_nested else t["key"]
    return {**t, "key_groups": torch.arange(like.shape[2], device=like.device) % 2, "num_groups": 2}


def examples(sizes: Sizes) -> Iterator[Example]:
    tensors, floats = _required(sizes) | {"row_weight": torch.rand(sizes.batch, sizes.queries)}, {"scale": FLOATS}
    yield Example(attention_statistics, "", tensors, {}, _in_two_groups, floats)
    tensors, floats = _required(sizes) | {"sink": torch.randn(sizes.heads)}, {"scale": FLOATS, "softcap": FLOATS}
    yield Example(attention_statistics, "softcap and sink", tensors, {"softcap": 1.5}, _in_two_groups, floats)
    yield Example(token_scores, "", _required(sizes), {"rule": "h2o"}, floats={"scale": FLOATS})


def verify(generator: torch.Generator, sizes: Sizes) -> Iterator[Example]:
    qkv, key_mask = verified(generator, sizes)
    groups = torch.randint(-1, 3, (sizes.batch, sizes.keys), generator=generator)
    options = {"key_groups": groups, "num_groups": 3, "key_mask": key_mask}
    randn = normal(generator)
    weighted = {"query": qkv["query"], "key": qkv["key"], "row_weight": randn(sizes.batch, sizes.queries)}
    yield Example(attention_statistics, "three groups", weighted, options)
    with_sink = {**weighted, "sink": randn(sizes.heads)}
    yield Example(attention_statistics, "softcap and sink", with_sink, {**options, "softcap": 1.5})
    bias, group_options = grouped(generator, sizes)
    yield Example(attention_statistics, "groups", {**weighted, **bias}, group_options)
    diagonal = {**options, "softcap": 1.5, "statistics": ("maximum", "diagonal"), "num_groups": None}
    qk_sink = {name: x for name, x in with_sink.items() if name != "row_weight"}
    yield Example(attention_statistics, "diagonal", {**qk_sink, **bias}, {**diagonal, **group_options})


def draw(dice: Dice, dtype: torch.dtype) -> Example:
    # signs give sums that are equal but for the order of the sum: rounding would choose the key of the maximum's tangent
    values = tuple(kind for kind in VALUES if kind != "signs")
    tensors, options = attention_inputs(dice, dtype, value=False, values=values)
    batch, _, queries, _ = tensors["query"].shape
    keys = tensors["key"].shape[2]
    if dice.chance(0.8):
        groups = dice.pick("G", (1, 2, 3, 7))
        shape = (batch, keys) if dice.chance(0.5) else (keys,)
        index = torch.randint(-1, groups, shape, generator=dice.generator)
        options |= {"key_groups": index, "num_groups": groups}
    if dice.chance(0.5):
        tensors["row_weight"] = dice.randn(batch, queries).to(dtype)
    options |= softcap_and_sink(dice, tensors, dtype)
    options |= group_bias(dice, tensors, options, dtype)
    return Example(attention_statistics, "", tensors, options)


def host(sizes: Sizes) -> Iterator[Example]:
    options = {"key_groups": torch.arange(sizes.keys) % 2, "num_groups": 2}
    yield Example(attention_statistics, "", _required(sizes), options)
