"""Calls of relevancy_step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.checking.cases._attention import carried, grad_output, grouped, plain, verified
from vlattn_fast.checking.cases._dice import Dice, group_bias, map_inputs, softcap_and_sink
from vlattn_fast.checking.cases._example import FLOATS, Example, Sizes, Tensors, normal
from vlattn_fast.ops.relevancy_step import relevancy_step

ROWS = ("relevancy",)


def _required(sizes: Sizes) -> Tensors:
    return {**plain(sizes), "relevancy": carried(sizes), "grad_output": grad_output(sizes)}


def examples(sizes: Sizes) -> Iterator[Example]:
    yield Example(relevancy_step, "", _required(sizes), floats={"scale": FLOATS}, in_float32=ROWS)


def verify(generator: torch.Generator, sizes: Sizes) -> Iterator[Example]:
    qkv, key_mask = verified(generator, sizes)
    randn = normal(generator)
    rows = {"relevancy": randn(sizes.batch, sizes.rows, sizes.queries)}
    for_gradient = {**qkv, **rows, "grad_output": randn(sizes.batch, sizes.heads, sizes.queries, sizes.value_dim)}
    yield Example(relevancy_step, "gradient", for_gradient, in_float32=ROWS)
    by_attention = {"query": qkv["query"], "key": qkv["key"], **rows}
    options = {"rule": "attention", "row_normalize": True, "key_mask": key_mask}
    yield Example(relevancy_step, "attention, row-normalised", by_attention, options, in_float32=ROWS)
    # an option, which has no gradient: that of streaming's sink in float32 comes near to what the rule allows
    yield Example(relevancy_step, "softcap and sink", for_gradient, {"softcap": 1.5, "sink": randn(sizes.heads)}, in_float32=ROWS)
    bias, groups = grouped(generator, sizes)
    yield Example(relevancy_step, "groups", {**for_gradient, **bias}, groups, in_float32=ROWS)


def draw(dice: Dice, dtype: torch.dtype) -> Example:
    tensors, options, differentiable = map_inputs(dice, dtype)
    batch, _, queries, _ = tensors["query"].shape
    tensors["relevancy"] = dice.randn(batch, dice.pick("T", (1, 2, 5)), queries).to(compute_dtype(tensors["query"]))
    options |= softcap_and_sink(dice, tensors, dtype)
    options |= group_bias(dice, tensors, options, dtype)
    return Example(relevancy_step, "", tensors, options, in_float32=ROWS, differentiable=differentiable)


def host(sizes: Sizes) -> Iterator[Example]:
    """Only forward: the backward pass is that of streaming."""
    yield Example(relevancy_step, "", _required(sizes), in_float32=ROWS, differentiable=False)
