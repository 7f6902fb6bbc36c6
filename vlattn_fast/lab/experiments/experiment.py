"""What an experiment is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = dict[str, Any]  # what is measured: names and numbers, "seed" among them
Row = dict[str, Any]  # a cell and what came out


@dataclass(frozen=True)
class Settings:
    """seeds: how many, 0 to seeds - 1. smoke: everything runs, but so short that nothing can be learnt from it."""

    seeds: int
    smoke: bool = False


@dataclass(frozen=True)
class Stage:
    """Cells that need nothing from one another.

    cells: (settings, the rows of the stages before) -> the cells. measure: (cell, settings) -> the rest of the row, in plain
    numbers, names and lists; it runs in a process of its own with one thread, so it may read nothing but its arguments.
    alone: one at a time and with all threads, since times are measured.
    """

    cells: Callable[[Settings, Sequence[Row]], list[Cell]]
    measure: Callable[[Cell, Settings], dict[str, Any]]
    alone: bool = False


@dataclass(frozen=True)
class Experiment:
    """tables: the rows as Markdown tables. figures: by name, drawn from the rows."""

    stages: Sequence[Stage]
    tables: Callable[[Sequence[Row]], Iterator[str]]
    figures: dict[str, Callable[[Sequence[Row]], Figure]]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation over seeds (0 of a single value)."""
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    return mean, (squares / max(len(values) - 1, 1)) ** 0.5
