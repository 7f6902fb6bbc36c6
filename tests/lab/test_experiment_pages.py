"""Pages of experiments have the tables of the stored rows, and their pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

from vlattn_fast.lab.experiments.run import NAMES, experiment  # noqa: E402

ROOT = Path(__file__).parents[2]
STORED = {path.stem.removeprefix("experiment-"): path for path in (ROOT / "benchmarks" / "results").glob("experiment-*.json")}


def test_every_experiment_has_rows_and_a_page():
    pages = {path.stem for path in (ROOT / "docs" / "experiments").glob("*.md")}
    assert set(STORED) == pages <= set(NAMES)


@pytest.mark.parametrize("name", sorted(STORED))
def test_tables_and_pictures_are_those_of_the_rows(name):
    report, page = json.loads(STORED[name].read_text()), (ROOT / "docs" / "experiments" / f"{name}.md").read_text()
    assert not report["smoke"] and report["command"].split(" --models")[0] in page
    assert "+dirty" not in {row["commit"] for row in report["rows"]}
    for table in experiment(name).tables(report["rows"]):
        assert table in page
    for picture in experiment(name).figures:
        assert f"({picture}.png)" in page and (ROOT / "docs" / "experiments" / f"{picture}.png").is_file()
