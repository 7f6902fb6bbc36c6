"""The tables of docs/evaluation.md, from the stored rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vlattn_fast.measuring.records import markdown
from vlattn_lab.checkout import ROOT
from vlattn_lab.evaluation import tables

ROWS = ROOT / "benchmarks" / "results"


def report_of(task: str) -> Mapping[str, Any]:
    report: Mapping[str, Any] = json.loads((ROWS / f"evaluation-{task}.json").read_text(encoding="utf-8"))
    return report


def residual_shares(task: str) -> str:
    """The weight of the residual stream by "contribution", a line for each attention of each tower."""
    rows = report_of(task)["residual_shares"]
    numbers = [[f"{row[key]:.3f}" for key in ("mean", "p5", "p95")] for row in rows]
    places = [[row["tower"], str(row["attention"])] for row in rows]
    lines = [[*place, *three] for place, three in zip(places, numbers, strict=True)]
    return markdown(["tower", "layer", "mean", "5th percentile", "95th percentile"], lines)


def evaluation(task: str, part: str) -> str:
    """The rows of a part, "image", "text" or "both": by method, and less those of "gradient"."""
    return "\n\n".join(tables([row for row in report_of(task)["rows"] if row["part"] == part]))
