"""Where the image tokens of decoders lie: each entry of a map is of the token that sees its place."""

from typing import Any

import pytest
import torch
import transformers as t

from tests.helpers.interpret.decoder_cases import IMAGE, Decoder, Map, every, image, pixels, words
from vlattn_fast.interpret import ADAPTERS, explain
from vlattn_fast.interpret.adapters.registry import find_adapter


def nothing(module, query, key, value, attention_mask, **options):  # type: ignore[no-untyped-def]
    """Attention that adds nothing, so that a token is its own patches alone."""
    return torch.zeros_like(query).transpose(1, 2), None


t.AttentionInterface.register("nothing", nothing)


@every
def test_maps_are_the_image_tokens_of_their_place(decoder):
    """Each entry is of the token that depends on the pixels at its place, and on no others."""
    inputs = decoder.inputs("left")
    explanation = explain(decoder.model, inputs)
    if decoder.maps is None:
        assert explanation.image is None
        return
    assert explanation.image_samples == [image.row for image in decoder.maps]
    row = explanation.relevancy["language"]
    numbers = torch.arange(row.numel()).view(row.shape)
    record = find_adapter(decoder.model).towers[0]
    maps, _ = record.tokens_in(decoder.model, inputs, row.shape).maps(numbers)
    assert len({int(i) for positions in maps for i in positions.flatten()}) == sum(positions.numel() for positions in maps)

    check_places(decoder, inputs, maps, "inputs_embeds")
    for positions, values in zip(maps, explanation.image, strict=True):
        assert torch.equal(values, row.flatten()[positions])


def check_places(decoder: Decoder, inputs: dict[str, Any], maps: Any, states: str) -> None:
    """Each entry of `maps`, which number the tokens of `states` in the batch, depends on the pixels of its place alone."""
    decoder.model.get_submodule(decoder.vision).set_attn_implementation("nothing")
    inputs["pixel_values"] = inputs["pixel_values"].requires_grad_()
    seen = []
    language = decoder.model.get_submodule(decoder.layers.rpartition(".")[0])
    hook = language.register_forward_pre_hook(lambda m, a, k: seen.append(k[states].flatten(0, 1)), with_kwargs=True)
    decoder.model(**inputs)
    hook.remove()
    for place, positions in zip(decoder.maps or [], maps, strict=True):
        for y, x in [(y, x) for y in range(positions.shape[0]) for x in range(positions.shape[1])]:
            (grad,) = torch.autograd.grad(seen[0][positions[y, x]].abs().sum(), inputs["pixel_values"], retain_graph=True)
            assert torch.equal(grad != 0, pixels_at(decoder, place, y, x, grad)), (place, y, x)


def pixels_at(decoder: Decoder, image: Map, y: int, x: int, like: torch.Tensor) -> torch.Tensor:
    """bool, True = a pixel of the cell (y, x) of a map."""
    marked = torch.zeros_like(like, dtype=torch.bool)
    if like.ndim == 2:  # Qwen: one row a patch, block by block
        first = 32 * image.tiles[0][0] + 4 * (y * image.shape[1] + x)
        marked[first : first + 4] = True
        return marked
    y, x = y + image.cut[0], x + image.cut[1]
    (height, width), sizes = image.shape, decoder.images.get("image_sizes")
    tile = image.tiles[y // height][x // width]
    of_tile = marked.view(-1, *like.shape[-3:])[tile]
    pixels = (32, 32) if sizes is None or like.ndim > 4 else sizes[image.row].tolist()
    h, w = pixels[0] // height, pixels[1] // width
    y, x = y % height, x % width
    of_tile[:, y * h : y * h + h, x * w : x * w + w] = True
    return marked


@pytest.mark.parametrize("decoder", ["LlavaOnevisionForConditionalGeneration"], indirect=True)
def test_large_images_are_scaled_down(decoder):
    """128 x 128 pixels are 8 x 8 cells, of which the model makes 4 x 4 where it allows one tile's worth."""
    ids = torch.tensor([[1, *image(16 + 4 * 5), 7]])
    images = {**pixels(1, 5), "image_sizes": torch.tensor([[128, 128]])}
    decoder.model.config.vision_aspect_ratio = "anyres_max_1"
    got = explain(decoder.model, {"input_ids": ids, **images})
    row = got.relevancy["language"][0]
    assert torch.equal(got.image[0].flatten(), row[1:17])
    assert torch.equal(got.image[1], row[17:37].view(4, 5)[:, :4])


@pytest.mark.parametrize("decoder", ["LlavaOnevisionForConditionalGeneration"], indirect=True)
def test_several_images_are_not_tiled(decoder):
    ids = torch.tensor([[1, *image(17), 6, *image(17), 7]])
    images = {**pixels(2, 1), "image_sizes": torch.tensor([[64, 64], [32, 64]]), "batch_num_images": torch.tensor([2])}
    got = explain(decoder.model, {"input_ids": ids, **images})
    assert got.image.shape == (2, 4, 4) and got.image_samples == [0, 0]
    for found, start in zip(got.image, (1, 19), strict=True):
        assert torch.equal(found.flatten(), got.relevancy["language"][0, start : start + 16])


@pytest.mark.parametrize("decoder", ["Idefics3ForConditionalGeneration"], indirect=True)
@pytest.mark.parametrize("labels", [[80, 80, 80], [81, 82, 80], None])
def test_tiles_of_no_complete_grid_are_maps_of_their_own(decoder, labels):
    """Tiles that are all named alike, rows of different lengths, and tiles without names between them."""
    tiles = [[90, label, *image(4)] for label in labels or []]
    prompt = [1, *tiles[0], *tiles[1], 89, 90, 83, *image(4), *tiles[2], 90, 7] if labels else [1, *image(16), 7]
    got = explain(decoder.model, {"input_ids": torch.tensor([prompt]), **pixels(1, 4)})
    of_image = got.relevancy["language"][0][torch.tensor(prompt) == IMAGE]
    assert got.image.shape == (4, 2, 2) and torch.equal(got.image.flatten(), of_image)


@pytest.mark.parametrize("decoder", ["Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"], indirect=True)
def test_frames_of_videos(decoder):
    """A video of two frames in front of an image; Qwen3-VL writes words between the frames."""
    apart = [96, 7, 95] if "Qwen3" in type(decoder.model).__name__ else []
    clip = [97] * 4
    ids = torch.tensor([[1, 95, *clip, *apart, *clip, 96, 6, 95, *image(8), 96, 8]])
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(32, 96),
        "image_grid_thw": torch.tensor([[1, 4, 8]]),
        "pixel_values_videos": torch.randn(32, 96),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == 97).int(),
    }
    got = explain(decoder.model, inputs)
    assert [tuple(found.shape) for found in got.image] == [(2, 2), (2, 2), (2, 4)] and got.image_samples == [0, 0, 0]
    row = got.relevancy["language"][0]
    of_video = row[ids[0] == 97]
    for found, expected in zip(got.image, (of_video[:4], of_video[4:], row[ids[0] == IMAGE]), strict=True):
        assert torch.equal(found.flatten(), expected)


@pytest.mark.parametrize("decoder", ["LlavaOnevisionForConditionalGeneration"], indirect=True)
def test_frames_and_the_token_behind_them(decoder):
    decoder.model.config.video_token_index = 97
    ids = torch.tensor([[1, *[97] * 9, 6, 7], [1, 5, *[97] * 9, 8]])
    got = explain(decoder.model, {"input_ids": ids, "pixel_values_videos": torch.randn(2, 2, 3, 32, 32)})
    assert got.image.shape == (4, 2, 2) and got.image_samples == [0, 0, 1, 1]
    row = got.relevancy["language"]
    assert torch.equal(got.image[:2].flatten(), row[0, 1:9]) and torch.equal(got.image[2:].flatten(), row[1, 2:10])


@pytest.mark.parametrize("decoder", ["mllama"], indirect=True)
def test_cross_attention_maps_are_the_tokens_of_their_place(decoder):
    inputs = decoder.inputs()
    got = explain(decoder.model, inputs)
    assert [tuple(image.shape) for image in got.image] == [(4, 8), (4, 4)] and got.image_samples == [0, 1]
    assert got.token_ids == [words(7, 20), [5, *words(3, 40)]]
    vision = ADAPTERS["MllamaForConditionalGeneration"].towers[1]
    numbers = torch.arange(2 * 34).view(2, 34)
    maps, _ = vision.tokens_in(decoder.model, inputs, numbers.shape).maps(numbers)
    check_places(decoder, inputs, maps, "cross_attention_states")
    for positions, values in zip(maps, got.image, strict=True):
        assert torch.equal(values, got.relevancy["vision"].flatten()[positions])


@pytest.mark.parametrize("decoder", ["LlavaNextForConditionalGeneration", "Idefics3ForConditionalGeneration"], indirect=True)
def test_image_tokens_that_do_not_add_up(decoder):
    inputs = decoder.inputs()
    record = find_adapter(decoder.model).towers[0]
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][1, -1] = IMAGE
    with pytest.raises(ValueError, match="inputs must have .* image tokens for maps"):
        record.tokens_in(decoder.model, inputs, inputs["input_ids"].shape).maps(torch.zeros(inputs["input_ids"].shape))
