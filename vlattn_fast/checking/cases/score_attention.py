"""Calls of score_attention, with every score function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlattn_fast import scores
from vlattn_fast.checking.cases._attention import plain, verified, without_second_sample
from vlattn_fast.checking.cases._dice import VALUES, Dice, attention_inputs, softcap_and_sink
from vlattn_fast.checking.cases._example import FLOATS, Example, Sizes, Tensors, normal
from vlattn_fast.ops.score_attention import score_attention


def _scored(make: Callable[..., scores.Score], names: tuple[str, ...]) -> Callable[[Tensors], dict[str, Any]]:
    """Arguments of a call whose score function takes the tensors `names`."""

    def arrange(t: Tensors) -> dict[str, Any]:
        score = make(**{name: t[name] for name in names})
        return {"query": t["query"], "key": t["key"], "value": t["value"], "score": score}

    return arrange


def _example_scores(sizes: Sizes) -> Iterator[Example]:
    kinds: dict[str, tuple[Callable[..., scores.Score], tuple[str, ...]]] = {
        "cosine": (scores.Cosine, ()),
        "general": (scores.General, ("weight",)),
        "additive": (scores.Additive, ("vector", "query_weight", "key_weight", "bias")),
        "hadamard": (partial(scores.Hadamard, activation="tanh"), ("vector", "weight", "bias")),
    }
    d = sizes.head_dim
    for name, (make, names) in kinds.items():
        parameters = {each: torch.randn(d, d) if each.endswith("weight") else torch.randn(d) for each in names}
        tensors = {**plain(sizes), **parameters}
        yield Example(score_attention, name, tensors, {"scale": 0.5}, _scored(make, names), {"scale": FLOATS})


def examples(sizes: Sizes) -> Iterator[Example]:
    yield Example(score_attention, "", plain(sizes), floats={"scale": FLOATS, "dropout_p": FLOATS})
    yield Example(score_attention, "lse", plain(sizes), {"return_lse": True}, floats={"scale": FLOATS})
    sink = {"sink": torch.randn(sizes.heads)}
    options, floats = {"return_lse": True, "softcap": 1.5}, {"scale": FLOATS, "softcap": FLOATS}
    yield Example(score_attention, "softcap and sink", plain(sizes) | sink, options, floats=floats)
    yield from _example_scores(sizes)


def _verified_scores(generator: torch.Generator, size: int, qkv: Tensors, options: dict[str, Any]) -> Iterator[Example]:
    randn, root = normal(generator), math.sqrt(size)
    square, vector = {"weight": randn(size, size) / root, "bias": randn(2, size) / root}, {"vector": randn(2, size) / root}
    additive = {**vector, "query_weight": randn(2, size, size) / root, "key_weight": randn(size, size) / root}
    kinds: dict[str, tuple[Tensors, Callable[..., scores.Score]]] = {
        "general": (square, scores.General),
        "general sigmoid": (square, partial(scores.General, activation="sigmoid", projects="query")),
        "additive": (additive, scores.Additive),
        "hadamard relu": (vector, partial(scores.Hadamard, activation="relu")),
        "hadamard tanh": ({**vector, **square}, partial(scores.Hadamard, activation="tanh")),
    }
    for name, (parameters, make) in kinds.items():
        chosen = {**options, "return_lse": name == "hadamard relu"}
        yield Example(score_attention, name, {**qkv, **parameters}, chosen, _scored(make, tuple(parameters)))


def verify(generator: torch.Generator, sizes: Sizes) -> Iterator[Example]:
    qkv, key_mask = verified(generator, sizes)
    yield Example(score_attention, "scaled_dot causal", qkv, {"is_causal": True})
    yield Example(score_attention, "cosine", qkv, {"score": "cosine", "scale": 4.0})
    yield from _verified_scores(generator, sizes.head_dim, qkv, {"key_mask": without_second_sample(key_mask)})
    with_sink = {**qkv, "sink": normal(generator)(sizes.heads)}
    yield Example(score_attention, "softcap and sink", with_sink, {"softcap": 1.5, "return_lse": True})
    shared = {"query": qkv["query"], "key": qkv["key"][:, :1], "value": qkv["value"][:, :1]}
    yield Example(score_attention, "grouped heads", shared, {"enable_gqa": True, "key_mask": key_mask})


def draw(dice: Dice, dtype: torch.dtype) -> Example:
    name = dice.pick("score", ("dot", "scaled_dot", "cosine", "general", "additive", "hadamard"))
    extreme = ("overflowing norms", "vanishing norms") if name == "cosine" else ()
    tensors, options = attention_inputs(dice, dtype, values=VALUES + extreme)
    heads, dim = tensors["query"].shape[1], tensors["query"].shape[3]
    options["return_lse"] = dice.pick("return_lse", (False, True))
    parameters, make = _drawn_score(dice, name, heads, dim)
    if dice.facts["values"] == "small" and dice.chance(0.5):
        options["scale"] = dice.facts["scale"] = 1e3  # logits that are not small
    options |= softcap_and_sink(dice, tensors, dtype, takes_softcap=name in ("dot", "scaled_dot"))
    attended = tuple(tensors)

    def arrange(t: Tensors) -> dict[str, Any]:
        score = name if make is None else make(**{key: t[key] for key in parameters})
        return {**{key: t[key] for key in attended}, "score": score}

    chosen = {key: x.to(dtype) for key, x in parameters.items()}
    return Example(score_attention, "", {**tensors, **chosen}, options, arrange)


def _drawn_score(dice: Dice, name: str, heads: int, dim: int) -> tuple[Tensors, Callable[..., scores.Score] | None]:
    """The parameters of the score function, and the function of them; None where the name is enough."""
    activation = dice.pick("activation", scores.ACTIVATIONS)
    projects = dice.choice.choice(("key", "query"))
    per_head = (heads,) if dice.chance(0.3) else ()
    parameters = {
        "weight": dice.randn(*per_head, dim, dim) / math.sqrt(dim),
        "bias": dice.randn(*per_head, dim) / 4,
        "vector": dice.randn(*per_head, dim) / math.sqrt(dim),
    }
    act = {"activation": activation, "projects": projects}
    kinds: dict[str, tuple[Callable[..., scores.Score], tuple[str, ...]]] = {
        "general": (partial(scores.General, **act), ("weight", "bias")),
        "additive": (scores.Additive, ("vector", "bias")),
        "hadamard": (partial(scores.Hadamard, **act), ("vector", "weight")),
    }
    make, used = kinds.get(name, (None, ()))
    if "bias" in used and not dice.pick("bias", (False, True)):  # which hides that other numbers are small
        used = tuple(key for key in used if key != "bias")
    return {key: parameters[key] for key in used}, make


def host(sizes: Sizes) -> Iterator[Example]:
    yield Example(score_attention, "", plain(sizes))
    d = sizes.head_dim
    vector, left, right = torch.randn(d), torch.randn(d, d), torch.randn(d, d)
    tanh = _scored(partial(scores.General, activation="tanh"), ("weight",))
    yield Example(score_attention, "general tanh", plain(sizes) | {"weight": left}, arrange=tanh)
    parameters = {"vector": vector, "query_weight": left, "key_weight": right}
    additive = _scored(scores.Additive, tuple(parameters))
    yield Example(score_attention, "additive", plain(sizes) | parameters, arrange=additive)
