"""Decoders, most of which see images: `explain` against stored maps."""

import itertools
from dataclasses import replace

import pytest
import torch
import transformers

from tests.helpers.interpret import linked_maps
from tests.helpers.interpret.cases import in_double, last_real_row, lively
from tests.helpers.interpret.decoder_cases import (
    DECODERS,
    IMAGE,
    LLAMA,
    LLAMA4,
    VISION,
    Decoder,
    every,
    next_logits,
    pixels,
    text,
    two_images,
    words,
)
from tests.helpers.interpret.linked_maps import with_gradients
from tests.helpers.interpret.stored_maps import Kept, assert_rows
from vlattn_fast.interpret import explain


@every
def test_equals_stored_maps(decoder):
    inputs = decoder.inputs("left")
    assert list(explain(decoder.model, inputs).relevancy) == ["language"]
    decoder.case(inputs).check(inputs)


@every
def test_a_token_of_prompts_padded_on_the_right(decoder):
    inputs = decoder.inputs("right")
    decoder.case(inputs, 7).check(inputs, ("gradient",), target=7)


@pytest.mark.parametrize("kind", ["granite", "glm4", "gemma3_text", "olmo2"])
def test_a_branch_that_is_scaled_before_it_is_added(kind):
    """LLaVA takes any language model: Granite multiplies what attention gives by a number, others take its norm."""
    sizes = dict(LLAMA, model_type=kind, residual_multiplier=0.5, query_pre_attn_scalar=8, attention_multiplier=8**-0.5)
    vision = transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(vision_config=vision, text_config=sizes, image_token_index=IMAGE)
    torch.manual_seed(6)
    model = lively(transformers.LlavaForConditionalGeneration(config)).eval()
    summed = {"gemma3_text": "pre_feedforward_layernorm", "olmo2": "mlp"}.get(kind, "post_attention_layernorm")
    decoder = Decoder(model, two_images(16), pixels(2), summed=summed)
    inputs = decoder.inputs()
    decoder.case(inputs).check(inputs)


# --- Mllama: cross-attention to the vision tower's tokens, whose own relevancy stays the identity ---


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("decoder", ["mllama"], indirect=True)
def test_cross_attention_equals_stored_maps(decoder, side):
    model, inputs = decoder.model, decoder.inputs(side)
    single = explain(model, inputs).relevancy
    exact = in_double(decoder.case(inputs))
    model.set_attn_implementation("literal")
    kept = Kept(model)
    with kept.watching():
        score = next_logits(model(**exact), exact).max(-1).values.sum()
    model.set_attn_implementation("sdpa")
    layers = [(path, stored) for path, stored in kept.maps if path.startswith(decoder.layers)]
    kinds = ["ti" if "cross_attn" in path else "tt" for path, _ in layers]
    assert kinds == ["tt", "ti", "tt", "ti"]
    maps = with_gradients(kinds, [stored for _, stored in layers], score)
    last = last_real_row(exact, exact["input_ids"].shape[1]).argmax(1).tolist()
    want = dict(zip(("language", "vision"), linked_maps.published("gradient", maps, last), strict=True))
    double = explain(model, exact).relevancy
    assert list(double) == list(want)
    for tower, rows in want.items():
        assert_rows(double[tower], rows, what=tower)
        assert_rows(single[tower], rows, what=tower)


@pytest.mark.parametrize("decoder", ["mllama"], indirect=True)
def test_prompts_without_images_leave_out_cross_attention(decoder):
    """Its layers do not run. A layer that runs must attend."""
    model, ids = decoder.model, torch.tensor([[1, *words(6)], [1, *words(4, 30), 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    decoder.case(inputs).check(inputs, ("gradient",))
    assert explain(model, inputs, answer=[5, 7]).relevancy["language"].shape == (2, 2, 9)
    model.get_submodule(decoder.layers)[1].cross_attn.forward = lambda hidden_states, **k: (hidden_states, None)
    with pytest.raises(ValueError, match=r"no attention call was traced in layer 'model\.language_model\.layers\.1'"):
        explain(model, decoder.inputs())


# BLIP-2 and InstructBLIP must see an image.
@pytest.mark.parametrize("decoder", [name for name in DECODERS if "blip" not in name.lower()], indirect=True)
def test_prompts_without_images(decoder):
    ids = torch.tensor([[1, *words(6)]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **decoder.of_prompt(ids)}
    got = explain(decoder.model, inputs)
    assert got.image is None and got.token_ids == [words(6)]
    decoder.case(inputs).check(inputs, ("gradient",))


@pytest.mark.parametrize("layers", [3, 5])  # the fourth sees beyond the chunk
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.slow
def test_tokens_at_the_edges_of_a_chunk(layers, side):
    """Llama 4 attends in chunks of 16. The first token of a chunk sees itself alone in them, and its row says so."""
    torch.manual_seed(6)
    decoder = text("Llama4Text", name="Llama4ForCausalLM", parts=dict(LLAMA4, num_hidden_layers=layers))
    lively(decoder.model).eval()
    for size, others in itertools.product((16, 17, 18, 32, 33), ([], [words(3)])):
        decoder = replace(decoder, prompts=[words(size), *others])
        inputs = decoder.inputs(side)
        decoder.case(inputs).check(inputs, ("gradient",))
        got = explain(decoder.model, inputs).relevancy["language"]
        assert int((got[0] != 0).sum()) == (size if layers == 5 else 16 - -size % 16)
