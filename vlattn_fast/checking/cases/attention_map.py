"""Calls of attention_map."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlattn_fast.checking.cases._attention import grad_output, grouped, plain, verified, without_second_sample
from vlattn_fast.checking.cases._dice import Dice, group_bias, map_inputs, softcap_and_sink
from vlattn_fast.checking.cases._example import FLOATS, Example, Sizes, Tensors, normal
from vlattn_fast.ops.attention_map import attention_map


def _for_gradient(sizes: Sizes) -> Tensors:
    return {**plain(sizes), "grad_output": grad_output(sizes)}


def examples(sizes: Sizes) -> Iterator[Example]:
    yield Example(attention_map, "", _for_gradient(sizes), {"rule": "gradient"}, floats={"scale": FLOATS})
    tensors, floats = _for_gradient(sizes) | {"sink": torch.randn(sizes.heads)}, {"scale": FLOATS, "softcap": FLOATS}
    yield Example(attention_map, "softcap and sink", tensors, {"rule": "gradient", "softcap": 1.5}, floats=floats)


def verify(generator: torch.Generator, sizes: Sizes) -> Iterator[Example]:
    qkv, key_mask = verified(generator, sizes)
    randn, gradient = normal(generator), {"rule": "gradient"}
    for_gradient = {**qkv, "grad_output": randn(sizes.batch, sizes.heads, sizes.queries, sizes.value_dim)}
    masked = {"key_mask": without_second_sample(key_mask)}
    yield Example(attention_map, "attention", {"query": qkv["query"], "key": qkv["key"]}, masked)
    yield Example(attention_map, "gradient", for_gradient, gradient)
    with_sink = {**for_gradient, "sink": randn(sizes.heads)}
    yield Example(attention_map, "softcap and sink", with_sink, {**gradient, "softcap": 1.5})
    yield Example(
        attention_map, "gradient of the largest head", for_gradient, {**gradient, "head_reduction": "max", "row_normalize": True}
    )
    bias, groups = grouped(generator, sizes)
    yield Example(attention_map, "groups", {**for_gradient, **bias}, {**gradient, **groups})


def draw(dice: Dice, dtype: torch.dtype) -> Example:
    """With gradients only of the mean over heads: the largest and the least may be those of two heads, by rounding."""
    tensors, options, differentiable = map_inputs(dice, dtype)
    options["head_reduction"] = dice.pick("head_reduction", ("mean", "mean", "max", "min"))
    options |= softcap_and_sink(dice, tensors, dtype)
    options |= group_bias(dice, tensors, options, dtype)
    differentiable = differentiable and options["head_reduction"] == "mean"
    return Example(attention_map, "", tensors, options, differentiable=differentiable)


def host(sizes: Sizes) -> Iterator[Example]:
    """Only forward: the backward pass is that of streaming."""
    tensors = plain(sizes)
    yield Example(attention_map, "", {name: tensors[name] for name in ("query", "key")}, differentiable=False)
