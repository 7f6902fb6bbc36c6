"""Integrated effects of edges: `va.attribute_edges(n_steps=)`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

import vlattn_fast as va
from tests.helpers.interpret.edited_maps import llama, made, small

GROUPS = {"first": (0, 3), "middle": (3, 6), "last": "last"}
LAYERS, HEADS, STEPS = 3, 4, 3
Made = tuple[Any, dict[str, Any], dict[str, Any], str | None, Callable[[Any], Tensor]]


class WithSinks(nn.Module):
    """Two layers that call score_attention, with a sink in each head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.sink = nn.Parameter(torch.tensor([0.4, -0.3]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            query, key, value = layer(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            x = x + va.score_attention(query, key, value, sink=self.sink).transpose(1, 2).flatten(2)
        return x


def with_sinks() -> Made:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 5, 8, dtype=torch.float64)}
    return WithSinks().double(), inputs, {"a": (0, 2), "b": (2, 5)}, None, lambda out: out[:, -1].square().sum(-1)


CASES: dict[str, Callable[[], Made]] = {
    "interface": lambda: (
        *made("clip"),
        {"patches": "image", "cls": "special"},
        "vision",
        lambda out: out.logits_per_image[:, 0],
    ),
    "uniter": lambda: (*made("uniter"), {"words": "text", "regions": "image"}, None, lambda out: out.logits[:, 1]),
    "score_attention, with sinks": with_sinks,
    "written by hand": lambda: (*small("BloomForCausalLM"), GROUPS, None, lambda out: out.logits[:, -1, 3]),
}


def test_effects_are_mean_derivatives_along_growing_cuts() -> None:
    """Maps between the unedited one and one without the edges, written out, give the same in autograd."""
    model, inputs = llama()
    table = va.attribute_edges(model, inputs, GROUPS, target=4, n_steps=STEPS)
    kept: list[Tensor] = []
    pair: list[tuple[slice, slice]] = []

    def growing(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        weights = (query @ key.mT * scaling).exp().tril()
        whole, (rows, columns) = weights / weights.sum(-1, keepdim=True), pair[0]
        removed = weights.clone()
        removed[:, :, rows, columns] = 0
        removed = removed / removed.sum(-1, keepdim=True).clamp(min=1e-300)
        share = kept[module.layer_idx][:, :, None, None]
        return ((share * whole + (1 - share) * removed) @ value).transpose(1, 2), None

    AttentionInterface.register("growing", growing)
    model.set_attn_implementation("growing")
    tokens = {"first": slice(0, 3), "middle": slice(3, 6), "last": slice(8, 9)}

    def run(share: float) -> Tensor:
        kept[:] = [torch.full((2, HEADS), share, dtype=torch.float64, requires_grad=True) for _ in range(LAYERS)]
        return model(input_ids=inputs["input_ids"]).logits[:, -1, 4]

    for i, from_ in enumerate(tokens):
        for j, to in enumerate(tokens):
            pair[:] = [(tokens[to], tokens[from_])]
            each = [torch.autograd.grad(run((step + 0.5) / STEPS).sum(), kept) for step in range(STEPS)]
            expected = sum(torch.stack(one) for one in each) / STEPS  # (L, B, H)
            found = [n for n, edge in enumerate(table) if (edge.from_, edge.to) == (from_, to)]
            effects = table.effects[found].view(LAYERS, HEADS, 2).transpose(1, 2)
            torch.testing.assert_close(effects, expected, rtol=1e-9, atol=1e-13)
            with torch.no_grad():
                gap = expected.sum((0, 2)) - (run(1.0) - run(0.0))
            assert table.gaps is not None
            torch.testing.assert_close(table.gaps[i, j], gap.mean(), rtol=1e-9, atol=1e-13)
    assert float(table.effects.abs().max()) > 1e-4


@pytest.mark.parametrize("kind", CASES)
def test_effects_sum_to_what_all_cuts_at_once_take(kind: str) -> None:
    model, inputs, groups, tower, score = CASES[kind]()
    few, many = (va.attribute_edges(model, inputs, groups, target=score, tower=tower, n_steps=steps) for steps in (1, 24))
    assert few.gaps is not None and many.gaps is not None
    assert float(many.gaps.abs().max()) < 0.02 * float(few.gaps.abs().max())
    for i, from_ in enumerate(groups):
        for j, to in enumerate(groups):
            with torch.no_grad():
                drop = score(model(**inputs))
                with va.intervene(model, inputs, va.Knockout(queries=groups[to], keys=groups[from_], tower=tower)):
                    drop = drop - score(model(**inputs))
            total = many.matrix(from_, to).double().sum() - many.gaps[i, j]
            torch.testing.assert_close(total, drop.double().mean(), rtol=1e-5, atol=1e-7)


def test_tables_say_what_they_are() -> None:
    model, inputs = llama()
    table = va.attribute_edges(model, inputs, GROUPS, target=4, n_steps=1)
    assert "36 edges, integrated effects" not in repr(va.attribute_edges(model, inputs, GROUPS, target=4))
    assert "integrated effects" in repr(table) and "differ from all cuts at once by" in repr(table)
    cut = va.intervene_each(model, inputs, table.top(2))
    assert cut.gaps is None and "integrated" not in repr(cut)


@pytest.mark.parametrize("n_steps", [0, -1, 1.5, True])
def test_n_steps_is_at_least_one(n_steps: Any) -> None:
    model, inputs = llama()
    with pytest.raises((TypeError, ValueError), match="n_steps"):
        va.attribute_edges(model, inputs, GROUPS, target=4, n_steps=n_steps)
