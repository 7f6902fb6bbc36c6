"""The run over DigitScenes, and what the page says of its stored rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

import vlattn_fast as va  # noqa: E402
from vlattn_fast.lab import evaluation  # noqa: E402

ROOT = Path(__file__).parent.parent.parent


def test_the_run_writes_rows(tmp_path, capsys):
    out = tmp_path / "rows.json"
    evaluation.main(["--samples", "4", "--seeds", "2", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["command"] == "python -m vlattn_fast.lab.evaluation --samples 4 --seeds 2"
    assert {"commit", "versions", "threads", "cpu_seconds", "facts"} <= set(report)
    assert len(report["accepted"]["without_word"]) == 5
    assert {row["method"] for row in report["rows"]} == set(evaluation.METHODS)
    for row in report["rows"]:
        assert len(row["values"]) == 2 and row["samples"] + row["left_out"] == 8
        if row["method"] == "gradient" and row["test"] != "sanity":
            assert row["minus_gradient"] == 0 and row["value"] == pytest.approx(sum(row["values"]) / 2)
    assert "gradient       positive" in capsys.readouterr().out


def test_weights_by_contribution_are_halves_behind_a_norm():
    """LayerNorm(x + o) does not change with the length of x + o, so that g.x = -g.o: what docs/evaluation.md says."""
    model, _ = va.lab.load_uniter()
    model.double()
    inputs = {
        name: value.double() if value.is_floating_point() else value for name, value in va.lab.digit_scenes(8).inputs().items()
    }
    one, two = (
        va.explain(model, inputs, target=1, method="weighted", weighting=weighting).relevancy["joint"]
        for weighting in ("contribution", "equal")
    )
    layers = model.config.num_hidden_layers
    assert float((one * 2**layers - two).abs().max()) < 1e-4 * float(two.abs().max())
    norm = va.explain(model, inputs, target=1, method="weighted", weighting="norm").relevancy["joint"]
    assert float((norm * 2**layers - two).abs().max()) > 0.01 * float(two.abs().max())


def test_the_page_has_the_stored_rows():
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    report = json.loads((ROOT / "benchmarks" / "results" / "evaluation-digitscenes.json").read_text())
    rows, accepted = report["rows"], report["accepted"]
    for share in (accepted["whole"], *accepted["without_word"]):
        assert f"{share:.1%}".replace("%", " %") in page
    stored = {(row["method"], row["test"], row["part"]): row for row in rows}
    tables = re.findall(r"((?:^\|.+\|\n)+)", page, re.M)
    assert len(tables) == 5
    seen = set()
    for number, table in enumerate(tables):
        heads, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines())
        for method, *cells in lines:
            for test, cell in zip(heads[1:], cells, strict=True):
                part = "image" if number < 2 else "text"
                if number == 4:
                    continue
                row = stored[method.strip("`"), test, part]
                keys = ("value", "sd") if number in (0, 2) else ("minus_gradient", "minus_gradient_sd")
                sign = "+" if number in (1, 3) else ""
                assert cell == f"{row[keys[0]]:{sign}.3f} ± {row[keys[1]]:.3f}"
                seen.add((method.strip("`"), test, part))
            if number == 4:
                image, text = (stored[method.strip("`"), "sanity", part] for part in ("image", "text"))
                expected = [f"{image['value']:+.3f} ± {image['sd']:.3f}", str(image["left_out"])]
                assert cells == [*expected, f"{text['value']:+.3f} ± {text['sd']:.3f}", str(text["left_out"])]
                seen |= {(method.strip("`"), "sanity", part) for part in ("image", "text")}
    assert seen == set(stored)


def test_captions_are_accepted_by_their_odds():
    inputs, target, boxes = next(evaluation.matching(3, 0))
    model, _ = va.lab.load_uniter()
    with torch.no_grad():
        assert torch.equal(target(model(**inputs)), va.lab.matching_score(model, va.lab.digit_scenes(3, seed=0)))
    assert len(boxes) == 3 and all(part.shape == (2, 4) and part.max() <= 1 for part in boxes)
