"""The experiment of the loss on relevancy: it runs, and its parts are what they say."""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

import vlattn_fast as va
from vlattn_fast.nn import RelevancyLoss
from vlattn_lab import digit_scans
from vlattn_lab.experiments import run as frame
from vlattn_lab.experiments.robust import report, training
from vlattn_lab.train.fit import seeded


@pytest.fixture(scope="module")
def scenes():
    return training.draw(60, "fit", 0)


def test_everything_is_measured_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(frame, "commit", lambda: "abc")
    out = tmp_path / "rows.json"
    frame.main(["robust", "--smoke", "--out", str(out), "--figures", str(tmp_path), "--seeds", "1", "--processes", "1"])
    sweep, row = json.loads(out.read_text())["rows"]
    assert {one["loss"] for one in sweep["tried"]} == set(report.LABELS) - {"before"}
    for name in ("shaded", "clean"):
        assert [one["loss"] for one in row[name]] == list(report.LABELS)
        assert all(0 <= one[cue] <= 1 for one in row[name] for cue in (training.CUES if name == "shaded" else ["none"]))
    maps = [json.dumps(one["maps"]) for one in row["shaded"]]
    assert len(set(maps)) == len(maps), "each arm trains in its way"
    assert all(0 <= one[measured] <= 1 for one in row["shaded"] for measured in report.POINTING)
    shown = capsys.readouterr().out
    assert all(label in shown for label in report.LABELS.values()) and (tmp_path / "robust.png").is_file()


def test_the_shade_lies_in_the_corner_of_the_answer_or_opposite(scenes):
    assert len(scenes.answer) == 60 and scenes.shaded("none") is scenes
    places = {0: (0, 0), 1: (0, 26), 2: (26, 26), 3: (26, 0)}  # row, column
    for cue, turned in (("as in training", 0), ("inverted", 2)):
        shaded = scenes.shaded(cue)
        for image, plain, answer in zip(shaded.images, scenes.images, scenes.answer.tolist(), strict=True):
            row, column = places[(answer + turned) % 4]
            corner = (slice(row, row + 6), slice(column, column + 6))
            assert torch.equal(image[corner], plain[corner].clamp(min=0.5))
            assert int((image != plain).sum()) == int((plain[corner] < 0.5).sum()), "nothing else differs"


def test_a_mask_covers_the_digit_that_is_the_answer(scenes):
    assert scenes.mask.sum((1, 2)).tolist() == [64] * 60
    scans, digits, _ = digit_scans("fit")
    known = {scan.numpy().tobytes(): int(digit) for scan, digit in zip(scans, digits, strict=True)}
    for image, mask, answer in zip(scenes.images, scenes.mask, scenes.answer.tolist(), strict=True):
        assert known[image[mask].numpy().tobytes()] == answer < training.ANSWERS
    assert training.few(scenes).answer.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def test_a_loss_on_masks_moves_relevancy_into_them(scenes):
    few = training.few(scenes.shaded("as in training"))[::3]

    def outside(model, method):
        with va.nn.capture_relevancy(model, method=training.RELEVANCIES[method]) as captured:
            logits = model(few.images[:, None])
        score = None if method == "rollout" else logits.gather(1, few.answer[:, None]).sum()
        return RelevancyLoss("inside", prefix=1)(captured.relevancy(score, position="cls"), few.mask).item()

    start = seeded(0, training.Classifier)
    models = {}
    for loss, weight in (("none", 0.0), ("crop", 1.0), ("rollout", 8.0), ("gradient", 8.0), ("held", 8.0), ("gradient", 0.0)):
        models[loss, weight] = model = copy.deepcopy(start)
        training.second_training(model, few, loss, weight, 1e-3, 3)
    for name in ("gradient", "held", "rollout"):
        assert outside(models[name, 8.0], name) < outside(start, name) - 0.02
    held, published = (models[name, 8.0].head.weight for name in ("held", "gradient"))
    assert (held - published).abs().max() > 1e-4
    plain, silent, cropped = (models[key].head.weight for key in (("none", 0.0), ("gradient", 0.0), ("crop", 1.0)))
    torch.testing.assert_close(silent, plain, rtol=1e-4, atol=1e-6)
    assert (cropped - plain).abs().max() > 1e-4


def test_pointing_counts_what_lies_in_the_digit_and_in_the_shade(scenes, monkeypatch):
    def planted(model, shown, name="gradient"):
        maps = torch.zeros(len(shown.answer), 8, 8)
        if name == "gradient":  # all in the patch at the digit's centre
            x, y = ((shown.box[:, :2] + 4) // 4).long().unbind(1)
            maps[torch.arange(len(maps)), y, x] = 3.0
        return maps

    monkeypatch.setattr(training, "relevancy_maps", planted)
    measured = training.pointing(None, scenes)
    assert measured["hits"] == 1.0 and measured["rollout in the digit"] == measured["held fixed in the digit"] == 0.0
    assert measured["in the digit"] == 1.0 and measured["in the shade"] < 0.05  # few digits lie under the shade


def test_the_best_without_a_shade_is_chosen():
    def one(loss, weight, rate, none, inverted):
        return {"loss": loss, "weight": weight, "rate": rate, "none": none, "inverted": inverted, "as in training": 1.0}

    rest = [one(loss, 1.0, 0.1, 0.5, 0.5) for loss in ("none", "crop", "rollout", "held")]
    first = [one("gradient", 1.0, 0.1, 0.8, 0.9), one("gradient", 2.0, 0.1, 0.7, 0.0), one("gradient", 3.0, 0.1, 0.7, 0.0)]
    second = [one("gradient", 1.0, 0.1, 0.2, 0.9), one("gradient", 2.0, 0.1, 0.5, 0.0), one("gradient", 3.0, 0.1, 0.5, 0.0)]
    rows = [{"what": "sweep", "seed": seed, "tried": rest + tried} for seed, tried in enumerate((first, second))]
    assert report.chosen(rows) == [
        *((loss, 1.0, 0.1) for loss in ("none", "crop", "rollout")),
        ("gradient", 2.0, 0.1),
        ("held", 1.0, 0.1),
    ]
