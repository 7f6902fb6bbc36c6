"""A box of the image as a group: the same as its patches named one by one."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.interpret.edited_maps import llama, made

BOXES = {
    (0.0, 0.0, 0.5, 1.0): [0, 1, 4, 5, 8, 9, 12, 13],
    (0.3, 0.6, 0.7, 0.7): [9, 10],  # the third row has its centres at 5/8
    (0.625, 0.125, 0.875, 0.125 + 1e-9): [2, 3],  # centres on an edge are inside
}


def patches(family: str, inputs: dict[str, Any]) -> Tensor:
    """int64 (B, 16), the places of the 4 x 4 patches of each sample."""
    if family == "clip":
        return torch.arange(1, 17).expand(len(inputs["pixel_values"]), -1)
    return (inputs["input_ids"] == 55).nonzero()[:, 1].view(len(inputs["input_ids"]), -1)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("family", ["llava", "clip"])
def test_a_box_has_the_patches_whose_centres_lie_in_it(family: str, box: tuple[float, float, float, float]) -> None:
    model, inputs = made(family)
    places = patches(family, inputs)
    assert places.shape[1] == 16
    size = inputs["input_ids"].shape[1] if family == "llava" else 17
    mask = torch.zeros(len(places), size, dtype=torch.bool)
    for row, of_row in zip(mask, places, strict=True):
        row[of_row[BOXES[box]]] = True
    results = []
    for keys in (("image", box), mask, None):
        cut = va.Knockout(queries="last" if family == "llava" else "special", keys=keys)
        with torch.no_grad(), nullcontext() if keys is None else va.intervene(model, inputs, cut):
            results.append(getattr(model(**inputs), "logits" if family == "llava" else "logits_per_image"))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert not torch.allclose(results[0], results[2])


def test_boxes_are_groups_of_edges() -> None:
    model, inputs = made("llava")
    left, right = ((start, 0.0, start + 0.5, 1.0) for start in (0.0, 0.5))
    table = va.attribute_edges(model, inputs, {"left": ("image", left), "right": ("image:0", right), "last": "last"})
    halves = table.matrix("left", "last") + table.matrix("right", "last")
    torch.testing.assert_close(halves, va.attribute_edges(model, inputs, ["image", "last"]).matrix("image", "last"))
    effects = va.intervene_each(model, inputs, table.top(2))
    assert len(effects) == 2


@pytest.mark.parametrize(
    "keys, message",
    [
        (("image", (0.5, 0.0, 0.5, 1.0)), r"keys must be \('image', \(x1, y1, x2, y2\)\), .* in \[0, 1\]; got"),
        (("image", (0, 0, 12, 12)), r"keys must be \('image', "),
        (("text", (0.0, 0.0, 1.0, 1.0)), r"keys must be \('image', "),
        (
            ("image", (0.4, 0.4, 0.6, 0.6)),
            r"keys must have a token; got \('image', \(0.4, 0.4, 0.6, 0.6\)\), which is empty in tower",
        ),
    ],
)
def test_a_box_that_is_none_or_has_no_patch_is_refused(keys: Any, message: str) -> None:
    model, inputs = made("llava")
    with pytest.raises(ValueError, match=message):
        va.intervene(model, inputs, va.Knockout(queries="last", keys=keys))


def test_a_box_needs_patches() -> None:
    model, inputs = llama()
    with pytest.raises(ValueError, match=r"keys=\('image', \(0.0, 0.0, 0.5, 1.0\)\) has no meaning in tower"):
        va.intervene(model, inputs, va.Knockout(queries="last", keys=("image", (0.0, 0.0, 0.5, 1.0))))
