"""What docs/experiments/ shows of stored records."""

from __future__ import annotations

import json
from typing import Any

from vlattn_lab.checkout import ROOT
from vlattn_lab.experiments.run import experiment


def report_of(name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"experiment-{name}.json").read_text(encoding="utf-8"))
    return report


def tables(name: str) -> str:
    """All tables of an experiment's stored records."""
    return "\n\n".join(experiment(name).tables(report_of(name)["rows"]))
