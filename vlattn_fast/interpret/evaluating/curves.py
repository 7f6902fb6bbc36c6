"""The tests of `evaluate` that run a model on perturbed inputs: which inputs each test runs, and the value of their scores.

A curve takes the values (n,) of a part's entries. It names the entries that stay in each input, as part -> entries. A part
without a name stays whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

STEPS = (0.0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)  # fractions removed, as in LXMERT's perturbation test of Chefer et al.
TWENTIETHS = tuple(step / 20 for step in range(21))
TENTHS = tuple(step / 10 for step in range(11))  # of the code published with synergistic faithfulness
BINS = (0.01, 0.05, 0.1, 0.2, 0.5)  # of ERASER
PARTS = ("image", "text")
BOTH = "both"  # the part of the table for tests of image and text together


@dataclass(frozen=True)
class Curve:
    """The area under a measure over the fraction removed or put in, by trapezoids."""

    parts: ClassVar[tuple[str, ...]] = PARTS  # of the table
    needs: ClassVar[str] = "a map with an entry to remove"
    measure: str  # "accuracy" or "probability"
    steps: tuple[float, ...]
    keep: Callable[[Tensor, float], list[int]]  # values (n,) and a step -> the entries that stay, in their order
    axis: str = "fraction removed"

    def inputs(self, maps: Mapping[str, Tensor], steps: Sequence[float]) -> list[dict[str, list[int]]]:
        """The entries that stay in each input of the test, of a map for each part that the test removes entries of."""
        return [{part: self.keep(values, step) for part, values in maps.items()} for step in steps]

    def curve(self, scores: Sequence[float], steps: Sequence[float]) -> list[float]:
        """A value for each step, from the measures of all inputs."""
        return list(scores)

    def value(self, curve: Sequence[float], steps: Sequence[float]) -> float:
        """One value for the whole curve."""
        return area_under(steps, curve)


class Erasure(Curve):
    """How much a measure falls from the whole input, mean over the steps: DeYoung et al., "ERASER", ACL 2020, equations 1 and 2,
    over the bins of their section 4 (their scorer divides by the 5 bins; the text by 6, with a bin of no token)."""

    def inputs(self, maps: Mapping[str, Tensor], steps: Sequence[float]) -> list[dict[str, list[int]]]:
        return [{}, *super().inputs(maps, steps)]

    def curve(self, scores: Sequence[float], steps: Sequence[float]) -> list[float]:
        whole, *left = scores
        return [whole - score for score in left]

    def value(self, curve: Sequence[float], steps: Sequence[float]) -> float:
        return sum(curve) / len(curve)


class Synergy(Curve):
    """Synergistic faithfulness (Ky, Ghamizi, Cordy, 2026, arXiv 2605.22168): `synergy_norm_auc` of their published code
    (serval-uni-lu/xai-vdoc-benchmark, commit 6743a48).

    I and T are the round(step n) most relevant entries of image and text, v is the measure. The interaction of I and T is their
    joint Harsanyi dividend v(I, T) - v(I) - v(T) + v(neither) in an empty input, and v(all but I and T) - v(all but I) - v(all
    but T) + v(whole) in the whole one. Each is divided by |v(whole) - v(neither)|, 0.05 at least, and cut to [0, 1]: redundant
    parts have 0. A step's value is the mean of the two, and the area is by trapezoids.

    That code blurs pixels and pads words, while `evaluate` removes entries. Its v is the product of the probabilities of those
    tokens of an answer that need the input, and it measures the maps of an answer's tokens one by one.
    """

    parts = (BOTH,)
    needs = "maps of image and text with an entry to remove"

    def inputs(self, maps: Mapping[str, Tensor], steps: Sequence[float]) -> list[dict[str, list[int]]]:
        inputs: list[dict[str, list[int]]] = [{}, {part: [] for part in PARTS}]
        for step in steps:
            top = {part: self.keep(maps[part], step) for part in PARTS}
            inputs += [top, *({**dict.fromkeys(PARTS, []), part: top[part]} for part in PARTS)]
            left = {part: _rest(maps[part], len(top[part])) for part in PARTS}
            inputs += [left, *({part: left[part]} for part in PARTS)]
        return inputs

    def curve(self, scores: Sequence[float], steps: Sequence[float]) -> list[float]:
        whole, neither = scores[:2]
        together, image, text = torch.tensor(scores[2:], dtype=torch.float64).view(len(steps), 2, 3).unbind(-1)
        dividends = together - image - text + torch.tensor([neither, whole], dtype=torch.float64)
        scaled = dividends / max(abs(whole - neither), 0.05)
        return [float(value) for value in scaled.clamp(0, 1).mean(-1)]


def area_under(steps: Sequence[float], values: Sequence[float]) -> float:
    """The area under a curve by trapezoids."""
    return float(torch.trapezoid(torch.tensor(values, dtype=torch.float64), torch.tensor(steps, dtype=torch.float64)))


def _most(values: Tensor, count: int) -> list[int]:
    """The entries with the largest values, largest first; ties in their order."""
    return _ranked(values)[:count]


def _rest(values: Tensor, count: int) -> list[int]:
    """All entries but these."""
    return _ranked(values)[count:]


def _ranked(values: Tensor) -> list[int]:
    order: list[int] = values.argsort(descending=True, stable=True).tolist()
    return order


def _left(values: Tensor, step: float) -> list[int]:
    """The int((1 - step) n) largest. The product is truncated as in the published code: (1 - 0.8) * 10 = 1.9999999999999996 keeps
    one."""
    return _most(values, int((1 - step) * len(values)))


def _down(values: Tensor, step: float) -> int:
    return int(step * len(values) + 1e-9)


def _up(values: Tensor, step: float) -> int:
    return math.ceil(step * len(values) - 1e-9)


CURVES: dict[str, Curve] = {
    "positive": Curve("accuracy", STEPS, lambda values, step: _left(-values, step)),
    "negative": Curve("accuracy", STEPS, _left),
    "insertion": Curve("probability", TWENTIETHS, lambda values, step: _most(values, _down(values, step)), "fraction put in"),
    "deletion": Curve("probability", TWENTIETHS, lambda values, step: _rest(values, _down(values, step))),
    "comprehensiveness": Erasure("probability", BINS, lambda values, step: _rest(values, _up(values, step))),
    "sufficiency": Erasure("probability", BINS, lambda values, step: _most(values, _up(values, step)), "fraction that stays"),
    "synergy": Synergy(
        "probability", TENTHS, lambda values, step: _most(values, round(step * len(values))), "fraction put in or removed"
    ),
}
