"""Pages of experiments have the tables of the stored rows, and their pictures."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("sklearn")

from vlattn_lab.checkout import ROOT
from vlattn_lab.experiments import weighted_relevancy
from vlattn_lab.experiments.run import NAMES, experiment, main

STORED = {path.stem.removeprefix("experiment-"): path for path in (ROOT / "benchmarks" / "results").glob("experiment-*.json")}


def test_every_experiment_has_rows_and_a_page():
    pages = {path.stem for path in (ROOT / "docs" / "experiments").glob("*.md")} - {"real", "convergence"}  # of tools
    assert set(STORED) == pages <= set(NAMES)


@pytest.mark.parametrize("name", sorted(STORED))
def test_tables_and_pictures_are_those_of_the_rows(name):
    report, page = json.loads(STORED[name].read_text()), (ROOT / "docs" / "experiments" / f"{name}.md").read_text()
    assert not report["smoke"] and report["command"].split(" --models")[0] in page
    assert not [row["commit"] for row in report["rows"] if not re.fullmatch("[0-9a-f]{12,}", row["commit"])]
    for table in experiment(name).tables(report["rows"]):
        assert table in page
    for picture in experiment(name).figures:
        assert f"({picture}.png)" in page and (ROOT / "docs" / "experiments" / f"{picture}.png").is_file()


def test_weighted_relevancy_gathers_what_is_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "rows.json"
    main(["weighted_relevancy", "--smoke", "--out", str(out), "--figures", str(tmp_path), "--processes", "1"])
    rows = json.loads(out.read_text())["rows"]
    assert [row["task"] for row in rows] == [
        task for task in weighted_relevancy.TASKS if weighted_relevancy.path_of(task).is_file()
    ]
    assert {one["method"] for row in rows for one in row["compared"]} == set(weighted_relevancy.METHODS)
    assert (tmp_path / "weighted_relevancy.png").is_file() and "UNITER" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must hold a stored evaluation"):
        main(["weighted_relevancy", "--out", str(tmp_path / "none.json")])


def test_a_difference_counts_where_chance_is_unlikely():
    one = {"better_by": 0.1, "p": 0.01}
    assert weighted_relevancy.verdict(one) == "better" and weighted_relevancy.verdict({**one, "p": 0.06}) == "open"
    assert weighted_relevancy.verdict({**one, "better_by": -0.1}) == "worse"
