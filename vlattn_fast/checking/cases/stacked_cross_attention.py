"""Calls of stacked_cross_attention and damsm_similarity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlattn_fast import scores
from vlattn_fast.backends.reference.stacked_cross_attention import FIRST_NORMS
from vlattn_fast.checking.cases._dice import DIMS, LENGTHS, Dice
from vlattn_fast.checking.cases._example import FLOATS, Example, Sizes, Tensors, normal
from vlattn_fast.ops.stacked_cross_attention import damsm_similarity, stacked_cross_attention
from vlattn_fast.scores.general import General
from vlattn_fast.scores.score import MATRIX


def _required(sizes: Sizes) -> Tensors:
    shapes = {"images": (sizes.images, sizes.regions), "captions": (sizes.captions, sizes.words)}
    return {name: torch.randn(*shape, sizes.features) for name, shape in shapes.items()}


def _scored(make: Callable[..., scores.Score], names: tuple[str, ...]) -> Callable[[Tensors], dict[str, Any]]:
    """Arguments of a call whose score takes the tensors `names`."""
    return lambda t: {"images": t["images"], "captions": t["captions"], "score": make(**{name: t[name] for name in names})}


def examples(sizes: Sizes) -> Iterator[Example]:
    floats = {"smooth": FLOATS, "lambda_lse": FLOATS}
    yield Example(stacked_cross_attention, "", _required(sizes), floats=floats)
    i2t = {"direction": "i2t", "aggregation": "mean"}
    yield Example(stacked_cross_attention, "i2t", _required(sizes), i2t, floats={"smooth": FLOATS})
    yield Example(damsm_similarity, "", _required(sizes), floats={"gamma1": FLOATS, "gamma2": FLOATS})


def verify(generator: torch.Generator, sizes: Sizes) -> Iterator[Example]:
    randn, words = normal(generator), sizes.words
    shapes = {"images": (sizes.images, sizes.regions), "captions": (4, words)}
    pairs = {name: torch.nn.functional.normalize(randn(*shape, sizes.features), dim=-1) for name, shape in shapes.items()}
    lengths = {"caption_lengths": torch.tensor([words, words // 2 + 1, 3, words * 3 // 4])}
    yield Example(stacked_cross_attention, "SCAN t2i", pairs, lengths)
    yield Example(stacked_cross_attention, "SCAN i2t", pairs, {**lengths, "direction": "i2t", "aggregation": "mean"})
    weight = {"weight": MATRIX.random(randn(sizes.features, sizes.features), sizes.features)}
    yield Example(stacked_cross_attention, "general score", pairs | weight, lengths, _scored(General, ("weight",)))
    yield Example(stacked_cross_attention, "DAMSM", pairs, {**lengths, "first_norm": "softmax", "smooth": 4.0})


def draw(dice: Dice, dtype: torch.dtype) -> Example:
    images, captions = dice.pick("Bi", (0, 1, 2, 3)), dice.pick("Bc", (0, 1, 2, 4))
    regions, words, features = dice.pick("R", LENGTHS[:18]), dice.pick("T", LENGTHS[:15]), dice.pick("D", DIMS)
    options: dict[str, Any] = {
        "direction": dice.pick("direction", ("t2i", "i2t")),
        "first_norm": dice.pick("first_norm", FIRST_NORMS),
        "smooth": dice.pick("smooth", (9.0, 4.0, 1.0)),
        "aggregation": dice.pick("aggregation", ("logsumexp", "sum", "mean")),
        "lambda_lse": dice.pick("lambda_lse", (6.0, 1.0)),
    }
    kind = scores.SCORES[dice.pick("score", ("dot", "dot", "scaled_dot", "cosine", "general", "hadamard"))]
    parameters, fixed = kind.random(dice, 1, features)
    if "activation" in fixed:
        fixed["activation"] = None
    shapes = {"images": (images, regions, features), "captions": (captions, words, features)}
    tensors = {name: torch.nn.functional.normalize(dice.randn(*shape), dim=-1) for name, shape in shapes.items()}
    for name, (count, length, _) in shapes.items():
        if shortened := dice.chance(0.5):
            lengths = torch.randint(0, length + 1, (count,), generator=dice.generator)
            options[f"{name.removesuffix('s')}_lengths"] = lengths
            tensors[name] = torch.where((torch.arange(length) < lengths[:, None])[..., None], tensors[name], torch.nan)
        tensors[name] = dice.laid_out(name, tensors[name], dtype, repeated=not shortened)
    chosen = {key: x.to(dtype) for key, x in parameters.items()}
    return Example(stacked_cross_attention, "", tensors | chosen, options, _scored(partial(kind, **fixed), tuple(parameters)))


def host(sizes: Sizes) -> Iterator[Example]:
    yield Example(stacked_cross_attention, "", _required(sizes))


def fit(sizes: Sizes) -> Sizes:
    """As many regions as queries and words as keys, up to what images and captions have."""
    n, m = min(sizes.queries, 400), min(sizes.keys, 64)
    counts = {"images": sizes.batch, "captions": sizes.heads}
    return sizes._replace(queries=n, keys=m, regions=n, words=m, features=sizes.head_dim, **counts)
