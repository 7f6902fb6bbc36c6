"""The scale of pictures, from 0 to the largest value beside the range of the values; and how many maps are laid out."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
import torch

import vlattn_fast as va
from tests.helpers.interpret.made import made

pytest.importorskip("matplotlib")
from PIL import Image

NEARLY_EVEN = torch.linspace(0.0911, 0.0966, 12).view(1, 3, 4).repeat(2, 1, 1)  # a spread of 6 %
SIGNED = torch.linspace(-1.0, 2.0, 12).view(1, 3, 4).repeat(2, 1, 1)
PHOTO = np.full((30, 40, 3), 255, np.uint8)
MANY = {"relevancy": {"vision": torch.rand(32, 12)}, **dict.fromkeys(("text", "token_ids", "scores", "target"))}


def bars(figure) -> list:
    return [axis for axis in figure.axes if axis.get_label() == "<colorbar>"]


@pytest.mark.parametrize("photo", [None, PHOTO])
def test_a_nearly_even_map_is_drawn_nearly_even(photo):
    explanation = made(image=NEARLY_EVEN, text=NEARLY_EVEN.flatten(1)[:, :3])
    figure = explanation.plot(photo, rows=[0])
    drawn = next(axis.images[-1] for axis in figure.axes if axis.images and axis.images[-1].get_array().shape == (3, 4))
    assert drawn.get_clim() == pytest.approx((0, 0.0966))
    if photo is not None:
        assert drawn.get_alpha().min() > 0.8
        shown = np.asarray(explanation.overlay(photo)).astype(int)
        assert np.abs(shown - shown[0, 0]).max() < 40  # of 255
    (bar,) = bars(figure)
    assert bar.get_ylabel() == "values 0.0911 to 0.0966"


def test_a_map_with_numbers_below_zero_has_a_scale_of_two_sides():
    explanation = made(image=SIGNED)
    figure = explanation.plot(rows=[0])
    drawn = figure.axes[0].images[-1]
    assert drawn.get_clim() == (-2, 2) and bars(figure)[0].get_ylabel() == "values \u22121 to 2"
    colors = drawn.cmap(drawn.norm(np.array([-2.0, -1e-9, 1e-9, 2.0])))
    assert colors[0][2] > colors[0][0] and colors[3][0] > colors[3][2]  # blue below, the map's last colour above
    np.testing.assert_allclose(colors[1], colors[2], atol=0.05)
    over = explanation.plot(PHOTO, rows=[0])
    alpha = next(axis.images[1] for axis in over.axes if len(axis.images) == 2).get_alpha()
    near_zero = 0.85 * (1.5 * float(SIGNED[0, 1, 0]) / 2) ** 1.5
    np.testing.assert_allclose(alpha.ravel()[[0, 4, 11]], [0.85 * 0.75**1.5, near_zero, 0.85], rtol=1e-4)
    shown = np.asarray(explanation.overlay(PHOTO)).astype(int)
    assert shown[3, 5, 2] > shown[3, 5, 0] and shown[27, 35, 0] > shown[27, 35, 2]


def test_an_overlay_knows_its_scale():
    low, high = made(image=SIGNED).overlay(PHOTO).info["scale"]
    assert (low, high) == (-2, 2) and made(image=SIGNED).overlay(PHOTO).info["range"] == (-1, 2)
    info = made(image=NEARLY_EVEN).overlay(PHOTO).info
    assert info["scale"] == pytest.approx((0, 0.0966)) and info["range"] == pytest.approx((0.0911, 0.0966))


def test_a_page_has_the_same_scale():
    pytest.importorskip("jinja2")
    for image, scale in ((NEARLY_EVEN, [0, 0.0966]), (SIGNED, [-2, 2])):
        page = made(image=image).to_html(PHOTO)
        data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
        view = data["methods"][0]["choices"][0]["views"][""]
        assert [view["low"], view["high"]] == pytest.approx(scale)
        assert view["range"] == pytest.approx([image.min().item(), image.max().item()], rel=1e-3)
        (map_,) = view["figures"][0]["maps"]
        cells = map_["low"] + np.array(map_["cells"]) / data["steps"] * (map_["high"] - map_["low"])
        np.testing.assert_allclose(cells, image[0].flatten(), atol=1e-3 * float(image.max() - image.min()))
    assert int(data["signed"][0][5:], 16) > int(data["signed"][0][1:3], 16)  # more blue than red


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_map_without_a_number_above_zero(value):
    explanation = made(image=torch.full((2, 3, 4), value), text=torch.full((2, 3), value))
    figure = explanation.plot(PHOTO)
    figure.canvas.draw()
    assert not bars(figure)
    assert (np.asarray(explanation.overlay(PHOTO)) == 255).all()  # the photo as it is
    assert "NaN" not in explanation.to_html(PHOTO).split("</script>")[0]


# --- many maps ---


def test_many_rows_wrap_into_a_grid():
    rows = made(image=torch.rand(32, 3, 4), **MANY, image_rows=list(range(32)))
    width, height = rows.plot().get_size_inches()
    assert height < 25 and 0.5 < width / height < 2
    few = rows.plot(rows=[0, 1, 2])
    assert few.get_size_inches()[1] == pytest.approx(3 * few.subfigs[0].bbox.height / few.dpi, rel=1e-3)
    assert len(rows.plot(rows=[0]).axes) == len(few.axes) // 3


@pytest.mark.parametrize("photo", [None, PHOTO])
def test_frames_of_a_video_wrap_into_lines(photo):
    for frames in (9, 128):
        video = made(image=torch.rand(frames, 3, 4), image_rows=[0] * frames)
        figure = video.plot(photo if photo is None else [photo] * frames, rows=[0])
        width, height = figure.get_size_inches()
        assert width < 26 and height < 12
        names = [axis.get_title() for axis in figure.axes]
        assert (f"map 9 of {frames}" in names) == (frames == 9)
        assert len(figure.axes) == (9 + 2 if frames == 9 else 3)  # maps or their sheet, words, scale
    page = va.compare({"a": video, "b": video}).to_html(rows=[0])
    sizes = [Image.open(io.BytesIO(base64.b64decode(one))).size for one in re.findall(r'base64,([^"]+)"', page)]
    assert sizes == [sizes[0]] * 2 and max(sizes[0]) <= 1040
