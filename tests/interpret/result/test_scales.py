"""The scale of pictures, from 0 to the largest value beside the range of the values; and how many maps are laid out."""

import base64
import io
import re

import numpy as np
import pytest
import torch

import vlattn_fast as va
from tests.helpers.interpret.made import made
from tests.interpret.result.test_page import data as data_of

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
    figure = explanation.plot(photo, samples=[0])
    drawn = next(axis.images[-1] for axis in figure.axes if axis.images and axis.images[-1].get_array().shape == (3, 4))
    assert drawn.get_clim() == pytest.approx((0, 0.0966))
    if photo is not None:
        alpha = drawn.get_alpha()
        assert 0.4 < alpha.min() == pytest.approx(alpha.max(), rel=0.1) and alpha.max() < 0.5  # the photo stays visible
        shown = np.asarray(explanation.overlay(photo)).astype(int)
        assert np.abs(shown - shown[0, 0]).max() < 40  # of 255
    (bar,) = bars(figure)
    assert bar.get_ylabel() == "values 0.0911 to 0.0966"


def test_a_map_with_numbers_below_zero_has_a_scale_of_two_sides():
    explanation = made(image=SIGNED)
    figure = explanation.plot(samples=[0])
    drawn = figure.axes[0].images[-1]
    assert drawn.get_clim() == (-2, 2) and bars(figure)[0].get_ylabel() == "values \u22121 to 2"
    colors = drawn.cmap(drawn.norm(np.array([-2.0, -1e-9, 1e-9, 2.0])))
    assert colors[0][2] > colors[0][0] and colors[3][0] > colors[3][2]  # blue below, the map's last colour above
    np.testing.assert_allclose(colors[1], colors[2], atol=0.05)
    over = explanation.plot(PHOTO, samples=[0])
    alpha = next(axis.images[1] for axis in over.axes if len(axis.images) == 2).get_alpha()
    most = 0.85 * (1 - float(SIGNED[0].abs().flatten().sort()[0][1]) / 4)  # nine tenths are larger
    near_zero = most * (1.5 * float(SIGNED[0, 1, 0]) / 2) ** 1.5
    np.testing.assert_allclose(alpha.ravel()[[0, 4, 11]], [most * 0.75**1.5, near_zero, most], rtol=1e-4)
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
        data = data_of(page)
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


def test_many_rows_wrap_into_a_grid():
    rows = made(image=torch.rand(32, 3, 4), **MANY, image_samples=list(range(32)))
    width, height = rows.plot().get_size_inches()
    assert height < 25 and 0.5 < width / height < 2
    few = rows.plot(samples=[0, 1, 2])
    assert few.get_size_inches()[1] == pytest.approx(3 * few.subfigs[0].bbox.height / few.dpi, rel=1e-3)
    assert len(rows.plot(samples=[0]).axes) == len(few.axes) // 3


@pytest.mark.parametrize("photo", [None, PHOTO])
def test_frames_of_a_video_wrap_into_lines(photo):
    for frames in (9, 128):
        video = made(image=torch.rand(frames, 3, 4), image_samples=[0] * frames)
        figure = video.plot(photo if photo is None else [photo] * frames, samples=[0])
        width, height = figure.get_size_inches()
        assert width < 26 and height < 12
        names = [axis.get_title() for axis in figure.axes]
        assert (f"map 9 of {frames}" in names) == (frames == 9)
        assert len(figure.axes) == (9 + 2 if frames == 9 else 3)  # maps or their sheet, words, scale
    page = va.compare({"a": video, "b": video}).to_html(samples=[0])
    sizes = [Image.open(io.BytesIO(base64.b64decode(one))).size for one in re.findall(r'base64,([^"]+)"', page)]
    assert sizes == [sizes[0]] * 2 and max(sizes[0]) <= 4 * 260 + 3 * 2


PEAK = torch.cat([torch.linspace(0.0, 0.016, 195), torch.tensor([0.082])]).view(1, 14, 14).repeat(2, 1, 1)  # as "rollout" has it
SQUARE = np.full((28, 28, 3), 255, np.uint8)
END = float(PEAK[0].flatten()[193])  # of 196 entries, two are larger


def test_one_large_patch_does_not_hide_the_others():
    explanation = made(image=PEAK)
    for photo in (None, SQUARE):
        for scale, end, text in (("max", 0.082, "values 0 to 0.082"), ("quantile", END, "values 0 to 0.082, clipped at 0.0159")):
            figure = explanation.plot(photo, samples=[0], scale=scale)
            drawn = next(axis.images[-1] for axis in figure.axes if axis.images and axis.images[-1].get_array().shape == (14, 14))
            (bar,) = bars(figure)
            assert drawn.get_clim() == pytest.approx((0, end)) and bar.get_ylabel() == text
            assert bar._colorbar.extend == ("neither" if scale == "max" else "max")
            figure.canvas.draw()
    info = explanation.overlay(SQUARE, scale="quantile").info
    assert info["scale"] == pytest.approx((0, END)) and info["range"] == pytest.approx((0, 0.082))
    dark, light = (np.asarray(explanation.overlay(SQUARE, scale=scale)).astype(int)[27, 20] for scale in ("quantile", "max"))
    assert (255 - dark).max() > 100 > 50 > (255 - light).max()  # a patch of 0.015


def test_a_scale_that_clips_has_two_ends_below_zero():
    signed = made(image=torch.where(PEAK > 0.05, -PEAK, PEAK))
    figure = signed.plot(samples=[0], scale="quantile")
    drawn = next(axis.images[-1] for axis in figure.axes if axis.images)
    assert drawn.get_clim() == pytest.approx((-END, END)) and bars(figure)[0]._colorbar.extend == "both"
    assert bars(figure)[0].get_ylabel() == "values \u22120.082 to 0.016, clipped at ±0.0159"


@pytest.mark.parametrize(
    ("values", "end"),
    [([0.5], 0.5), ([0.0, 0.0, 3.0], 3.0), ([0.25, 1.0], 0.25), ([float("nan"), 0.25, 1.0], 0.25), ([0.0], 0.0)],
)
def test_the_end_of_few_patches(values, end):
    """The largest is left out, unless nothing else is above 0."""
    image = torch.tensor(values).view(1, 1, -1).repeat(2, 1, 1)
    figure = made(image=image).plot(samples=[0], scale="quantile")
    drawn = next(axis.images[-1] for axis in figure.axes if axis.images)
    assert drawn.get_clim() == pytest.approx((0, end))


def test_one_scale_for_all_rows_reaches_as_far_as_the_widest():
    both = made(image=torch.stack([PEAK[0], 3 * PEAK[0]]))
    drawn = [axis.images[-1] for axis in both.plot(scale="quantile", common=True).axes if axis.images]
    assert [image.get_clim() for image in drawn if image.get_array().shape == (14, 14)] == [pytest.approx((0, 3 * END))] * 2


def test_a_page_and_small_multiples_clip_as_figures_do():
    pytest.importorskip("jinja2")
    pages = {scale: made(image=PEAK).to_html(scale=scale) for scale in ("max", "quantile")}
    for scale, page in pages.items():
        data = data_of(page)
        view = data["methods"][0]["choices"][0]["views"][""]
        assert [view["high"], view["clip"]] == pytest.approx([0.082, END], rel=1e-3)
        assert ('id="clip" type="checkbox" checked' in page) == (scale == "quantile")
    beside = va.compare({"a": made(image=PEAK), "b": made()}, scale="quantile")
    assert [bar._colorbar.norm.vmax for bar in bars(beside.plot(samples=[0]))][0] == pytest.approx(END)
    assert "clipped at 0.0159" in beside.to_html() and "clipped at 0.0159" not in beside.to_html(scale="max")


@pytest.mark.parametrize("draw", ["plot", "to_html", "overlay"])
def test_an_unknown_scale_is_named(draw):
    with pytest.raises(ValueError, match="scale must be one of 'max', 'quantile'; got 'log'"):
        getattr(made(), draw)(PHOTO, scale="log")
    with pytest.raises(ValueError, match="scale must be one of 'max', 'quantile'; got None"):
        va.compare({"a": made()}, scale=None)
