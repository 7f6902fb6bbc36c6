"""Comprehensiveness, sufficiency and synergy of `evaluate` on models whose probability is worked out by hand."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.evaluation_cases import made, rows
from vlattn_fast.interpret.evaluating.curves import CURVES

Players = Callable[[Tensor, Tensor], Tensor]


class Game(nn.Module):
    """A probability that is a function of which patches, bool (B, n), and which of the words 10, 11, ..., bool (B, m), are there.
    It counts the rows that it runs."""

    def __init__(self, value: Players, words: int) -> None:
        super().__init__()
        self.value, self.words, self.rows = value, words, 0

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> SimpleNamespace:
        self.rows += len(input_ids)
        said = torch.stack([(input_ids == 10 + word).any(1) for word in range(self.words)], 1)
        value = self.value(pixel_values[:, 0, 0] > 0, said).double()
        return SimpleNamespace(logits=torch.stack([value, 1 - value], 1).log())


def played(value: Players, image: list[float], text: list[float] | None, **options: Any) -> tuple[va.Evaluation, Game]:
    words = 2 if text is None else len(text)
    model = Game(value, words)
    inputs = {"pixel_values": torch.ones(1, 3, 1, len(image)), "input_ids": torch.tensor([[1, *range(10, 10 + words), 2]])}
    maps = {"image": torch.tensor(image).view(1, 1, -1)} | ({} if text is None else {"text": torch.tensor([text])})
    method = lambda model, inputs, target: SimpleNamespace(**maps)  # noqa: E731
    return va.evaluate(model, [(inputs, 0, None)], methods={"map": method}, **options), model


WEIGHTS = torch.tensor([0.3, 0.2, 0.1, *[0.04] * 7])


def test_comprehensiveness_and_sufficiency_are_those_of_eraser():
    """By hand, equations 1 and 2 over the bins 1, 5, 10, 20 and 50 %: of ten patches 1, 1, 1, 2 and 5, of two words one each."""
    value = lambda ink, said: (ink * WEIGHTS).sum(1) + said.double() @ torch.tensor([0.05, 0.02]).double()  # noqa: E731
    tests = ("comprehensiveness", "sufficiency")
    result, _ = played(value, [9.0, 8.0, 7.0, *[1.0] * 7], [2.0, 1.0], tests=tests)
    # The whole picture is worth 0.88. The two largest have 0.5, the five largest 0.68.
    assert result.value("map", "comprehensiveness") == pytest.approx((3 * 0.3 + 0.5 + 0.68) / 5)
    assert result.value("map", "sufficiency") == pytest.approx((3 * 0.58 + 0.38 + 0.2) / 5)
    assert result.value("map", "comprehensiveness", "text") == pytest.approx(0.05)
    assert result.value("map", "sufficiency", "text") == pytest.approx(0.02)
    curve = next(curve for curve in result.curves if (curve["test"], curve["part"]) == ("sufficiency", "image"))
    assert curve["steps"] == [0.01, 0.05, 0.1, 0.2, 0.5] and curve["mean"] == pytest.approx([0.58, 0.58, 0.58, 0.38, 0.2])
    counts = [len(inputs["image"]) for inputs in CURVES["sufficiency"].inputs({"image": torch.rand(60)}, curve["steps"])[1:]]
    assert counts == [1, 3, 6, 12, 30]


def test_synergy_is_what_patch_and_word_have_together_alone():
    """By hand: the first patch and the first word are worth 0.6 together and nothing apart; the second patch is worth 0.2."""
    value = lambda ink, said: 0.1 + 0.6 * (ink[:, 0] & said[:, 0]) + 0.2 * ink[:, 1]  # noqa: E731
    right, wrong = [2.0, 1.0], [1.0, 2.0]
    steps = [0, 0.5, 1]
    areas = {}
    for name, image, text in (("both", right, right), ("image", right, wrong), ("text", wrong, right), ("none", wrong, wrong)):
        result, _ = played(value, image, text, tests=("synergy",), steps=steps)
        (record,), (curve,) = result.table, result.curves
        assert (record["part"], record["samples"], record["left_out"]) == ("both", 1, 0)
        assert result.value("map", "synergy") == result.value("map", "synergy", "both") == record["value"]
        areas[name] = record["value"], curve["mean"]
    # Half: put into the empty input 0.7 - 0.1 - 0.1 + 0.1 = 0.6; taken from the whole one 0.3 - 0.3 - 0.3 + 0.9 = 0.6; of
    # 0.9 - 0.1 = 0.8 both are 3 / 4. All: 0.9 - 0.3 - 0.1 + 0.1 = 0.6 in either way.
    assert areas["both"] == (pytest.approx(0.5 * (0.75 / 2) + 0.5 * 0.75), pytest.approx([0, 0.75, 0.75]))
    for name in ("image", "text", "none"):  # half: 0 in either way
        assert areas[name] == (pytest.approx(0.5 * (0.75 / 2)), pytest.approx([0, 0, 0.75])), name


def test_synergy_put_in_and_taken_out_differ():
    """By hand: any of two patches serves, so the whole input does not miss the first, and in the empty one it is enough."""
    value = lambda ink, said: 0.1 + 0.8 * (ink.any(1) & said[:, 0])  # noqa: E731
    result, _ = played(value, [2.0, 1.0], [2.0, 1.0], tests=("synergy",), steps=[0, 0.5, 1])
    # Half: put in 0.9 - 0.1 - 0.1 + 0.1 = 0.8, which is all of 0.8; taken out 0.1 - 0.9 - 0.1 + 0.9 = 0. All: 0.8 in either way.
    assert result.curves[0]["mean"] == pytest.approx([0, 0.5, 1])


def test_parts_that_replace_each_other_have_no_synergy():
    """Their dividend is 0.7 - 0.7 - 0.7 + 0.1 = -0.6, and cut to 0."""
    value = lambda ink, said: 0.1 + 0.6 * (ink[:, 0] | said[:, 0])  # noqa: E731
    result, _ = played(value, [2.0, 1.0], [2.0, 1.0], tests=("synergy",))
    assert result.value("map", "synergy") == 0.0 and len(result.curves[0]["steps"]) == 11


def test_a_small_change_of_the_probability_is_divided_by_a_twentieth():
    """By hand: 0.51 - 0.5 - 0.5 + 0.5 = 0.01, of 0.05; 1 is not exceeded where the parts push the other way."""
    result, _ = played(lambda ink, said: 0.5 + 0.01 * (ink[:, 0] & said[:, 0]), [2.0, 1.0], [2.0, 1.0], tests=("synergy",))
    assert result.curves[0]["mean"] == pytest.approx([0] * 3 + [0.2] * 8)  # round(0.3 * 2) = 1; round(0.25 * 2) would be 0
    value = lambda ink, said: 0.5 + 0.4 * (ink[:, 0] & said[:, 0]) - 0.4 * ink[:, 1]  # noqa: E731
    result, _ = played(value, [2.0, 1.0], [2.0, 1.0], tests=("synergy",), steps=[0, 0.5, 1])
    assert result.curves[0]["mean"] == pytest.approx([0, 1, 1])


def test_numbers_of_entries_are_rounded_as_published():
    inputs = CURVES["synergy"].inputs({"image": torch.rand(5), "text": torch.rand(16)}, CURVES["synergy"].steps)
    together = [{part: len(left) for part, left in one.items()} for one in inputs[2::6]]
    assert [one["image"] for one in together] == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5]  # halves to the even number
    assert [one["text"] for one in together] == [0, 2, 3, 5, 6, 8, 10, 11, 13, 14, 16]


def test_without_a_map_of_both_parts_there_is_no_synergy():
    value = lambda ink, said: 0.5 + 0.4 * (ink[:, 0] & said[:, 0])  # noqa: E731
    with pytest.raises(
        ValueError, match="'synergy' is impossible .*: no sample has maps of image and text with an entry to remove"
    ):
        played(value, [2.0, 1.0], None, tests=("synergy",))


def test_equal_inputs_run_once():
    """The whole input, and what is without picture or words, whichever test and part asks for it; words in any order."""
    value = lambda ink, said: 0.5 + 0.4 * (ink[:, 0] & said[:, 0])  # noqa: E731
    tests = ("positive", "negative", "insertion", "deletion", "comprehensiveness", "sufficiency", "synergy")
    _, model = played(value, [3.0, 2.0], [3.0, 2.0], tests=tests, steps=[0, 0.5, 1])
    one_part = 1 + 3 + 3  # the whole input; nothing of a part, or either half of it
    both = 1 + 2 + 2  # neither; the upper half of one part alone; both upper halves, or both lower ones
    assert model.rows == 1 + one_part + both  # the whole input once more, before all tests, where the target is resolved


@pytest.mark.parametrize("target", [0, 1])
def test_synergy_of_clip_is_among_all_texts(target):
    """A perturbed image meets the perturbed text and the other texts of the batch as they are."""
    model, inputs = made("clip")
    images = len(inputs["pixel_values"])
    found = va.evaluate(model, [(inputs, [target] * images, None)], methods=("attention",), tests=("synergy",), steps=[0, 1])
    places = va.explain(model, inputs, target=[target] * images, method="attention").text_positions[0]

    def probability(image, picture, text):
        pixels = inputs["pixel_values"][image : image + 1] * picture
        one = {name: value[target : target + 1] for name, value in inputs.items() if name != "pixel_values"}
        if not text:
            keep = [column for column in range(inputs["input_ids"].shape[1]) if column not in places]
            one = {name: value[:, keep] for name, value in one.items()}
        with torch.no_grad():
            whole = model(**{**inputs, "pixel_values": pixels}).logits_per_image[0]
            whole[target] = model(**one, pixel_values=pixels).logits_per_image[0, 0]
        return float(whole.double().softmax(-1)[target])

    areas = []
    for image in range(images):
        v = {(a, b): probability(image, a, b) for a in (0, 1) for b in (0, 1)}
        dividend = v[1, 1] - v[1, 0] - v[0, 1] + v[0, 0]
        areas.append(min(max(dividend / max(abs(v[1, 1] - v[0, 0]), 0.05), 0), 1) / 2)
    assert rows(found)["attention", "synergy", "both"]["value"] == pytest.approx(sum(areas) / images, abs=1e-5)
