"""Whether explanations of the CLIPMapper of DigitScenes point at the digit that a question or a word is about."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

import vlattn_lab as lab
from vlattn_lab import pointing
from vlattn_lab.checkout import ROOT
from vlattn_lab.pointing import CHANCE, METHODS, box_shares, question_pointing, word_pointing
from vlattn_lab.processor import DIGIT_WORDS


def test_a_patch_counts_by_its_part_in_the_box():
    image = torch.zeros(2, 3, 8, 8)  # patches of four pixels
    image[0, 0, 0, 1] = 16.0
    image[1, 2, 7, 7], image[1, 2, 0, 0] = 1.0, 5.0
    boxes = torch.tensor([[[2, 1, 10, 9], [6, 3, 14, 11]], [[24, 24, 32, 32], [20, 22, 28, 30]]]).float()
    shares = box_shares(image, boxes)
    assert shares.shape == (2, 3, 2)
    assert shares[0, 0].tolist() == [12.0, 2.0]  # columns 4 to 7, rows 1 to 3; columns 6 and 7, row 3
    assert shares[1, 2].tolist() == [1.0, 0.0] and shares.sum() == 15.0
    whole = box_shares(torch.rand(1, 8, 8).double(), torch.tensor([[[0.0, 0.0, 32.0, 32.0]]]))
    assert whole.dtype == torch.float64 and 0 < whole < 64


# Of 100 questions each; measured are the figures of `make demo` in docs/evaluation.md.
FLOORS = {"gradient": {"answer": 0.85, "there": 0.85, "is": 0.65, "word": 0.9}}


@pytest.mark.parametrize("method", FLOORS)
def test_maps_point_at_the_digit(method):
    shares = {**question_pointing(method, count=100), **word_pointing(method, count=60)}
    assert shares.pop("words") > 60
    assert set(shares) == set(CHANCE) and method in METHODS
    for name, floor in FLOORS[method].items():
        assert shares[name] >= floor > CHANCE[name], f"{name}: {shares[name]}"


@pytest.mark.parametrize("right", [True, False])
def test_what_a_map_has_to_point_at(right, monkeypatch):
    """Maps that are the box of the digit in question, or of one that a question names, too, or of another."""
    count = 12
    parts = iter(lab.digit_questions(n, seed=2, kind=kind) for kind, n in (("what", count), ("there", 2 * count), ("is", count)))

    def pointed(model, inputs, method):
        part = next(parts)
        assert torch.equal(inputs["pixel_values"][:, 0], part.images)
        aims = part.named if right else ~part.named
        if part.kinds[0] == "what":
            answers = torch.tensor([DIGIT_WORDS.index(answer) for answer in part.answers])
            aims = part.named & ((part.digits == answers[:, None]) == right)
        image = torch.zeros(len(part), 32, 32)
        for row, region in enumerate(aims.int().argmax(1).tolist()):
            x1, y1, x2, y2 = part.boxes[row, region].int().tolist()
            image[row, y1:y2, x1:x2] = 1.0
        return SimpleNamespace(image=image)

    monkeypatch.setattr(pointing, "explain", pointed)
    assert question_pointing(count=count, seed=2) == dict.fromkeys(("answer", "there", "is"), float(right))


def test_readme_and_the_evaluation_have_one_measurement():
    readme, evaluation = (
        " ".join((ROOT / name).read_text(encoding="utf-8").split()) for name in ("README.md", "docs/evaluation.md")
    )
    words, right = re.search(r"name a digit of a scene (\d+) times, and (\d+) of these maps point at", readme).groups()
    assert f"{words} words for a digit" in evaluation and f"| {int(right) / int(words):.3f} |" in evaluation
