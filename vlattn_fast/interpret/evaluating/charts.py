"""Charts of an Evaluation; `draw` imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AXES = {"sanity": "share of modules randomised", "insertion": "fraction put in"}  # x axes of curves


def draw(table: Sequence[dict[str, Any]], curves: Sequence[dict[str, Any]]) -> Figure:
    """See `Evaluation.plot`."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["test"], row["part"]) for row in table if row["value"] is not None))
    columns = min(max(len(panels), 1), 4)
    lines = -(-max(len(panels), 1) // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    methods = list(dict.fromkeys(row["method"] for row in table))
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes, panels, strict=False):
        axis.set_title(" of the ".join(panel), fontsize=10)
        drawn = {row["method"]: row for row in curves if (row["test"], row["part"]) == panel}
        rows = {row["method"]: row for row in table if (row["test"], row["part"]) == panel and row["value"] is not None}
        for index, method in enumerate(methods):
            if method in drawn:
                row = drawn[method]
                axis.plot(row["steps"], row["mean"], f"C{index % 10}.-", label=_plain(f"{method} ({rows[method]['value']:.3f})"))
            elif method in rows:
                axis.bar(index, rows[method]["value"], yerr=rows[method]["sd"] or 0, color=f"C{index % 10}", capsize=3)
        if drawn:
            axis.set_xlabel(_AXES.get(panel[0], "fraction removed"), fontsize=8)
            axis.legend(fontsize=7)
        else:
            axis.set_xticks(range(len(methods)), [_plain(name) for name in methods], rotation=30, fontsize=8, ha="right")
    return figure


def _plain(word: str) -> str:
    """A word for matplotlib, where a bare dollar sign would start a formula."""
    return word.replace("$", r"\$")
