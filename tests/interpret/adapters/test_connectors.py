"""Relevancy that goes on from a decoder's image tokens into the vision tower, against stored maps of both towers."""

from dataclasses import replace

import pytest
import torch
import transformers

import vlattn_fast as va
from tests.helpers.interpret.cases import last_real_row
from tests.helpers.interpret.decoder_cases import DECODERS, IMAGE, LLAMA, image, next_logits, pixels
from tests.helpers.interpret.stored_maps import Kept, assert_rows
from tests.interpret.adapters.test_decoder_images import pixels_at
from vlattn_fast.interpret import ADAPTERS, explain
from vlattn_fast.interpret.adapters.registry import find_adapter
from vlattn_fast.interpret.dataset.pieces import split
from vlattn_fast.interpret.explaining.fields import vision_maps


@pytest.mark.parametrize("decoder", ["LlavaForConditionalGeneration"], indirect=True)
def test_each_prompt_has_a_row_of_all_its_images(decoder):
    """As many images as prompts, but both are of the first."""
    inputs, through = in_double(decoder, "right"), va.methods.Gradient(through_connector=True)
    first = inputs["input_ids"].flatten()
    ids = torch.stack([first, first.where(first != IMAGE, 7)])
    got, alone = (
        explain(decoder.model, inputs | {"input_ids": some, "attention_mask": torch.ones_like(some)}, method=through)
        for some in (ids, ids[:1])
    )
    assert got.relevancy["vision"].shape == (2, 2 * 17) and not got.relevancy["vision"][1].any()
    assert_rows(got[0].relevancy["vision"], alone.relevancy["vision"])
    assert got[0].image_samples == [0, 0] and not got[1].relevancy["vision"].any() and not len(got[1].image)


@pytest.mark.parametrize("decoder", ["LlavaForConditionalGeneration"], indirect=True)
def test_what_is_refused(decoder):
    model, inputs, through = decoder.model, decoder.inputs(), va.methods.Gradient(through_connector=True)
    with pytest.raises(ValueError, match="start_layer must be 0 with through_connector=True; got 1"):
        va.methods.Gradient(through_connector=True, start_layer=1)
    for kind in (va.methods.Rollout, va.methods.Weighted):
        with pytest.raises(TypeError, match="unexpected keyword argument 'through_connector'"):
            kind(through_connector=True)
    words = r"only supports image tokens made from one layer's patches; got vision_feature_layer \[-1, -2\]"
    with pytest.raises(ValueError, match=words):
        explain(model, {**inputs, "vision_feature_layer": [-1, -2]}, method=through)
    model.config.vision_feature_layer = [-1, -2]
    with pytest.raises(ValueError, match=words):
        explain(model, inputs, method=through)
    with pytest.raises(ValueError, match="must have an adapter with a connector .*; got LlamaForCausalLM"):
        explain(DECODERS["LlamaForCausalLM"]().model, {"input_ids": inputs["input_ids"]}, method=through)


CONNECTED = [*(name for name in DECODERS if getattr(ADAPTERS.get(name), "vision", None) is not None), "pixtral"]

# Tokens of each prompt's pictures, where it has several of one size, the tower sees tiles, or all at once. Three and five tiles;
# 4 x 8 and 8 x 4 patches.
OF_PROMPTS = {
    "LlavaNextForConditionalGeneration": [3 * 17, 5 * 17],
    "LlavaOnevisionForConditionalGeneration": [3 * 16, 5 * 16],
    "Idefics3ForConditionalGeneration": [7 * 16, 2 * 16],
    "SmolVLMForConditionalGeneration": [7 * 16, 2 * 16],
    "Qwen2VLForConditionalGeneration": [32, 32],
    "Qwen2_5_VLForConditionalGeneration": [32, 32],
    "Mistral3ForConditionalGeneration": [8, 16],
    "Gemma3ForConditionalGeneration": [2 * 64, 64],
    "InternVLForConditionalGeneration": [3 * 17, 17],
    "pixtral": [8, 12],
}
SHAPES = {  # of the tower
    "LlavaNextForConditionalGeneration": (8, 17),
    "LlavaOnevisionForConditionalGeneration": (8, 16),
    "Idefics3ForConditionalGeneration": (9, 16),
    "SmolVLMForConditionalGeneration": (9, 16),
    "Qwen2VLForConditionalGeneration": (1, 64),
    "Qwen2_5_VLForConditionalGeneration": (1, 64),
    "pixtral": (1, 20),
}


def kind(decoder):
    """The name of the model's class; "pixtral" for LLaVA over Pixtral."""
    name = type(decoder.model).__name__
    return "pixtral" if name.startswith("Llava") and "Pixtral" in type(decoder.model.model.vision_tower).__name__ else name


def in_double(decoder, side):
    decoder.model.double()
    return {name: x.double() if x.is_floating_point() else x for name, x in decoder.inputs(side).items()}


def vision_layers(decoder):
    tower = find_adapter(decoder.model).vision
    return f"{tower.path}.{tower.layers}"


def made_of(model, embeddings, outputs):
    """bool (tokens, images * N): whether an embedding has a gradient at a token of the last vision layer that the model reads."""
    for states in reversed(outputs):
        rows = []
        for embedding in embeddings:
            (grad,) = torch.autograd.grad(embedding.abs().sum(), states, retain_graph=True, allow_unused=True)
            rows.append(torch.zeros(states.shape[:-1]) if grad is None else grad.abs().sum(-1))
        if any(bool(row.any()) for row in rows):
            return torch.stack(rows).flatten(1) != 0
    raise AssertionError("no vision layer is read")


def kept_run(decoder, inputs):
    """Outputs, maps by module, the embeddings of all tokens, and the outputs of the vision layers."""
    model, states, embeddings = decoder.model, [], []
    model.set_attn_implementation("literal")
    language = model.get_submodule(decoder.layers.rpartition(".")[0])
    handles = [language.register_forward_pre_hook(lambda m, a, k: embeddings.append(k["inputs_embeds"]), with_kwargs=True)]
    for layer in model.get_submodule(vision_layers(decoder)):
        handles.append(layer.register_forward_hook(lambda m, a, o: states.append(o[0] if isinstance(o, tuple) else o)))
    kept = Kept(model)
    with kept.watching():
        outputs = model(**inputs)
    for handle in handles:
        handle.remove()
    return outputs, kept.maps, embeddings[0].flatten(0, 1), states


def layer_bars(maps, score, layers):
    """Abar (B, N, N) of each layer; where it attends in chunks, with the chunks' along the diagonal."""
    grouped = {}
    for path, found in maps:
        if path.startswith(f"{layers}."):
            grouped.setdefault(path, []).append(found)
    bars = []
    for parts in grouped.values():
        grads = torch.autograd.grad(score, parts, retain_graph=True, allow_unused=True)
        of_parts = [(a * (0 * a if g is None else g)).clamp(min=0).mean(1).detach() for a, g in zip(parts, grads, strict=True)]
        bars.append(of_parts[0] if len(parts) == 1 else torch.block_diag(*(bar[0] for bar in of_parts))[None])
    return bars


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("decoder", CONNECTED, indirect=True)
def test_every_connector(decoder, side):
    inputs = in_double(decoder, side)
    got = explain(decoder.model, inputs, method=va.methods.Gradient(through_connector=True))
    outputs, maps, embeddings, states = kept_run(decoder, inputs)
    score = next_logits(outputs, inputs).max(-1).values.sum()
    row = last_real_row(inputs, inputs["input_ids"].shape[1]).double()[:, None]
    for bar in reversed(layer_bars(maps, score, decoder.layers)):
        row = row + row @ bar
    assert_rows(got.relevancy["language"], row[:, 0])

    of_image = (inputs["input_ids"] == IMAGE).flatten()
    parts = made_of(decoder.model, embeddings[of_image], states).double()
    start = row.flatten()[of_image] @ (parts / parts.sum(1, keepdim=True).clamp(min=1))
    vision = layer_bars(maps, score, vision_layers(decoder))
    start = start.view(vision[0].shape[0], 1, -1)
    for bar in reversed(vision):
        start = start + start @ bar
    want = start[:, 0]
    if (sizes := OF_PROMPTS.get(kind(decoder))) is not None:
        want = torch.nn.utils.rnn.pad_sequence(want.flatten().split(sizes), batch_first=True)
    assert_rows(got.relevancy["vision"], want)
    assert sum(bool((bar != 0).any()) for bar in vision) >= len(vision) - 1 > 0
    assert "<canvas" in got.to_html()


@pytest.mark.parametrize(
    "decoder",
    [
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
        "Idefics3ForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "pixtral",
    ],
    indirect=True,
)
def test_maps_are_the_patches_of_their_place(decoder):
    """Each entry is of the vision token that depends on the pixels at its place, and on no others."""
    inputs = decoder.inputs()
    got = explain(decoder.model, inputs, method=va.methods.Gradient(through_connector=True))
    row, family = got.relevancy["vision"], find_adapter(decoder.model)
    shape = SHAPES.get(kind(decoder), row.shape)
    numbers = 1 + torch.arange(shape[0] * shape[1]).view(shape)  # 0 pads
    config = decoder.model.config
    of_prompts, found = vision_maps(numbers, family.connector, config, inputs, {}, family.towers[0].grid(config, inputs))
    assert found["image_samples"] == got.image_samples == [place.row for place in decoder.maps]
    decoder.model.get_submodule(decoder.vision).set_attn_implementation("nothing")
    inputs["pixel_values"].requires_grad_()
    seen = []
    layer = decoder.model.get_submodule(vision_layers(decoder))[-1]
    hook = layer.register_forward_pre_hook(lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True)
    decoder.model(**inputs)
    hook.remove()
    states = seen[0].flatten(0, -2)
    for image_map, (place, index) in enumerate(zip(decoder.maps, found["image"], strict=True)):
        read = torch.stack([row[of_prompts == number][0] for number in index.flatten()])
        assert torch.equal(got.image[image_map].flatten(), read)
        if place.cut == (0, 0):  # an image token may be a square of patches
            place = replace(place, shape=(index.shape[0] // len(place.tiles), index.shape[1] // len(place.tiles[0])))
        for y, x in [(y, x) for y in range(index.shape[0]) for x in range(index.shape[1])]:
            (grad,) = torch.autograd.grad(states[index[y, x] - 1].abs().sum(), inputs["pixel_values"], retain_graph=True)
            if grad.ndim == 2:  # Qwen: a row a patch, in squares of two by two
                first, columns = 32 * image_map, index.shape[1] // 2
                want = torch.zeros_like(grad, dtype=torch.bool)
                want[first + 4 * (y // 2 * columns + x // 2) + 2 * (y % 2) + x % 2] = True
            else:
                want = pixels_at(decoder, place, y, x, grad)
            assert torch.equal(grad != 0, want), (place, y, x)


@pytest.mark.parametrize("decoder", ["LlavaOnevisionForConditionalGeneration"], indirect=True)
def test_images_that_the_connector_scales_or_does_not_tile(decoder):
    config, model = decoder.model.config, decoder.model
    ids = torch.tensor([[1, *image(17), 6, *image(17), 7]])
    images = {**pixels(2, 1), "image_sizes": torch.tensor([[64, 64], [32, 64]]), "batch_num_images": torch.tensor([2])}
    got = explain(model, {"input_ids": ids, **images}, method=va.methods.Gradient(through_connector=True))
    assert got.image.shape == (2, 4, 4) and got.image_samples == [0, 0]
    assert torch.equal(got.image.flatten()[None], got.relevancy["vision"])
    config.vision_aspect_ratio = "anyres_max_1"
    ids = torch.tensor([[1, *image(16 + 4 * 5), 7]])
    inputs = {"input_ids": ids, **pixels(1, 5), "image_sizes": torch.tensor([[128, 128]])}
    with pytest.raises(ValueError, match=r"does not support images that the model scales down; got \(8, 8\) patches"):
        explain(model, inputs, method=va.methods.Gradient(through_connector=True))


@pytest.mark.parametrize("decoder", ["Qwen2_5_VLForConditionalGeneration"], indirect=True)
def test_videos_are_refused(decoder):
    ids = torch.tensor([[1, 95, *[97] * 8, 96, 6]])
    clip = {"pixel_values_videos": torch.randn(32, 96), "video_grid_thw": torch.tensor([[2, 4, 4]])}
    with pytest.raises(ValueError, match="through_connector=True only supports images"):
        explain(
            decoder.model,
            {"input_ids": ids, "mm_token_type_ids": 2 * (ids == 97).int(), **clip},
            method=va.methods.Gradient(through_connector=True),
        )


@pytest.mark.parametrize("decoder", ["LlavaNextForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"], indirect=True)
def test_answers_entries_and_parts_of_a_batch(decoder):
    """What the tower ran at once is cut by prompts, also with a row for each token of an answer."""
    inputs = in_double(decoder, "left")
    inputs.pop("mm_token_type_ids", None)
    through = va.methods.Gradient(through_connector=True)
    each = explain(decoder.model, inputs, answer=[[7, 4], [9, 5]], method=through)
    assert each.relevancy["vision"].shape[:2] == (2, 2)
    scored = lambda outputs: next_logits(outputs, inputs).log_softmax(-1)[[0, 1], [7, 9]]  # noqa: E731
    assert_rows(each.relevancy["vision"][:, 0], explain(decoder.model, inputs, target=scored, method=through).relevancy["vision"])
    for t, answer in enumerate(([[7], [9]], [[4], [5]])):
        alone = explain(decoder.model, inputs, answer=answer, method=va.methods.Gradient(through_connector=True), per_token=False)
        assert (alone.relevancy["vision"] > 0).any(-1).all()
        assert_rows(each.relevancy["vision"][:, t], alone.relevancy["vision"])
        ids = torch.cat([inputs["input_ids"], torch.tensor([[7], [9]])], 1)  # the second token has seen the first
        inputs = {
            **inputs,
            "input_ids": ids,
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
        }
    (best,) = (best for best in alone.top(1) if best.tower == "vision" and best.sample == 1)
    image, y, x = best.place
    assert alone.image_samples[image] == 1 and float(alone.image[image][y, x]) == best.value == float(
        alone.relevancy["vision"][1].max()
    )
    second = split(alone, [1, 1])[1]
    assert torch.equal(second.relevancy["vision"], alone.relevancy["vision"][1:])
    assert second.image_samples == [0] * len(second.image)


@pytest.mark.parametrize("decoder", CONNECTED, indirect=True)
def test_prompts_without_pictures_and_empty_batches(decoder):
    empty = {name: x[:0] for name, x in decoder.inputs().items()}
    got = explain(decoder.model, empty, method=va.methods.Gradient(through_connector=True))
    assert got.relevancy["language"].shape == (0, empty["input_ids"].shape[1]) and got.relevancy["vision"].shape == (0, 0)
    with pytest.raises(ValueError, match="through_connector=True needs 'pixel_values' in inputs; got none"):
        explain(decoder.model, {"input_ids": torch.tensor([[1, 5, 6, 7]])}, method=va.methods.Gradient(through_connector=True))


@pytest.mark.parametrize("decoder", ["pixtral", "Mistral3ForConditionalGeneration"], indirect=True)
def test_images_in_one_row_must_have_their_sizes(decoder):
    wrong = {**decoder.inputs(), "image_sizes": torch.tensor([[32, 32], [32, 32]])}
    family = find_adapter(decoder.model)
    with pytest.raises(
        ValueError, match="image_sizes must match the image tokens for through_connector=True; got 5 tokens for a tower of"
    ):
        family.connector(decoder.model.config, wrong, (1, 20), 5)


def test_edges_that_are_in_no_square():
    """Images of 3 x 5 patches: squares of 2 x 2 leave a row and a column out."""
    config = DECODERS["Mistral3ForConditionalGeneration"]().model.config
    inputs = {"pixel_values": torch.zeros(2, 3, 24, 40), "image_sizes": torch.tensor([[24, 40]] * 2)}
    merged = ADAPTERS["Mistral3ForConditionalGeneration"].connector(config, inputs, (1, 30), 4)
    first = [0, 0, 1, 1, -1, 0, 0, 1, 1, -1, -1, -1, -1, -1, -1]
    assert merged.tokens.tolist() == [*first, *(token + 2 * (token >= 0) for token in first)]


def test_llava_over_another_vision_tower_has_no_record_of_its_connector():
    vision = dict(model_type="dinov2", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8)
    config = transformers.LlavaConfig(vision_config=vision, text_config=LLAMA, image_token_index=98)
    family = find_adapter(transformers.LlavaForConditionalGeneration(config))
    assert family.towers == ADAPTERS["LlavaForConditionalGeneration"].towers and family.vision is None
