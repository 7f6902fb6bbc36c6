"""relevancy_attention: what autograd may ask, registration, torch.compile; the same for every backend unless a test says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import vlattn_fast as va
from tests.helpers.ops.backends import F64

B, H, N, D = 2, 4, 6, 5


class Products(TorchDispatchMode):
    """Counts matrix products with a weight of H * D rows, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func) in ("aten.mm.default", "aten.addmm.default")
        return func(*args, **(kwargs or {}))


class Model(torch.nn.Module):
    """Two layers of self-attention with residuals; carrier in, (score, carrier) out."""

    def __init__(self, layers: int = 2, remat: bool = False) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(0.5 * torch.randn(3, H * D, H * D, dtype=F64)) for _ in range(layers)
        )
        self.remat = remat

    def layer(self, x: Tensor, carrier: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        b, n = x.shape[:2]
        q, k, v = ((x @ w).view(b, n, H, D).transpose(1, 2) for w in weight)
        out, carrier = va.relevancy_attention(q, k, v, carrier)
        return x + out.transpose(1, 2).reshape(b, n, H * D), carrier

    def forward(self, x: Tensor, carrier: Tensor) -> tuple[Tensor, Tensor]:
        for weight in self.weights:
            x, carrier = (
                checkpoint(self.layer, x, carrier, weight, use_reentrant=False) if self.remat else self.layer(x, carrier, weight)
            )
        return x.pow(2).sum(), carrier


def relevancy_of(model: Callable[..., Any], x: Tensor) -> Tensor:
    start = torch.zeros(B, 1, x.shape[1], dtype=F64, requires_grad=True)
    score, carrier = model(x, start)
    row = torch.zeros_like(start)
    row[:, :, 0] = 1.0
    (rows,) = torch.autograd.grad([score, carrier], [start], [torch.ones_like(score), row])
    return rows


def test_no_weight_gradient_that_nobody_asked_for() -> None:
    """As many matrix products as with frozen weights, fewer than training takes."""
    x, counts = torch.randn(B, N, H * D, dtype=F64).requires_grad_(), {}
    for name in ("relevancy", "frozen", "training"):
        model = Model().requires_grad_(name != "frozen")
        start = torch.zeros(B, 1, N, dtype=F64, requires_grad=True)
        score, carrier = model(x, start)
        with Products() as products:
            if name == "training":
                score.backward()
            else:
                torch.autograd.grad([score, carrier], [start], [torch.ones_like(score), torch.ones_like(carrier)])
        counts[name] = products.count
        assert name == "training" or all(p.grad is None for p in model.parameters())
    assert counts["relevancy"] == counts["frozen"] < counts["training"], counts


def test_frozen_parameters_and_checkpointing_change_nothing() -> None:
    torch.manual_seed(3)
    model = Model()
    x = torch.randn(B, N, H * D, dtype=F64)
    expected = relevancy_of(model, x)
    model.remat = True
    assert torch.equal(relevancy_of(model, x), expected)
    model.remat = False
    model.requires_grad_(False)
    assert torch.equal(relevancy_of(model, x.clone().requires_grad_()), expected)


@pytest.mark.slow
def test_fullgraph_two_layers_with_grad_outside_and_two_graphs_over_five_lengths() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = Model()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for n in (8, 9, 15, 16, 17):
        x = torch.randn(B, n, H * D, dtype=F64)
        torch.testing.assert_close(relevancy_of(compiled, x), relevancy_of(model, x))
    assert counter.frame_count <= 2
    torch._dynamo.reset()
