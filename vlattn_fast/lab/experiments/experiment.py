"""The parts of an experiment."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlattn_fast._ground.extras import extra
from vlattn_fast.lab.records import mean_and_deviation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = dict[str, Any]  # names and numbers that say which measurement, "seed" among them
Record = dict[str, Any]  # a cell and its results


@dataclass(frozen=True)
class Settings:
    """seeds: 0 to seeds - 1 are run. smoke: everything runs, but too briefly for a meaning. models: directory of trained models,
    one folder for each seed; None = the experiment trains its models."""

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


@dataclass(frozen=True)
class Experiment:
    """tables: the records as Markdown tables. figures: by name, drawn from the records."""

    stages: Sequence[Stage]
    tables: Callable[[Sequence[Record]], Iterator[str]]
    figures: dict[str, Callable[[Sequence[Record]], Figure]]


def panels(lines: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure of `size` inches, and its panels line by line."""
    with extra("viz"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False, **options)


def least_seconds(calls: Mapping[str, Callable[[], Any]], rounds: int, least: float = 0.0) -> dict[str, float]:
    """The least mean seconds of each call in `rounds`, in which the calls take turns, at least `least` seconds each."""
    seconds = dict.fromkeys(calls, math.inf)
    for _ in range(rounds):
        for name, call in calls.items():
            began, count = time.perf_counter(), 0
            while not count or time.perf_counter() - began < least:
                call()
                count += 1
            seconds[name] = min(seconds[name], (time.perf_counter() - began) / count)
    return seconds


def paired_test(differences: Sequence[float]) -> tuple[float, float]:
    """(t, p) of Student's two-sided test that the mean of paired differences is 0; (0, 1) where all are 0."""
    from scipy.stats import t as student  # scikit-learn, which the scenes need, brings it

    mean, deviation = mean_and_deviation(differences)
    if deviation == 0.0:
        return (0.0, 1.0) if mean == 0.0 else (math.copysign(math.inf, mean), 0.0)
    ratio = mean / (deviation / len(differences) ** 0.5)
    return ratio, 2 * float(student.sf(abs(ratio), len(differences) - 1))


def rank_correlation(one: Sequence[float], two: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 where one side is constant."""
    from scipy.stats import spearmanr

    if len(set(one)) == 1 or len(set(two)) == 1:
        return 0.0
    return float(spearmanr(one, two).statistic)
