"""The experiment on pruned image tokens: what its rules score, and that few patches are few."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from vlattn_lab.experiments import pruning
from vlattn_lab.experiments.run import main
from vlattn_lab.mapper import load_captioner
from vlattn_lab.questions import digit_prompts
from vlattn_lab.texts import SceneProcessor


def test_a_smoke_run_has_every_rule(tmp_path, capsys):
    out = tmp_path / "rows.json"
    main(["pruning", "--smoke", "--seeds", "1", "--out", str(out), "--figures", str(tmp_path), "--processes", "1"])
    rows = json.loads(out.read_text())["rows"]
    assert [row["kind"] for row in rows] == list(pruning.PROMPTS)
    assert all(set(row["accuracy"]) == {"all patches", *pruning.RULES} for row in rows)
    assert "visionzip" in capsys.readouterr().out and (tmp_path / "pruning.png").is_file()


@torch.no_grad()
def test_the_rules_read_the_maps_of_the_mapper():
    """Of the words, without padding, in the mapper's second layer."""
    model, _ = load_captioner()
    asked = digit_prompts(8, seed=0)
    inputs = dict(SceneProcessor(end=False)(asked.images, asked.questions))
    maps = []

    def attend(module, query, key, value, mask, *, scaling, dropout):
        maps.append((query @ key.mT * scaling).softmax(-1))
        return (maps[-1] @ value).transpose(1, 2), None

    model.layers[1].cross_attention.attention_function = attend
    model(**inputs)
    real = inputs["attention_mask"].bool()
    prob = maps[0].mean(1)
    model, _ = load_captioner()
    last = prob[torch.arange(8), real.sum(1) - 1]
    torch.testing.assert_close(pruning.RULES["fastv"](model, inputs, 0), last)
    torch.testing.assert_close(pruning.RULES["h2o"](model, inputs, 0), (prob * real[..., None]).sum(1))
    for rule in pruning.RULES.values():
        assert rule(model, inputs, 0).shape == (8, 65)
