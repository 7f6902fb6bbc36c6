"""Relevancy that goes on from a decoder's image tokens into the vision tower, against stored maps of both towers."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.interpret.cases import lively
from vlattn_fast.interpret import explain

VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8)
TEXT = dict(
    model_type="llama",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=99,
    head_dim=8,
)


def llava():
    vision = dict(VISION, model_type="clip_vision_model")
    config = transformers.LlavaConfig(vision_config=vision, text_config=TEXT, image_token_id=98, image_token_index=98)
    return transformers.LlavaForConditionalGeneration(config), "model.vision_tower.encoder.layers", torch.arange(16), 1, 16


def internvl():
    vision = dict(VISION, image_size=[32, 32], patch_size=[8, 8])
    text = dict(TEXT, model_type="qwen2")
    config = transformers.InternVLConfig(vision_config=vision, text_config=text, image_token_id=98, downsample_ratio=0.5)
    squares = (torch.arange(4)[:, None] // 2 * 2 + torch.arange(4) // 2).flatten()
    return transformers.InternVLForConditionalGeneration(config), "model.vision_tower.encoder.layer", squares, 1, 4


def gemma3():
    vision = dict(VISION, model_type="siglip_vision_model")
    text = dict(TEXT, model_type="gemma3_text", sliding_window=8)
    config = transformers.Gemma3Config(
        vision_config=vision, text_config=text, image_token_index=98, image_token_id=98, mm_tokens_per_image=4
    )
    squares = (torch.arange(4)[:, None] // 2 * 2 + torch.arange(4) // 2).flatten()
    return transformers.Gemma3ForConditionalGeneration(config), "model.vision_tower.encoder.layers", squares, 0, 4


def maps_of(model, layers, found):
    """Hooks that keep the maps of each layer's attention in `found`."""
    handles = []
    for layer in model.get_submodule(layers):
        attention = next(m for name, m in layer.named_children() if name in ("self_attn", "attention"))
        handles.append(attention.register_forward_hook(lambda m, a, o: found.append(o[1])))
    return handles


@pytest.mark.parametrize("make", [llava, internvl, gemma3])
def test_against_stored_maps(make):
    torch.manual_seed(0)
    model, layers, token_of_patch, before, count = make()
    lively(model).eval().double()
    ids = torch.randint(3, 90, (2, count + 6))
    ids[0, 1 : count + 1], ids[1, 3 : count + 3] = 98, 98
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 32, 32).double()}
    if make is gemma3:
        inputs["token_type_ids"] = (ids == 98).long()
    got = explain(model, inputs, through_connector=True)

    model.set_attn_implementation("literal")
    vision, language = [], []
    handles = maps_of(model, layers, vision) + maps_of(model, "model.language_model.layers", language)
    score = model(**inputs).logits[:, -1].max(-1).values.sum()
    for handle in handles:
        handle.remove()
    grads = torch.autograd.grad(score, [*vision, *language], allow_unused=True)
    bars = [
        torch.zeros_like(a[:, 0]) if g is None else (a.detach() * g).clamp(min=0).mean(1)
        for a, g in zip([*vision, *language], grads, strict=True)
    ]
    row = torch.zeros(2, 1, ids.shape[1]).double()
    row[:, :, -1] = 1
    for bar in reversed(bars[len(vision) :]):
        row = row + row @ bar
    torch.testing.assert_close(got.relevancy["language"], row[:, 0], rtol=1e-8, atol=1e-10)
    tokens = row[:, 0][ids == 98].view(2, -1)
    start = torch.zeros(2, 1, 16 + before).double()
    start[:, 0, before:] = tokens[:, token_of_patch] / token_of_patch.bincount()[0]
    for bar in reversed(bars[: len(vision)]):
        start = start + start @ bar
    torch.testing.assert_close(got.relevancy["vision"], start[:, 0], rtol=1e-8, atol=1e-10)
    assert torch.equal(got.image, got.relevancy["vision"][:, before:].view(2, 4, 4)) and got.image_rows == [0, 1]
    assert (bars[0] != 0).any() and got.tower_images["language"].shape[0] == 2
    assert "vision" not in got.position and "<canvas" in got.to_html()


def test_answers():
    torch.manual_seed(0)
    model = lively(llava()[0]).eval()
    ids = torch.randint(3, 90, (1, 22))
    ids[0, 1:17] = 98
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32)}
    got = explain(model, inputs, answer=[4, 9, 7], through_connector=True)
    assert got.relevancy["vision"].shape == (1, 3, 17) and got.image.shape == (1, 3, 4, 4)
    together = explain(model, inputs, answer=[4, 9, 7], through_connector=True, each=False)
    assert together.relevancy["vision"].shape == (1, 17) and together.image.shape == (1, 4, 4)


def test_what_is_refused():
    torch.manual_seed(0)
    model = llava()[0].eval()
    ids = torch.randint(3, 90, (1, 22))
    ids[0, 1:17] = 98
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32)}
    for options in ({"method": "rollout"}, {"method": "weighted"}, {"start_layer": 1}):
        with pytest.raises(ValueError, match="through_connector must be off but for method 'gradient'"):
            explain(model, inputs, through_connector=True, **options)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{k: v for k, v in TEXT.items() if k != "model_type"}))
    with pytest.raises(ValueError, match="without a record of its connector; got LlamaForCausalLM"):
        explain(llama, {"input_ids": ids}, through_connector=True)
