"""Heat maps of a ProbeReport and its page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlattn_fast.interpret.probing.gathered import COLUMNS
from vlattn_fast.interpret.result.page import data_uri, fill_template
from vlattn_fast.interpret.result.report import panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_VALUES = {"modality": "attention", "cross_modal": "share of inputs", "fusion": "mutual information"}  # else accuracy

Records = Sequence[dict[str, Any]]


def draw(table: Records) -> Figure:
    """See `ProbeReport.plot`."""
    tests: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for record in table:
        if record["layer"] is not None and record["value"] is not None:
            tests.setdefault((record["test"], record["kind"]), []).append(record)
    figure, axes = panels(len(tests), most=3, width=4.4)
    for axis, ((test, kind), records) in zip(axes, tests.items(), strict=True):
        axis.set_title((test if kind is None else f"{test}: {kind}").replace("$", r"\$"), fontsize=10)
        unit = _VALUES.get(test, "accuracy")
        heads = [record for record in records if record["head"] is not None]
        if heads:
            cells = np.full([1 + max(record[name] for record in heads) for name in ("layer", "head")], np.nan)
            for record in heads:
                cells[record["layer"], record["head"]] = record["value"]
            figure.colorbar(axis.imshow(cells, aspect="auto", vmin=0, vmax=1), ax=axis).set_label(unit, fontsize=8)
            axis.set_xlabel("head", fontsize=8)
            axis.set_ylabel("layer", fontsize=8)
            for count, label in ((cells.shape[0], axis.set_yticks), (cells.shape[1], axis.set_xticks)):
                label(range(0, count, 1 + (count - 1) // 12))
            continue
        for name, style in (("value", "C0.-"), ("control", "C1.--"), ("chance", "C7:")):
            points = [(record["layer"], record[name]) for record in records if record[name] is not None]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=name)
        axis.set_ylim(0, 1.02)
        axis.set_ylabel(unit, fontsize=8)
        axis.set_xticks(sorted({record["layer"] for record in records}))
        axis.set_xlabel("layer", fontsize=8)
        axis.legend(fontsize=7)
    return figure


def page(table: Records, facts: Mapping[str, Any]) -> str:
    """See `ProbeReport.save_html`."""
    picture = io.BytesIO()
    draw(table).savefig(picture, format="png", dpi=110)

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    return fill_template(
        Path(__file__).parent / "templates" / "probe.html",
        title=f"Probes of {facts.get('model', 'a model')}",
        source=data_uri("image/png", picture.getvalue()),
        columns=COLUMNS,
        cells=[[cell(record[name]) for name in COLUMNS] for record in table],
        facts=facts,
    )
