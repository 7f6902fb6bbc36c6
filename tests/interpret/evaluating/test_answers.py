"""`evaluate` of answers: each token is a sample, with the answer before it in place. Curves are computed again by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.interpret import decoder_cases
from tests.interpret.evaluating.test_token_grounding import captioner

STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)
ANSWER = [5, 6, 7]
BOX = [[0.0, 0.0, 0.5, 0.5]]


class Names:
    """A tokenizer: ids 6 and 7 are one word, and 8 is no word."""

    unk_token, all_special_ids = None, ()
    tokens = {5: "Ġred", 6: "Ġsqu", 7: "are", 8: "."}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.tokens.get(int(one), f"Ġ{int(one)}") for one in ids]


def llava() -> tuple[Any, dict[str, Tensor], Any]:
    """One prompt, and the logits (V) after it and some tokens of the answer."""
    case = decoder_cases.llava()
    model = case.model.double().eval()
    ids = torch.tensor(case.prompts[:1])
    pixels = case.images["pixel_values"][:1].double()

    def after(pixels: Tensor, prefix: list[int]) -> Tensor:
        with torch.no_grad():
            return model(input_ids=torch.cat([ids, torch.tensor([prefix]).long()], 1), pixel_values=pixels).logits[0, -1]

    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}, after


def caption() -> tuple[Any, dict[str, Tensor], Any]:
    model, inputs = captioner()

    def after(pixels: Tensor, prefix: list[int]) -> Tensor:
        with torch.no_grad():
            return model(pixel_values=pixels, decoder_input_ids=torch.tensor([[1, *prefix]])).logits[0, -1]

    return model, {"pixel_values": inputs["pixel_values"][:1]}, after


def removed(pixels: Tensor, gone: Tensor) -> Tensor:
    """Pixels whose patches in bool (h, w) are 0."""
    size = pixels.shape[-1] // gone.shape[-1]
    return pixels * ~gone.repeat_interleave(size, 0).repeat_interleave(size, 1)


@pytest.mark.parametrize("make", [caption, llava])
def test_each_token_is_a_sample(make: Any) -> None:
    model, inputs, after = make()
    dataset = [{"inputs": inputs, "answer": [ANSWER], "boxes": {0: BOX, "6": BOX}}]
    tests = ("positive", "deletion", "insertion", "comprehensiveness", "pointing")
    found = va.evaluate(model, dataset, tests=tests, steps=STEPS)
    image = va.explain(model, inputs, answer=[ANSWER]).image[0]  # (T, h, w)
    values = {(one["position"], one["test"]): one["value"] for one in found.tokens if one["part"] == "image"}
    for t, token in enumerate(ANSWER):
        order = image[t].flatten().argsort(descending=True, stable=True)
        likely, first = {"deletion": [], "insertion": []}, []
        for step in STEPS:
            for test in likely:
                gone = torch.zeros(len(order), dtype=torch.bool)
                gone[order[: int(step * len(order))]] = True
                gone = ~gone if test == "insertion" else gone
                logits = after(removed(inputs["pixel_values"], gone.view(image[t].shape)), ANSWER[:t])
                likely[test].append(float(logits.softmax(-1)[token]))
                first += [float(logits.argmax() == token)] if test == "deletion" else []
        for test, curve in likely.items():
            area = sum((a + b) / 2 * 0.25 for a, b in zip(curve, curve[1:], strict=False))
            assert values[t, test] == pytest.approx(area, rel=1e-6), (t, test)
        assert values[t, "positive"] == pytest.approx(sum((a + b) / 8 for a, b in zip(first, first[1:], strict=False)))
        falls = [likely["deletion"][0] - one for one in likely["deletion"]]
        assert values[t, "comprehensiveness"] == pytest.approx(sum(falls) / len(falls), rel=1e-6)
        y, x = divmod(int(order[0]), image.shape[2])
        inside = float(y < image.shape[1] / 2 and x < image.shape[2] / 2)
        assert values.get((t, "pointing")) == (None if t == 2 else inside)
    row = next(one for one in found.table if (one["test"], one["part"]) == ("pointing", "image"))
    assert (row["samples"], row["left_out"]) == (2, 1)  # the third token has no box
    assert found.value("gradient", "deletion") == pytest.approx(sum(values[t, "deletion"] for t in range(3)) / 3)
    assert {(one["item"], one["token"], one["word"]) for one in found.tokens} == {(0, str(t), str(t)) for t in ANSWER}


def test_words_of_the_prompt_alone_are_removed() -> None:
    model, inputs, _ = llava()
    ids = inputs["input_ids"]
    dataset = [{"inputs": inputs, "answer": [ANSWER]}]
    found = va.evaluate(model, dataset, tests=["deletion"], steps=(0.0, 1.0), tokens=[-1])
    with torch.no_grad():
        kept = ids[:, (ids[0] == 1) | (ids[0] == decoder_cases.IMAGE)]  # all words of the prompt are gone
        sides = [torch.cat([one, torch.tensor([ANSWER[:2]])], 1) for one in (ids, kept)]
        ends = [model(input_ids=one, pixel_values=inputs["pixel_values"]).logits[0, -1].softmax(-1)[ANSWER[2]] for one in sides]
    (value,) = (one["value"] for one in found.tokens if one["part"] == "text")
    assert value == pytest.approx(float(sum(ends)) / 2) != pytest.approx(float(ends[0]))


def test_an_answer_as_a_whole() -> None:
    model, inputs, after = caption()
    found = va.evaluate(model, [{"inputs": inputs, "answer": [ANSWER]}], tests=["deletion"], steps=STEPS, per_token=False)
    image = va.explain(model, inputs, answer=[ANSWER], per_token=False).image[0]
    order, curve = image.flatten().argsort(descending=True, stable=True), []
    for step in STEPS:
        gone = torch.zeros(len(order), dtype=torch.bool)
        gone[order[: int(step * len(order))]] = True
        pixels = removed(inputs["pixel_values"], gone.view(image.shape))
        logs = [after(pixels, ANSWER[:t]).log_softmax(-1)[token] for t, token in enumerate(ANSWER)]
        curve.append(float(sum(logs).exp()))
    assert found.value("gradient", "deletion") == pytest.approx(sum((a + b) / 8 for a, b in zip(curve, curve[1:], strict=False)))
    assert found.tokens == []


def test_the_true_words_of_a_token_are_pointed_at() -> None:
    model, inputs, _ = llava()
    ids = inputs["input_ids"][0]
    words = [n for n in range(len(ids)) if int(ids[n]) != decoder_cases.IMAGE]  # columns
    maps = va.explain(model, inputs, answer=[ANSWER], processor=Names()).text[0].double()
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[words[1]] = True
    first, second = [words[0], words[2] - len(ids)], " ".join(str(int(ids[words[n]])) for n in (2, 3))
    dataset = [{"inputs": inputs, "answer": [ANSWER], "text_truth": {0: first, 1: second, 2: mask}}]
    tests = ("pointing", "iou", "mass")
    found = va.evaluate(model, dataset, tests=tests, processor=Names(), tokens="all")
    values = {(one["position"], one["test"]): one["value"] for one in found.tokens}
    for n, truth in enumerate(([0, 2], [2, 3], [1])):
        shown = maps[n, : len(words) - (n == 0)]  # without the explained token, and the answer's own words
        inside = torch.zeros(len(shown), dtype=torch.bool)
        inside[truth] = True
        above, positive = shown > shown.mean(), shown.clamp(min=0)
        assert values[n, "pointing"] == float(inside[shown.argmax()])
        assert values[n, "iou"] == pytest.approx(float((above & inside).sum() / (above | inside).sum()))
        assert values[n, "mass"] == pytest.approx(float(positive[inside].sum() / positive.sum()))
    assert {one["part"] for one in found.tokens} == {"text"} and found.value("gradient", "mass", "text") is not None
    batch = {"inputs": {name: torch.cat([x, x]) for name, x in inputs.items()}, "target": 5, "text_truth": [None, first]}
    row = next(one for one in va.evaluate(model, [batch], tests=["mass"]).table if one["part"] == "text")
    assert (row["samples"], row["left_out"]) == (1, 1)
    for truth, said in (
        ([len(ids)], f"columns of input_ids.* got {len(ids)}"),
        ("5 9", "got '5 9'"),
        ([words[1] + 1], "may be removed.*got"),
        (mask[1:], "got"),
    ):
        with pytest.raises(ValueError, match=f"text_truth must be .*{said}"):
            va.evaluate(model, [{"inputs": inputs, "target": 5, "text_truth": truth}], tests=["mass"], processor=Names())
    with pytest.raises(ValueError, match="processor must be given for a text_truth of words; got"):
        va.evaluate(model, [{"inputs": inputs, "target": 5, "text_truth": second}], tests=["mass"])


@pytest.mark.parametrize(
    ("tokens", "positions"),
    [
        (None, [0, 1, 2]),
        ("words", [0, 1, 2]),
        ("all", [0, 1, 2, 3]),
        ([-2, 0], [0, 2]),
        (lambda names: ["re" in x for x in names], [0, 2]),
    ],
)
def test_which_tokens_are_judged(tokens: Any, positions: list[int]) -> None:
    model, inputs, _ = caption()
    dataset = [{"inputs": inputs, "answer": [[5, 6, 7, 8]], "boxes": {"square": BOX}}]
    found = va.evaluate(model, dataset, tests=["mass"], methods=["attention"], processor=Names(), tokens=tokens)
    boxed = [n for n in positions if n in (1, 2)]
    assert [(one["position"], one["word"]) for one in found.tokens] == [(n, "square") for n in boxed]
    assert sum(found.table[0][name] for name in ("samples", "left_out")) == len(positions)


def test_every_test_runs_on_an_answer() -> None:
    model, inputs, _ = llava()
    tests = ["negative", "sufficiency", "synergy", "iou", "mass", "intervention", "sanity"]
    dataset = [{"inputs": inputs, "answer": [ANSWER], "boxes": BOX}]
    found = va.evaluate(model, dataset, tests=tests, methods=["gradient", "random"], sanity_stages=1, tokens=[1])
    assert {one["test"] for one in found.tokens} >= {*tests} and {one["position"] for one in found.tokens} == {1}


@pytest.mark.parametrize(
    ("item", "options", "message"),
    [
        (
            {"answer": [ANSWER]},
            {},
            "dataset must give mappings with 'inputs' and among inputs, target, answer, boxes, text_truth; got answer",
        ),
        ({"inputs": {}, "text": 1}, {}, "dataset must give mappings with 'inputs' .*; got inputs, text"),
        ({"inputs": {}, "answer": [ANSWER], "target": 1}, {}, "a target or an answer for each input; got both"),
        ({"answer": [ANSWER, ANSWER], "batch": 2}, {}, "inputs with an answer one by one; got a batch of 2"),
        ({"answer": [ANSWER], "batch": 1}, {"tokens": "verbs"}, "tokens must be 'words', 'all', indices or a callable; got"),
        ({"answer": [ANSWER], "batch": 1}, {"tokens": [3]}, "tokens must be from -3 to 2; got 3"),
        ({"answer": [ANSWER], "batch": 1}, {"tokens": lambda names: [True]}, "True or False for each of the 3 tokens; got 1"),
        ({"answer": [ANSWER], "batch": 1}, {"per_token": False, "tests": ["intervention"]}, "per_token must be True for the"),
    ],
)
def test_what_is_refused(item: dict[str, Any], options: dict[str, Any], message: str) -> None:
    model, inputs = captioner()
    if count := item.pop("batch", None):
        item = {**item, "inputs": {"pixel_values": inputs["pixel_values"][:count]}}
    with pytest.raises(ValueError, match=message):
        va.evaluate(model, [item], **{"tests": ["deletion"], **options})
