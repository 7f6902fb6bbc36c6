"""The experiment of attention without content: it runs, and the planted sink takes what it says."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

import vlattn_lab as lab
from vlattn_fast import find_sinks
from vlattn_lab.experiments import run as frame
from vlattn_lab.experiments.experiment import Settings
from vlattn_lab.experiments.sinks import SHARES, measures, samples
from vlattn_lab.experiments.sinks.planted import TOKEN, VALUE, Planted, plant


def test_everything_is_measured_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(frame, "commit", lambda: "abc")
    out = tmp_path / "rows.json"
    frame.main(["sinks", "--smoke", "--out", str(out), "--figures", str(tmp_path), "--seeds", "1", "--processes", "1"])
    *rows, cost = json.loads(out.read_text())["rows"]
    assert [(row["task"], row["share"]) for row in rows] == [("clip", share) for share in SHARES[:2]]
    for row in rows:
        pairs = [(one["method"], one["sinks"]) for one in row["maps"] if one["method"] != "photo"]
        assert pairs == [(method, sinks) for method in measures.METHODS for sinks in measures.SINKS]
        assert len(row["thresholds"]) == len(measures.TIMES) * len(measures.NORMS)
    assert {one["token"] for one in rows[1]["sinks"]} == {"planted patch"} and not rows[0]["sinks"]
    assert set(cost["times"]) == {f"{method} {sinks}" for method in measures.METHODS for sinks in measures.SINKS}
    assert "same answer as without a planted sink" in capsys.readouterr().out
    assert (tmp_path / "sinks.png").is_file()


def test_the_planted_token_takes_its_share_and_the_others_give_what_they_gave():
    torch.manual_seed(0)
    attention = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in ("q", "k", "v", "o")})
    planted = Planted(attention, ("q", "k", "v", "o"), 2, 0.6, pair=False).double()
    states, words = (torch.randn(2, size, 8, dtype=torch.float64) for size in (6, 3))
    query, key, value = (
        attention[n](x).unflatten(-1, (2, 4)).transpose(1, 2) for n, x in (("q", words), ("k", states), ("v", states))
    )
    rest = [column for column in range(6) if column != TOKEN]
    maps = (query @ key[:, :, rest].mT / 2).softmax(-1)
    out = maps @ value[:, :, rest] + 0.6 / 0.4 * VALUE * value[:, :, [TOKEN]]
    torch.testing.assert_close(planted(words, states), attention["o"](out.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("task", ["clip", "vqa"])
def test_the_planted_patch_is_found_in_every_attention(task):
    if task == "clip":
        model, asked = samples.draw("clip", 0, 4, Settings(1))
    else:
        model, processor = lab.load_vqa()
        scenes = lab.digit_questions(4, seed=0, kind="what")
        asked = samples.Samples(processor(scenes.images, scenes.questions), [0] * 4, torch.zeros(4, 65, dtype=torch.bool))
    plant(model, 0.3)
    for sample in find_sinks(model, asked.inputs):
        by_reader = {sink.reader: sink for sink in sample if (sink.tower, sink.index) == ("vision", TOKEN)}
        layers = {"vision": 3} if task == "clip" else {"vision": 3, "text": 3}
        assert {reader: len(sink.layers) for reader, sink in by_reader.items()} == layers
        for sink in by_reader.values():
            assert all(sink.shares[layer] == pytest.approx(0.3, abs=1e-5) and sink.norms[layer] < 0.2 for layer in sink.layers)
