"""Crops of photos: a photo with one white spot goes through each family's own image processor, and a map that is hot in the token
whose pixels hold the spot is drawn at the spot."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

image_module = pytest.importorskip("PIL.Image")

import transformers as t  # noqa: E402

from tests.helpers.interpret.crop_cases import CASES, Crops  # noqa: E402
from tests.helpers.interpret.decoder_cases import IMAGE  # noqa: E402
from tests.interpret.adapters import test_decoder_images  # noqa: F401, E402 (registers attention that adds nothing)
from tests.interpret.result.test_page import data as data_of  # noqa: E402
from vlattn_fast.interpret import Explanation, explain  # noqa: E402
from vlattn_fast.interpret.adapters.registry import find_adapter  # noqa: E402
from vlattn_fast.interpret.adapters.tokens import Tokens  # noqa: E402
from vlattn_fast.interpret.evaluating.perturbation import split  # noqa: E402

LANDSCAPE, PORTRAIT = (600, 400), (400, 600)
SPOTS = [(LANDSCAPE, (0.75, 0.15)), (PORTRAIT, (0.3, 0.7))]


def photo(size: tuple[int, int], spot: tuple[float, float] | None) -> Any:
    """Grey, with a white spot of 40 pixels."""
    pixels = np.full((size[1], size[0], 3), 100, np.uint8)
    if spot is not None:
        x, y = (round(place * side) for place, side in zip(spot, size, strict=True))
        pixels[y - 20 : y + 20, x - 20 : x + 20] = 255
    return image_module.fromarray(pixels)


def states_of(case: Crops, inputs: dict[str, Any]) -> torch.Tensor:
    """What the language model gets of each token."""
    seen: list[torch.Tensor] = []
    language = case.model.get_submodule(case.language)
    hook = language.register_forward_pre_hook(lambda m, a, k: seen.append(k[case.states].flatten(0, -2)), with_kwargs=True)
    with torch.no_grad():
        case.model(**inputs)
    hook.remove()
    return seen[0].float()


def hot_at_the_spot(case: Crops, *spots: tuple[tuple[int, int], tuple[float, float]]) -> Explanation:
    """The explanation of photos of these sizes, whose maps have the difference that the spots make to each token."""
    inputs, plain = case.inputs([photo(*spot) for spot in spots]), case.inputs([photo(size, None) for size, _ in spots])
    return with_change(case, inputs, plain)


def with_change(case: Crops, inputs: dict[str, Any], plain: dict[str, Any]) -> Explanation:
    """The explanation of inputs, whose maps have the difference to plain inputs."""
    got = explain(case.model, inputs)
    case.model.get_submodule(case.vision).set_attn_implementation("nothing")
    change = (states_of(case, inputs) - states_of(case, plain)).norm(dim=-1)[None]
    record = find_adapter(case.model).towers[-1]
    maps, _ = record.tokens_in(case.model, inputs, tuple(change.shape)).maps(change)
    return replace(got, image=maps)


def drawn_at(explanation: Explanation, panel: int, *sizes: tuple[int, int]) -> tuple[float, float]:
    """Where the hottest part of a map is drawn, relative to its photo, which is one of these sizes."""
    shown = explanation.overlay([image_module.new("RGB", size) for size in sizes], panel=panel)
    light = np.asarray(shown).sum(-1, dtype=float)
    y, x = (places.mean() + 0.5 for places in (light > 0.95 * light.max()).nonzero())
    return x / shown.width, y / shown.height


def hottest_on_the_page(explanation: Explanation, size: tuple[int, int]) -> list[tuple[float, float]]:
    """The same for each map of the page: the middle of its hottest cell."""
    page = explanation.to_html(image_module.new("RGB", size))
    data = data_of(page)
    places = []
    for figure in data["methods"][0]["choices"][0]["views"][""]["figures"]:
        (part,) = figure["maps"]
        assert data["images"][figure["image"]]["width"] == size[0]
        x1, y1, x2, y2 = part["box"]
        row, column = divmod(int(np.argmax(part["cells"])), part["size"][1])
        places.append((x1 + (column + 0.5) / part["size"][1] * (x2 - x1), y1 + (row + 0.5) / part["size"][0] * (y2 - y1)))
    return places


@pytest.mark.parametrize("family", CASES)
def test_a_spot_is_drawn_where_it_is(family: str) -> None:
    for size, spot in SPOTS:
        case = CASES[family]()
        got = hot_at_the_spot(case, (size, spot))
        assert len(got.image) == case.maps and set(got.photos) == {0} and None not in got.crops
        on_page = hottest_on_the_page(got, size)
        for panel, part in enumerate(got.image):
            cell = [1.05 / count for count in reversed(part.shape)]
            for place in (drawn_at(got, panel, size), on_page[panel]):
                assert all(abs(a - b) < one for a, b, one in zip(place, spot, cell, strict=True)), (size, panel, place)


@pytest.mark.parametrize("family", ["InternVL", "Gemma 3", "Idefics 3", "LLaVA-NeXT", "Llama 4"])
def test_photos_of_one_prompt_have_their_crops(family: str) -> None:
    """Photos of different shapes, and so of different numbers of crops: each map is drawn on its photo, and not on the other."""
    if family not in CASES:
        return
    got = hot_at_the_spot(CASES[family](), *SPOTS)
    assert got.photos == [0, 0, 1, 1] and got.image_samples == [0] * 4
    if family == "Llama 4":  # 144 x 96 pixels of a canvas of 160 x 96, and upright
        assert [got.crops[0], got.crops[2]] == [pytest.approx((0, 0, 160 / 144, 1)), pytest.approx((0, 0, 1, 160 / 144))]
    for panel, (part, number) in enumerate(zip(got.image, got.photos, strict=True)):
        size, spot = SPOTS[number]
        place = drawn_at(got, panel, LANDSCAPE, PORTRAIT)
        assert got.overlay([image_module.new("RGB", size) for size, _ in SPOTS], panel=panel).size == size
        assert all(abs(a - b) < 1.05 / n for a, b, n in zip(place, spot, reversed(part.shape), strict=True)), (panel, place)
    page = got.to_html([image_module.new("RGB", size) for size, _ in SPOTS])
    data = data_of(page)
    shown = [figure["image"] for figure in data["methods"][0]["choices"][0]["views"][""]["figures"]]
    assert [data["images"][number]["width"] for number in shown] == [600, 600, 400, 400]
    assert [picture is None for picture in data["images"]] == [False, True, False, True]  # each photo is stored once
    for photos in ([image_module.new("RGB", LANDSCAPE)], [image_module.new("RGB", LANDSCAPE)] * 3):
        with pytest.raises(ValueError, match=f"image must be 2 photos, .*, or 4, one per map; got {len(photos)}"):
            got.overlay(photos)


@pytest.mark.parametrize("family", ["InternVL", "Llama 4"])
def test_patches_of_crops_can_be_taken_away(family: str) -> None:
    """`evaluate` sets the pixels of these tokens to 0: without the tokens that the spot changes, the photo is one without it."""
    if family not in CASES:
        return
    case = CASES[family]()
    inputs, plain = (case.inputs([photo(LANDSCAPE, spot), photo(PORTRAIT, None)]) for spot in (SPOTS[0][1], None))
    got = hot_at_the_spot(case, SPOTS[0], SPOTS[1])
    (sample,) = split(find_adapter(case.model), inputs, 1, got, None)
    hot = torch.cat([part.flatten() * (number == 0) for part, number in zip(got.image, got.photos, strict=True)]) > 1e-6
    left = sample.keeping(sample.stays({"image": (~hot).nonzero()[:, 0].tolist()}))["pixel_values"]
    assert left.shape == plain["pixel_values"].shape and 0 < int((left == 0).sum()) < left.numel() / 3
    torch.testing.assert_close(left, plain["pixel_values"] * (left != 0))


def test_crops_without_a_place_are_refused() -> None:
    """A photo of one colour: no pixel tells how its six crops lie."""
    case = CASES["InternVL"]()
    got = explain(case.model, case.inputs([photo(LANDSCAPE, None)]))
    assert got.image.shape == (7, 2, 2) and got.photos == list(range(7)) and got.crops == [None] * 7
    for draw in (got.plot, got.to_html, got.overlay):
        with pytest.raises(ValueError, match="image must be 7 photos, .*; got 1.* crops of one photo, .*: pass crop="):
            draw(photo(LANDSCAPE, None))
    got.plot()
    corners = [(x / 3, y / 2, (x + 1) / 3, (y + 1) / 2) for y in range(2) for x in range(3)]
    placed = got.overlay([photo(LANDSCAPE, None)] * 7, crop=[*corners, (0, 0, 1, 1)])
    assert placed.size == LANDSCAPE


def test_a_dark_edge_of_the_photo_is_no_edge_of_the_canvas() -> None:
    """A photo that is black below looks like one whose canvas is: its shape says that it is not."""
    case, (size, spot) = CASES["Mllama"](), SPOTS[0]
    dark = np.asarray(photo(size, spot)).copy()
    dark[200:] = 0
    got = explain(case.model, case.inputs([image_module.fromarray(dark)]))
    with pytest.warns(UserWarning, match="A map of 8 x 4 patches is stretched over a photo of 600 x 400"):
        got.overlay(image_module.fromarray(dark))


def test_pictures_of_a_batch_want_a_photo_each() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = t.ViTForImageClassification(t.ViTConfig(**sizes, image_size=24, patch_size=6)).eval()
    got = explain(vision, {"pixel_values": torch.rand(3, 3, 24, 24)})
    assert got.photos == [0, 1, 2] and got.crops == [None] * 3
    white = image_module.new("RGB", (24, 24), "white")
    for draw in (got.plot, got.to_html):
        with pytest.raises(ValueError, match="image must be 3 photos, .*; got 1, in the order of the samples"):
            draw(white)
        draw([white] * 3)
    assert got.overlay(white, sample=1).size == got.overlay([white] * 3, sample=1).size == (24, 24)  # of one row alone
    assert len([axis for axis in got.plot(white, samples=[2]).axes if len(axis.images) == 2]) == 1
    twice = explain(vision, {"pixel_values": torch.rand(1, 3, 24, 24).expand(2, -1, -1, -1)})
    assert twice.photos == [0, 0] and twice.overlay(white, sample=1).size == (24, 24)


def test_one_image_with_many_texts_is_one_photo() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = t.CLIPConfig(text_config={**sizes, "vocab_size": 99}, vision_config={**sizes, "image_size": 24, "patch_size": 6})
    ids = torch.tensor([[0, 5, 98], [0, 6, 98], [0, 7, 98]])
    got = explain(t.CLIPModel(config).eval(), {"input_ids": ids, "pixel_values": torch.rand(1, 3, 24, 24)})
    assert got.photos == [0, 0, 0]
    assert [got.overlay(image_module.new("RGB", (24, 24)), sample=row).size for row in range(3)] == [(24, 24)] * 3


def test_facts_of_photos_are_kept(tmp_path: Any) -> None:
    case = CASES["Gemma 3"]()
    got = explain(case.model, case.inputs([photo(*SPOTS[0])]))
    read = Explanation.load(got.save(tmp_path / "one.safetensors"))
    assert read.photos == [0, 0] and read.crops == [[0, 0, 1, 1]] * 2
    for part in ({"photos": [0]}, {"crops": [None]}, {"photos": [0, 2]}, {"crops": [None, (0, 0, 0, 1)]}):
        with pytest.raises(ValueError, match=f"{next(iter(part))} must"):
            replace(got, **part)


def test_pictures_that_are_made_squares() -> None:
    """LLaVA-OneVision does not tile several pictures of one prompt: it puts an edge around each."""
    case, processor = CASES["LLaVA-OneVision"](), t.LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32})
    made = [dict(processor([[photo(size, at if spot else None) for size, at in SPOTS]], return_tensors="pt")) for spot in (1, 0)]
    ids = torch.tensor([[1, *[IMAGE] * 17, 6, *[IMAGE] * 17, 7]])
    inputs, plain = ({"input_ids": ids, **one, "batch_num_images": torch.tensor([2])} for one in made)
    got = with_change(case, inputs, plain)
    assert got.photos == [0, 1] and got.image.shape == (2, 4, 4)
    assert got.crops == [(0, -0.25, 1, 1.25), (-0.25, 0, 1.25, 1)]
    for panel, (size, spot) in enumerate(SPOTS):
        place = drawn_at(got, panel, LANDSCAPE, PORTRAIT)
        cells = [max(size) / side / 4 for side in size]  # of the square
        assert all(abs(a - b) < 1.05 * cell for a, b, cell in zip(place, spot, cells, strict=True)), (panel, place)


def test_other_inputs_of_four_dimensions_are_no_pictures() -> None:
    tokens = Tokens({"attention_mask": torch.zeros(3, 1, 4, 4), "pixel_values": torch.rand(3, 3, 8, 8)}, (3, 4))
    assert tokens.photos(3) == ([0, 1, 2], [None] * 3)
    without = {"attention_mask": torch.zeros(3, 1, 4, 4), "input_ids": torch.ones(3, 4).long()}
    assert Tokens(without, (3, 4)).photos(3)[0] == [0, 1, 2]
