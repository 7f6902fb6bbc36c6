"""Second derivatives of recurrent_step where a derivative jumps, and their memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp

from tests.helpers.compare import LargestAllocation
from tests.helpers.ops.backends import F64
from tests.ops.test_recurrent_step import RULES, call, tensors
from vlattn_fast.backends.streaming import _tiles
from vlattn_fast.backends.streaming import recurrent_step as streaming
from vlattn_fast.ops.recurrent_step import _derivatives

# what torch says about its own formulas of forward mode
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
Step = Callable[..., Tensor]
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


@pytest.mark.slow  # of the first derivatives properties/test_memory.py asks
def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times as many tokens take about four times as much, and no map of a head is made."""
    monkeypatch.setattr(streaming, "CHUNK", 16)
    seen = []
    for n in (64, 256):
        x = {name: y.float() for name, y in tensors(n, b=1, h=1, hq=1, hk=1, d=4).items()}
        tangents = {f"{name}_tangent": y for name, y in x.items()}
        options = {"num_heads": 1, "rule": "gradient", "row_normalize": True, "backend": "streaming"}
        inputs = _derivatives.second_type(**tangents, grad=x["relevancy"], **x, **options)
        with LargestAllocation() as each:
            streaming.jvp(inputs)
            streaming.second(inputs)
        seen.append(each)
    assert seen[1].peak < 5 * seen[0].peak, [each.peak for each in seen]
    assert seen[1].bytes < 5 * seen[0].bytes and seen[1].bytes < 256 * 256, seen[1].by
