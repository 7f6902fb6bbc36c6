"""Twins: their accuracies, their training and its command."""

from __future__ import annotations

import json

import pytest
import torch

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
    accuracy = {cue: twins.twin_accuracy(ByFrame(), cue, count=200) for cue in CUES}
    frame = accuracy["frame"]
    assert set(frame["told"].values()) == set(frame["told, objects removed"].values()) == {1.0}
    assert all(value < 0.36 for value in frame["not told"].values())  # 3.6 standard deviations above 1/4
    assert all(value < 0.36 for cue in CUES[1:] for value in accuracy[cue]["told"].values())


def test_the_two_trainings_begin_alike_and_see_other_cues(monkeypatch):
    seen = []
    begin = {}
    asked = training.asked_states

    def watched(model, inputs):
        begin[len(begin)] = [x.detach().clone() for x in model.parameters()]
        seen.append(inputs)
        return asked(model, inputs)

    monkeypatch.setattr(training, "asked_states", watched)
    for cue in (None, "frame"):
        training.train(1, seed=3, log_every=0, cue=cue)
    assert all(torch.equal(a, b) for a, b in zip(begin[0], begin[1], strict=True))
    plain, told = seen
    assert len(plain["input_ids"]) == len(told["input_ids"]) == training.GRIDS
    assert plain["input_ids"].shape[1] < told["input_ids"].shape[1], "the first one begins with statements without a step"


def test_statements_get_longer_once_the_shorter_ones_are_answered(monkeypatch):
    """Of a model whose answers are right from the start."""
    lengths = []
    sample = training.sample_grids

    def watched(count, steps, cue, told, generator):
        grids = sample(count, steps, cue, told, generator)
        lengths.append(steps)
        labels.append(grids.label)
        return grids

    def right(model, states):
        label = torch.cat(labels)
        labels.clear()
        return 9.0 * torch.nn.functional.one_hot(label, 4) + 0.0 * states.sum()

    labels = []
    monkeypatch.setattr(training, "sample_grids", watched)
    monkeypatch.setattr(training, "colour_logits", right)
    training.train(60, seed=0, log_every=0)
    assert lengths == [0] * 45 + [0, 1] * 15  # 1 - 0.95^45 is the first above 0.9


def test_a_twin_learns_a_told_colour(tmp_path, monkeypatch):
    monkeypatch.setitem(run.EVALUATED, "twin", 100)
    run.main(["twin", "--steps", "40", "--threads", "1", "--cue", "frame", "--output", str(tmp_path)])
    report = json.loads((tmp_path / "twin.json").read_text())
    assert report["command"].endswith("twin --steps 40 --seed 0 --threads 1 --cue frame")
    frame = report["test"]["twin_accuracy"]["frame"]
    assert min(frame["told"].values()) > 0.9 and max(frame["not told"].values()) < 0.5
    grids = grid_statements(100, cue="frame", told=True)
    assert twins.colour_accuracy(twins.load_twin(tmp_path), grids) == pytest.approx(frame["told"]["1"])
