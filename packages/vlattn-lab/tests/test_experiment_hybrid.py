"""The experiment of the hybrid captioner: it runs, and its parts are what they say."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

import vlattn_lab as lab
from vlattn_lab import hybrid as models
from vlattn_lab.experiments import hybrid
from vlattn_lab.experiments import run as frame
from vlattn_lab.experiments.hybrid import report
from vlattn_lab.processor import DIGIT_WORDS
from vlattn_lab.questions import digit_prompts
from vlattn_lab.scenes import CANVAS
from vlattn_lab.texts import START, TEXT_VOCABULARY
from vlattn_lab.train.hybrid import Words


@pytest.fixture(scope="module", params=list(models.WEIGHTS))
def untrained(request):
    torch.manual_seed(0)
    return models.build(models.config(request.param)).eval()


def test_everything_is_measured_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(frame, "commit", lambda: "abc")
    out = tmp_path / "rows.json"
    frame.main(["hybrid", "--smoke", "--out", str(out), "--figures", str(tmp_path), "--seeds", "1", "--processes", "1"])
    rows = json.loads(out.read_text())["rows"]
    assert [row["kind"] for row in rows] == list(report.KINDS) and len({row["weights"] for row in rows}) == 2
    for row in rows:
        assert [(one["method"], one["test"]) for one in row["table"]] == [(m, t) for m in report.METHODS for t in report.TESTS]
        assert {len(curve["mean"]) for curve in row["curves"]} == {3}
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*report.KINDS, *report.METHODS, *report.TESTS))
    assert (tmp_path / "hybrid.png").is_file()


def test_both_captioners_have_as_many_parameters():
    hybrid_model, transformer = (models.build(models.config(kind)) for kind in report.KINDS)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (hybrid_model, transformer)]
    assert abs(counts[0] - counts[1]) <= 12 < counts[0] / 10_000
    kinds = [{type(module).__name__ for module in model.modules()} for model in (hybrid_model, transformer)]
    assert kinds[0] - kinds[1] >= {"Qwen3_5GatedDeltaNet"} and not kinds[1] - kinds[0]


def test_gates_begin_with_a_long_memory():
    """Of three layers with two heads each; transformers' own first value is 1."""
    gates = {name: bias for name, bias in models.build(models.config("hybrid")).named_parameters() if name.endswith("dt_bias")}
    steps = torch.nn.functional.softplus(torch.stack([*gates.values()])).detach()
    assert steps.shape == (3, 2) and len(steps.unique()) == 6 and 0.001 <= float(steps.min()) <= float(steps.max()) <= 0.1


def test_training_and_model_compute_the_same_words(untrained):
    """Texts of two lengths: padding stands behind the words, so it changes none of them."""
    processor = lab.SceneProcessor()
    scenes = lab.digit_scenes(2, seed=3)
    words = processor(scenes.images, ["three left of a six", "one"])
    states = untrained.model.multi_modal_projector(
        untrained.model.vision_tower(pixel_values=words["pixel_values"]).last_hidden_state[:, 1:]
    )
    output = Words(untrained)(words["input_ids"], words["attention_mask"], states)
    for sample, length in enumerate(words["attention_mask"].sum(1).tolist()):
        whole = untrained(**models.inputs(scenes.images[[sample]], words["input_ids"][[sample], :length])).logits
        torch.testing.assert_close(output.logits[[sample], :length], whole[:, models.PATCHES :], rtol=1e-4, atol=1e-5)


def test_captions_are_the_likeliest_words(untrained):
    images = lab.digit_scenes(2, seed=3).images
    said = models.captions(untrained, images)
    assert said.shape == (2, 1 + models.WORDS) and said[:, 0].tolist() == [START, START]
    logits = untrained(**models.inputs(images, said[:, :-1])).logits[:, models.PATCHES :]
    assert torch.equal(logits.argmax(-1), said[:, 1:])


def test_words_are_explained_with_the_boxes_of_their_digits():
    scenes = digit_prompts(3, seed=1, kind="caption")
    ids = [[TEXT_VOCABULARY.index(word) for word in ("[START]", *caption.split())] for caption in scenes.answers]
    ids[1][5] = TEXT_VOCABULARY.index("of")  # no digit: this caption is left out
    absent = next(digit for digit in range(10) if digit not in scenes.digits[2])
    ids[2][1] = TEXT_VOCABULARY.index(DIGIT_WORDS[absent])
    first, second = hybrid.items(scenes, torch.tensor(ids))
    assert (first[1], second[1]) == ([ids[0][1], ids[2][1]], [ids[0][5], ids[2][5]])
    assert [len(boxes) for boxes in (*first[2], *second[2])] == [1, 0, 1, 1]
    region = scenes.digits[0].tolist().index(DIGIT_WORDS.index(scenes.answers[0].split()[-1]))
    assert torch.equal(second[2][0][0] * CANVAS, scenes.boxes[0, region])
    assert (
        second[0]["input_ids"].shape == (2, models.PATCHES + 5)
        and (first[0]["input_ids"][:, : models.PATCHES] == models.IMAGE).all()
    )
