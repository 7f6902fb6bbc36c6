"""relevancy_residual: weighted relevancy, R <- diag(a) R + diag(b) Abar R, in one backward pass."""

from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import LargestAllocation, as_dtype, assert_all_close_to, assert_close_to, bytes_of
from tests.helpers.ops.backends import F64, HALVES, assert_refused, each, finest, on
from tests.helpers.ops.tile_edges import covering
from vlattn_fast.backends.reference.relevancy_residual import BY_ROWS
from vlattn_fast.backends.reference.relevancy_residual import WEIGHTINGS as NAMES

B, H, N, D, T, LAYERS = 2, 2, 6, 4, 2, 3
C = H * D
FAST = ("streaming", "cpu", "triton")
TILE_ELEMENTS = 200  # streaming crosses several tiles, of tokens and of samples


def by_norm_of_gradient(residual: Tensor, branch: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A weighting of a user's own: not symmetric, not adding up to one."""
    return g.norm(dim=-1) * residual[..., 0].abs(), branch.mean(-1).abs()


WEIGHTINGS: dict[str, Any] = {**dict(zip(NAMES, NAMES, strict=True)), "callable": by_norm_of_gradient}


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
        elif name == "magnitude":
            c_x, c_o = torch.zeros(B, N, dtype=F64), torch.zeros(B, N, dtype=F64)
            for feature in range(C):
                c_x += (g[..., feature] * residual[..., feature]).abs()
                c_o += (g[..., feature] * branch[..., feature]).abs()
            a, b = c_x / (c_x + c_o), c_o / (c_x + c_o)
        elif name == "equal":
            a = b = torch.ones(B, N, dtype=F64)
        else:
            a, b = by_norm_of_gradient(residual, branch, g)
        relevancy = a[..., None] * relevancy + b[..., None] * (abar @ relevancy)
    assert_close_to(rows, seed @ relevancy, None, what=name)


def carriers(requires_grad: bool = True) -> tuple[Tensor, Tensor]:
    return tuple(torch.rand(1, 1, 3, requires_grad=requires_grad) for _ in range(2))  # type: ignore[return-value]


@on("reference", *FAST)
def test_forward_is_the_sum_and_the_residual_carrier(backend: str) -> None:
    x, o = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    c, d = carriers()
    for name, weighting in WEIGHTINGS.items():
        if name == "callable" and backend in ("cpu", "triton"):
            assert_refused(
                backend, "a callable", partial(va.relevancy_residual, x, o, c, d, weighting=weighting, backend=backend)
            )
            continue
        total, carrier = va.relevancy_residual(x, o, c, d, weighting=weighting, backend=backend)
        assert torch.equal(total, x + o) and torch.equal(carrier, c)


@on("reference", *FAST)
def test_by_hand_and_one_half_where_both_are_zero(backend: str) -> None:
    """g = [1, 1]: token 0 has x.g = 3, o.g = -1 (3/4, 1/4); token 1 nothing (1/2 each); token 2 only the branch (0, 1)."""
    x = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [1.0, -1.0]]], requires_grad=True)
    o = torch.tensor([[[0.0, -1.0], [0.0, 0.0], [3.0, 4.0]]], requires_grad=True)
    c, d = carriers()
    expected = {
        "contribution": ([0.75, 0.5, 0.0], [0.25, 0.5, 1.0]),
        "equal": ([1.0] * 3, [1.0] * 3),
        "norm": ([5**0.5 / (5**0.5 + 1), 0.5, 2**0.5 / (2**0.5 + 5)], [1 / (5**0.5 + 1), 0.5, 5 / (2**0.5 + 5)]),
        "magnitude": ([0.75, 0.5, 2 / 9], [0.25, 0.5, 7 / 9]),
    }
    for weighting, (a, b) in expected.items():
        outputs = va.relevancy_residual(x, o, c, d, weighting=weighting, backend=backend)
        r = torch.tensor([[[1.0, 10.0, 100.0]]])
        gx, go, gc, gd = torch.autograd.grad(outputs, (x, o, c, d), (torch.ones_like(x), r))
        assert torch.equal(gx, torch.ones_like(x)) and torch.equal(go, torch.ones_like(x))
        torch.testing.assert_close(gc, r * torch.tensor(a))
        torch.testing.assert_close(gd, r * torch.tensor(b))


@each("weighting", **dict.fromkeys(("reference", *FAST), BY_ROWS))
def test_nan_stays_nan(backend: str, weighting: str) -> None:
    x, o = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    x[0, 1, 2] = torch.nan
    c, d = carriers()
    outputs = va.relevancy_residual(x.requires_grad_(), o, c, d, weighting=weighting, backend=backend)
    for grad in torch.autograd.grad(outputs, (c, d), (torch.ones_like(x), torch.ones_like(c))):
        assert grad.isnan().tolist() == [[[False, True, False]] * c.shape[1]]


@each("dtype", **dict.fromkeys(("reference", *FAST), HALVES))
def test_half_precision_weights_are_taken_in_float32(backend: str, dtype: torch.dtype) -> None:
    """g x of 300 * 300 overflows float16; the carrier stays float32."""
    x, o = (torch.full((1, 3, 4), 300.0, dtype=dtype, requires_grad=True) for _ in range(2))
    c, d = carriers()
    outputs = va.relevancy_residual(x, o, c, d, backend=backend)
    grads = torch.autograd.grad(outputs, (x, o, c, d), (torch.full_like(x, 300.0), torch.ones_like(c)))
    assert [g.dtype for g in grads] == [dtype, dtype, torch.float32, torch.float32]
    torch.testing.assert_close(grads[2], torch.full_like(c, 0.5))


def tensors(b: int = 2, n: int = 5, c: int = 24, t: int = 2) -> dict[str, Tensor]:
    streams = {name: torch.randn(b, n, c, dtype=F64) for name in ("residual", "branch")}
    return streams | {name: torch.randn(b, t, n, dtype=F64) for name in ("residual_carrier", "branch_carrier")}


def check(backend: str, inputs: dict[str, Tensor], weighting: str, grad: Tensor | None = None) -> None:
    """Outputs and gradients against the formula's; `grad`: at the sum."""
    grad = torch.randn(inputs["residual"].shape) if grad is None else grad
    cotangents = [grad, torch.randn(inputs["residual_carrier"].shape)]
    functions = partial(va.relevancy_residual, backend=backend), va.reference.relevancy_residual
    assert_all_close_to(*(partial(function, weighting=weighting) for function in functions), inputs, cotangents)


@on(*FAST)
@pytest.mark.parametrize("c, n, weighting", covering((1, 7, 65, 1030), (1, 33), BY_ROWS))
def test_edges_of_rows(backend: str, c: int, n: int, weighting: str) -> None:
    for dtype in (finest(backend), torch.bfloat16):
        check(backend, as_dtype(tensors(n=n, c=c), dtype), weighting)


@on("reference", *FAST)
def test_terms_of_two_dtypes_under_autocast(backend: str) -> None:
    x, o, g = torch.randn(1, 3, 8).bfloat16(), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    c, d = carriers()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = va.relevancy_residual(x, o, c, d, backend=backend)
    (a,) = torch.autograd.grad(outputs, c, (g, torch.ones_like(c)), retain_graph=True)
    by_x, by_o = ((g * term).sum(-1).abs() for term in (x.float(), o))
    torch.testing.assert_close(a, (by_x / (by_x + by_o))[:, None])


@on("streaming", "cpu")
def test_rows_are_widened_in_no_copy(backend: str) -> None:
    inputs = {name: x.bfloat16().requires_grad_() for name, x in tensors(1, 64, 128).items()}
    outputs = va.relevancy_residual(**inputs, backend=backend)
    cotangents = [torch.randn_like(x) for x in outputs]
    with LargestAllocation() as largest:
        torch.autograd.grad(outputs, list(inputs.values()), cotangents)
    assert 0 < largest.bytes <= 1024 < bytes_of(inputs["residual"])


def test_the_weights_have_no_gradient() -> None:
    x = tensors(n=3, c=4)["residual"].float()
    with pytest.raises(RuntimeError, match="the weights are constants of the rule"):
        torch.ops.vlattn.residual_weights(x.requires_grad_(), x, x, "norm", "streaming")[0].sum().backward()


X, Y = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)


def test_carriers_of_two_dtypes_are_refused() -> None:
    carrier = torch.zeros(1, 1, 3)
    with pytest.raises(ValueError, match="branch_carrier must have residual_carrier's"):
        va.relevancy_residual(X, Y, carrier, carrier.double())


@pytest.mark.parametrize("returned", (None, (torch.ones(1, 3),), (torch.ones(1, 3), torch.ones(3)), (1.0, 1.0)), ids=str)
def test_a_weighting_that_returns_something_else(returned: Any) -> None:
    c, d = carriers()
    _, carrier = va.relevancy_residual(X, Y, c, d, weighting=lambda *_: returned)
    with pytest.raises(ValueError, match=r"weighting must return two tensors \(a, b\) of shape \(B, N\) = \(1, 3\)"):
        carrier.sum().backward()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@each("weighting", reference=BY_ROWS, **dict.fromkeys(FAST, BY_ROWS))
@pytest.mark.slow
def test_fullgraph_of_one_call(backend: str, weighting: str) -> None:
    torch._dynamo.reset()
    inputs, cotangents = as_dtype(tensors(), torch.float32), (torch.randn(2, 5, 24), torch.randn(2, 2, 5))
    call = partial(va.relevancy_residual, weighting=weighting, backend=backend)
    found = []
    for run in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        found.append(torch.autograd.grad(run(**leaves), list(leaves.values()), cotangents))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")  # it looks into the kernel, which torch.func calls, and gives it up
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
