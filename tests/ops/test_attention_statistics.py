"""attention_statistics: the formulas by hand, and every backend against them."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.compare import LargestAllocation, as_dtype
from tests.helpers.ops.backends import F64, finest, on
from tests.helpers.ops.map_cases import STATISTICS, B, D, G, H, M, N, check_statistics, groups, sharp, statistics_inputs
from tests.helpers.ops.masks import visible
from vlattn_fast.backends.reference.attention_statistics import attention_statistics as formulas
from vlattn_fast.backends.streaming import _tiles
from vlattn_fast.ops.attention_statistics import AttentionStatistics, attention_statistics

FAST = ("streaming", "cpu", "triton")
LOG2, LOG3 = math.log(2.0), math.log(3.0)

# the interpreter's numpy warns of Inf in numbers that no result takes
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning")
TILE_ELEMENTS = 3 * M  # streaming crosses many tiles


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


@on("reference", "streaming")
def test_by_hand(backend: str) -> None:
    """One head, A = [[1/2, 1/4, 1/4], [1/3, 1/3, 1/3], [0, 1, 0], [0, 0, 0]]."""
    masked = -torch.inf
    logits = torch.tensor([[LOG2, 0.0, 0.0], [0.0, 0.0, 0.0], [masked, 9.0, masked], [masked] * 3], dtype=F64)
    query, key = torch.zeros(1, 1, 4, 1, dtype=F64), torch.zeros(1, 1, 3, 1, dtype=F64)
    found = attention_statistics(
        query,
        key,
        attn_mask=logits,
        key_groups=torch.tensor([1, -1, 1]),
        num_groups=2,
        row_weight=torch.tensor([1.0, 3.0, 2.0, 5.0]),
        backend=backend,
    )
    want = AttentionStatistics(
        mass=torch.tensor([[0, 3 / 4], [0, 2 / 3], [0, 0], [0, 0]]),
        entropy=torch.tensor([1.5 * LOG2, LOG3, 0, 0]),
        maximum=torch.tensor([1 / 2, 1 / 3, 1, 0]),
        argmax=torch.tensor([0, 0, 1, -1]),
        received=torch.tensor([1 / 2 + 1, 1 / 4 + 1 + 2, 1 / 4 + 1]),
    )
    for name, got, wanted in zip(want._fields, found, want, strict=True):
        torch.testing.assert_close(got[0, 0].double(), wanted.double(), rtol=0, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert found.argmax.dtype == torch.int64


@on("reference", "streaming")
def test_gradients_by_hand(backend: str) -> None:
    """A = (a, 1 - a) with a = sigmoid(q): da/dq = a (1 - a), dH/dq = -a (1 - a) q."""
    query = torch.tensor([[[[LOG3]]]], dtype=F64, requires_grad=True)
    key = torch.tensor([[[[1.0], [0.0]]]], dtype=F64)
    weight = torch.tensor([2.0], dtype=F64, requires_grad=True)
    found = attention_statistics(
        query, key, key_groups=torch.tensor([-1, 0]), num_groups=1, row_weight=weight, scale=1.0, backend=backend
    )
    slope = 3 / 4 * 1 / 4
    for value, wanted in (
        (found.mass, -slope),
        (found.entropy, -slope * LOG3),
        (found.maximum, slope),
        (found.received[..., 0], 2 * slope),
    ):
        (grad,) = torch.autograd.grad(value.sum(), query, retain_graph=True)
        assert float(grad) == pytest.approx(wanted, abs=1e-14)
    (grad,) = torch.autograd.grad(found.received[..., 0].sum(), weight)
    assert float(grad) == pytest.approx(3 / 4, abs=1e-14)


@on(*FAST)
@pytest.mark.parametrize("only", STATISTICS)
def test_the_gradient_of_each_statistic(only: str, backend: str) -> None:
    inputs = as_dtype(statistics_inputs(), finest(backend))
    check_statistics(backend, inputs, only=only, attn_mask=visible(B, 1, N, M), **groups())


GROUPS: dict[str, Any] = {
    "none": lambda: {},
    "of each sample": lambda: {"key_groups": torch.randint(-1, G, (B, M)), "num_groups": G},
    "more than keys": lambda: groups(M, 2 * M),
    "no group at all": lambda: {"key_groups": torch.full((M,), -1), "num_groups": 0},
}


@on(*FAST)
@pytest.mark.parametrize("name", GROUPS)
def test_groups(name: str, backend: str) -> None:
    check_statistics(backend, as_dtype(statistics_inputs(), finest(backend)), **GROUPS[name]())


@on(*FAST)
@pytest.mark.parametrize("scale", (0.0, -0.7))
def test_scale(scale: float, backend: str) -> None:
    check_statistics(backend, as_dtype(statistics_inputs(), finest(backend)), scale=scale, **groups())


@on(*FAST)
def test_row_weight_of_every_sample_alike_and_none(backend: str) -> None:
    inputs = as_dtype(statistics_inputs(), finest(backend))
    check_statistics(backend, inputs | {"row_weight": inputs["row_weight"][0]}, only="received")
    del inputs["row_weight"]
    check_statistics(backend, inputs, attn_mask=visible(B, 1, N, M), **groups())


@on(*FAST)
def test_first_of_equal_keys_is_the_maximum_and_takes_its_gradient(backend: str) -> None:
    """Small integers: every order of summation gives the same logits. Keys tie within a tile and across tiles."""
    query, key = torch.randint(-1, 2, (1, 1, N, 8)).to(F64), torch.randint(-1, 2, (1, 1, M, 8)).to(F64)
    inputs = as_dtype({"query": query, "key": key, "row_weight": torch.ones(N)}, finest(backend))
    for fixed in ({}, {"is_causal": True}, {"scale": -1.0}, {"attn_mask": torch.rand(N, M) > 0.3}):
        found = attention_statistics(inputs["query"], inputs["key"], backend=backend, **fixed)
        assert torch.equal(found.argmax, formulas(query, key, **fixed).argmax)
    check_statistics(backend, inputs, only="maximum")


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # by the interpreter of Triton 3.6
@on(*FAST)
def test_the_largest_weight_of_a_row_of_nan_is_the_first(backend: str) -> None:
    query = torch.randn(1, 1, 4, 8)
    key = torch.randn(1, 1, 40, 8)
    query[0, 0, 1, 2] = torch.nan
    rows = [attention_statistics(query, key, backend=name).argmax[0, 0] for name in (backend, "reference")]
    assert rows[0].equal(rows[1]) and rows[0][1] == 0


@on(*FAST)
def test_sharp_attention_far_from_zero(backend: str) -> None:
    """Weights underflow, the entropy is as small as its rounding; the logits of the masked keys are the largest."""
    inputs, keys = sharp(as_dtype(statistics_inputs(), torch.float32))
    for masks in ({"key_mask": keys}, {"is_causal": True}):
        check_statistics(backend, inputs, scale=1.0, **masks, **groups())
    found = attention_statistics(**inputs, key_mask=keys, scale=1.0, backend=backend)
    assert float(found.maximum.max()) == 1.0 and (found.entropy >= 0).all()


@on(*FAST)
def test_a_sharp_row_has_the_entropy_of_its_small_weights(backend: str) -> None:
    key = torch.tensor([20.0, 0.0, 0.0]).view(1, 1, 3, 1)
    check_statistics(backend, {"query": torch.ones(1, 1, 1, 1), "key": key}, only="entropy", scale=1.0)


def test_the_argmax_has_no_gradient() -> None:
    tensors = statistics_inputs()
    query = tensors["query"].clone().requires_grad_()
    assert not attention_statistics(query, tensors["key"]).argmax.requires_grad


def test_compiled_groups_are_not_read() -> None:
    torch._dynamo.reset()
    query, key, groups = double(1, 1, 3, 2).requires_grad_(), double(1, 1, 4, 2), torch.tensor([0, 1, 7, -3])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(num_groups: int | None) -> Tensor:
        return attention_statistics(query, key, key_groups=groups, num_groups=num_groups).mass

    with pytest.raises(Exception, match="num_groups must be an integer if the values of key_groups are not available"):
        compiled(None)
    mass = compiled(2)
    want = attention_statistics(query, key, key_groups=torch.tensor([0, 1, -1, -1]), num_groups=2).mass
    assert torch.equal(mass, want)  # a value out of range is no group, in the backward pass too
    wanted = torch.autograd.grad(want.sum(), query)[0]
    assert torch.equal(torch.autograd.grad(mass.sum(), query)[0], wanted)


def test_membership_is_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 1 << 16)
    # as many groups as keys, few queries: membership as one (M,G) matrix would be a map
    query, key = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2048, 4)
    with LargestAllocation() as memory:
        attention_statistics(query, key, key_groups=torch.arange(2048), backend="streaming")
    assert memory.bytes <= 8 * (1 << 16), memory.by


@on("reference", "streaming")
def test_number_of_groups_from_the_data(backend: str) -> None:
    run = partial(attention_statistics, double(B, H, N, D), backend=backend)
    for index, wanted in ((torch.tensor([0, 4, -1, 2] * 10), 5), (torch.full((M,), -1), 0), (None, 0)):
        assert run(double(B, H, M, D), key_groups=index).mass.shape == (B, H, N, wanted)
    empty = run(double(B, H, 0, D), key_groups=torch.zeros(0, dtype=torch.int64))
    assert empty.mass.shape == (B, H, N, 0) and empty.received.shape == (B, H, 0)


INDEX = torch.zeros(M, dtype=torch.int64)
BAD_INPUT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"key_groups": INDEX + 7, "num_groups": 2}, ValueError, "key_groups must hold values .* num_groups = 2; got values from 7"),
    ({"key_groups": INDEX - 2}, ValueError, "key_groups must hold values from -1"),
    ({"key_groups": INDEX + 2, "num_groups": 2}, ValueError, "below num_groups = 2; got values from 2 to 2"),
    ({"key_groups": INDEX, "num_groups": -1}, ValueError, "num_groups must be at least 0"),
    ({"num_groups": 3}, ValueError, "num_groups must be 0 or None if key_groups is not given"),
    ({"row_weight": torch.ones(1, N)}, ValueError, r"row_weight must have shape \(N\) or \(B, N\) with \(B, N\) = \(2, 7\)"),
]


@pytest.mark.parametrize(("changed", "error", "words"), BAD_INPUT, ids=[words[:40] for *_, words in BAD_INPUT])
def test_bad_input(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    given_inputs = {"query": double(B, H, N, D), "key": double(B, H, M, D)}
    with pytest.raises(error, match=words):
        attention_statistics(**given_inputs | changed)


@on("streaming", "cpu", "triton")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (7, 5)])
def test_distance(backend: str, queries: int, keys: int, is_causal: bool) -> None:
    """Against the sum over the map; with a query that sees no key, and a sink."""
    query, key = torch.randn(2, 2, queries, D).requires_grad_(), torch.randn(2, 1, keys, D).requires_grad_()
    mask, sink = torch.rand(2, 1, queries, keys) > 0.3, torch.randn(2).requires_grad_()
    mask[0, :, 1] = False
    options: dict[str, Any] = {"statistics": ["distance"], "attn_mask": mask, "is_causal": is_causal, "enable_gqa": True}
    found, exact = (
        attention_statistics(*(x.to(dtype) for x in (query, key)), sink=sink.to(dtype), backend=each, **options).distance
        for each, dtype in ((backend, finest(backend)), ("reference", F64))
    )
    torch.testing.assert_close(found.to(F64), exact, rtol=1e-4, atol=1e-4)
    for got, want in zip(*(torch.autograd.grad(x.square().sum(), (query, key, sink)) for x in (found, exact)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
