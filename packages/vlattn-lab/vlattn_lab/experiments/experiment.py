"""The parts of an experiment."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlattn_fast.measuring.records import markdown, mean_and_deviation, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = dict[str, Any]  # names and numbers that say which measurement, "seed" among them
Record = dict[str, Any]  # a cell and its results


@dataclass(frozen=True)
class Settings:
    """seeds: 0 to seeds - 1 are run. smoke: everything runs, but too briefly for a meaning. models: directory of trained models,
    one folder for each seed; None = the experiment trains its models, or takes the shipped ones."""

    seeds: int
    smoke: bool = False
    models: Path | None = None


@dataclass(frozen=True)
class Stage:
    """Cells that do not depend on one another.

    cells: (settings, records of earlier stages) -> the cells. measure: (cell, settings) -> the rest of the record, in plain
    numbers, names and lists; measure runs in a separate process with one thread, so it may read nothing but its arguments.
    alone: cells run one at a time with all threads, since times are measured.
    """

    cells: Callable[[Settings, Sequence[Record]], list[Cell]]
    measure: Callable[[Cell, Settings], dict[str, Any]]
    alone: bool = False


class Effect(NamedTuple):
    """What an experiment says of a claim, over models or samples that were drawn independently.

    effect: the mean, with its 95 % interval by Student's t. p: of Student's two-sided test that it is 0, and after Holm's
    correction for all effects of a table. detectable: the size that such a test finds in four of five repetitions, at the level
    that Holm's correction asks of the smallest p.
    """

    claim: str
    measured: str
    effect: float
    low: float
    high: float
    seeds: int
    p: float
    holm: float
    detectable: float


@dataclass(frozen=True)
class Experiment:
    """tables: the records as Markdown tables. figures: by name, drawn from the records. effects: what the page's table shows, and
    what is stored next to the records."""

    stages: Sequence[Stage]
    tables: Callable[[Sequence[Record]], Iterator[str]]
    figures: dict[str, Callable[[Sequence[Record]], Figure]]
    effects: Callable[[Sequence[Record]], list[Effect]] = lambda records: []


def band(axis: Any, places: Sequence[float], values: Sequence[Sequence[float]], **style: Any) -> None:
    """A line through the means of `values`, those of the seeds at each place, and their deviations around it."""
    means, deviations = (np.array(part) for part in zip(*map(mean_and_deviation, values), strict=True))
    axis.plot(places, means, **style)
    axis.fill_between(places, means - deviations, means + deviations, color=style["color"], alpha=0.12, linewidth=0)
    axis.spines[["top", "right"]].set_visible(False)


def dots(axis: Any, columns: Mapping[str, Sequence[float]], colour: str, shift: float = 0.0, **style: Any) -> None:
    """A dot for each seed and a bar for the mean, column by column, whose names are the keys."""
    for place, values in enumerate(columns.values()):
        axis.scatter([place + shift] * len(values), values, color=colour, s=14, zorder=2, **style)
        axis.hlines(sum(values) / len(values), place + shift - 0.16, place + shift + 0.16, color=colour, linewidth=2.0)
        style.pop("label", None)
    axis.set_xticks(range(len(columns)), [*columns], rotation=35, ha="right", rotation_mode="anchor")
    axis.spines[["top", "right"]].set_visible(False)


def least_seconds(
    calls: Mapping[str, Callable[[], Any]], rounds: int, least: float = 0.0, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The least mean seconds of each call in `rounds`, in which the calls take turns, at least `least` seconds each."""
    seconds = dict.fromkeys(calls, math.inf)
    for _ in range(rounds):
        for name, call in calls.items():
            began, count = clock(), 0
            while not count or clock() - began < least:
                call()
                count += 1
            seconds[name] = min(seconds[name], (clock() - began) / count)
    return seconds


def paired_test(differences: Sequence[float]) -> tuple[float, float]:
    """(t, p) of Student's two-sided test that the mean of paired differences is 0; (0, 1) where all are 0."""
    from scipy.stats import t as student  # scikit-learn, which the scenes need, brings it

    mean, deviation = mean_and_deviation(differences)
    if deviation == 0.0:
        return (0.0, 1.0) if mean == 0.0 else (math.copysign(math.inf, mean), 0.0)
    ratio = mean / (deviation / len(differences) ** 0.5)
    return ratio, 2 * float(student.sf(abs(ratio), len(differences) - 1))


def less(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """first - second, pair by pair."""
    return [a - b for a, b in zip(first, second, strict=True)]


def effects_of(found: Sequence[tuple[str, str, Sequence[float]]]) -> list[Effect]:
    """The effects of one table, of (claim, what is measured, a value of each seed, which is 0 without an effect).
    One value has no interval, and is left out."""
    from scipy.stats import t as student

    effects, found = [], [one for one in found if len(one[2]) > 1]
    corrected = holm([paired_test(values)[1] for *_, values in found])
    for (claim, measured, values), after in zip(found, corrected, strict=True):
        mean, deviation = mean_and_deviation(values)
        error, freedom = deviation / len(values) ** 0.5, len(values) - 1
        half = float(student.isf(0.025, freedom)) * error
        numbers = mean, mean - half, mean + half, len(values), paired_test(values)[1], after
        effects.append(Effect(claim, measured, *numbers, error * _found_in_four_of_five(freedom, 0.05 / len(found))))
    return effects


def holm(chances: Sequence[float]) -> list[float]:
    """p after Holm's step-down correction, in the order given."""
    corrected, largest = [0.0] * len(chances), 0.0
    for rank, place in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        largest = max(largest, min(1.0, (len(chances) - rank) * chances[place]))
        corrected[place] = largest
    return corrected


@functools.cache
def _found_in_four_of_five(freedom: int, level: float) -> float:
    """The mean over its standard error that a two-sided t-test of this level finds with a chance of 0.8."""
    from scipy.optimize import brentq
    from scipy.stats import nct
    from scipy.stats import t as student

    least = float(student.isf(level / 2, freedom))
    return float(brentq(lambda size: nct.sf(least, freedom, size) - 0.8, 0.0, 4 * least))


def effects_table(effects: Sequence[Effect], form: str = ".3f") -> str:
    lines = [
        [
            *(one.claim, one.measured, f"{one.effect:+{form}}", f"{one.low:+{form}} to {one.high:+{form}}", str(one.seeds)),
            *("< 0.001" if one.holm < 0.001 else f"{one.holm:.3f}", f"{one.detectable:{form}}"),
        ]
        for one in effects
    ]
    return markdown(["", "effect of", "mean", "95 % interval", "seeds", "p (Holm)", "detectable"], lines, words=(0, 1))


def paired_change(first: Sequence[float], second: Sequence[float], form: str = ".3f") -> tuple[str, str]:
    """The mean of first - second, pair by pair, ± its deviation, and p; one pair has no p."""
    differences = less(first, second)
    p = paired_test(differences)[1]
    shown = "–" if len(differences) < 2 else "< 0.001" if p < 0.001 else f"{p:.3f}"
    return spread(differences, form, sign="+"), shown


def spearman(one: Tensor, two: Tensor) -> Tensor:
    """Rank correlation along the last axis, ties sharing their mean rank; 0 where one side is constant."""
    from scipy.stats import rankdata

    a, b = (torch.from_numpy(rankdata(x.numpy(), axis=-1)) - (x.shape[-1] + 1) / 2 for x in (one, two))
    norms = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(norms > 0, (a * b).sum(-1) / norms.clamp(min=1e-12), 0.0)
