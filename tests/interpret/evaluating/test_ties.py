"""`evaluate` where scores differ by no more than their rounding."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import vlattn_fast as va
from tests.helpers.interpret.evaluation_cases import made, rows
from vlattn_fast.interpret.evaluating.box_scores import Truth, grid_entries, intersection_over_union, pointing


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
