"""What `evaluate` and `probe` say and print; scores that differ by no more than their rounding."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch import nn

import vlattn_fast as va
from tests.helpers.interpret.evaluation_cases import Planted, made, planted_data, rows, truth
from tests.helpers.saved_models import tokenizer
from vlattn_fast.interpret.evaluating.box_scores import Truth, grid_entries, intersection_over_union, pointing
from vlattn_fast.interpret.probing.report import ProbeReport


class Wrapped(nn.Module):
    """A classifier of texts within a class of the user's."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = hf.BertConfig(vocab_size=60, num_labels=3, **sizes)
        self.inner = hf.BertForSequenceClassification(config)

    def forward(self, input_ids, attention_mask):
        return self.inner(input_ids, attention_mask).logits


def test_a_wrapped_text_model_asks_for_its_tokenizer():
    model, ids = Wrapped().eval(), torch.randint(5, 60, (2, 8))
    data = [({"input_ids": ids, "attention_mask": torch.ones(2, 8).long()}, lambda outputs: outputs[:, 0], None)]
    options = {"position": {"tower0": "cls"}, "methods": ("gradient", "random")}
    hint = "no sample has a map with an entry to remove; pass processor= to find the words"
    result = va.evaluate(model, data, **options)
    row = rows(result)["gradient", "positive", "text"]
    assert (row["samples"], row["left_out"], row["note"]) == (0, 2, hint)
    assert rows(result)["gradient", "positive", "image"]["note"] == "no sample has a map with an entry to remove"
    assert rows(result)["random", "positive", "text"]["note"] is None
    assert str(result).splitlines()[2].endswith(f"-        0         2  {hint}")
    with pytest.raises(ValueError, match=f"Test 'positive' is impossible .*: {hint}. Leave it out of tests="):
        va.evaluate(model, data, **{**options, "methods": ("gradient",)}, tests=("positive",))
    named = va.evaluate(model, data, **options, processor=tokenizer())
    assert rows(named)["gradient", "positive", "text"]["samples"] == 2


class Stubborn(Planted):
    """Its answer is always the same; its probability follows the picture."""

    def forward(self, pixel_values, input_ids, attention_mask=None):
        outputs = super().forward(pixel_values, input_ids, attention_mask)
        return type(outputs)(logits=outputs.logits + torch.tensor([0.0, 5.0]))


class Deaf(Planted):
    def forward(self, pixel_values, input_ids, attention_mask=None):
        outputs = super().forward(torch.ones_like(pixel_values), input_ids, attention_mask)
        return type(outputs)(logits=outputs.logits)


@pytest.mark.parametrize(("kind", "measure", "parts"), [(Stubborn, "accuracy", {"image", "text"}), (Deaf, None, {"image"})])
def test_answers_that_never_change_are_noted(kind, measure, parts):
    found = va.evaluate(
        kind(), planted_data(2), methods={"truth": truth(), "random": "random"}, tests=("positive", "deletion", "iou")
    )
    for (_, test, part), row in rows(found).items():
        of = {"positive": "accuracy", "deletion": "probability"}.get(test)
        same = of is not None and part in parts and measure in (None, of)
        said = f"the {of} is the same whatever is removed of the {part}: this value cannot compare maps"
        assert row["note"] == (said if same else None) and row["value"] is not None
        assert not same or said in str(found)


def test_a_report_of_heads_alone_shows_each_layer():
    fields = {"chance": None, "control": None, "samples": 3, "left_out": 1, "note": None}
    table = [
        {"test": "modality", "kind": kind, "layer": layer, "head": head, "value": 0.1 * layer + 0.2 * head + share, **fields}
        for kind, share in (("text", 0.0), ("image", 0.05))
        for layer in range(2)
        for head in range(3)
    ]
    lines = str(ProbeReport(table)).splitlines()
    assert len(lines) == 5
    assert lines[2].split() == "modality text 1 0.3000 - - 3 1 mean of 3 heads, 0.5000 in head 2".split()
    whole = {"test": "coreference", "kind": None, "layer": None, "head": None, "value": 0.75, **fields}
    heads = [{**whole, "layer": 0, "head": head} for head in range(3)]
    assert len(str(ProbeReport([whole, *heads])).splitlines()) == 2


class TwoEqualClasses(nn.Module):
    """Classes 1 and 2 are equal, but that the bits of one or the other are larger by the place in the batch; class 0 is less."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, pixel_values):
        one = 2 + pixel_values.mean((1, 2, 3)) + self.weight
        place = torch.arange(len(one)) % 2 == 0
        nudged = one.nextafter(one + 1)
        return SimpleNamespace(logits=torch.stack([0.9 * one, one.where(place, nudged), nudged.where(place, one)], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("target, right", [(0, 0.0), (1, 1.0), (2, 0.0), (None, 1.0)])
def test_the_first_of_equal_classes_is_the_answer(target, right, dtype):
    def image(model, inputs, target):
        return SimpleNamespace(image=torch.arange(4.0).view(1, 2, 2).expand(len(inputs["pixel_values"]), 2, 2))

    inputs = {"pixel_values": torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)}
    targets = target if target is None else [target] * 5
    result = va.evaluate(TwoEqualClasses(dtype), [(inputs, targets, None)], methods={"image": image}, tests=("positive",))
    (curve,) = result.curves
    assert curve["mean"] == [right] * len(curve["steps"])


def test_what_differs_by_more_is_no_tie():
    class Near(TwoEqualClasses):
        def forward(self, pixel_values):
            one = super().forward(pixel_values).logits[:, 1]
            return SimpleNamespace(logits=torch.stack([one, one * (1 + 2**-15)], 1))

    def image(model, inputs, target):
        return SimpleNamespace(image=torch.arange(4.0).view(1, 2, 2))

    data = [({"pixel_values": torch.ones(1, 3, 4, 4)}, 1, None)]
    result = va.evaluate(Near(torch.float32), data, methods={"image": image}, tests=("positive",))
    assert rows(result)["image", "positive", "image"]["value"] == 1.0


def test_equal_texts_have_one_similarity(monkeypatch):
    """Another processor rounds each row of a product by itself: here the second text's similarity is larger by a hundredth."""
    model, inputs = made("siglip")
    inputs["input_ids"][1] = inputs["input_ids"][0]
    forward = type(model).forward

    def other_bits(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        nudge = torch.zeros_like(outputs.logits_per_image)
        nudge[:, 1:2] = 0.01
        outputs.logits_per_image = outputs.logits_per_image + nudge
        return outputs

    monkeypatch.setattr(type(model), "forward", other_bits)
    for target in (0, 1):
        result = va.evaluate(model, [(inputs, [target] * 2, None)], methods=("attention",), tests=("positive",), steps=(0, 1))
        assert [curve["mean"][0] for curve in result.curves] == [1.0 - target] * 2


def test_a_map_that_is_constant_but_for_its_rounding_points_nowhere():
    cells, box = grid_entries(7, 7), Truth.from_boxes(torch.tensor([[0.0, 0.0, 0.5, 0.5]]))
    flat = torch.full((49,), 0.3).double() * (1 + 1e-7 * torch.arange(49).remainder(3))
    assert (intersection_over_union(flat, cells, box), pointing(flat, cells, box)) == (0.0, 0.0)
    peak = torch.zeros(49).double()
    peak[8], peak[30] = 1, 1 + 1e-7  # the first of the two lies in the box, the second does not
    assert pointing(peak, cells, box) == 1.0


def test_sanity_leaves_out_maps_that_are_constant_but_for_their_rounding():
    model, inputs = made("vit")

    def flat(model, inputs, target):
        return SimpleNamespace(image=0.3 * (1 + 1e-7 * torch.rand(2, 4, 5)))

    result = va.evaluate(model, [(inputs, None, None)], methods={"flat": flat, "gradient": "gradient"}, tests=("sanity",))
    assert rows(result)["flat", "sanity", "image"]["left_out"] == 2
