"""`Evaluation`: the results of `evaluate` as records, curves and pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from vlattn_fast._ground.extras import extra
from vlattn_fast.interpret.result.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Evaluation(Report):
    """The results of `evaluate`.

    Args:
        table: a record for each method, test and part: "method", "test", "part" ("image" or "text"), "value" (the mean over
            samples; None without any), "sd" (their standard deviation; None below two), "samples", and "left_out": samples
            without that part, without boxes, or with too little of them.
        curves: a record for each method, test and part with a curve: "method", "test", "part", "steps", "mean" and "sd" (a number
            a step), "samples". The steps of "sanity" are shares of randomised modules, and its samples have a map at each step.
        facts: the arguments of the run.
    """

    FORMAT: ClassVar[str] = "vlattn_fast.evaluation.1"
    table: list[dict[str, Any]]
    curves: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def value(self, method: str, test: str, part: str = "image") -> float | None:
        """The mean of one record of the table. ValueError where there is no such record."""
        for row in self.table:
            if (row["method"], row["test"], row["part"]) == (method, test, part):
                return row["value"]
        raise ValueError(f"method, test and part must be those of a row of the table; got {method!r}, {test!r}, {part!r}")

    def plot(self) -> Figure:
        """Draw a curve for each test with steps, and bars with standard deviations for the others.

        Returns:
            A matplotlib Figure (without pyplot: nothing is shown or kept open).
        """
        with extra("viz"):
            from vlattn_fast.interpret.evaluating.charts import draw

            return draw(self.table, self.curves)

    def __str__(self) -> str:
        """The table as text."""
        width = max([len(row["method"]) for row in self.table], default=0)
        lines = [f"{'method':{max(width, 6)}}  {'test':9}  {'part':5}  {'value':>7}  {'s.d.':>7}  samples  left out"]
        for row in self.table:
            value, sd = ("-" if row[name] is None else f"{row[name]:.4f}" for name in ("value", "sd"))
            head = f"{row['method']:{max(width, 6)}}  {row['test']:9}  {row['part']:5}"
            lines.append(f"{head}  {value:>7}  {sd:>7}  {row['samples']:7}  {row['left_out']:8}")
        return "\n".join(lines)
