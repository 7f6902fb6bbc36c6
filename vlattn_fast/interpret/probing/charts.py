"""Heat maps of a ProbeReport and its page; `draw` and `page` import matplotlib and jinja2."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("test", "kind", "layer", "head", "value", "chance", "control", "samples", "left_out", "note")
_VALUES = {"modality": "attention", "cross_modal": "share of inputs", "fusion": "mutual information"}  # else accuracy

Rows = Sequence[dict[str, Any]]


def draw(table: Rows) -> Figure:
    """See `ProbeReport.plot`."""
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for row in table:
        if row["layer"] is not None and row["value"] is not None:
            panels.setdefault((row["test"], row["kind"]), []).append(row)
    columns = min(max(len(panels), 1), 3)
    lines = -(-max(len(panels), 1) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.2 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, ((test, kind), rows) in zip(axes, panels.items(), strict=False):
        axis.set_title((test if kind is None else f"{test}: {kind}").replace("$", r"\$"), fontsize=10)
        what = _VALUES.get(test, "accuracy")
        heads = [row for row in rows if row["head"] is not None]
        if heads:
            cells = np.full([1 + max(row[name] for row in heads) for name in ("layer", "head")], np.nan)
            for row in heads:
                cells[row["layer"], row["head"]] = row["value"]
            figure.colorbar(axis.imshow(cells, aspect="auto", vmin=0, vmax=1), ax=axis).set_label(what, fontsize=8)
            axis.set_xlabel("head", fontsize=8)
            axis.set_ylabel("layer", fontsize=8)
            for count, label in ((cells.shape[0], axis.set_yticks), (cells.shape[1], axis.set_xticks)):
                label(range(0, count, 1 + (count - 1) // 12))
            continue
        for name, style in (("value", "C0.-"), ("control", "C1.--"), ("chance", "C7:")):
            points = [(row["layer"], row[name]) for row in rows if row[name] is not None]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=name)
        axis.set_ylim(0, 1.02)
        axis.set_ylabel(what, fontsize=8)
        axis.set_xticks(sorted({row["layer"] for row in rows}))
        axis.set_xlabel("layer", fontsize=8)
        axis.legend(fontsize=7)
    return figure


def page(table: Rows, facts: Mapping[str, Any]) -> str:
    """See `ProbeReport.save_html`."""
    import jinja2

    picture = io.BytesIO()
    draw(table).savefig(picture, format="png", dpi=110)
    source = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode("ascii")
    folder = Path(__file__).parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    cells = [[_cell(row[name]) for name in COLUMNS] for row in table]
    title = f"Probes of {facts.get('model', 'a model')}"
    return environment.get_template("probe.html").render(title=title, source=source, columns=COLUMNS, cells=cells, facts=facts)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
