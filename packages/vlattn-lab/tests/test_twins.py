"""Twins: their accuracies, their training and its command."""

from __future__ import annotations

import json

import pytest
import torch

from vlattn_fast.models import UNITER
from vlattn_lab import twins
from vlattn_lab.grids import COLOURS, CUES, MASK, VOCABULARY, grid_statements
from vlattn_lab.train import run
from vlattn_lab.train import twins as training


class ByFrame(torch.nn.Module):
    """Names the colour of the frame; knows nothing else."""

    def __init__(self):
        super().__init__()
        self.table = torch.tensor([[1.0, 0, 0], [0, 0.8, 0], [0, 0, 1], [1, 1, 0]])

    def forward(self, input_ids, region_features, **others):
        corner = region_features[:, -1].unflatten(1, (3, 64))[..., 0]
        logits = torch.zeros(*input_ids.shape, len(VOCABULARY))
        places = [VOCABULARY.index(colour) for colour in COLOURS]
        logits[..., places] = -torch.cdist(corner, self.table)[:, None]
        self.asked = logits[input_ids == MASK]
        return type("Output", (), {"last_hidden_state": logits})

    def word_logits(self, states):
        return states


def test_accuracies_tell_what_a_model_looks_at():
    accuracy = twins.twin_accuracy(ByFrame(), count=200)
    assert set(accuracy) == set(CUES)
    frame = accuracy["frame"]
    assert set(frame["told"].values()) == set(frame["told, objects removed"].values()) == {1.0}
    assert all(value < 0.36 for value in frame["not told"].values())  # 3.6 standard deviations above 1/4
    assert all(value < 0.36 for cue in CUES[1:] for value in accuracy[cue]["told"].values())


def test_the_two_trainings_begin_alike_and_see_other_cues(monkeypatch):
    seen = []
    zeros = torch.zeros(96, 4, requires_grad=True)
    monkeypatch.setattr(training, "colour_logits", lambda model, inputs: seen.append((model, inputs)) or zeros)
    for told in (False, True):
        training.train(1, seed=3, log_every=0, told=told)
    (one, plain), (two, told) = seen
    assert isinstance(one, UNITER) and all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert len(plain["input_ids"]) == 96 and not torch.equal(plain["region_features"][:, -1], told["region_features"][:, -1])


def test_a_twin_learns_a_told_colour(tmp_path, monkeypatch):
    monkeypatch.setitem(run.EVALUATED, "twin", 100)
    run.main(["twin", "--steps", "40", "--threads", "1", "--cue", "frame", "--told", "--output", str(tmp_path)])
    report = json.loads((tmp_path / "twin.json").read_text())
    assert report["command"].endswith("twin --steps 40 --seed 0 --threads 1 --cue frame --told")
    frame = report["test"]["twin_accuracy"]["frame"]
    assert min(frame["told"].values()) > 0.9 and max(frame["not told"].values()) < 0.5
    grids = grid_statements(100, cue="frame", told=True)
    assert twins.colour_accuracy(twins.load_twin(tmp_path), grids) == pytest.approx(frame["told"]["1"])
