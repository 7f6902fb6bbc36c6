"""The panels of a row: names of thumbnails and tiles, a photo once, lines that wrap."""

import numpy as np
import pytest
import torch

import vlattn_fast as va
from tests.helpers.interpret.cases import CASES
from tests.helpers.interpret.made import answered, made
from tests.interpret.result.test_page import data as data_of

pytest.importorskip("matplotlib")

PHOTO = np.full((40, 60, 3), 255, np.uint8)
ONE = {"relevancy": {"vision": torch.rand(1, 13)}, **dict.fromkeys(("text", "token_ids", "scores", "target"))}


def of_tiles(count: int = 1, *, first: bool = True):
    """A row whose photos have a map of tiles and a thumbnail each, in front or behind."""
    of_photo = [torch.rand(4, 4), torch.rand(6, 8)][:: 1 if first else -1]
    photos = [number for number in range(count) for _ in of_photo]
    places = {"image_samples": [0] * 2 * count, "photos": photos, "crops": [(0, 0, 1, 1)] * 2 * count}
    return made(**ONE, image=tuple(of_photo * count), **places)


def titles(figure) -> list[str]:
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


def test_tiles_and_their_thumbnail_have_names():
    assert titles(of_tiles().plot()) == ["thumbnail", "tiles"]
    assert titles(of_tiles(first=False).plot(PHOTO)) == ["tiles", "thumbnail"]
    two = ["photo 1, thumbnail", "photo 1, tiles", "photo 2, thumbnail", "photo 2, tiles"]
    assert titles(of_tiles(2).plot([PHOTO, PHOTO[::2]])) == two
    page = of_tiles(2).to_html()
    data = data_of(page)
    assert [figure["name"] for figure in data["methods"][0]["choices"][0]["views"][""]["figures"]] == two


@pytest.mark.parametrize(
    "maps",
    [{"photos": [0, 1]}, {"photos": None}, {"photos": [0, 0], "image": torch.rand(2, 4, 4)}],
    ids=["two", "unknown", "same"],
)
def test_other_maps_are_counted(maps):
    fields = {"image": (torch.rand(4, 4), torch.rand(6, 8)), "image_samples": [0, 0], **maps}
    assert titles(made(**ONE, **fields).plot()) == ["map 1 of 2", "map 2 of 2"]


def test_a_photo_is_drawn_once_before_its_maps():
    """A photo alone has one image; a map lies on its photo."""
    shown = [len(axis.images) for axis in of_tiles().plot(PHOTO).axes if axis.images]
    assert shown == [1, 2, 2]
    shown = [len(axis.images) for axis in of_tiles(2).plot([PHOTO, PHOTO[::2]]).axes if axis.images]
    assert shown == [1, 2, 2, 1, 2, 2]
    assert [len(axis.images) for axis in of_tiles(3).plot([PHOTO] * 3).axes if axis.images] == [2] * 6


def test_maps_of_words_have_names():
    image = (torch.rand(3, 2, 3), torch.rand(3, 4, 6), torch.rand(3, 2, 3), torch.rand(3, 4, 6))
    figure = answered(image=image, image_samples=[0, 0, 1, 1], photos=[0, 0, 1, 1]).plot()
    names = [name.split("  ")[0] for name in titles(figure)]
    assert names[:4] == ["a (thumbnail)", "a (tiles)", "giraffe (thumbnail)", "giraffe (tiles)"]


def test_small_multiples_of_wide_rows_wrap():
    """Two maps side by side are twice as wide: there are half as many in a line."""
    beside = va.compare({str(number): of_tiles() for number in range(4)})
    figure = beside.plot()
    maps = [axis for axis in figure.axes if axis.images]
    assert len({round(axis.get_subplotspec().colspan.start) for axis in maps}) == 2
    assert figure.get_size_inches()[0] < 12
    assert [axis.get_title(loc="left") for axis in maps] == [f"{number}\nthumbnail | tiles" for number in range(4)]
    assert beside.to_html().count('class="line"') == 2


def test_sheets_of_layers_say_their_scale():
    case = CASES["clip"]()
    whole = va.explain_layers(case.model, case.inputs, per="layer")
    apart, together = whole.plot(samples=[0]), whole.plot(samples=[0], common=True)
    assert [axis.get_xlabel() for axis in apart.axes if axis.get_xlabel()] == ["each map on a scale of its own"]
    (bar,) = [axis for axis in together.axes if axis.get_label() == "<colorbar>"]
    assert bar._colorbar.norm.vmax == whole.image[:, 0].max().item() and bar.get_ylabel().startswith("values ")
    assert [axis.get_title() for axis in apart.axes if axis.get_title()] == ["words, each line on a scale of its own"]
