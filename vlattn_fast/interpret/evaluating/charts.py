"""Charts of an Evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlattn_fast.interpret.result.report import panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AXES = {"sanity": "share of modules randomised", "insertion": "fraction put in"}  # x axes of curves


def draw(table: Sequence[dict[str, Any]], curves: Sequence[dict[str, Any]]) -> Figure:
    """See `Evaluation.plot`."""
    tests = list(dict.fromkeys((record["test"], record["part"]) for record in table if record["value"] is not None))
    figure, axes = panels(len(tests), most=4, width=4)
    methods = list(dict.fromkeys(record["method"] for record in table))
    for axis, test in zip(axes, tests, strict=True):
        axis.set_title(" of the ".join(test), fontsize=10)
        drawn = {record["method"]: record for record in curves if (record["test"], record["part"]) == test}
        known = (record for record in table if (record["test"], record["part"]) == test and record["value"] is not None)
        records = {record["method"]: record for record in known}
        for index, method in enumerate(methods):
            if method in drawn:
                curve, label = drawn[method], _plain(f"{method} ({records[method]['value']:.3f})")
                axis.plot(curve["steps"], curve["mean"], f"C{index % 10}.-", label=label)
            elif method in records:
                record = records[method]
                axis.bar(index, record["value"], yerr=record["sd"] or 0, color=f"C{index % 10}", capsize=3)
        if drawn:
            axis.set_xlabel(_AXES.get(test[0], "fraction removed"), fontsize=8)
            axis.legend(fontsize=7)
        else:
            axis.set_xticks(range(len(methods)), [_plain(name) for name in methods], rotation=30, fontsize=8, ha="right")
    return figure


def _plain(word: str) -> str:
    """A word for matplotlib, where a bare dollar sign would start a formula."""
    return word.replace("$", r"\$")
