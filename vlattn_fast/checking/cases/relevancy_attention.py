"""Calls of relevancy_attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.checking.cases._attention import carried, grouped, plain, verified
from vlattn_fast.checking.cases._dice import Dice, attention_inputs, group_bias, head_gate, softcap_and_sink
from vlattn_fast.checking.cases._example import FLOATS, Example, Sizes, Tensors, normal
from vlattn_fast.ops.relevancy_attention import relevancy_attention

CARRIER = ("carrier",)


def fit(sizes: Sizes) -> Sizes:
    """Self-attention has as many keys as queries."""
    return sizes._replace(keys=sizes.queries)


def _required(sizes: Sizes) -> Tensors:
    return {**plain(fit(sizes)), "carrier": carried(sizes)}


def examples(sizes: Sizes) -> Iterator[Example]:
    floats = {"scale": FLOATS, "residual_weight": FLOATS, "attention_weight": FLOATS}
    yield Example(relevancy_attention, "", _required(sizes), floats=floats, in_float32=CARRIER)
    options, floats = {"rule": "attention", "row_normalize": True}, {"scale": FLOATS}
    yield Example(relevancy_attention, "rollout", _required(sizes), options, floats=floats, in_float32=CARRIER)
    options, floats = {"rule": "attention", "softcap": 1.5}, {"scale": FLOATS, "softcap": FLOATS, "residual_weight": FLOATS}
    tensors = _required(sizes) | {"sink": torch.randn(sizes.heads)}
    yield Example(relevancy_attention, "softcap and sink", tensors, options, floats=floats, in_float32=CARRIER)


def verify(generator: torch.Generator, sizes: Sizes) -> Iterator[Example]:
    n, b = sizes.queries, sizes.batch
    qkv, key_mask = verified(generator, fit(sizes))
    tensors = {**qkv, "carrier": normal(generator)(b, sizes.rows, n)}
    weight = torch.rand(b, n, generator=generator).double()
    rollout = {"rule": "attention", "residual_weight": 0.5, "attention_weight": 0.5, "key_mask": key_mask}
    weighted = {"row_normalize": True, "residual_weight": weight, "attention_weight": 1 - weight, "is_causal": True}
    for name, options in {"gradient": {}, "rollout": rollout, "row-normalised": weighted}.items():
        yield Example(relevancy_attention, name, tensors, options, in_float32=CARRIER)
    with_sink = tensors | {"sink": normal(generator)(sizes.heads)}
    options = {"softcap": 1.5, "key_mask": key_mask}
    yield Example(relevancy_attention, "softcap and sink", with_sink, options, in_float32=CARRIER)
    bias, groups = grouped(generator, fit(sizes))
    gated = tensors | bias | {"head_gate": normal(generator)(b, sizes.heads)}
    yield Example(relevancy_attention, "groups and gate", gated, groups, in_float32=CARRIER)


def draw(dice: Dice, dtype: torch.dtype) -> Example:
    tensors, options = attention_inputs(dice, dtype, square=True)
    batch, _, queries, _ = tensors["query"].shape
    rows = dice.pick("T", (1, 1, 2, 3, 5, 17))
    carrier = dice.randn(batch, rows, queries).to(compute_dtype(tensors["query"]))
    options |= {"rule": dice.pick("rule", ("gradient", "attention")), "row_normalize": dice.pick("row_normalize", (False, True))}
    if dice.chance(0.5):
        weight = torch.rand(batch, queries, generator=dice.generator)
        options |= {"residual_weight": weight, "attention_weight": 1 - weight} if dice.chance(0.5) else {"residual_weight": 0.5}
    options |= softcap_and_sink(dice, tensors, dtype)
    options |= group_bias(dice, tensors, options, dtype)
    head_gate(dice, tensors, dtype)
    return Example(relevancy_attention, "", {**tensors, "carrier": carrier}, options, in_float32=CARRIER)


def host(sizes: Sizes) -> Iterator[Example]:
    yield Example(relevancy_attention, "", _required(sizes), in_float32=CARRIER)
