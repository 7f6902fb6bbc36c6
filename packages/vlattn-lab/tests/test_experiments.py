"""The frame of the experiments, with an experiment made for the test."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

pytest.importorskip("sklearn")

from vlattn_fast.measuring.records import mean_and_deviation
from vlattn_lab.experiments import run as frame
from vlattn_lab.experiments.experiment import Experiment, Settings, Stage, paired_test

MEASURED = []


def square(cell, settings):
    MEASURED.append(cell)
    if cell["x"] == 99:
        raise KeyboardInterrupt
    return {"square": cell["x"] ** 2}


def with_cells(xs):
    first = Stage(lambda settings, rows: [{"x": x, "seed": s} for x in xs for s in range(settings.seeds)], square)
    second = Stage(lambda settings, rows: [{"x": sum(row["square"] for row in rows)}], square)
    return Experiment((first, second), lambda rows: iter([str(len(rows))]), {})


@pytest.fixture
def made(monkeypatch):
    MEASURED.clear()
    xs = [1, 2]
    monkeypatch.setattr(frame, "experiment", lambda name: with_cells(xs))
    monkeypatch.setattr(frame, "commit", lambda: "abc")
    return xs


def test_stages_follow_one_another(made, tmp_path):
    rows = frame.run("value", Settings(2), tmp_path / "rows.json")
    assert [(row["stage"], row["x"], row["square"]) for row in rows] == [(0, 1, 1), (0, 1, 1), (0, 2, 4), (0, 2, 4), (1, 10, 100)]
    stored = json.loads((tmp_path / "rows.json").read_text())
    assert stored["rows"] == rows and not stored["smoke"]
    assert stored["command"] == "python -m vlattn_lab.experiments value --seeds 2"


def test_a_run_goes_on_where_it_was_interrupted(made, tmp_path, monkeypatch):
    out = tmp_path / "rows.json"
    made.append(99)
    with pytest.raises(KeyboardInterrupt):
        frame.run("value", Settings(1), out)
    assert [row["x"] for row in json.loads(out.read_text())["rows"]] == [1, 2]
    made[2] = 3
    MEASURED.clear()
    rows = frame.run("value", Settings(1), out)
    assert [cell["x"] for cell in MEASURED] == [3, 14] and [row["x"] for row in rows] == [1, 2, 3, 14]
    MEASURED.clear()
    assert frame.run("value", Settings(1), out) == rows and not MEASURED
    for other in ("def", "abc+dirty", "unknown", "unknown"):  # rows of another state of the code say nothing about this one
        MEASURED.clear()
        monkeypatch.setattr(frame, "commit", lambda other=other: other)
        frame.run("value", Settings(1), out)
        assert len(MEASURED) == 4


def test_rows_of_other_models_do_not_stay(made, tmp_path):
    for models, measured in ((tmp_path / "one", 3), (tmp_path / "two", 3), (None, 3), (None, 0)):
        MEASURED.clear()
        frame.run("value", Settings(1, models=models), tmp_path / "rows.json")
        assert len(MEASURED) == measured


def test_a_file_of_another_experiment_is_not_overwritten(made, tmp_path):
    out = tmp_path / "rows.json"
    frame.run("value", Settings(1), out)
    with pytest.raises(ValueError, match="must be a file of scores"):
        frame.run("scores", Settings(1), out)
    with pytest.raises(ValueError, match="smoke=True"):
        frame.run("value", Settings(1, smoke=True), out)


def test_a_smoke_run_leaves_the_pictures_of_the_pages_alone(made, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = replace(with_cells(made), figures={"square": lambda rows: Figure()})
    monkeypatch.setattr(frame, "experiment", lambda name: drawn)
    monkeypatch.chdir(tmp_path)
    frame.main(["value", "--smoke", "--out", "rows/rows.json", "--seeds", "1", "--processes", "1"])
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
    assert {path.name for path in (tmp_path / "rows").iterdir()} == {"rows.json", "square.png"}


@pytest.mark.parametrize("broken", ["{", "[]", '{"experiment": "value"}'])
def test_what_cannot_be_written_ends_the_run_at_its_start(broken, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(frame, "run", None)
    file = tmp_path / "file.json"
    file.write_text(broken)
    for options, words in (
        (["--out", str(file)], f"got {file}, which holds something else"),
        (["--out", str(tmp_path)], f"got {tmp_path}, which holds something else"),
        (["--out", str(file / "rows.json")], f"--out must be a directory that can be written; got {file}"),
        (["--out", str(tmp_path / "new.json"), "--figures", str(file)], f"--figures must be a directory .* got {file}"),
    ):
        with pytest.raises(SystemExit):
            frame.main(["value", *options])
        assert re.search(words, " ".join(capsys.readouterr().err.split()))
    assert file.read_text() == broken and [path.name for path in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize("wrong", (["value", "--seeds", "0"], ["value", "--smoke"], ["vqa"], ["scores", "--models"]))
def test_wrong_options_end_the_run(wrong, capsys, monkeypatch):
    monkeypatch.setattr(frame, "run", None)
    with pytest.raises(SystemExit):
        frame.main([*wrong, "nowhere"] if wrong[-1] == "--models" else wrong)
    assert wrong[-1].strip("-") in capsys.readouterr().err


def test_statistics():
    assert mean_and_deviation([1.0, 2.0, 6.0]) == pytest.approx((3.0, 7.0**0.5))
    assert mean_and_deviation([2.0]) == (2.0, 0.0)
    t, p = paired_test([1.0, 2.0, 3.0])  # t = 2 sqrt(3), two degrees of freedom: p = 1 - t / sqrt(2 + t^2)
    assert (t, p) == pytest.approx((12**0.5, 1 - (12 / 14) ** 0.5))
    assert paired_test([0.0, 0.0]) == (0.0, 1.0) and paired_test([1.0, 1.0]) == (float("inf"), 0.0)
