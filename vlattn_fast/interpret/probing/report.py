"""The results of `probe`: a table, heat maps, a page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vlattn_fast._ground.checks import check_writable
from vlattn_fast._ground.extras import extra
from vlattn_fast.interpret.probing.gathered import COLUMNS
from vlattn_fast.interpret.result.figures.page import data_uri, fill_template
from vlattn_fast.interpret.result.figures.report import Report, panels

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_VALUES = {"modality": "attention", "cross_modal": "share of inputs", "fusion": "mutual information"}  # else accuracy


@dataclass(frozen=True, eq=False)
class ProbeReport(Report):
    """The results of `probe`: `print` shows the table, `plot` draws it, `save_html` writes a page, `value` gives one
    number.

    Args:
        table: an entry for each test, kind, layer and head. "test"; "kind": the group of tokens for "modality", the task for
            "linguistic", else None; "layer" and "head", None = all; "value", None if "note" gives a reason; "chance": the share
            of the largest class; "control": the same test on shuffled labels; "samples": two for each phrase, and for each text
            with its words exchanged; "left_out": the number of unusable samples.
        metadata: the arguments of the run.
    """

    FORMAT: ClassVar[str] = "vlattn_fast.probe.1"
    table: list[dict[str, Any]]
    metadata: dict[str, Any] = field(default_factory=dict)

    def value(self, test: str, layer: int | None = None, head: int | None = None, kind: str | None = None) -> float | None:
        """Returns the value in one entry of the table. ValueError if there is no such entry."""
        key = (test, kind, layer, head)
        for entry in self.table:
            if tuple(entry[name] for name in COLUMNS[:4]) == key:
                return entry["value"]
        raise ValueError(f"test, kind, layer and head must name an entry of the table; got {key}")

    def to_pandas(self) -> pd.DataFrame:
        """Returns the table as a data frame with a column per key."""
        with extra("tables"):
            import pandas as pd

            return pd.DataFrame(self.table, columns=list(COLUMNS))

    def plot(self) -> Figure:
        """Draws a heat map over layers and heads, or a line over layers, for each test and kind.

        Returns:
            A matplotlib Figure (without pyplot: nothing is shown or kept open).
        """
        tests: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
        for entry in self.table:
            if entry["layer"] is not None and entry["value"] is not None:
                tests.setdefault((entry["test"], entry["kind"]), []).append(entry)
        with extra("viz"):
            figure, axes = panels(len(tests))
        for axis, ((test, kind), entries) in zip(axes, tests.items(), strict=True):
            axis.set_title((test if kind is None else f"{test}: {kind}").replace("$", r"\$"))
            unit = _VALUES.get(test, "accuracy")
            heads = [entry for entry in entries if entry["head"] is not None]
            if heads:
                cells = np.full([1 + max(entry[name] for entry in heads) for name in ("layer", "head")], np.nan)
                for entry in heads:
                    cells[entry["layer"], entry["head"]] = entry["value"]
                figure.colorbar(axis.imshow(cells, aspect="auto", vmin=0, vmax=1), ax=axis).set_label(unit)
                axis.set_xlabel("head")
                axis.set_ylabel("layer")
                for count, label in ((cells.shape[0], axis.set_yticks), (cells.shape[1], axis.set_xticks)):
                    label(range(0, count, 1 + (count - 1) // 12))
                continue
            for name, style in (("value", "C0.-"), ("control", "C1.--"), ("chance", "C7:")):
                points = [(entry["layer"], entry[name]) for entry in entries if entry[name] is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), style, label=name)
            axis.set_ylim(0, 1.02)
            axis.set_ylabel(unit)
            axis.set_xticks(sorted({entry["layer"] for entry in entries}))
            axis.set_xlabel("layer")
            axis.legend(fontsize=9)
        return figure

    def save_html(self, path: str | Path) -> Path:
        """Writes the heat maps and the table to `path` as one page that needs no network."""
        check_writable("path", Path(path))
        with extra("viz"):

            def cell(value: Any) -> str:
                return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

            page = fill_template(
                Path(__file__).parent / "templates" / "probe.html",
                title=f"Probes of {self.metadata.get('model', 'a model')}",
                source=data_uri(self.plot().savefig, "png", dpi=110),
                columns=COLUMNS,
                cells=[[cell(entry[name]) for name in COLUMNS] for entry in self.table],
                metadata=self.metadata,
            )
        Path(path).write_text(page, encoding="utf-8")
        return Path(path)

    def _rows(self) -> list[dict[str, Any]]:
        """The entries without single heads; for a test and kind that have only these, an entry for each layer."""
        whole = {(entry["test"], entry["kind"]) for entry in self.table if entry["head"] is None}
        rows = dict[tuple[Any, ...], list[dict[str, Any]]]()
        for entry in self.table:
            if entry["head"] is None or (entry["test"], entry["kind"]) not in whole:
                rows.setdefault((entry["test"], entry["kind"], entry["layer"]), []).append(entry)
        return [entries[0] if entries[0]["head"] is None else _of_layer(entries) for entries in rows.values()]

    def __str__(self) -> str:
        """The table as text. If a test has no entry for a layer, it shows the mean of the layer's heads, and the largest one."""
        lines = [f"{'test':20}{'kind':14}{'layer':>5}  {'value':>7}  {'chance':>7}  {'control':>7}  samples  left_out  note"]
        for entry in self._rows():
            if entry["head"] is None:
                numbers = "  ".join(f"{'-' if entry[n] is None else format(entry[n], '.4f'):>7}" for n in COLUMNS[4:7])
                layer = "all" if entry["layer"] is None else entry["layer"]
                head = f"{entry['test']:20}{entry['kind'] or '':14}{layer:>5}"
                lines.append(f"{head}  {numbers}  {entry['samples']:7}  {entry['left_out']:8}  {entry['note'] or ''}".rstrip())
        return "\n".join(lines)


def _of_layer(heads: list[dict[str, Any]]) -> dict[str, Any]:
    """One entry for the heads of a layer."""
    defined = [entry for entry in heads if entry["value"] is not None]
    if not defined:
        return {**heads[0], "head": None}
    most = max(defined, key=lambda entry: entry["value"])
    note = f"mean of {len(defined)} heads, {most['value']:.4f} in head {most['head']}"
    return {**heads[0], "head": None, "value": sum(entry["value"] for entry in defined) / len(defined), "note": note}
