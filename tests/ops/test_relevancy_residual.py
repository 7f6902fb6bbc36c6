"""relevancy_residual: weighted relevancy, R <- diag(a) R + diag(b) Abar R, in one backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import assert_close_to

F64 = torch.float64
B, H, N, D, T, LAYERS = 2, 2, 6, 4, 2, 3
C = H * D


def by_norm_of_gradient(residual: Tensor, branch: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A weighting of a user's own: not symmetric, not adding up to one."""
    return g.norm(dim=-1) * residual[..., 0].abs(), branch.mean(-1).abs()


WEIGHTINGS: dict[str, Any] = {"contribution": "contribution", "norm": "norm", "equal": "equal", "callable": by_norm_of_gradient}


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], H, D).transpose(1, 2)


def model(x: Tensor, carrier: Tensor, weights: list[list[Tensor]], weighting: Any) -> tuple[Tensor, Tensor]:
    for wq, wk, wv, wo in weights:
        out, branch_carrier = va.relevancy_attention(
            *(heads(x @ w) for w in (wq, wk, wv)), carrier, row_normalize=True, residual_weight=0.0
        )
        branch = out.transpose(1, 2).reshape(x.shape) @ wo
        x, carrier = va.relevancy_residual(x, branch, carrier, branch_carrier, weighting=weighting)
    return x, carrier


def projections() -> list[list[Tensor]]:
    return [[0.5 * torch.randn(C, C, dtype=F64) for _ in range(4)] for _ in range(LAYERS)]


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_rows_of_the_full_formula(name: str) -> None:
    weights, x0, readout, seed = (
        projections(),
        torch.randn(B, N, C, dtype=F64),
        torch.randn(B, N, C, dtype=F64),
        torch.rand(B, T, N, dtype=F64),
    )
    start = torch.zeros(B, T, N, dtype=F64, requires_grad=True)
    x, carrier = model(x0.clone().requires_grad_(), start, weights, WEIGHTINGS[name])
    (rows,) = torch.autograd.grad([(x * readout).sum(), carrier], [start], [torch.tensor(1.0, dtype=F64), seed])

    z, kept = x0.clone().requires_grad_(), []
    for wq, wk, wv, wo in weights:
        q, k, v = (heads(z @ w) for w in (wq, wk, wv))
        prob = torch.softmax(q @ k.mT / D**0.5, -1)
        branch = (prob @ v).transpose(1, 2).reshape(z.shape) @ wo
        total = z + branch
        for y in (prob, total):
            y.retain_grad()
        kept.append((prob, z.detach(), branch.detach(), total))
        z = total
    (z * readout).sum().backward()
    relevancy = torch.eye(N, dtype=F64).expand(B, N, N)
    for prob, residual, branch, total in kept:
        g = total.grad
        abar = (prob * prob.grad).clamp(min=0).mean(1).detach()
        abar = abar / abar.sum(-1, keepdim=True)
        if name == "contribution":
            c_x, c_o = (g * residual).sum(-1).abs(), (g * branch).sum(-1).abs()
            a, b = c_x / (c_x + c_o), c_o / (c_x + c_o)
        elif name == "norm":
            c_x, c_o = residual.norm(dim=-1), branch.norm(dim=-1)
            a, b = c_x / (c_x + c_o), c_o / (c_x + c_o)
        elif name == "equal":
            a = b = torch.ones(B, N, dtype=F64)
        else:
            a, b = by_norm_of_gradient(residual, branch, g)
        relevancy = a[..., None] * relevancy + b[..., None] * (abar @ relevancy)
    assert_close_to(rows, seed @ relevancy, None, what=name)


def carriers(requires_grad: bool = True) -> tuple[Tensor, Tensor]:
    return tuple(torch.rand(1, 1, 3, requires_grad=requires_grad) for _ in range(2))  # type: ignore[return-value]


def test_forward_is_the_sum_and_the_residual_carrier() -> None:
    x, o = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    c, d = carriers()
    for weighting in WEIGHTINGS.values():
        total, carrier = va.relevancy_residual(x, o, c, d, weighting=weighting)
        assert torch.equal(total, x + o) and torch.equal(carrier, c)


def test_by_hand_and_one_half_where_both_are_zero() -> None:
    """g = [1, 1]: token 0 has x.g = 3, o.g = -1 (3/4, 1/4); token 1 nothing (1/2 each); token 2 only the branch (0, 1)."""
    x = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [1.0, -1.0]]], requires_grad=True)
    o = torch.tensor([[[0.0, -1.0], [0.0, 0.0], [3.0, 4.0]]], requires_grad=True)
    c, d = carriers()
    expected = {
        "contribution": ([0.75, 0.5, 0.0], [0.25, 0.5, 1.0]),
        "equal": ([1.0] * 3, [1.0] * 3),
        "norm": ([5**0.5 / (5**0.5 + 1), 0.5, 2**0.5 / (2**0.5 + 5)], [1 / (5**0.5 + 1), 0.5, 5 / (2**0.5 + 5)]),
    }
    for weighting, (a, b) in expected.items():
        outputs = va.relevancy_residual(x, o, c, d, weighting=weighting)
        r = torch.tensor([[[1.0, 10.0, 100.0]]])
        gx, go, gc, gd = torch.autograd.grad(outputs, (x, o, c, d), (torch.ones_like(x), r))
        assert torch.equal(gx, torch.ones_like(x)) and torch.equal(go, torch.ones_like(x))
        torch.testing.assert_close(gc, r * torch.tensor(a))
        torch.testing.assert_close(gd, r * torch.tensor(b))


@pytest.mark.parametrize("weighting", ("contribution", "norm"))
def test_nan_stays_nan(weighting: str) -> None:
    x, o = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    x[0, 1, 2] = torch.nan
    c, d = carriers()
    outputs = va.relevancy_residual(x.requires_grad_(), o, c, d, weighting=weighting)
    for grad in torch.autograd.grad(outputs, (c, d), (torch.ones_like(x), torch.ones_like(c))):
        assert grad.isnan().tolist() == [[[False, True, False]] * c.shape[1]]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_weights_are_taken_in_float32(dtype: torch.dtype) -> None:
    """g x of 300 * 300 overflows float16; the carrier stays float32."""
    x, o = (torch.full((1, 3, 4), 300.0, dtype=dtype, requires_grad=True) for _ in range(2))
    c, d = carriers()
    outputs = va.relevancy_residual(x, o, c, d)
    grads = torch.autograd.grad(outputs, (x, o, c, d), (torch.full_like(x, 300.0), torch.ones_like(c)))
    assert [g.dtype for g in grads] == [dtype, dtype, torch.float32, torch.float32]
    torch.testing.assert_close(grads[2], torch.full_like(c, 0.5))


def test_carriers_alone_require_a_gradient() -> None:
    x, o = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    c, d = carriers()
    _, carrier = va.relevancy_residual(x, o, c, d)
    grads = torch.autograd.grad(carrier.sum(), (c, d))  # no gradient of the sum: both contributions are zero
    assert all(torch.equal(g, torch.full_like(g, 0.5)) for g in grads)


X, Y = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
K = torch.zeros(1, 1, 3)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "residual is a list": (lambda: va.relevancy_residual([1.0], Y, K, K), TypeError, "residual must be a torch.Tensor"),
    "residual rank": (lambda: va.relevancy_residual(X[0], Y, K, K), ValueError, r"residual must have 3 dimensions \(B, N, C\)"),
    "branch shape": (
        lambda: va.relevancy_residual(X, Y[:, :2], K, K),
        ValueError,
        r"branch must have residual's shape \(1, 3, 4\)",
    ),
    "branch dtype": (lambda: va.relevancy_residual(X, Y.double(), K, K), TypeError, "branch must have the dtype of residual"),
    "integers": (lambda: va.relevancy_residual(X.long(), Y.long(), K, K), TypeError, "residual must be float16"),
    "carrier rank": (lambda: va.relevancy_residual(X, Y, K[0], K), ValueError, "residual_carrier must have 3 dimensions"),
    "carrier length": (
        lambda: va.relevancy_residual(X, Y, K, K[..., :2]),
        ValueError,
        r"branch_carrier must have shape \(B, T, N\)",
    ),
    "carriers differ": (
        lambda: va.relevancy_residual(X, Y, K, K.expand(1, 2, 3)),
        ValueError,
        "branch_carrier must have residual_carrier's",
    ),
    "carrier dtypes": (
        lambda: va.relevancy_residual(X, Y, K, K.double()),
        ValueError,
        "branch_carrier must have residual_carrier's",
    ),
    "carriers of integers": (
        lambda: va.relevancy_residual(X, Y, K.long(), K.long()),
        TypeError,
        "residual_carrier must be floating point",
    ),
    "weighting name": (lambda: va.relevancy_residual(X, Y, K, K, weighting="mean"), ValueError, "weighting must be one of"),
    "weighting type": (lambda: va.relevancy_residual(X, Y, K, K, weighting=0.5), TypeError, "weighting must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, words = BAD[name]
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("returned", (None, (torch.ones(1, 3),), (torch.ones(1, 3), torch.ones(3)), (1.0, 1.0)), ids=str)
def test_a_weighting_that_returns_something_else(returned: Any) -> None:
    c, d = carriers()
    _, carrier = va.relevancy_residual(X, Y, c, d, weighting=lambda *_: returned)
    with pytest.raises(ValueError, match=r"weighting must return two tensors \(a, b\) of shape \(B, N\) = \(1, 3\)"):
        carrier.sum().backward()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch tracing an autograd.Function
@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.slow
def test_fullgraph(name: str) -> None:
    torch._dynamo.reset()
    weights, x = projections()[: 2 if name == "contribution" else 1], torch.randn(B, N, C, dtype=F64)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    found = []
    for fn in (model, compiled):
        start = torch.zeros(B, T, N, dtype=F64, requires_grad=True)
        out, carrier = fn(x, start, weights, WEIGHTINGS[name])
        found.append(torch.autograd.grad([carrier], [start], [torch.ones_like(carrier)])[0])
        x_leaf = x.clone().requires_grad_()
        start = torch.zeros(B, T, N, dtype=F64, requires_grad=True)
        out, carrier = fn(x_leaf, start, weights, WEIGHTINGS[name])
        found.append(
            torch.autograd.grad([out.pow(2).sum(), carrier], [start], [torch.tensor(1.0, dtype=F64), torch.ones_like(carrier)])[0]
        )
    torch.testing.assert_close(found[2:], found[:2])
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_fullgraph_with_transforms_is_refused() -> None:
    """torch.compile traces the backward pass for torch.func in place of calling it, and would give wrong carriers."""
    x, start = torch.randn(2, 4, 8), torch.randn(2, 1, 4)

    def loss(x: Tensor, carrier: Tensor) -> Tensor:
        return sum(y.square().sum() for y in va.relevancy_residual(x, x, carrier, carrier))  # type: ignore[return-value]

    def gradients(x: Tensor, carrier: Tensor) -> Any:
        return torch.func.grad(loss, (0, 1))(x, carrier)

    with pytest.raises(torch._dynamo.exc.Unsupported, match="relevancy_residual"):
        torch.compile(gradients, backend="aot_eager", fullgraph=True)(x, start)
    torch._dynamo.reset()
    for ours, plain in zip(torch.compile(gradients, backend="aot_eager")(x, start), gradients(x, start), strict=True):
        torch.testing.assert_close(ours, plain)
