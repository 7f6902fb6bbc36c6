"""Calls of score_attention, with every score function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlattn_fast import scores
from vlattn_fast.checking.cases._attention import grouped, plain, verified, without_second_sample
from vlattn_fast.checking.cases._dice import (
    EXTREME_VALUES,
    VALUES,
    Dice,
    attention_inputs,
    group_bias,
    head_gate,
    softcap_and_sink,
)
from vlattn_fast.checking.cases._example import FLOATS, Example, Sizes, Tensors, normal
from vlattn_fast.ops.score_attention import score_attention


def _scored(make: Callable[..., scores.Score], names: tuple[str, ...]) -> Callable[[Tensors], dict[str, Any]]:
    """Arguments of a call whose score function takes the tensors `names`."""

    def arrange(t: Tensors) -> dict[str, Any]:
        score = make(**{name: t[name] for name in names})
        return {"query": t["query"], "key": t["key"], "value": t["value"], "score": score}

    return arrange


def _example_scores(sizes: Sizes) -> Iterator[Example]:
    for kind in scores.SCORES.values():
        if kind.is_plain:
            continue
        fixed, d = next(iter(kind.examples().values())), sizes.head_dim
        parameters = {name: each.random(torch.randn(each.shape(d)), d) for name, each in kind.parameters.items()}
        arrange = _scored(partial(kind, **fixed), tuple(parameters))
        yield Example(score_attention, kind.name, {**plain(sizes), **parameters}, {"scale": 0.5}, arrange, {"scale": FLOATS})


def examples(sizes: Sizes) -> Iterator[Example]:
    yield Example(score_attention, "", plain(sizes), floats={"scale": FLOATS, "dropout_p": FLOATS})
    yield Example(score_attention, "lse", plain(sizes), {"return_lse": True}, floats={"scale": FLOATS})
    sink = {"sink": torch.randn(sizes.heads)}
    options, floats = {"return_lse": True, "softcap": 1.5}, {"scale": FLOATS, "softcap": FLOATS}
    yield Example(score_attention, "softcap and sink", plain(sizes) | sink, options, floats=floats)
    yield from _example_scores(sizes)


def _verified_scores(generator: torch.Generator, sizes: Sizes, qkv: Tensors, options: dict[str, Any]) -> Iterator[Example]:
    randn, size = normal(generator), sizes.head_dim
    for kind in scores.SCORES.values():
        for name, fixed in () if kind.is_plain else kind.examples().items():
            parameters = {  # one for all heads if it is a matrix, otherwise one for each
                key: each.random(randn(*each.shape(size, () if each.rank == 2 else (sizes.heads,))), size)
                for key, each in kind.parameters.items()
            }
            make = partial(kind, **fixed)
            returns_lse = make(**parameters).is_dot_product and name != "general"  # SDPA returns none: so it is checked, too
            scale = 0.7 if kind.parameters else 4.0  # such as a cosine's, which is at most 1
            chosen, attended = {**options, "return_lse": returns_lse, "scale": scale}, qkv
            if fixed.get("activation") == "sigmoid":
                # scores are at most 1, and many are near it: keys that grow with their index have larger ones in the last tile
                chosen["scale"] = 4.0
                attended = {**qkv, "key": qkv["key"] * torch.linspace(0.25, 1.5, sizes.keys, dtype=torch.float64)[:, None]}
            yield Example(score_attention, name, {**attended, **parameters}, chosen, _scored(make, tuple(parameters)))


def verify(generator: torch.Generator, sizes: Sizes) -> Iterator[Example]:
    qkv, key_mask = verified(generator, sizes)
    # as many queries as keys: only the last ones attend to the keys beyond a tile
    square = {**qkv, "query": qkv["key"].flip(2)}
    yield Example(score_attention, "scaled_dot causal", square, {"is_causal": True})
    yield from _verified_scores(generator, sizes, qkv, {"key_mask": without_second_sample(key_mask)})
    with_sink = {**qkv, "sink": normal(generator)(sizes.heads)}
    yield Example(score_attention, "softcap and sink", with_sink, {"softcap": 1.5, "return_lse": True})
    shared = {"query": qkv["query"], "key": qkv["key"][:, :1], "value": qkv["value"][:, :1]}
    yield Example(score_attention, "grouped heads", shared, {"enable_gqa": True, "key_mask": key_mask})
    bias, groups = grouped(generator, sizes)
    gated = {**qkv, **bias, "head_gate": normal(generator)(sizes.batch, sizes.heads)}
    yield Example(score_attention, "groups and gate", gated, {**groups, "key_mask": key_mask, "return_lse": True})


def draw(dice: Dice, dtype: torch.dtype) -> Example:
    kind = scores.SCORES[dice.pick("score", scores.SCORES)]
    tensors, options = attention_inputs(dice, dtype, values=VALUES + EXTREME_VALUES * kind.ignores_lengths)
    heads, dim = tensors["query"].shape[1], tensors["query"].shape[3]
    options["return_lse"] = dice.pick("return_lse", (False, True))
    parameters, fixed = kind.random(dice, heads, dim)
    if dice.drawn["values"] == "small" and dice.chance(0.5):
        options["scale"] = dice.drawn["scale"] = 1e3  # logits that are not small
    options |= softcap_and_sink(dice, tensors, dtype, takes_softcap=kind.is_plain)
    options |= group_bias(dice, tensors, options, dtype)
    head_gate(dice, tensors, dtype)
    attended = tuple(tensors)

    def arrange(t: Tensors) -> dict[str, Any]:
        return {**{key: t[key] for key in attended}, "score": kind(**{key: t[key] for key in parameters}, **fixed)}

    chosen = {key: x.to(dtype) for key, x in parameters.items()}
    return Example(score_attention, "", {**tensors, **chosen}, options, arrange)


def host(sizes: Sizes) -> Iterator[Example]:
    yield Example(score_attention, "", plain(sizes))
    d = sizes.head_dim
    vector, left, right = torch.randn(d), torch.randn(d, d), torch.randn(d, d)
    tanh = _scored(partial(scores.General, activation="tanh"), ("weight",))
    yield Example(score_attention, "general tanh", plain(sizes) | {"weight": left}, arrange=tanh)
    parameters = {"vector": vector, "query_weight": left, "key_weight": right}
    additive = _scored(scores.Additive, tuple(parameters))
    yield Example(score_attention, "additive", plain(sizes) | parameters, arrange=additive)
