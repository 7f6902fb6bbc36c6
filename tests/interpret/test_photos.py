"""Photos under maps: the part that the model saw, and photos as people pass them."""

from __future__ import annotations

import json
import re
import warnings

import numpy as np
import pytest
import torch

image_module = pytest.importorskip("PIL.Image")
transformers = pytest.importorskip("transformers")

from tests.helpers import saved_models  # noqa: E402
from vlattn_fast.interpret import Explanation  # noqa: E402
from vlattn_fast.interpret.result import photos  # noqa: E402

PHOTO = image_module.effect_noise((640, 427), 80).convert("RGB")
MIDDLE = ((640 - 427) / 2 / 640, 0, (640 + 427) / 2 / 640, 1)  # a square


def explained(*shapes: tuple[int, int]) -> Explanation:
    maps = tuple(torch.rand(shape) for shape in shapes or [(14, 14)])
    return Explanation({"vision": torch.rand(len(maps), 197)}, image=maps)


def by_hand(picture, size: int = 224) -> torch.Tensor:
    """As timm's and open_clip's: the shortest side resized, the middle cut out, normalised."""
    scale = size / min(picture.size)
    picture = picture.resize([round(side * scale) for side in picture.size], image_module.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in picture.size)
    pixels = torch.from_numpy(np.array(picture.crop((left, top, left + size, top + size)))).permute(2, 0, 1) / 255
    return (pixels - torch.tensor([0.48, 0.46, 0.41])[:, None, None]) / 0.27


def squashed(picture) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.resize((224, 224)))).permute(2, 0, 1) / 127.5 - 1


CLIP = transformers.CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})


@pytest.mark.parametrize("processor", [CLIP, transformers.CLIPProcessor(CLIP, saved_models.tokenizer()), by_hand])
def test_the_map_lies_over_the_part_that_the_model_saw(processor) -> None:
    figure = explained().plot(PHOTO, processor=processor)
    x1, x2, y2, y1 = figure.axes[1].images[1].get_extent()
    assert (x1 / 640, y1 / 427, x2 / 640, y2 / 427) == pytest.approx(MIDDLE, abs=3e-3)
    page = explained().to_html(PHOTO, processor=processor)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data["methods"][0]["choices"][0]["views"][""]["figures"][0]["maps"][0]["box"] == pytest.approx(MIDDLE, abs=3e-3)


def test_a_processor_that_shows_the_whole_photo() -> None:
    assert photos.seen_part(squashed, PHOTO.size) == (0, 0, 1, 1)
    assert photos.seen_part(squashed, (30, 1000)) == (0, 0, 1, 1)
    for processor in (squashed, lambda picture: torch.zeros(5, 3, 24, 24)):  # tiles have no single place
        assert explained().plot(PHOTO, processor=processor).axes[1].images[1].get_extent() == [0, 640, 427, 0]


def test_each_photo_has_its_part() -> None:
    upright = PHOTO.rotate(90, expand=True)
    figure = explained((14, 14), (14, 14)).plot([PHOTO, upright], processor=by_hand)
    overlays = [axis.images[1].get_extent() for axis in figure.axes if len(axis.images) == 2]
    assert overlays[0] == pytest.approx([106.5, 533.5, 427, 0], abs=2)
    assert overlays[1] == pytest.approx([0, 427, 533.5, 106.5], abs=2)


def test_a_map_of_another_shape_than_the_photo_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="A map of 14 x 14 patches is stretched over a photo of 640 x 427 .* Pass processor="):
        explained().plot(PHOTO)
    with pytest.warns(UserWarning, match="14 x 14") as caught:
        explained((10, 15), (14, 14)).to_html(PHOTO)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explained((10, 15), (10, 14)).plot(PHOTO)  # a patch more or less is rounding
        explained().plot(PHOTO, crop=(0, 0, 1, 1))
        explained().plot(PHOTO, processor=squashed)
        explained().plot()


def test_a_photo_may_be_a_file(tmp_path) -> None:
    small, path = PHOTO.resize((30, 20)), tmp_path / "photo.png"
    small.save(path)
    with path.open("rb") as file:
        for photo in (path, str(path), file):
            shown = explained((2, 3)).plot(photo).axes[0].images[0].get_array()
            np.testing.assert_array_equal(shown, np.asarray(small))
    pair = explained((2, 3), (2, 3)).plot([path, small])
    assert len([axis for axis in pair.axes if len(axis.images) == 2]) == 2
    with pytest.raises(ValueError, match="image must be a file; got none.png, which is not there"):
        explained().plot("none.png")
    with pytest.raises(ValueError, match="image must be a picture; got .*, which is no picture"):
        explained().save_html(tmp_path / "page.html", __file__)


def test_processors_are_refused_by_name() -> None:
    for processor in (saved_models.tokenizer(), "clip"):
        with pytest.raises(TypeError, match="processor must prepare pictures for the model; got"):
            explained().plot(PHOTO, processor=processor)
    with pytest.raises(ValueError, match="crop must be None beside processor, .*; got"):
        explained().plot(PHOTO, processor=CLIP, crop=MIDDLE)
    with pytest.raises(ValueError, match="processor must come with an image"):
        explained().plot(processor=CLIP)
    for changed in (lambda picture: by_hand(picture).flip(2), lambda picture: by_hand(picture) * 0):
        with pytest.raises(ValueError, match="processor must do no more than resize and cut out"):
            explained().plot(PHOTO, processor=changed)
