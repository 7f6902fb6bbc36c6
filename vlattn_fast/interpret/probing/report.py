"""The results of `probe`: a table, heat maps, a page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vlattn_fast._ground.extras import extra
from vlattn_fast.interpret.probing.charts import draw, page
from vlattn_fast.interpret.probing.gathered import COLUMNS
from vlattn_fast.interpret.result.report import Report

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class ProbeReport(Report):
    """The results of `probe`.

    Args:
        table: a record for each test, kind, layer and head. "test"; "kind": whose mass for "modality", the task for "linguistic",
            else None; "layer" and "head", None = all; "value", None where "note" says why; "chance": the share of the largest
            class; "control": the same test on shuffled labels; "samples": two for each phrase, and for each text with its words
            exchanged; "left_out": the number of unusable samples.
        facts: the arguments of the run.
    """

    FORMAT: ClassVar[str] = "vlattn_fast.probe.1"
    table: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)

    def value(self, test: str, layer: int | None = None, head: int | None = None, kind: str | None = None) -> float | None:
        """The value of one record of the table. ValueError where there is no such record."""
        key = (test, kind, layer, head)
        for row in self.table:
            if tuple(row[name] for name in COLUMNS[:4]) == key:
                return row["value"]
        raise ValueError(f"test, kind, layer and head must be those of a row of the table; got {key}")

    def to_pandas(self) -> pd.DataFrame:
        """The table as a data frame with a column per key."""
        with extra("tables"):
            import pandas as pd

            return pd.DataFrame(self.table, columns=list(COLUMNS))

    def plot(self) -> Figure:
        """Draw a heat map over layers and heads, or a line over layers, for each test and kind.

        Returns:
            A matplotlib Figure (without pyplot: nothing is shown or kept open).
        """
        with extra("viz"):
            return draw(self.table)

    def save_html(self, path: str | Path) -> Path:
        """Write the heat maps and the table to `path` as one page without network."""
        with extra("viz"):
            text = page(self.table, self.facts)
        Path(path).write_text(text, encoding="utf-8")
        return Path(path)

    def __str__(self) -> str:
        """The table as text, without single heads."""
        lines = [f"{'test':12}{'kind':14}{'layer':>5}  {'value':>7}  {'chance':>7}  {'control':>7}  samples  left_out  note"]
        for row in self.table:
            if row["head"] is None:
                numbers = "  ".join(f"{'-' if row[n] is None else format(row[n], '.4f'):>7}" for n in COLUMNS[4:7])
                layer = "all" if row["layer"] is None else row["layer"]
                head = f"{row['test']:12}{row['kind'] or '':14}{layer:>5}"
                lines.append(f"{head}  {numbers}  {row['samples']:7}  {row['left_out']:8}  {row['note'] or ''}".rstrip())
        return "\n".join(lines)
