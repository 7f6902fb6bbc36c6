"""Matching with one factor changed at a time: heads, the factor in the softmax (smooth), depth."""

from __future__ import annotations

import functools
from typing import Any

from vlattn_lab.experiments.scores import matching
from vlattn_lab.experiments.scores.material import Sizes

RATES = matching.RATES[1:]  # one rate, so that nothing but the factor changes
SIZES, SMOKE, measure = matching.SIZES, matching.SMOKE, matching.measure

# A factor of a score, and its values. Each score's first arm has none.
FACTORS: dict[tuple[str, str], tuple[float, ...]] = {
    ("scaled_dot", "heads"): (1, 2, 4, 8),
    ("scaled_dot", "smooth"): (0.25, 1, 4),
    ("cosine", "smooth"): (1, 3, 9, 27),
    ("scaled_dot", "depth"): (1, 2, 3),
}


def arm_of(score: str, factor: str, value: float) -> str:
    """The arm's name; all factors of a score share the arm without any."""
    return score if value == 1 else f"{score}, {factor} {value:g}"


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    arm_of(score, factor, value): (score, {} if value == 1 else {factor: value})
    for (score, factor), values in FACTORS.items()
    for value in values
}
ARMS = tuple(OPTIONS)


def train(arm: str, seed: int, sizes: Sizes, rate: float) -> tuple[matching.Matcher, matching.Matcher]:
    """As in `matching`."""
    score, options = OPTIONS[arm]
    return matching.train(score, seed, sizes, rate, functools.partial(matching.Matcher, **options))
