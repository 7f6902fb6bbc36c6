"""`vlattn demo`, which this package brings, and `python -m vlattn_lab.demo`."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vlattn_fast import cli
from vlattn_fast.benchmarks import _measure
from vlattn_lab import demo
from vlattn_lab.checkout import ROOT


@pytest.mark.filterwarnings("ignore:A part of the map belongs to later tokens")  # of rollout as published
def test_demo_writes_its_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr("vlattn_lab.demo.SCENES", 20)
    result = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path / "demo"), "--no-costs"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "demo" / "answer.png").read_bytes().startswith(b"\x89PNG")
    assert "base64" in (tmp_path / "demo" / "answer.html").read_text()
    assert len(re.findall(r"^gradient +\d", result.output, re.M)) == 2
    words = re.search(r'^"which digits are there"\? "(\w+) (\w+) (\w+) (\w+)"', result.output, re.M).groups()
    for word in words:  # each word's map is strongest on its own digit
        assert re.search(rf"^{word} +[01]\.\d\d +{word} +\d", result.output, re.M)


def test_the_demo_prints_the_costs_that_the_benchmark_measures(monkeypatch, capsys):
    """Of a tiny model."""
    measured = _measure.Measurement

    def tiny(benchmark, device, overrides, **options):
        assert benchmark.name.startswith("task_explain_clip") and overrides == {"layers": demo.LAYERS}
        return measured(benchmark, device, overrides={"layers": 2, "H": 2, "N": 12, "C": 16}, **{**options, "rounds": 1})

    monkeypatch.setattr(_measure, "Measurement", tiny)
    demo.compare()
    printed = capsys.readouterr().out
    for variant in demo.VARIANTS:
        assert re.search(rf"^{re.escape(variant)} +\d+\.\d\d +\d+\.\d\d", printed, re.M), printed
    assert re.search(r"published procedure takes \d+\.\d times as long", printed)


def test_the_picture_is_the_demos(tmp_path):
    """Same size and, up to the drawing library's version, same pixels."""
    demo.picture(tmp_path)
    shown, made = (
        np.asarray(Image.open(path).convert("RGB"), dtype=float)
        for path in (ROOT / "docs" / "answer.png", tmp_path / "answer.png")
    )
    assert shown.shape == made.shape
    assert abs(shown - made).mean() < 2
    assert (ROOT / "docs" / "answer.png").stat().st_size < 200_000
