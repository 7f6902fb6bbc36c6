"""Calls of recurrent_step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from vlattn_fast.checking.cases._dice import DIMS, Dice
from vlattn_fast.checking.cases._example import Example, Sizes, Tensors, normal
from vlattn_fast.ops.recurrent_step import recurrent_step

ROWS = ("relevancy",)


def _tensors(sizes: Sizes, randn: Callable[..., torch.Tensor] = torch.randn) -> Tensors:
    """The tensors of a gated delta rule, whose keys have length 1 and whose decays are up to exp(-2)."""
    shape = sizes.batch, sizes.heads, sizes.queries
    features = {"query": sizes.head_dim, "key": sizes.head_dim, "value": sizes.value_dim, "grad_output": sizes.value_dim}
    tensors = {"relevancy": randn(sizes.batch, sizes.rows, sizes.queries)}
    tensors |= {name: randn(*shape, size) for name, size in features.items()}
    tensors["key"] = F.normalize(tensors["key"], dim=-1)
    return {**tensors, "log_decay": -2 * torch.sigmoid(randn(*shape)), "beta": 2 * torch.sigmoid(randn(*shape))}


def examples(sizes: Sizes) -> Iterator[Example]:
    yield Example(recurrent_step, "", _tensors(sizes), in_float32=ROWS)


def verify(generator: torch.Generator, sizes: Sizes) -> Iterator[Example]:
    randn = normal(generator)
    delta_rule = _tensors(sizes, randn)
    yield Example(recurrent_step, "gated delta rule", delta_rule, in_float32=ROWS)
    per_feature = {**delta_rule, "log_decay": -2 * torch.sigmoid(randn(*delta_rule["query"].shape))}
    yield Example(recurrent_step, "decay per feature", per_feature, {"row_normalize": True}, in_float32=ROWS)
    names = ("relevancy", "query", "key", "log_decay")
    by_attention = {**{name: delta_rule[name] for name in names}, "diagonal": randn(*delta_rule["log_decay"].shape)}
    yield Example(recurrent_step, "attention, without beta", by_attention, {"rule": "attention"}, in_float32=ROWS)


def draw(dice: Dice, dtype: torch.dtype) -> Example:
    batch, heads, key_heads, length, _ = dice.sizes(square=True)  # the formula makes the map of N x N
    dim, value_dim = dice.pick("D", DIMS), dice.pick("Dv", DIMS)
    rule = dice.pick("rule", ("gradient", "attention"))
    options: dict[str, Any] = {"rule": rule, "row_normalize": dice.pick("row_normalize", (False, True))}
    query_heads = dice.pick("Hq", (key_heads, heads))
    kind = dice.pick("values", ("normal", "normal", "small", "constant", "signs", "one-hot", "with zero rows"))
    if kind == "signs":
        dim += 1 - dim % 2  # entries of one magnitude in an odd number of columns never add up to 0, which row_normalize makes 1
    key = F.normalize(dice.numbers((batch, key_heads, length, dim), kind, dtype), dim=-1)
    tensors = {"query": dice.numbers((batch, query_heads, length, dim), kind, dtype), "key": key}
    differentiable = True
    if rule == "gradient":
        # entries of one magnitude in an odd number of columns never add up to 0, at which the gradient jumps
        pair = {name: dice.randn(batch, heads, length, value_dim) for name in ("value", "grad_output")}
        if differentiable := dice.pick("signs", (False, True)):
            pair = {name: x.sign()[..., : value_dim - 1 + value_dim % 2] for name, x in pair.items()}
        tensors |= pair
    shape = batch, heads, length
    decay = dice.pick("decay", (None, "weak", "of a model", "strong", "none at all"))
    if decay is not None:
        size = (*shape, dim) if dice.pick("per feature", (False, True)) else shape
        factor = {"weak": 1e-3, "of a model": 1.0, "strong": 50.0, "none at all": 0.0}[decay]
        tensors["log_decay"] = -factor * dice.randn(*size).abs()
    if decay == "strong" and (rule == "attention" or options["row_normalize"]):
        differentiable = False  # the formula's own gradients overflow if a row's sum is subnormal
    if dice.pick("delta rule", (False, True)):
        tensors["beta"] = 2 * torch.sigmoid(dice.randn(*shape))
        # Each token multiplies A between equal keys by 1 - beta. Once it is below the rounding of others, rounding chooses its
        # sign, at which the gradient jumps; the formula goes token by token and keeps it.
        differentiable = differentiable and kind != "constant"
    if dice.pick("diagonal", (False, False, True)):
        tensors["diagonal"] = dice.randn(*shape)
    if heads not in (x.shape[1] for x in tensors.values()):  # nothing else says how many there are
        tensors["diagonal"] = dice.randn(*shape)
    tensors = {name: dice.laid_out(name, x, dtype) for name, x in tensors.items()}
    tensors["relevancy"] = dice.randn(batch, dice.pick("T", (1, 2, 5)), length)
    wide = ("log_decay", "beta", "diagonal") if dice.pick("gates", ("in float32", "as query")) == "in float32" else ()
    return Example(recurrent_step, "", tensors, options, in_float32=(*ROWS, *wide), differentiable=differentiable)


def host(sizes: Sizes) -> Iterator[Example]:
    yield Example(recurrent_step, "", _tensors(sizes), in_float32=ROWS)
