"""`evaluate`'s test "intervention": a two-layer model made by hand, whose effects are known, and knockouts one by one."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import vlattn_fast as va
from tests.helpers.interpret.cases import lively
from tests.helpers.interpret.evaluation_cases import Planted, made, planted_data, rows, truth
from vlattn_fast.interpret.evaluating.attention_cuts import overlap
from vlattn_fast.interpret.result.numbers.rank_correlation import rank_correlation

WORTH = torch.tensor([0.0, 0.0, 0.0, 3.0, -1.0, 2.0, 0.5, 8.0, 1.0])  # of each id


class Means(nn.Module):
    """Two layers, in each of which every token adds the mean worth of all tokens to its answer. Class 1 has the last token's."""

    def __init__(self) -> None:
        super().__init__()
        self.worth = nn.Parameter(WORTH.clone().double())
        self.layers = nn.ModuleList(Uniform() for _ in range(2))

    def forward(self, input_ids: Tensor) -> Any:
        worth = self.worth[input_ids][:, None, :, None]
        answer = torch.zeros_like(worth)
        for layer in self.layers:
            answer = answer + layer(answer, worth)
        logit = answer[:, 0, -1, 0]
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(logit), logit], 1))


class Uniform(nn.Module):
    def forward(self, x: Tensor, worth: Tensor) -> Tensor:
        flat = torch.zeros_like(x) * x
        return functional.scaled_dot_product_attention(flat, flat, worth)


IDS = torch.tensor([[1, 3, 4, 5, 6, 7, 8, 2]])  # five words that differ, between tokens that are none


def by_worth(sign: float) -> Any:
    def method(model: nn.Module, inputs: dict[str, Tensor], target: Any) -> Any:
        return SimpleNamespace(text=sign * WORTH[inputs["input_ids"][:, 1:-1]])

    return method


def test_effects_and_curves_are_those_worked_by_hand() -> None:
    """Without a token the answer is twice the mean worth of the others, so the order of effects is that of worths."""
    methods = {"worth": by_worth(1.0), "opposite": by_worth(-1.0), "edges": "attribute_edges"}
    result = va.evaluate(Means(), [({"input_ids": IDS}, 1, None)], methods=methods, tests=("intervention",))
    table = rows(result)
    worth = WORTH[IDS[0]].double()

    def probability(words: list[int]) -> float:
        """Of class 1 where these of the eight tokens are seen."""
        return float(torch.sigmoid(2 * worth[words].mean()))

    descending = sorted(range(1, 7), key=lambda place: -float(worth[place]))
    for name, order in (("worth", descending), ("edges", descending), ("opposite", descending[::-1])):
        assert table[name, "intervention", "text"]["value"] == pytest.approx(-1.0 if name == "opposite" else 1.0)
        assert table[name, "intervention:top", "text"]["value"] == (0.0 if name == "opposite" else 1.0)
        for test in ("deletion", "insertion"):
            curve = []
            for step in range(11):
                first, rest = order[: step * 6 // 10], order[step * 6 // 10 :]
                curve.append(probability([0, 7, *(rest if test == "deletion" else first)]))
            area = sum(curve) / 10 - (curve[0] + curve[-1]) / 20
            assert table[name, f"intervention:{test}", "text"]["value"] == pytest.approx(area, rel=1e-6)
            (drawn,) = (c for c in result.curves if (c["method"], c["test"]) == (name, f"intervention:{test}"))
            assert drawn["mean"] == pytest.approx(curve, rel=1e-6) and drawn["steps"] == [n / 10 for n in range(11)]
    assert table["worth", "intervention", "image"]["left_out"] == 1
    assert va.Evaluation.plot(result) is not None


def test_equal_effects_have_no_correlation() -> None:
    """Eight times the same token: whatever is cut, the mean stays."""
    items = [({"input_ids": ids}, 1, None) for ids in (IDS, torch.full_like(IDS, 3))]
    method = lambda *_: SimpleNamespace(text=torch.arange(6.0)[None])  # noqa: E731
    table = rows(va.evaluate(Means(), items, methods={"map": method}, tests=("intervention",)))
    for test, samples in (("", 1), (":top", 1), (":deletion", 2), (":insertion", 2)):
        record = table["map", f"intervention{test}", "text"]
        assert (record["samples"], record["left_out"]) == (samples, 2 - samples)


def test_the_overlap_is_of_the_largest_quarter_rounded_up() -> None:
    one, two = torch.tensor([5.0, 4.0, 3.0, 0.0, 0.0]), torch.tensor([1.0, 4.0, 0.0, 9.0, 0.0])
    assert overlap(one, two) == 0.5 and overlap(one, one) == 1.0 and overlap(one[:4], two[:4]) == 0.0


def test_an_image_of_many_patches_has_sixteen_pieces() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = lively(ViTForImageClassification(ViTConfig(**sizes, image_size=48, patch_size=8))).double().eval()
    inputs = {"pixel_values": torch.randn(1, 3, 48, 48).double()}
    image = torch.rand(1, 6, 6).double()
    table = rows(
        va.evaluate(model, [(inputs, 1, None)], methods={"map": lambda *_: SimpleNamespace(image=image)}, tests=("intervention",))
    )
    lines = (0, 2, 3, 5, 6)  # six patches in four pieces
    masses, falls = [], []
    with torch.no_grad():
        whole = model(**inputs).logits[0, 1]
        for top, bottom in itertools.pairwise(lines):
            for left, right in itertools.pairwise(lines):
                patches = torch.zeros(6, 6, dtype=torch.bool)
                patches[top:bottom, left:right] = True
                masses.append(image[0][patches].sum())
                cut = va.Knockout(queries="special", keys=torch.cat([torch.zeros(1, dtype=torch.bool), patches.flatten()]))
                with va.intervene(model, inputs, cut):
                    falls.append(whole - model(**inputs).logits[0, 1])
    mass, fall = torch.stack(masses), torch.stack(falls)
    assert table["map", "intervention", "image"]["value"] == pytest.approx(rank_correlation(mass, fall), abs=1e-9)
    tops = [set(values.argsort(descending=True)[:4].tolist()) for values in (mass, fall)]
    assert table["map", "intervention:top", "image"]["value"] == len(tops[0] & tops[1]) / 4


def test_pieces_of_several_images_are_those_of_each() -> None:
    """A prompt with two images of 4 x 4 patches."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision, text = CLIPVisionConfig(**sizes, image_size=24, patch_size=6), LlamaConfig(**sizes, vocab_size=100)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=99)
    model = lively(LlavaForConditionalGeneration(config)).double().eval()
    ids = torch.tensor([[1, *[99] * 16, 20, *[99] * 16, 21, 22]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 24, 24).double()}
    shown = va.explain(model, inputs, target=7)
    assert shown.image_samples == [0, 0]
    falls = []
    with torch.no_grad():
        whole = model(**inputs).logits[0, -1, 7]
        for column in (ids[0] == 99).nonzero()[:, 0].tolist():
            with va.intervene(model, inputs, va.Knockout(queries="last", keys=(column, column + 1))):
                falls.append(whole - model(**inputs).logits[0, -1, 7])
    table = rows(va.evaluate(model, [(inputs, 7, None)], tests=("intervention",)))
    expected = rank_correlation(shown.image.flatten().double(), torch.stack(falls))
    assert table["gradient", "intervention", "image"]["value"] == pytest.approx(expected, abs=1e-9)


def test_what_cannot_be_cut_is_refused_by_name() -> None:
    model, inputs = made("clip")
    with pytest.raises(
        ValueError, match=r"Test 'intervention' is impossible with this model: one tower .* Leave it out of tests="
    ):
        va.evaluate(model, [(inputs, None, None)], tests=("intervention",))
    with pytest.raises(
        ValueError, match="methods must have 'attribute_edges' only with the test 'intervention'; got tests deletion"
    ):
        va.evaluate(Means(), [], methods=("attribute_edges",), tests=("deletion",))
    few = {"input_ids": IDS[:, [0, 1, 2, 7]]}
    with pytest.raises(
        ValueError, match="'intervention' is impossible with this model and data set: no sample has a map with three"
    ):
        va.evaluate(Means(), [(few, 1, None)], methods={"map": by_worth(1.0)}, tests=("intervention",))
    with pytest.raises(ValueError, match="model must call attention .* got a forward pass of Planted"):  # nothing in it attends
        va.evaluate(Planted(), planted_data(1), methods={"map": truth()}, tests=("intervention",))
