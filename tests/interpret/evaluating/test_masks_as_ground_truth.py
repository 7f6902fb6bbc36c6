"""Masks in place of boxes: pointing, intersection over union and mass, by hand and against boxes, and files of them."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.interpret.evaluation_cases import Planted, made, planted_data, rows
from vlattn_fast.interpret.dataset.items import Items
from vlattn_fast.interpret.dataset.samples import samples
from vlattn_fast.interpret.evaluating.box_scores import BOX_SCORES, Truth, grid_entries, mass
from vlattn_fast.interpret.result.figures.photos import read_mask

SCORES = ("pointing", "iou", "mass")
MAP = torch.tensor([[0.0, 4.0], [1.0, -1.0]])  # cells of a quarter of the image; the mean is 1


def scored(truth: Any) -> list[dict[str, Any]]:
    inputs = next(planted_data(1))[0]
    method = lambda model, inputs, target: SimpleNamespace(image=MAP.expand(2, -1, -1))  # noqa: E731
    found = rows(va.evaluate(Planted(), [(inputs, 1, truth)], methods={"map": method}, tests=SCORES))
    return [found["map", test, "image"] for test in SCORES]


def test_masks_on_a_map_made_by_hand():
    """Of 3 x 3 pixels under 2 x 2 cells: the middle ones lie in two or four cells."""
    first, second = torch.zeros(2, 3, 3, dtype=torch.bool)
    first[0, 1:] = True  # the upper row from a third on: 1/6 x 1/3 of the image in the upper left cell, 1/2 x 1/3 in the right
    second[2, 0] = True  # the lower left pixel
    found = scored([first, second])
    # The centre of the upper right cell, (3/4, 1/4), lies in the first mask alone.
    # The cell has 1/4 of the image, the first mask 2/9, and 1/6 is in both; the second mask is outside.
    # The upper right cell has 4 of 5 of the positive mass, and 2/3 of it lie in the first mask. The lower left cell has 1 of 5,
    # and 4/9 of it lie in the second mask. The upper left cell has no mass.
    expected = [(1 + 0) / 2, (1 / 6 / (1 / 4 + 2 / 9 - 1 / 6) + 0) / 2, (4 / 5 * 2 / 3 + 1 / 5 * 4 / 9) / 2]
    assert [row["value"] for row in found] == pytest.approx(expected)
    assert all((row["samples"], row["left_out"]) == (2, 0) for row in found)


def test_a_batch_holds_masks_boxes_and_nothing():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2, 2:] = True
    box = [[0.5, 0.0, 1.0, 0.5]]
    alone = [row["value"] for row in scored([box, None])]
    for truth in ([mask, None], [mask, box], mask.expand(2, 4, 4), [mask.numpy(), mask.tolist()], mask.expand(2, 4, 4).numpy()):
        assert [row["value"] for row in scored(truth)] == alone == [1.0, 1.0, 0.8]
    for truth in ([mask, torch.zeros(4, 4, dtype=torch.bool)], [mask, None]):  # a mask without a pixel is as no box
        assert all((row["samples"], row["left_out"]) == (1, 1) for row in scored(truth))


def test_one_sample_may_be_its_mask():
    model, inputs = made("vit")
    single = {"pixel_values": inputs["pixel_values"][:1]}
    mask = torch.ones(7, 5, dtype=torch.bool)
    for truth in (mask, mask[None], [mask], mask.numpy(), mask.numpy()[None], mask.tolist(), [mask.tolist()]):
        table = rows(va.evaluate(model, [(single, None, truth)], tests=SCORES))
        assert [table["gradient", test, "image"]["samples"] for test in SCORES] == [1, 1, 1]
        assert [table["gradient", test, "image"]["value"] for test in ("pointing", "mass")] == pytest.approx([1.0, 1.0])


def pieces(mask: Tensor) -> Tensor:
    """A box for each True pixel."""
    (height, width), (y, x) = mask.shape, mask.nonzero().double().T
    return torch.stack([x / width, y / height, (x + 1) / width, (y + 1) / height], 1)


@pytest.mark.parametrize("shape", [(6, 6), (7, 5), (12, 18)])
def test_a_mask_scores_as_the_boxes_of_its_pixels(shape):
    """Also under regions that overlap."""
    generator = torch.Generator().manual_seed(shape[0])
    mask = torch.rand(shape, generator=generator) > 0.7
    corners = torch.rand(9, 2, generator=generator).double() * 0.6
    regions = torch.cat([corners, corners + 0.05 + torch.rand(9, 2, generator=generator).double() * 0.3], 1)
    for entries in (grid_entries(3, 4), grid_entries(6, 6), regions):
        values = torch.rand(len(entries), generator=generator) - 0.2
        for score in BOX_SCORES.values():
            one, two = (score(values, entries, truth) for truth in (Truth.from_mask(mask), Truth.from_boxes(pieces(mask))))
            assert one == pytest.approx(two, abs=1e-12)


def test_areas_of_overlapping_regions_are_counted_once():
    """By hand: two regions of 0.5 x 0.5 overlap in 0.25 x 0.5, and the right half of the image is true."""
    mask = torch.tensor([[False, True]])
    regions = torch.tensor([[0.25, 0.0, 0.75, 0.5], [0.5, 0.0, 1.0, 0.5], [0.0, 0.5, 0.5, 1.0]]).double()
    values = torch.tensor([2.0, 2.0, 0.0])
    together, shared = 0.75 * 0.5, 0.5 * 0.5
    assert BOX_SCORES["iou"](values, regions, Truth.from_mask(mask)) == pytest.approx(shared / (together + 0.5 - shared))
    assert mass(values, regions, Truth.from_mask(mask)) == pytest.approx((2 * 0.5 + 2 * 1.0) / 4)


def test_a_centre_on_the_edge_of_a_pixel_is_inside():
    """As on the edge of a box: the centre of a cell of 2 x 2 pixels is a corner of all four."""
    for pixel in ((0, 0), (0, 1), (1, 0), (1, 1)):
        mask = torch.zeros(4, 4, dtype=torch.bool)
        mask[pixel] = True
        assert BOX_SCORES["pointing"](torch.tensor([1.0, 0.0, 0.0, 0.0]), grid_entries(2, 2), Truth.from_mask(mask)) == 1.0
        assert BOX_SCORES["pointing"](torch.tensor([0.0, 0.0, 1.0, 0.0]), grid_entries(2, 2), Truth.from_mask(mask)) == 0.0


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        (torch.ones(2, 3, 3), r"boxes must be \(K, 4\), or a mask bool \(h, w\), .*; got a torch.float32 tensor of shape \(3"),
        (torch.ones(2, 3, 3, dtype=torch.uint8), r"a mask bool \(h, w\), for each sample; got a torch.uint8 tensor"),
        (torch.ones(2, 1, 3, 3, dtype=torch.bool), r"a mask bool \(h, w\), .*; got a torch.bool tensor of shape \(1, 3, 3\)"),
        (torch.ones(3, 3, 3, dtype=torch.bool), "one set of boxes or one mask for each of the 2 samples; got 3"),
    ],
)
def test_what_is_no_mask_is_refused(truth, message):
    with pytest.raises(ValueError, match=message):
        scored(truth)


def test_masks_are_read_from_pictures(tmp_path):
    """Bytes, 16 bits, palettes, bits and colours: what is not 0 is inside."""
    image = pytest.importorskip("PIL.Image")
    mask = np.array([[0, 1], [3, 0]], dtype=np.uint8)
    colours = np.zeros((2, 2, 3), dtype=np.uint8)
    colours[mask > 0, 2] = 1
    palette = image.fromarray(mask).convert("P")
    palette.putpalette([255, 255, 255, 0, 0, 0] * 128)
    pictures = {"l": image.fromarray(mask), "p": palette, "rgb": image.fromarray(colours), "bits": image.fromarray(mask > 0)}
    pictures |= {"i16": image.fromarray(mask.astype(np.uint16)), "rgba": image.fromarray(colours).convert("RGBA")}
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
        assert read_mask(tmp_path / f"{name}.png").tolist() == (mask > 0).tolist() == read_mask(picture).tolist(), name
    with pytest.raises(ValueError, match="boxes must be a file; got .*none.png, which does not exist"):
        read_mask(tmp_path / "none.png")


def test_a_column_of_boxes_may_name_masks(tmp_path, monkeypatch):
    """Relative to the folder of the file, as pictures are."""
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.array([[0, 255]], dtype=np.uint8)).save(tmp_path / "mask.png")
    lines = [{"text": "one", "boxes": "mask.png"}, {"text": "two", "boxes": [[0, 0, 0.5, 1]]}, {"text": "three"}]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "data.csv").write_text('text,boxes\none,mask.png\ntwo,"[[0, 0, 0.5, 1]]"\nthree,\n')
    monkeypatch.setattr("vlattn_fast.interpret.dataset.samples.build_inputs", lambda *_: {})
    monkeypatch.setattr("vlattn_fast.interpret.dataset.samples.on_device", lambda inputs, model: inputs)
    for name in ("data.jsonl", "data.csv"):
        assert Items(tmp_path / name)[0].boxes == tmp_path / "mask.png"
        mask, boxes, nothing = (one["boxes"] for one in samples(None, None, tmp_path / name))
        assert mask.tolist() == [[False, True]] and boxes.tolist() == [[0, 0, 0.5, 1]] and nothing is None
    (tmp_path / "data.csv").write_text("text,id,boxes\none,first,none.png\n")
    with pytest.raises(
        ValueError, match="boxes must be a file; got .*none.png, which does not exist, in input 'first' of the dataset"
    ):
        list(samples(None, None, tmp_path / "data.csv"))
