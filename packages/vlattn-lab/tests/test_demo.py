"""`vlattn demo`, which this package brings, and `python -m vlattn_lab.demo`."""

from __future__ import annotations

import json
import re

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from vlattn_fast import cli
from vlattn_fast.benchmarks import _measure
from vlattn_lab import demo
from vlattn_lab.checkout import ROOT


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
    assert re.search(r"^paged_attention_statistics +float32 ", result.output, re.M)
    table, _, notes = result.output.partition("The same of questions")[2].partition("\nchance ")
    assert "later tokens" not in table and notes.count("\nNote: A part of the map belongs to later tokens") == 1  # of rollout


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
    assert (
        re.search(r"published procedure takes \d+\.\d times as long", printed)
        and f"24 layers it takes\n{demo.ALL_LAYERS}" in printed
    )


def test_the_costs_of_all_layers_are_stored():
    rows = [
        row for row in json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
        if row["benchmark"] == "task_explain_clip/relevancy/clip-tower" and row["sizes"]["layers"] == 24
    ]  # fmt: skip
    taken = ([row["p50_us"] for row in rows if row["variant"] == variant] for variant in ("published", "cpu"))
    times = [long / short for long, short in zip(*taken, strict=True)]
    assert demo.ALL_LAYERS.startswith(f"{min(times):.1f} to {max(times):.1f} times as long")


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
