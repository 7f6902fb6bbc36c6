"""`freeze` beside norms that are written out with detached denominators: `python -m tools.model_classes --held`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tools.model_classes import held
from tools.model_classes.compare import BOUND, outcome_of
from tools.model_classes.run import HELD, classes
from vlattn_fast.attach import frozen


@pytest.mark.parametrize(
    ("mapping", "name", "kept"),
    [
        ("causal", "LlamaForCausalLM", ""),
        ("causal", "BambaForCausalLM", ""),  # has recurrences, and a norm behind a gate
        ("causal", "DbrxForCausalLM", "DbrxFFN"),  # whose router divides by a norm of its weights
        ("zero-shot", "CLIPModel", "CLIPModel"),  # divides by the norms of both embeddings
        ("sequence", "T5ForConditionalGeneration", ""),
        ("image", "ViTForImageClassification", ""),
    ],
)
def test_norms_and_attention_are_those_of_a_plain_implementation(mapping: str, name: str, kept: str) -> None:
    row = outcome_of(mapping, name, held.compared)
    said, _, named = row.reason.partition(held.KEPT)
    assert row.outcome == "equal" and said.startswith("gradient ") and "refused" not in said, row
    assert named == kept


def test_another_denominator_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = frozen._Norm.over_root
    monkeypatch.setattr(frozen._Norm, "over_root", lambda norm, x: right(norm, x) * (1 + 1e-6))
    row = outcome_of("image", "ViTForImageClassification", held.compared)
    assert row.outcome == "wrong" and row.reason.startswith("gradients differ by"), row


def test_attention_that_keeps_its_derivative_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen.Frozen, "constant", lambda one, tensor: tensor)
    row = outcome_of("image", "ViTForImageClassification", held.compared)
    assert row.outcome == "wrong" and row.reason.startswith("norms and attention held fixed: rows differ by"), row


class ScaledNorm(nn.Module):
    """A norm by the root mean square of groups, gated behind, with a factor of one more than its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps, self.group_size = nn.Parameter(torch.linspace(-0.5, 0.5, 12)), 1e-4, 6

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        rows = x.unflatten(-1, (-1, self.group_size))
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self.eps)
        return rows.flatten(-2) * (1 + self.weight) * nn.functional.silu(gate)


class CubicNorm(nn.Module):
    """None of the formulas."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().pow(3).mean(-1, keepdim=True) ** (1 / 3)


def test_formulas_are_found_by_their_output() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    gate, cotangent = torch.randn(2, 3, 12, dtype=torch.float64), torch.randn(2, 3, 12, dtype=torch.float64)
    model = nn.ModuleDict({"norm": ScaledNorm().double(), "cubic": CubicNorm(), "layer": nn.LayerNorm(12).double()})
    with held.Detached(model) as detached:
        output, cubic, layer = model["norm"](x, gate), model["cubic"](x), model["layer"](x)
    assert detached.norms == 2 and list(detached.kept) == ["CubicNorm"]
    torch.testing.assert_close(output, model["norm"](x, gate))
    torch.testing.assert_close(layer, model["layer"](x))
    for linear in (output, layer):  # <gradient, x> = <cotangent, y>, of a norm 0
        (grad,) = torch.autograd.grad(linear, x, cotangent, retain_graph=True)
        torch.testing.assert_close((grad * x).sum(), (cotangent * linear).sum())
    (grad,) = torch.autograd.grad(cubic, x, cotangent)
    assert (grad * x).sum().abs() < 1e-9


def test_the_stored_outcomes_are_of_classes_and_none_is_wrong() -> None:
    table: dict[str, Any] = json.loads(HELD.read_text(encoding="utf-8"))
    table.pop("transformers")
    assert sum(outcome == "equal" for rows in table.values() for _, outcome, _ in rows.values()) >= 350
    for mapping, rows in table.items():
        named = classes(mapping)
        for kind, (name, outcome, reason) in rows.items():
            assert named[kind] == name and outcome in ("equal", "refused", "cannot be built", "cannot be compared")
            assert outcome != "equal" or float(reason.removeprefix("gradient ").partition(",")[0]) <= BOUND
