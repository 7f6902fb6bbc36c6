"""The Winoground scores, against the batched ones of DigitScenes' own model and on tables made by hand."""

from __future__ import annotations

import json
import random

import pytest
import torch
from PIL import Image

import vlattn_lab as lab
from vlattn_lab import winoground


def test_equals_the_batched_scores() -> None:
    model, _ = lab.load_uniter()
    one, two = lab.swapped_pairs(40, seed=3)
    sides = (one, two)
    table = {(a, b): lab.matching_score(model, sides[a], input_ids=sides[b].input_ids).tolist() for a in (0, 1) for b in (0, 1)}
    pairs = [(((0, i), (1, i)), ((0, i), (1, i))) for i in range(40)]
    got = winoground.evaluate(lambda image, caption: table[image[0], caption[0]][image[1]], pairs)
    assert got == lab.winoground_scores(model, count=40, seed=3)


def test_chance_and_ties() -> None:
    draw = random.Random(0)
    pairs = [((0, 1), (0, 1))] * 20000
    got = winoground.evaluate(lambda image, caption: draw.random(), pairs)
    for name, chance in (("text", 1 / 4), ("image", 1 / 4), ("group", 1 / 6)):
        assert got[name] == pytest.approx(chance, abs=0.02)
    assert winoground.evaluate(lambda image, caption: 1.0, pairs[:3]) == {"text": 0.0, "image": 0.0, "group": 0.0}
    assert winoground.evaluate(lambda image, caption: image == caption, pairs[:3]) == {"text": 1.0, "image": 1.0, "group": 1.0}


def test_a_local_copy(tmp_path) -> None:
    (tmp_path / "images").mkdir()
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / "images" / f"ex_0_img_{i}.png")
    line = {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "red", "caption_1": "blue"}
    line["collapsed_tag"] = "\u2028 ends no line"
    (tmp_path / "examples.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    channel = {"red": 0, "blue": 2}
    score = lambda image, caption: image.getpixel((0, 0))[channel[caption]]  # noqa: E731
    assert winoground.evaluate(score, winoground.load_pairs(tmp_path)) == {"text": 1.0, "image": 1.0, "group": 1.0}


def test_refusals(tmp_path) -> None:
    with pytest.raises(ValueError, match="pairs must hold at least one pair; got none"):
        winoground.evaluate(lambda image, caption: 1.0, [])
    with pytest.raises(ValueError, match="pairs must be of two images and two captions; got 1 and 2"):
        winoground.evaluate(lambda image, caption: 1.0, [((0,), (0, 1))])
    with pytest.raises(ValueError, match="directory must hold examples.jsonl"):
        list(winoground.load_pairs(tmp_path))
    for line in ("{", "[]", '{"image_0": "a"}'):
        (tmp_path / "examples.jsonl").write_text("\n" + line)
        with pytest.raises(ValueError, match="must have image_0, image_1, caption_0 and caption_1 in line 2; got"):
            list(winoground.load_pairs(tmp_path))
    (tmp_path / "examples.jsonl").write_text('{"image_0": "a", "image_1": "b", "caption_0": "", "caption_1": ""}')
    with pytest.raises(ValueError, match="image must be a file; got .*a.png, which does not exist"):
        list(winoground.load_pairs(tmp_path))


def test_nan_is_no_lost_pair() -> None:
    with pytest.raises(ValueError, match="score must give numbers that can be compared; got NaN in pair 2"):
        winoground.evaluate(lambda image, caption: float(image) if caption else 1.0, [((1, 2), (1, 1)), (("nan", 2), (1, 1))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_scores_of_a_pair_are_wrong(dtype):
    """Whichever of the two their bits put first."""

    def score(image, caption):
        value = torch.tensor(3.0, dtype=dtype)
        return value.nextafter(value + 1) if image == caption else value

    assert winoground.evaluate(score, [((0, 1), (0, 1))]) == {"text": 0.0, "image": 0.0, "group": 0.0}
    assert winoground.evaluate(lambda image, caption: 3 + 0.1 * (image == caption), [((0, 1), (0, 1))])["group"] == 1.0
