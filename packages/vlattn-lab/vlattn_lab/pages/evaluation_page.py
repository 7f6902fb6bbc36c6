"""The tables of docs/evaluation.md, from the stored rows: `python -m vlattn_lab.pages.evaluation_page` writes them.

A section names its file of rows. Tables by "method" and by "less `gradient`" hold the rows of the part that their heading names,
and a table by "tower" the shares of the residual stream. The sentences around the tables are written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from vlattn_fast.interpret.evaluating.curves import BOTH, PARTS
from vlattn_fast.measuring.records import markdown
from vlattn_lab.checkout import ROOT
from vlattn_lab.evaluation import tables

PAGE = ROOT / "docs" / "evaluation.md"
_TABLES = re.compile(r"(?:^\|.+\|\n)+(?:\n(?:^\|.+\|\n)+)*", re.M)  # tables that only empty lines divide


def shares(report: Mapping[str, Any]) -> str:
    """The weight of the residual stream by "contribution", a line for each attention of each tower."""
    numbers = [[f"{row[key]:.3f}" for key in ("mean", "p5", "p95")] for row in report["residual_shares"]]
    places = [[row["tower"], str(row["attention"])] for row in report["residual_shares"]]
    lines = [[*place, *three] for place, three in zip(places, numbers, strict=True)]
    return markdown(["tower", "layer", "mean", "5th percentile", "95th percentile"], lines)


def rewritten(section: str) -> str:
    """A section of the page with its tables made anew."""
    named = re.search(r"`(benchmarks/results/evaluation-\w+\.json)`", section)
    if named is None:
        return section
    report = json.loads((ROOT / named[1]).read_text(encoding="utf-8"))
    head, *parts = re.split(r"^(?=### )", section, flags=re.M)
    pieces = [_TABLES.sub(lambda _: shares(report) + "\n", head, count=1) if "| tower |" in head else head]
    for part in parts:
        name = part.splitlines()[0].rpartition(" ")[2].lower()
        if name in (*PARTS, BOTH):
            rows = [row for row in report["rows"] if row["part"] == name]
            part = _TABLES.sub(lambda _, rows=rows: "\n\n".join(tables(rows)) + "\n", part, count=1)
        pieces.append(part)
    return "".join(pieces)


def page() -> str:
    return "".join(map(rewritten, re.split(r"^(?=## )", PAGE.read_text(encoding="utf-8"), flags=re.M)))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
