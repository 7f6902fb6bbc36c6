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
from tests.helpers.ops.backends import F64, arguments_of, each
from tests.helpers.ops.relevancy_cases import cotangents, padding, some, tensors
from vlattn_fast.backends.inputs import (
    RelevancyAttentionBackwardInputs,
    RelevancyAttentionInputs,
    RelevancyStepBackwardInputs,
    RelevancyStepInputs,
)

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


def test_autocast_does_as_sdpa() -> None:
    inputs = tensors(N, b=2)
    leaves = [x.requires_grad_() for x in inputs.values()]
    with torch.autocast("cpu", torch.bfloat16):
        out, carrier = va.relevancy_attention(*leaves)
    assert (out.dtype, carrier.dtype) == (torch.bfloat16, torch.float32)
    grads = torch.autograd.grad(
        [out, carrier], leaves, [x.to(y.dtype) for x, y in zip(cotangents(inputs), (out, carrier), strict=True)]
    )
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)


@each(
    "case",
    streaming=[("gradient", "transposed"), ("attention", "contiguous")],
    cpu=[("gradient", "transposed")],
    triton=[("gradient", "transposed")],
    cuda=[("gradient", "transposed"), ("attention", "contiguous")],
)
def test_opcheck(backend: str, case: tuple[str, str]) -> None:
    """Schemas and fake layouts that the operators promise; autograd's registration, which all backends share, for streaming."""
    rule, layout = case
    checks = ("test_schema", "test_faketensor")
    traced = checks + (("test_autograd_registration", "test_aot_dispatch_dynamic") if backend == "streaming" else ())
    made = tensors(N, b=2, d=6, dv=6 if layout == "contiguous" else 5)
    x = {name: y if layout == "contiguous" else y.transpose(1, 2).contiguous().transpose(1, 2) for name, y in made.items()}
    query, key, value, carrier = (y.detach().requires_grad_(backend == "streaming") for y in x.values())
    given: dict[str, Any] = {"query": query, "key": key, "value": value, "carrier": carrier, "rule": rule, "backend": backend}
    if rule == "gradient":
        given |= {"residual_weight": torch.rand(B, N), "attention_weight": torch.full((1, 1), 0.5)}
    given |= {"key_mask": padding(N)} if layout == "contiguous" else {"attn_mask": some(N)[None, None]}
    if backend == "streaming" and rule == "gradient":
        given["row_bias"] = torch.randn(*query.shape[:3], 3, dtype=query.dtype)
        given["key_groups"] = torch.randint(-1, 3, (query.shape[0], N))
    if backend in ("streaming", "cpu"):
        given |= {"score": "dot_softcap", "parameter": 0.7}
    given |= {"sink": None if backend == "cuda" else torch.zeros(2, 1), "row_normalize": rule == "gradient"}
    given |= {"scale": 0.5, "is_causal": layout == "transposed"}
    ops = torch.ops.vlattn
    torch.library.opcheck(ops.relevancy_attention, arguments_of(RelevancyAttentionInputs, **given), test_utils=traced)
    given |= x
    c = x["carrier"]
    out, _, lse, _ = ops.relevancy_attention(*arguments_of(RelevancyAttentionInputs, **given))
    given |= {"out": out, "lse": lse}
    for grad_out, grad_carrier, need in ((out, c, True), (out, None, True), (None, c, True), (out, c, False)):
        whole = grad_out is not None and grad_carrier is not None and need
        given |= {"grad_out": grad_out, "grad_carrier": grad_carrier, "need_inputs": need}
        given["grad_lse"] = torch.randn_like(lse) if whole and backend != "cuda" else None
        given["grad_behind_sink"] = torch.randn_like(out) if whole and given["sink"] is not None else None
        arguments = arguments_of(RelevancyAttentionBackwardInputs, **given)
        torch.library.opcheck(ops.relevancy_attention_backward, arguments, test_utils=traced if whole else checks)
    given |= {"relevancy": c, "grad_output": out, "grad": torch.randn_like(c)}
    torch.library.opcheck(ops.relevancy_step, arguments_of(RelevancyStepInputs, **given), test_utils=traced)
    for needed in ((True, True, True), (True, False, False), (False, True, False)):
        given |= dict(zip(("need_relevancy", "need_inputs", "need_lse"), needed, strict=True))
        torch.library.opcheck(ops.relevancy_step_backward, arguments_of(RelevancyStepBackwardInputs, **given), test_utils=checks)


def test_every_operator_here_is_checked() -> None:
    ours = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("vlattn::")}
    mine = {name.removesuffix("_symbolic") for name in ours if name.startswith(("score_attention", "relevancy"))}
    suffixes = "", "_backward", "_jvp", "_second"
    each = {name + suffix for name in ("score_attention", "relevancy_step") for suffix in suffixes}
    assert mine == each | {"relevancy_attention", "relevancy_attention_backward"}


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
