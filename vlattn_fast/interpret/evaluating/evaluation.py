"""`Evaluation`: the results of `evaluate` as a table, curves and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vlattn_fast._ground.extras import extra
from vlattn_fast.interpret.evaluating.box_scores import BOX_SCORES
from vlattn_fast.interpret.evaluating.curves import BOTH, CURVES
from vlattn_fast.interpret.evaluating.items import TokenPlace
from vlattn_fast.interpret.result.figures.report import Report, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AXES = {"sanity": "share of modules randomised", **{test: curve.axis for test, curve in CURVES.items()}}
_AXES |= {"intervention:insertion": "fraction of groups not cut", "intervention:deletion": "fraction of groups cut"}


@dataclass(frozen=True, eq=False)
class Evaluation(Report):
    """The results of `evaluate`: `print` shows the table, `plot` the curves, `value` gives one number, `save` writes a file.

    Args:
        table: an entry for each method, test and part: "method", "test", "part" ("image", "text", or "both" for tests of the two
            together), "value" (the mean over samples; None without any), "sd" (their standard deviation; None below two),
            "samples", "left_out": samples without that part, without ground truth, or with too little of them, and "note": why
            there is no value, or why it says nothing about the maps.
        curves: an entry for each method, test and part with a curve: "method", "test", "part", "steps", "mean" and "sd" (a number
            per step), "samples". The steps of "sanity" are shares of randomised modules, and its samples have a map at each step.
        metadata: the arguments of the run, the class of the model, its dtype and device, and the versions of packages.
        tokens: for answers, an entry for each value: "item" of the data set, "position" in its answer, "token", "word", "method",
            "test", "part" and "value".
    """

    FORMAT: ClassVar[str] = "vlattn_fast.evaluation.1"
    table: list[dict[str, Any]]
    curves: list[dict[str, Any]] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    tokens: list[dict[str, Any]] = field(default_factory=list)

    def value(self, method: str, test: str, part: str | None = None) -> float | None:
        """Returns the mean in one entry of the table. part None = the image, or both for a test of both. ValueError if
        there is none."""
        for entry in self.table:
            if (entry["method"], entry["test"]) == (method, test) and entry["part"] in ((part,) if part else ("image", BOTH)):
                return entry["value"]
        raise ValueError(f"method, test and part must name an entry of the table; got {method!r}, {test!r}, {part!r}")

    def plot(self) -> Figure:
        """Draws a curve for each test with steps, and bars with standard errors for the others.

        Returns:
            A matplotlib Figure (without pyplot: nothing is shown or kept open).
        """
        with_value = [entry for entry in self.table if entry["value"] is not None]
        tests = list(dict.fromkeys((entry["test"], entry["part"]) for entry in with_value))
        with extra("viz"):
            figure, axes = panels(len(tests))
        # a bare dollar sign would start a formula
        plain = {entry["method"]: entry["method"].replace("$", r"\$") for entry in self.table}
        for axis, test in zip(axes, tests, strict=True):
            axis.set_title(f"{test[0]} of {'both parts' if test[1] == BOTH else f'the {test[1]}'}")
            drawn, entries = (
                {entry["method"]: entry for entry in some if (entry["test"], entry["part"]) == test}
                for some in (self.curves, with_value)
            )
            for index, method in enumerate(plain):
                if method in drawn:
                    curve, label = drawn[method], f"{plain[method]} ({entries[method]['value']:.3f})"
                    axis.plot(curve["steps"], curve["mean"], f"C{index % 10}.-", label=label)
                elif method in entries:
                    entry = entries[method]
                    error = (entry["sd"] or 0) / entry["samples"] ** 0.5
                    axis.bar(index, entry["value"], yerr=error, color=f"C{index % 10}", capsize=3)
            if drawn:
                axis.set_xlabel(_AXES[test[0]])
                axis.legend(fontsize=9)
            else:
                axis.set_xticks(range(len(plain)), list(plain.values()), rotation=30, ha="right")
        return figure

    def __str__(self) -> str:
        """The table as text."""
        widths = {"method": 6, "test": 9}
        width, wide = (max([least, *(len(entry[name]) for entry in self.table)]) for name, least in widths.items())
        lines = [f"{'method':{width}}  {'test':{wide}}  {'part':5}  {'value':>7}  {'s.d.':>7}  samples  left out  note"]
        for entry in self.table:
            value, sd = ("-" if entry[name] is None else f"{entry[name]:.4f}" for name in ("value", "sd"))
            head = f"{entry['method']:{width}}  {entry['test']:{wide}}  {entry['part']:5}"
            counts = f"{entry['samples']:7}  {entry['left_out']:8}"
            lines.append(f"{head}  {value:>7}  {sd:>7}  {counts}  {entry['note'] or ''}".rstrip())
        return "\n".join(lines)


class Tally:
    """The values of each sample by (method, test, part)."""

    def __init__(self, keys: list[tuple[str, str, str]]) -> None:
        self._values: dict[tuple[str, str, str], list[float]] = {key: [] for key in keys}
        self._curves: dict[tuple[str, str, str], list[list[float]]] = {key: [] for key in keys}
        self._left_out = dict.fromkeys(keys, 0)
        self.place: TokenPlace | None = None  # of the token of an answer that is judged
        self.tokens: list[dict[str, Any]] = []
        self.lacks = dict.fromkeys(keys, "")  # what a sample must have; the note of an entry without samples
        self.asks_words = False  # whether an input of the data set has true words
        self.changed: set[tuple[str, str]] = set()  # (measure, part) that differ between inputs with more and less of the part

    def add(self, key: tuple[str, str, str], value: float | None, curve: list[float] | None = None) -> None:
        """Adds a sample's value; None = left out."""
        if value is None:
            self._left_out[key] += 1
            return
        self._values[key].append(value)
        if self.place is not None:
            self.tokens.append(
                {**self.place._asdict(), **dict(zip(("method", "test", "part"), key, strict=True)), "value": value}
            )
        if curve is not None:
            self._curves[key].append(curve)

    def table(self) -> list[dict[str, Any]]:
        entries = []
        for (method, test, part), values in self._values.items():
            if part == "text" and test in BOX_SCORES and not self.asks_words:
                continue
            numbers = torch.tensor(values, dtype=torch.float64)
            mean, sd = float(numbers.mean()) if values else None, float(numbers.std()) if len(values) > 1 else None
            counts: dict[str, Any] = {"samples": len(values), "left_out": self._left_out[method, test, part]}
            counts["note"] = self._note(test, part) if values else self.lacks[method, test, part]
            entries.append({"method": method, "test": test, "part": part, "value": mean, "sd": sd, **counts})
        return entries

    def _note(self, test: str, part: str) -> str | None:
        measure = CURVES[test].measure if test in CURVES else None
        if measure is None or (measure, part) in self.changed:
            return None
        removed = "image and text" if part == BOTH else f"the {part}"
        return f"the {measure} is the same whatever is removed of {removed}: this value cannot compare maps"

    def curves(self, steps: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
        entries = []
        for (method, test, part), curves in self._curves.items():
            if curves:
                numbers = torch.tensor(curves, dtype=torch.float64)
                sd = numbers.std(0).tolist() if len(curves) > 1 else None
                entry = {"method": method, "test": test, "part": part, "steps": list(steps[test])}
                entries.append({**entry, "mean": numbers.mean(0).tolist(), "sd": sd, "samples": len(curves)})
        return entries
