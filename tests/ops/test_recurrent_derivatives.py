"""Forward mode and second derivatives of recurrent_step, against torch.func of the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from tests.helpers.compare import LargestAllocation
from tests.helpers.ops.backends import F64, on
from tests.ops.test_recurrent_step import KINDS, RULES, call, tensors
from vlattn_fast.backends.streaming import _tiles
from vlattn_fast.backends.streaming import recurrent_step as streaming

# what torch says about its own formulas of forward mode
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
Step = Callable[..., Tensor]
HEADS: tuple[dict[str, int], ...] = ({}, {"hq": 2, "hk": 1}, {"hk": 2}, {"hq": 1})
ROWS = torch.linspace(-1, 1, 2 * 2 * 11, dtype=F64).view(2, 2, 11)  # of a weight on the result


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streaming crosses several chunks, of which the last is not full, samples one by one, and some chunks at a time."""
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 100)
    monkeypatch.setattr(streaming, "CHUNK", 4)


def positional(x: dict[str, Tensor], backend: str, **options: Any) -> Step:
    step, names = call(backend, **options), list(x)
    return lambda *given: step(**dict(zip(names, given, strict=True)))


def weighted(step: Step) -> Step:
    """A function of the step that is not linear."""
    return lambda *x: (step(*x).sin() * ROWS[: len(x[0]), :, : x[0].shape[2]]).sum()


def assert_as_formula(derive: Callable[[Step], Any], x: dict[str, Tensor], **options: Any) -> None:
    """`derive` returns tensors, in tuples, for a step of the tensors in x."""
    ours, truth = ([*_flat(derive(positional(x, backend, **options)))] for backend in ("streaming", "reference"))
    assert len(ours) == len(truth) and any(y.abs().max() > 1e-3 for y in truth)
    for one, two in zip(ours, truth, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


def apart_from_zero(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of few numbers have a sum that one can divide by."""
    x["beta"][:, :, :2] = 1.0
    for name in ("query", "key"):
        x[name][:, :, :2] = x[name][:, :, :2].abs() + 0.1
    return x


def _flat(x: Any) -> Any:
    return [x] if isinstance(x, Tensor) else [y for each in x for y in _flat(each)]


def second_derivatives(step: Step, x: tuple[Tensor, ...], u: tuple[Tensor, ...]) -> Any:
    """The tangent, forward over reverse, reverse over forward, and reverse over reverse."""
    every = tuple(range(len(x)))
    hvp = jvp(grad(weighted(step), every), x, u)
    over_forward = grad(lambda *y: jvp(weighted(step), y, u)[1], every)(*x)
    leaves = [y.clone().requires_grad_() for y in x]
    first = torch.autograd.grad(weighted(step)(*leaves), leaves, create_graph=True, materialize_grads=True)
    total = sum(((y * tangent).sum() for y, tangent in zip(first, u, strict=True)), leaves[0].sum() * 0)
    return jvp(step, x, u), hvp, over_forward, torch.autograd.grad(total, leaves, materialize_grads=True)


@pytest.mark.slow("linear", "per feature", "strong")
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_of_all_inputs(kind: str) -> None:
    for (rule, row_normalize), heads in zip(RULES, HEADS, strict=True):
        x = KINDS[kind](apart_from_zero(tensors(11, **heads)))
        u = tuple(map(torch.randn_like, x.values()))
        assert_as_formula(
            lambda step, x=x, u=u: second_derivatives(step, tuple(x.values()), u), x, rule=rule, row_normalize=row_normalize
        )


@pytest.mark.parametrize("name", ("relevancy", "query", "key", "value", "grad_output", "log_decay", "beta", "diagonal"))
def test_one_input_varies(name: str) -> None:
    """The other tangents are None, and the gradients of relevancy are cut off."""
    x = tensors(11, b=1)

    def derive(step: Step) -> Any:
        def of_one(y: Tensor) -> Tensor:
            return step(*{**x, name: y}.values())

        u = (torch.ones_like(x[name]),)
        return jvp(of_one, (x[name],), u), jvp(grad(weighted(of_one)), (x[name],), u)

    assert_as_formula(derive, x)


def test_whole_matrices() -> None:
    """jacfwd and hessian are vmap of a tangent, jacrev vmap of a gradient, which fold into the batch."""
    x = tensors(5, b=1, h=2, hq=1, hk=2, d=2, dv=2)
    gates = ("log_decay", "beta")
    where = tuple(list(x).index(name) for name in gates)

    def derive(step: Step) -> Any:
        arguments = tuple(x.values())
        second = hessian(weighted(step), where)(*arguments)
        return (
            jacfwd(step, where)(*arguments),
            jacrev(step, where)(*arguments),
            second,
            jacrev(jacrev(weighted(step)))(*arguments),
        )

    assert_as_formula(derive, x)
    assert_as_formula(lambda step: hessian(weighted(step), 1)(*x.values()), x, row_normalize=True)


def test_batches() -> None:
    x = {name: torch.stack([y, y.flip(0)]) for name, y in tensors(5).items()}
    assert_as_formula(lambda step: vmap(grad(weighted(step), (1, 2)))(*x.values()), x)
    shared = (None, *[0] * (len(x) - 1))
    rest = {**x, "relevancy": x["relevancy"][0]}
    u = torch.randn_like(rest["query"])

    def derive(step: Step) -> Any:
        def tangent(*y: Tensor) -> Tensor:
            return jvp(lambda query: step(y[0], query, *y[2:-1]), (y[1],), (y[-1],))[1]

        return vmap(tangent, (*shared, 0))(*rest.values(), u)

    assert_as_formula(derive, rest)


def test_dual_levels_and_a_backward_pass() -> None:
    """The tangent of a dual number has gradients, as MeanFlow's loss needs them."""
    x = tensors(11)
    u = [torch.randn_like(y) for y in x.values()]

    def derive(step: Step) -> Any:
        leaves = [y.clone().requires_grad_() for y in x.values()]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(y, tangent) for y, tangent in zip(leaves, u, strict=True)]
            result = forward_ad.unpack_dual(step(*duals))
            assert result.tangent is not None
            loss = (result.tangent.square() + result.primal.sin()).sum()
            return loss, torch.autograd.grad(loss, leaves)

    assert_as_formula(derive, x)
    assert_as_formula(derive, x, row_normalize=True)


@on("streaming")
def test_gradgradcheck(backend: str) -> None:
    """The differences of gradients, which share no formula with them."""
    x = tensors(7, b=1, h=2, hq=1, hk=2, d=3, dv=2)
    x["log_decay"] -= 0.1
    leaves = [y.requires_grad_() for y in x.values()]
    step = positional(x, backend)
    options = {"check_forward_ad": True, "check_batched_forward_grad": False}
    assert torch.autograd.gradcheck(step, leaves, fast_mode=True, **options)
    assert torch.autograd.gradgradcheck(step, leaves, fast_mode=True, check_fwd_over_rev=True)


def test_where_a_derivative_jumps() -> None:
    """relu has the derivative 0 at 0, |A| too, and a decay of 0 has no tangent."""
    x = tensors(11)
    x["value"][:, :, 3] = 0.0  # A dA = 0
    x["query"][:, :, 5] = 0.0  # A = 0
    x["diagonal"][:] = 0.0
    x["log_decay"][:, :, 6] = -torch.inf
    u = tuple(map(torch.ones_like, x.values()))
    for rule, row_normalize in RULES:
        assert_as_formula(lambda step: second_derivatives(step, tuple(x.values()), u), x, rule=rule, row_normalize=row_normalize)


@on("streaming", "cpu")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    """Sums are in float32: nothing is lost but the digits of results."""
    x = {name: y.to(dtype) for name, y in tensors(11).items()}
    u = tuple(map(torch.randn_like, x.values()))
    wide = {name: y.double() for name, y in x.items()}
    every = tuple(range(len(x)))

    def derive(step: Step, y: dict[str, Tensor], tangents: tuple[Tensor, ...]) -> Any:
        def tangent(*z: Tensor) -> Tensor:
            return jvp(step, z, tangents)[1]

        given = tuple(y.values())
        return tangent(*given), *grad(lambda *z: tangent(*z).double().mul(ROWS).sum(), every)(*given)

    ours = derive(positional(x, backend), x, u)
    truth = derive(positional(wide, "reference"), wide, tuple(y.double() for y in u))
    digits = max(torch.finfo(dtype).eps, 2e-5)
    for one, two in zip(ours, truth, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), two, rtol=digits, atol=digits * float(two.abs().max()))


@pytest.mark.parametrize("empty", ("b", "h", "n", "d", "dv"))
def test_empty_sizes(empty: str) -> None:
    sizes = {"n": 4, empty: 0} | ({"hq": 0, "hk": 0} if empty == "h" else {})
    x = tensors(**sizes)
    x.pop("diagonal")
    step, given = positional(x, "streaming"), tuple(x.values())
    u = tuple(map(torch.ones_like, given))
    _, tangents = jvp(grad(lambda *y: step(*y).sum(), tuple(range(len(given)))), given, u)
    assert [y.shape for y in tangents] == [y.shape for y in given] and not any(y.any() for y in tangents)


def test_no_third_derivative() -> None:
    x = tensors(5)
    step, u = positional(x, "streaming"), tuple(map(torch.ones_like, x.values()))
    with pytest.raises(RuntimeError, match="recurrent_step has no third derivative"):
        grad(lambda *y: jvp(grad(weighted(step)), y, u)[1].sum())(*x.values())


def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times as many tokens take about four times as much, and no map of a head is made."""
    monkeypatch.setattr(streaming, "CHUNK", 16)
    seen = []
    for n in (128, 512):
        x = {name: y.float() for name, y in tensors(n, b=1, h=1, hq=1, hk=1, d=4).items()}
        tangents = {f"{name}_tangent": y for name, y in x.items()}
        options = {"num_heads": 1, "rule": "gradient", "row_normalize": True, "backend": "streaming"}
        inputs = streaming.RecurrentStepSecondInputs(**tangents, grad=x["relevancy"], **x, **options)
        with LargestAllocation() as each:
            streaming.jvp(inputs)
            streaming.second(inputs)
        seen.append(each)
    assert seen[1].peak < 5 * seen[0].peak, [each.peak for each in seen]
    assert seen[1].bytes < 5 * seen[0].bytes and seen[1].bytes < 512 * 512, seen[1].by
