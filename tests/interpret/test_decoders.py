"""Decoders, most of which see images: `explain` against stored maps."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch  # noqa: E402
import transformers  # noqa: E402

from tests.helpers.interpret.cases import in_double, last_real_row, lively, one_sample, published  # noqa: E402
from tests.helpers.interpret.decoder_cases import (  # noqa: E402
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
from tests.helpers.interpret.stored_maps import Place, rows_of  # noqa: E402
from vlattn_fast.interpret import explain  # noqa: E402


def stored_maps(decoder: Decoder, inputs: dict[str, Any], token: int | None = None, form: str = "eager") -> torch.Tensor:
    """R <- R + mean_h relu(A dA) R over the stored maps of all layers (Chefer et al. 2021, equations 5 and 6): the row of the
    last real position."""
    model = decoder.model
    before = model.config._attn_implementation
    model.set_attn_implementation(form)
    maps: list[torch.Tensor] = []
    handles = [
        layer.get_submodule(decoder.attention).register_forward_hook(lambda m, a, o: maps.append(o[1]))
        for layer in model.get_submodule(decoder.layers)
    ]
    try:
        logits = next_logits(model(**inputs, use_cache=False), inputs)
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(before)
    score = logits.max(-1).values if token is None else logits[:, token]
    relevancy = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype).expand(len(score), -1, -1)
    for attention, gradient in zip(maps, torch.autograd.grad(score.sum(), maps), strict=True):
        relevancy = relevancy + (attention * gradient).clamp(min=0).mean(1) @ relevancy
    row = last_real_row(inputs, relevancy.shape[-1]).to(relevancy.dtype)
    return (row[:, None] @ relevancy)[:, 0].detach()


def error(row: torch.Tensor, expected: torch.Tensor, inputs: dict[str, Any]) -> float:
    """The largest difference beside the identity, as a share of the largest value there."""
    own = last_real_row(inputs, row.shape[1]).bool()
    assert row.shape == expected.shape and (expected.masked_fill(own, 0.0) != 0).sum(-1).min() > 2
    return float((row - expected).abs().max() / expected.masked_fill(own, 0.0).abs().max())


@every
def test_equals_stored_maps(decoder):
    inputs = decoder.inputs("left")
    got = explain(decoder.model, inputs)
    assert list(got.relevancy) == ["language"]
    assert error(got.relevancy["language"], stored_maps(decoder, inputs), inputs) < 1e-5


@pytest.mark.parametrize(("side", "token"), [("right", None), ("left", 7)])
@every
def test_in_double_precision(decoder, side, token):
    inputs = in_double(decoder.case(decoder.inputs(side)))
    got = explain(decoder.model, inputs, target=token).relevancy["language"]
    assert got.dtype == torch.float64
    assert error(got, stored_maps(decoder, inputs, token, form="literal"), inputs) < 1e-10


@every
def test_weighted(decoder):
    inputs = in_double(decoder.case(decoder.inputs()))
    got = explain(decoder.model, inputs, method="weighted").relevancy["language"]
    if decoder.summed is not None:
        expected = published(decoder.case(inputs), "weighted", form="literal")["language"]
    else:
        expected = weighted_by_branch(decoder, inputs)
    assert error(got, expected, inputs) < 1e-10


def weighted_by_branch(decoder: Decoder, inputs: dict[str, Any]) -> torch.Tensor:
    """`published` for layers in which no module is fed with the sum of stream and attention: its gradient is the branch's."""
    model = decoder.model
    model.set_attn_implementation("literal")
    maps, branches, streams, handles = [], [], [], []
    for layer in model.get_submodule(decoder.layers):
        attention = layer.get_submodule(decoder.attention)
        keep = lambda m, a, o: (maps.append(o[1]), branches.append(o[0]), None)[2]  # noqa: E731
        handles.append(attention.register_forward_hook(keep))
        handles.append(layer.register_forward_pre_hook(lambda m, a: streams.append(a[0])))
    score = next_logits(model(**inputs, use_cache=False), inputs).max(-1).values
    for handle in handles:
        handle.remove()
    model.set_attn_implementation("sdpa")
    gradients = torch.autograd.grad(score.sum(), [*maps, *branches])
    last = last_real_row(inputs, maps[0].shape[-1]).to(score.dtype)
    result = torch.zeros_like(last)
    for b, real in enumerate(inputs["attention_mask"].bool()):
        parts = ([part[b][real].detach() for part in kind] for kind in (streams, branches, gradients[len(maps) :]))
        x, o, g = parts
        kept = ([m[b][:, real][:, :, real].detach() for m in kind] for kind in (maps, gradients[: len(maps)]))
        sums = [a + b for a, b in zip(x, o, strict=True)]
        result[b, real] = one_sample("weighted", 0, *kept, x, sums, g, last[b, real][None], None)
    return result


@pytest.mark.parametrize("kind", ["granite", "glm4", "gemma3_text", "olmo2"])
def test_weighted_refuses_a_branch_that_is_scaled_before_it_is_added(kind):
    """LLaVA takes any language model: Granite multiplies what attention gives by a number, others take its norm."""
    sizes = dict(LLAMA, model_type=kind, residual_multiplier=0.5, query_pre_attn_scalar=8)
    vision = transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(vision_config=vision, text_config=sizes, image_token_index=IMAGE)
    torch.manual_seed(6)
    model = lively(transformers.LlavaForConditionalGeneration(config)).eval()
    decoder = Decoder(model, two_images(16), pixels(2))
    inputs = decoder.inputs()
    got = explain(model, inputs).relevancy["language"]
    assert error(got, stored_maps(decoder, inputs), inputs) < 1e-5
    with pytest.raises(ValueError, match=r"output of 'self_attn' to its residual stream as it is .* got '\w+' of it behind"):
        explain(model, inputs, method="weighted")


# --- Mllama: cross-attention to the vision tower's tokens ---


def stored_cross_maps(decoder: Decoder, inputs: dict[str, Any], form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rules 6 to 10 of Chefer et al. 2021 over the stored maps: the rows of the last real position. The vision tower's own R is
    the identity, since nothing is carried on into it."""
    model = decoder.model
    model.set_attn_implementation(form)
    maps: list[torch.Tensor] = []
    layers = model.get_submodule(decoder.layers)
    handles = [
        (layer.cross_attn if hasattr(layer, "cross_attn") else layer.self_attn).register_forward_hook(
            lambda m, a, o: maps.append(o[1])
        )
        for layer in layers
    ]
    score = next_logits(model(**inputs, use_cache=False), inputs).max(-1).values
    for handle in handles:
        handle.remove()
    model.set_attn_implementation("sdpa")
    gradients = torch.autograd.grad(score.sum(), maps)
    size, tokens = maps[0].shape[-1], maps[1].shape[-1]
    eye = torch.eye(size, dtype=maps[0].dtype)
    r_tt, r_ti = eye.expand(2, -1, -1), torch.zeros(2, size, tokens, dtype=eye.dtype)
    for layer, attention, gradient in zip(layers, maps, gradients, strict=True):
        step = (attention * gradient).clamp(min=0).mean(1)
        if hasattr(layer, "self_attn"):
            r_tt, r_ti = r_tt + step @ r_tt, r_ti + step @ r_ti
        else:
            beside = r_tt - eye
            sums = beside.sum(-1, keepdim=True)
            normalised = torch.where(sums == 0, 0.0, beside / sums) + eye
            r_ti = r_ti + normalised.transpose(1, 2) @ step
    row = last_real_row(inputs, size).to(eye.dtype)
    text = (row[:, None] @ r_tt)[:, 0].masked_fill(row.bool(), 0.0)
    return text.detach(), (row[:, None] @ r_ti)[:, 0].detach()


@pytest.mark.parametrize("form", ["eager", "literal"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("decoder", ["mllama"], indirect=True)
def test_cross_attention_equals_stored_maps(decoder, side, form):
    inputs = decoder.inputs(side)
    if form == "literal":
        inputs = in_double(decoder.case(inputs))
    got = explain(decoder.model, inputs)
    assert list(got.relevancy) == ["language", "vision"]
    for found, expected in zip(got.relevancy.values(), stored_cross_maps(decoder, inputs, form), strict=True):
        assert (expected != 0).sum(-1).min() > 2
        assert float((found - expected).abs().max() / expected.abs().max()) < (1e-5 if form == "eager" else 1e-10)


@pytest.mark.parametrize("decoder", ["mllama"], indirect=True)
def test_prompts_without_images_leave_out_cross_attention(decoder):
    """Its layers do not run. A layer that runs must attend."""
    ids = torch.tensor([[1, *words(6)], [1, *words(4, 30), 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    row = explain(decoder.model, inputs).relevancy["language"]
    model, maps = decoder.model, []
    model.set_attn_implementation("eager")
    layers = [layer for layer in model.get_submodule(decoder.layers) if hasattr(layer, "self_attn")]
    handles = [layer.self_attn.register_forward_hook(lambda m, a, o: maps.append(o[1])) for layer in layers]
    score = next_logits(model(**inputs, use_cache=False), inputs).max(-1).values
    for handle in handles:
        handle.remove()
    want = last_real_row(inputs, 7)[:, None]
    for attention, gradient in reversed(list(zip(maps, torch.autograd.grad(score.sum(), maps), strict=True))):
        want = want + want @ (attention * gradient).clamp(min=0).mean(1)
    assert error(row, want[:, 0].detach(), inputs) < 1e-5
    assert explain(model, inputs, answer=[5, 7]).relevancy["language"].shape == (2, 2, 9)
    model.get_submodule(decoder.layers)[1].cross_attn.forward = lambda hidden_states, **k: (hidden_states, None)
    with pytest.raises(ValueError, match=r"no attention call in layer 'model\.language_model\.layers\.1'"):
        explain(model, decoder.inputs())


@pytest.mark.parametrize("decoder", ["mllama"], indirect=True)
def test_cross_attention_has_no_weighted_rule(decoder):
    with pytest.raises(ValueError, match="method='weighted' needs a record of the residual sums"):
        explain(decoder.model, decoder.inputs(), method="weighted")


# --- refused ---


def test_softcap_is_refused():
    decoder = text("Gemma2", attn_logit_softcapping=50.0, query_pre_attn_scalar=8)
    with pytest.raises(ValueError, match="must not use softcap"):
        explain(decoder.model.eval(), decoder.inputs())


# --- batches without rows, prompts without images ---


@pytest.mark.parametrize("decoder", [*DECODERS, "mllama"], indirect=True)
def test_empty_batches(decoder):
    inputs = decoder.inputs()
    got = explain(decoder.model, {name: value[:0] for name, value in inputs.items()})
    assert got.relevancy["language"].shape == (0, inputs["input_ids"].shape[1]) and got.target == []


# BLIP-2 and InstructBLIP must see an image.
@pytest.mark.parametrize("decoder", [name for name in DECODERS if "blip" not in name.lower()], indirect=True)
def test_prompts_without_images(decoder):
    ids = torch.tensor([[1, *words(6)]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **decoder.of_prompt(ids)}
    got = explain(decoder.model, inputs)
    assert got.image is None and got.token_ids == [words(6)]
    assert error(got.relevancy["language"], stored_maps(decoder, inputs), inputs) < 1e-5


@pytest.mark.parametrize("layers", [3, 5])  # the fourth sees beyond the chunk
@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens_at_the_edges_of_a_chunk(layers, side):
    """Llama 4 attends in chunks of 16. The first token of a chunk sees itself alone in them, and its row says so."""
    torch.manual_seed(6)
    decoder = text("Llama4Text", name="Llama4ForCausalLM", parts=dict(LLAMA4, num_hidden_layers=layers))
    lively(decoder.model).eval()
    for size, others in itertools.product((16, 17, 18, 32, 33), ([], [words(3)])):
        decoder = replace(decoder, prompts=[words(size), *others])
        inputs = in_double(decoder.case(decoder.inputs(side)))
        real = inputs["attention_mask"].bool()
        place = Place("model.layers", last_real_row(inputs, real.shape[1]), real)
        score = lambda o: next_logits(o, inputs).max(-1).values  # noqa: B023, E731
        want = rows_of(decoder.model, inputs, score, {"language": place})["language"]
        got = explain(decoder.model, inputs).relevancy["language"]
        assert (got - want).abs().max() < 1e-9 * (want - place.row).abs().max()
        assert int((got[0] != 0).sum()) == (size if layers == 5 else 16 - -size % 16)
