"""The experiment of distillation: it runs, its losses are what they say, and the best weight is chosen."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from vlattn_lab.experiments import distillation
from vlattn_lab.experiments import run as frame
from vlattn_lab.experiments.congruence.training import CONFIG, MATCHED, batches, new_model


def test_everything_is_measured_once(tmp_path, capsys):
    out = tmp_path / "rows.json"
    frame.main(["distillation", "--smoke", "--out", str(out), "--figures", str(tmp_path), "--seeds", "2", "--processes", "1"])
    search, *trained = json.loads(out.read_text())["rows"]
    assert [(one["outputs"], one["attention"]) for one in search["tried"]] == [(0.0, 0.0), (0.0, 0.1), (1.0, 0.0), (1.0, 0.1)]
    assert [row["seed"] for row in trained] == [0, 1]
    for row in trained:
        assert list(row["arms"]) == list(distillation.LABELS)
        divergences = [arm["divergence in layer 0"] for arm in row["arms"].values()]
        assert len(set(divergences)) > 1 and all(value > 0 for value in divergences)
    shown = capsys.readouterr().out
    assert all(label in shown for label in distillation.LABELS.values()) and (tmp_path / "distillation.png").is_file()


def test_the_losses_are_those_of_the_maps():
    """The divergence of the means of heads in both layers, and that of the outputs where the labels are."""
    teacher, student = new_model(0), new_model(1, distillation.HALF)
    assert (CONFIG.num_attention_heads, distillation.HALF.num_attention_heads) == (4, 2)
    inputs, label, named = next(batches(48, torch.Generator().manual_seed(0)))

    def extra(outputs, attention):
        return distillation.Distillation(teacher, outputs, attention)(student, inputs, named, 0)[1]

    with torch.no_grad():
        maps = {}
        for name, model in (("teacher", teacher), ("student", student)):
            maps[name] = []
            for layer in model.uniter.encoder.layer:
                module = layer.attention.self
                states = {}
                handle = module.register_forward_pre_hook(lambda _, args, states=states: states.update(x=args[0]))
                model(**inputs)
                handle.remove()
                heads = model.config.num_attention_heads
                query, key = (f(states["x"]).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (module.query, module.key))
                maps[name].append((query @ key.mT * query.shape[-1] ** -0.5).softmax(-1).mean(1))
        each = [(a * (a / b).log()).sum(-1).mean() for a, b in zip(maps["teacher"], maps["student"], strict=True)]
        torch.testing.assert_close(extra(0.0, 3.0), 3.0 * torch.stack(each).mean(), rtol=1e-4, atol=1e-7)
        told, own = (model(**inputs).logits[: len(label)].softmax(-1) for model in (teacher, student))
        matching = (told * (told / own).log()).sum(-1).mean()
        whole = extra(1.0, 0.0)
        assert whole > matching > 0 and len(label) == 2 * MATCHED
        torch.testing.assert_close(extra(1.0, 3.0), whole + extra(0.0, 3.0))
        assert extra(0.0, 0.0) == 0.0


def test_the_weight_with_the_best_mean_is_chosen():
    def record(seed, groups):
        tried = [
            {"outputs": outputs, "attention": attention, "group": group}
            for outputs, arm in groups.items()
            for attention, group in arm.items()
        ]
        return {"what": "search", "seed": seed, "tried": tried}

    first = record(100, {0.0: {0.0: 0.9, 0.1: 0.5, 1.0: 0.6}, 1.0: {0.0: 0.1, 0.1: 0.4, 1.0: 0.4}})
    second = record(101, {0.0: {0.0: 0.9, 0.1: 0.6, 1.0: 0.4}, 1.0: {0.0: 0.1, 0.1: 0.4, 1.0: 0.4}})
    assert distillation.chosen([first, second], 0.0) == 0.1 and distillation.chosen([first], 0.0) == 1.0
    assert distillation.chosen([first, second], 1.0) == 0.1, "of equals the first"
