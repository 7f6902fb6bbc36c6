"""Photos under maps: the part that the model saw, and photos as people pass them."""

import warnings

import numpy as np
import pytest
import torch

image_module = pytest.importorskip("PIL.Image")
import transformers  # noqa: E402

from tests.helpers import saved_models  # noqa: E402
from tests.helpers.interpret.made import answered, made  # noqa: E402
from tests.interpret.result.test_page import data as data_of  # noqa: E402
from vlattn_fast.interpret import Explanation  # noqa: E402
from vlattn_fast.interpret.result.figures import photos  # noqa: E402

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
    data = data_of(page)
    assert data["methods"][0]["choices"][0]["views"][""]["figures"][0]["maps"][0]["box"] == pytest.approx(MIDDLE, abs=3e-3)


def test_a_processor_that_shows_the_whole_photo() -> None:
    assert photos.seen_part(squashed, PHOTO.size) == (0, 0, 1, 1)
    assert photos.seen_part(squashed, (30, 1000)) == (0, 0, 1, 1)
    assert explained().plot(PHOTO, processor=squashed).axes[1].images[1].get_extent() == [0, 640, 427, 0]
    with pytest.warns(UserWarning, match="A map of 14 x 14 patches is stretched"):  # a map of tiles has no single place
        explained().plot(PHOTO, processor=lambda picture: torch.zeros(5, 3, 24, 24))


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
    with pytest.raises(ValueError, match="image must be a file; got none.png, which does not exist"):
        explained().plot("none.png")
    with pytest.raises(ValueError, match="image must be an image file; got .*, which PIL cannot read"):
        explained().save_html(tmp_path / "page.html", __file__)


def test_frames_of_a_video_whose_maps_are_of_two() -> None:
    with pytest.raises(
        ValueError, match=r"one image or 4 of them .*; got 8. If each map stands for 2 frames .*, pass image\[::2\]"
    ):
        explained(*[(2, 3)] * 4).plot([PHOTO] * 8)


def test_processors_are_refused_by_name() -> None:
    for processor in (saved_models.tokenizer(), "clip"):
        with pytest.raises(TypeError, match="processor must prepare images for the model; got"):
            explained().plot(PHOTO, processor=processor)
    with pytest.raises(ValueError, match="crop must be None if processor is given, .*; got"):
        explained().plot(PHOTO, processor=CLIP, crop=MIDDLE)
    with pytest.raises(ValueError, match="processor must be given together with an image"):
        explained().plot(processor=CLIP)
    for changed in (lambda picture: by_hand(picture).flip(2), lambda picture: by_hand(picture) * 0):
        with pytest.raises(ValueError, match="processor must only resize and crop images"):
            explained().plot(PHOTO, processor=changed)


def test_an_overlay_has_the_photos_size_and_pixels() -> None:
    """Where the map is smallest, and outside of the part that the model saw, the photo stays as it is."""
    values = torch.zeros(1, 14, 14)
    values[0, 7, 7] = 1.0
    explanation = Explanation({"vision": torch.rand(1, 197)}, image=values)
    shown = explanation.overlay(PHOTO, processor=CLIP)
    assert shown.size == PHOTO.size and shown.mode == "RGB"
    changed = (np.asarray(shown) != np.asarray(PHOTO)).any(-1)
    rows, columns = changed.nonzero()
    side = 427 / 14  # of a patch; the map is smooth, so that its neighbours are coloured, too
    left = (640 - 427) / 2
    for places, start in ((rows, 0), (columns, left)):
        assert start + 6.4 * side < places.min() < start + 7 * side and start + 8 * side < places.max() < start + 8.6 * side
    middle = np.asarray(shown)[round(7.5 * side), round(left + 7.5 * side)] / 255
    under = np.asarray(PHOTO)[round(7.5 * side), round(left + 7.5 * side)] / 255
    from vlattn_fast.interpret.result.figures.figure import colors

    np.testing.assert_allclose(middle, 0.85 * np.asarray(colors("inferno")(1.0)[:3]) + 0.15 * under, atol=0.1)
    assert np.array_equal(np.asarray(explanation.overlay(PHOTO, processor=CLIP, alpha=0.0)), np.asarray(PHOTO))


def test_overlays_of_rows_words_and_panels() -> None:
    white, explanation = image_module.new("RGB", (30, 20), "white"), answered()
    words = [np.asarray(explanation.overlay(white, word=word)).astype(int) for word in range(2)]
    alone = Explanation({"language": explanation.relevancy["language"][:1, 0]}, image=explanation.image[:1, 0])
    assert np.array_equal(words[0], np.asarray(alone.overlay(white))) and (words[0] != words[1]).any()
    together = Explanation({"language": explanation.relevancy["language"][:1, 0]}, image=explanation.image[:1].sum(1))
    assert np.abs(np.asarray(explanation.overlay(white)).astype(int) - np.asarray(together.overlay(white))).max() <= 1
    second = made(image=torch.stack([torch.zeros(3, 4), torch.eye(4)[:3]]))
    assert (np.asarray(second.overlay(white)) == 255).all() and (np.asarray(second.overlay(white, sample=1)) < 255).any()
    tiles = made(image=torch.stack([torch.zeros(3, 4), torch.eye(4)[:3], torch.zeros(3, 4)]), image_samples=[0, 0, 1])
    assert (np.asarray(tiles.overlay(white, panel=1)) < 255).any() and (np.asarray(tiles.overlay(white, panel=0)) == 255).all()
    corners = torch.tensor([[[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]]])
    regions = Explanation({"joint": torch.rand(1, 9)}, regions=torch.tensor([[0.0, 1.0]]), boxes=corners)
    halves = np.asarray(regions.overlay(white))
    assert (halves[:, :15] == 255).all() and (halves[:, 15:].min(-1) < 255).all()
    for options, name in (({"sample": 2}, "sample"), ({"word": 0}, "word"), ({"panel": 1}, "panel"), ({"alpha": 2}, "alpha")):
        with pytest.raises(ValueError, match=f"{name} must be"):
            made().overlay(white, **options)
    with pytest.raises(ValueError, match="image must be the photo under the map; got None"):
        made().overlay(None)


def test_a_picture_of_too_many_pixels_says_what_to_do(tmp_path, monkeypatch) -> None:
    PHOTO.save(tmp_path / "large.png")
    monkeypatch.setattr(image_module, "MAX_IMAGE_PIXELS", 100_000)
    said = r"image must have at most 200,000 pixels, .*; got more in .*large.png. Scale the image down, .* or raise PIL's limit"
    for draw in (explained().plot, photos.open_image):
        with pytest.raises(ValueError, match=said):
            draw(tmp_path / "large.png")


def test_an_explanation_without_maps_says_what_to_do() -> None:
    """`tests/interpret/explaining/test_without_map.py` has what BLIP-2 and Whisper say."""
    for explanation in (
        Explanation({"tower0": torch.rand(1, 9)}),
        Explanation({"tower0": torch.rand(1, 9)}, no_map="it is a sound"),
    ):
        why = (
            explanation.no_map
            or r"no token of tower0 has a place in an image. .* explain with patches=va.PatchGrid\(rows, columns\)"
        )
        for draw in (explanation.plot, explanation.to_html, explanation.overlay):
            with pytest.raises(ValueError, match=f"image must be None .* without maps and boxes; got one, but {why}"):
                draw(PHOTO)


def test_a_part_of_a_batch_counts_its_photos_anew() -> None:
    crops = [None, (0, 0, 1, 1), (0, 0, 1, 2)]
    explanation = Explanation({"vision": torch.rand(3, 5)}, image=torch.rand(3, 2, 2), photos=[0, 1, 1], crops=crops)
    assert explanation[1:].photos == [0, 0] and explanation[1:].crops == crops[1:]
    assert explanation[:2].photos == [0, 1] and explanation[2].photos == [0]
    assert explanation[2].overlay(image_module.new("RGB", (40, 20))).size == (40, 20)
