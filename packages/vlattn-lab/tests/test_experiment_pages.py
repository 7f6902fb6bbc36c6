"""Pages of experiments have the tables of the stored rows, and their pictures."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("sklearn")

from vlattn_fast.measuring.records import having
from vlattn_lab.checkout import ROOT
from vlattn_lab.experiments import weighted_relevancy
from vlattn_lab.experiments.run import NAMES, experiment, main
from vlattn_lab.tasks import TASKS

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


def test_the_figure_of_six_tasks_is_as_wide_as_a_page():
    rows = json.loads(STORED["scores"].read_text())["rows"]
    figure = experiment("scores").figures["scores"](rows)
    assert figure.get_size_inches()[0] < 10 and sum(axes.axison for axes in figure.axes) == 2 * 6


def test_weighted_relevancy_runs(tmp_path, capsys):
    out = tmp_path / "rows.json"
    main(["weighted_relevancy", "--smoke", "--seeds", "1", "--out", str(out), "--processes", "1"])
    shares, shipped, trained = (having(json.loads(out.read_text())["rows"], stage=stage) for stage in range(3))
    assert [(row["task"], row["form"]) for row in shares] == [(task, form) for task in TASKS for form in weighted_relevancy.FORMS]
    assert [(row["task"], row["seed"]) for row in shipped] == [(task, 0) for task in TASKS]
    rules = len(weighted_relevancy.RULES)
    assert all(len(row["values"]) == 2 * (1 + rules) for row in shipped) and rules == 7
    assert [row["layers"] for row in trained] == [*weighted_relevancy.LAYERS]
    assert len({row["weights"] for row in trained}) == len(trained)
    assert (tmp_path / "weighted_relevancy.png").is_file() and "| published | plain rule |" in capsys.readouterr().out
