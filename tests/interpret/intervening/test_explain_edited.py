"""`explain` inside of `intervene`: relevancy of the edited model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.edited_maps import hooked, llama, made

METHODS = ["gradient", "rollout", "attention", "gradcam", "weighted"]


def masked(layer: nn.Module, bias: Tensor) -> Any:
    """A hook by which a layer's attention takes a bias (B, H, N, N) with its mask."""

    def change(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.zeros_like(bias).masked_fill(~torch.ones(bias.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        elif mask.dtype == torch.bool:
            mask = torch.zeros_like(bias).masked_fill(~mask, -torch.inf)
        return args, {**kwargs, "attention_mask": mask + bias}

    return layer.self_attn.register_forward_pre_hook(change, with_kwargs=True)


def without_heads(model: nn.Module, layer: str, heads: list[int], factor: float) -> nn.Module:
    """A copy of the model whose output projection takes `factor` of these heads of 8 numbers each."""
    edited = copy.deepcopy(model)
    with torch.no_grad():
        for head in heads:
            edited.get_submodule(layer).weight[:, 8 * head : 8 * head + 8] *= factor
    return edited


@pytest.mark.parametrize("method", METHODS)
def test_cut_edges_are_those_of_a_mask(method: str) -> None:
    model, inputs = made("llava")
    edges = torch.zeros(2, 4, 24, 24, dtype=torch.float64)
    image = inputs["input_ids"] == model.config.image_token_index
    assert bool(image.any())
    last = [23, 21]
    for row in range(2):
        edges[row, 1:3, last[row], image[row]] = -torch.inf
    cut = va.Knockout(queries="last", keys="image", layers=1, heads=[1, 2])
    plain = va.explain(model, inputs, method=method, target=7)
    with va.intervene(model, inputs, cut):
        edited = va.explain(model, inputs, method=method, target=7)
    hook = masked(model.model.language_model.layers[1], edges)
    expected = va.explain(model, inputs, method=method, target=7)
    hook.remove()
    torch.testing.assert_close(edited.relevancy["language"], expected.relevancy["language"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(edited.scores, expected.scores, rtol=0, atol=1e-10)
    if method not in ("attention", "gradcam"):  # which read the last layer alone
        assert not torch.allclose(edited.relevancy["language"], plain.relevancy["language"], rtol=1e-3)
    again = va.explain(model, inputs, method=method, target=7)
    assert torch.equal(again.relevancy["language"], plain.relevancy["language"])


@pytest.mark.parametrize("method", ["gradient", "weighted", "gradcam"])
def test_scaled_heads_are_those_of_scaled_weights(method: str) -> None:
    model, inputs = llama()
    with va.intervene(model, inputs, [va.ScaleHeads({1: [0, 3]}, 0.0), va.ScaleHeads({2: 1}, 0.5)]):
        edited = va.explain(model, inputs, method=method, target=7)
    changed = without_heads(
        without_heads(model, "model.layers.1.self_attn.o_proj", [0, 3], 0.0), "model.layers.2.self_attn.o_proj", [1], 0.5
    )
    expected = va.explain(changed, inputs, method=method, target=7)
    for name, row in expected.relevancy.items():
        torch.testing.assert_close(edited.relevancy[name], row, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(edited.scores, expected.scores, rtol=0, atol=1e-10)
    assert not torch.allclose(edited.scores, va.explain(model, inputs, target=7).scores)


@pytest.mark.parametrize("per", ["layer", "head"])
def test_maps_of_layers_and_heads(per: str) -> None:
    model, inputs = llama()
    cut = va.Knockout(queries="last", keys=(0, 3), layers=1)
    with va.intervene(model, inputs, cut):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)  # whose cache counts tokens
        maps = va.explain_layers(model, inputs, method="attention", per=per)
    chosen = maps.relevancy["language"][..., 1, :, :] if per == "layer" else maps.relevancy["language"][1]
    assert float(chosen[..., :3].abs().max()) == 0 and float(chosen[..., 3:].sum(-1).min()) == pytest.approx(1.0)
    assert float(maps.relevancy["language"][0][..., :3].min()) > 0


@pytest.mark.parametrize("method", ["gradient", "attention", "rollout"])
def test_edits_within_edits_add_up(method: str) -> None:
    """The outer ones are in the weights of a copy."""
    model, inputs = llama()
    explained = {"method": method, "target": 7}
    scaled = va.ScaleHeads({1: [0, 3]}, 0.25)
    cut = [va.Residual(1, (2, 5), scale=0.5), va.Knockout(queries="last", keys=(0, 3), layers=2)]
    changed = without_heads(model, "model.layers.1.self_attn.o_proj", [0, 3], 0.25)
    with va.intervene(changed, inputs, cut):
        expected, logits = va.explain(changed, inputs, **explained), changed(**inputs).logits.detach()
    with va.intervene(model, inputs, scaled):
        outer = model(**inputs).logits.detach()
        with va.intervene(model, inputs, cut):
            torch.testing.assert_close(model(**inputs).logits.detach(), logits, rtol=0, atol=1e-9)
            edited = va.explain(model, inputs, **explained)
        assert torch.equal(model(**inputs).logits, outer)
    torch.testing.assert_close(edited.relevancy["language"], expected.relevancy["language"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(edited.scores, expected.scores, rtol=0, atol=1e-10)
    assert float((logits - outer).abs().max()) > 1e-3


def test_an_answer_of_the_edited_model() -> None:
    """The answer's tokens stand behind those of the context's inputs."""
    model, inputs = made("llava")
    answer, layer = [[5, 6, 7], [8, 9]], model.model.language_model.layers[1].self_attn.o_proj
    with va.intervene(model, inputs, va.ScaleHeads({1: [2]}, 0.0)):
        edited = va.explain(model, inputs, answer=answer)

    def without(heads: Tensor) -> Tensor:
        heads[:, :, 2] = 0.0
        return heads

    with hooked(layer, without, 4):
        expected = va.explain(model, inputs, answer=answer)
    torch.testing.assert_close(edited.relevancy["language"], expected.relevancy["language"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(edited.scores, expected.scores, rtol=0, atol=1e-10)


def test_two_towers_of_which_one_is_edited() -> None:
    model, inputs = made("clip")
    plain = va.explain(model, inputs)
    with va.intervene(model, inputs, va.ScaleHeads({0: [1]}, 0.0, tower="vision")):
        edited = va.explain(model, inputs)
    weights = without_heads(model, "vision_model.encoder.layers.0.self_attn.out_proj", [1], 0.0)
    expected = va.explain(weights, inputs)
    for name, row in expected.relevancy.items():
        torch.testing.assert_close(edited.relevancy[name], row, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(edited.scores, plain.scores)
