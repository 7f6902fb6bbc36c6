"""Attention score functions, one class in one file each: those of Cao et al., COLING 2022, Table 1, and others.

In: query, key and a score's parameters.
Out: the formula of the score; its core score with features; the properties that callers ask a class for.
Imports: _ground.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from vlattn_fast._ground.checks import describe
from vlattn_fast.scores.additive import Additive
from vlattn_fast.scores.cosine import Cosine
from vlattn_fast.scores.distance import Distance
from vlattn_fast.scores.dot import Dot, ScaledDot
from vlattn_fast.scores.general import General
from vlattn_fast.scores.hadamard import Hadamard
from vlattn_fast.scores.score import ACTIVATIONS, Core, Layer, Parameter, Score, softcapped

__all__ = [
    "ACTIVATIONS",
    "Additive",
    "Core",
    "Cosine",
    "Distance",
    "Dot",
    "General",
    "Hadamard",
    "Layer",
    "Parameter",
    "SCORES",
    "ScaledDot",
    "Score",
    "layers",
    "resolve",
    "scores_in_folder",
    "softcapped",
]


def __dir__() -> list[str]:
    """Returns the public names."""
    return sorted(__all__)


def scores_in_folder() -> dict[str, type[Score]]:
    """Returns the score functions by their names: each class with a name in a file of this folder."""
    by_name: dict[str, type[Score]] = {}
    for file in pkgutil.iter_modules(__path__, f"{__name__}."):
        for kind in vars(importlib.import_module(file.name)).values():
            if isinstance(kind, type) and issubclass(kind, Score) and kind.name and kind.__module__ == file.name:
                if kind.name in by_name:
                    raise ValueError(f"scores must have names of their own; got {kind.name!r} in {file.name} once more")
                by_name[kind.name] = kind
    # those that need only a name first, dot products of query and key before the others
    return dict(sorted(by_name.items(), key=lambda item: (bool(item[1].parameters), not item[1].is_plain)))


SCORES = scores_in_folder()
_BY_NAME = {name: kind() for name, kind in SCORES.items() if not kind.parameters}  # those that a call names


def layers() -> dict[str, Layer]:
    """Returns each name that nn.ScoreAttention takes, and its score; one without learned tensors is the score of that name."""
    return {name: layer for kind in SCORES.values() for name, layer in kind.layers().items()}


def resolve(score: Any) -> Score:
    """Returns the score function of a name; an object is returned as it is."""
    if isinstance(score, Score):
        return score
    names = tuple(_BY_NAME)
    if not isinstance(score, str):
        raise TypeError(f"score must be one of {names} or a va.scores object; got {describe(score)}")
    if score in _BY_NAME:
        return _BY_NAME[score]
    kind, way = SCORES.get(score.lower()), ""
    if kind is not None and kind.parameters:
        way = f". It has parameters: pass va.scores.{kind.__name__}(...), or use va.nn.ScoreAttention, which makes them"
    raise ValueError(f"score must be one of {names} or a va.scores object; got {score!r}{way}")
