"""`explain` inside of `intervene`: relevancy of the edited model."""

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.edited_maps import hooked, llama, made

METHODS = ["gradient", "rollout", "attention", "gradcam", "weighted"]
VECTOR = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def without_edges(model: Any, inputs: dict[str, Tensor]) -> AbstractContextManager[Any]:
    """From the last tokens to the image, in two heads of layer 1, whose attention takes a bias (B, H, N, N) with its mask."""
    bias = torch.zeros(2, 4, 24, 24, dtype=torch.float64)
    image = inputs["input_ids"] == model.config.image_token_index
    for row, last in enumerate([23, 21]):
        bias[row, 1:3, last, image[row]] = -torch.inf

    def change(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(bias.shape[-2:], dtype=torch.bool).tril()
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(bias).masked_fill(~mask, -torch.inf)
        return args, {**kwargs, "attention_mask": mask + bias}

    return model.model.language_model.layers[1].self_attn.register_forward_pre_hook(change, with_kwargs=True)


def scaled(model: Any, path: str, heads: dict[int, float]) -> AbstractContextManager[Any]:
    def change(states: Tensor) -> Tensor:
        for head, factor in heads.items():
            states[:, :, head] *= factor
        return states

    return hooked(model.get_submodule(path), change, 4)


def moved(model: Any, path: str, rows: slice = slice(None)) -> AbstractContextManager[Any]:
    def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, rows] += VECTOR
        return output

    return model.get_submodule(path).register_forward_hook(change)


HEADS = [va.ScaleHeads({1: [0, 3]}, 0.0), va.ScaleHeads({2: 1}, 0.5)]
OF_LLAVA, OF_CLIP = "model.language_model.layers.1", "vision_model.encoder.layers.0.self_attn.out_proj"
# The model; edits, each within the ones before; the same changes by hooks; what is explained.
CASES: dict[str, tuple[str, list[Any], list[Any], dict[str, Any]]] = {
    "edges": ("llava", [va.Knockout(queries="last", keys="image", layers=1, heads=[1, 2])], [without_edges], {"target": 7}),
    "heads": (
        "llama",
        [HEADS],
        [
            lambda model, _: scaled(model, "model.layers.1.self_attn.o_proj", {0: 0.0, 3: 0.0}),
            lambda model, _: scaled(model, "model.layers.2.self_attn.o_proj", {1: 0.5}),
        ],
        {"target": 7},
    ),
    "edits within edits": (
        "llama",
        [HEADS[0], va.Residual(1, (2, 5), add=VECTOR), va.Residual(1, scale=0.5)],
        [
            lambda model, _: scaled(model, "model.layers.1.self_attn.o_proj", {0: 0.0, 3: 0.0}),
            lambda model, _: moved(model, "model.layers.1", slice(2, 5)),
            lambda model, _: model.get_submodule("model.layers.1").register_forward_hook(lambda _, args, output: 0.5 * output),
        ],
        {"target": 7},
    ),
    "states": ("llava", [va.Residual(1, add=VECTOR)], [lambda model, _: moved(model, OF_LLAVA)], {}),
    "an answer": (  # whose tokens stand behind those of the context's inputs
        "llava",
        [va.ScaleHeads({1: [2]}, 0.0)],
        [lambda model, _: scaled(model, f"{OF_LLAVA}.self_attn.o_proj", {2: 0.0})],
        {"answer": [[5, 6, 7], [8, 9]]},
    ),
    "one of two towers": (
        "clip",
        [va.ScaleHeads({0: [1]}, 0.0, tower="vision")],
        [lambda model, _: scaled(model, OF_CLIP, {1: 0.0})],
        {},
    ),
}


def same(one: va.Explanation, other: va.Explanation, case: str) -> None:
    for name, row in other.relevancy.items():
        torch.testing.assert_close(one.relevancy[name], row, rtol=1e-9, atol=1e-12, msg=lambda text: f"{case}: {text}")
    torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-10, msg=lambda text: f"{case}: {text}")


@pytest.mark.parametrize("method", METHODS)
def test_an_edited_model_is_explained_as_one_that_hooks_change(method: str) -> None:
    for case, (family, edits, changes, asked) in CASES.items():
        model, inputs = llama() if family == "llama" else made(family)
        plain = va.explain(model, inputs, method=method, **asked)
        question = asked if "answer" in asked else {**asked, "target": plain.target}
        explanations = []
        for way in ("edits", "hooks", "neither"):
            with ExitStack() as stack:
                for one in {"edits": edits, "hooks": changes}.get(way, []):
                    stack.enter_context(va.intervene(model, inputs, one) if way == "edits" else one(model, inputs))
                explanations.append(va.explain(model, inputs, method=method, **question))
        edited, changed, again = explanations
        same(edited, changed, case)
        same(again, plain, case)
        assert not torch.allclose(edited.scores, plain.scores), case
        if method in ("gradient", "weighted"):
            assert any(not torch.allclose(edited.relevancy[name], row, rtol=1e-3) for name, row in plain.relevancy.items()), case


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
