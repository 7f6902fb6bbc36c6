"""attention_divergence: the formula by hand, every backend against it, small divergences, and what it refuses."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype, outputs_and_grads
from tests.helpers.ops.backends import F64, core, each, finest, on
from vlattn_fast.backends.reference.attention_divergence import KINDS

FAST = ("streaming", "cpu", "triton")
TILE_ELEMENTS = 500  # streaming crosses several tiles


def tensors(heads: int = 4, others: int = 4, shared: int = 1, n: int = 7, m: int = 9) -> dict[str, Tensor]:
    shapes = {"query": (heads, n, 6), "key": (heads // shared, m, 6), "other_query": (others, n, 5)}
    shapes["other_key"] = others // shared, m, 5
    return {name: torch.randn(2, *shape, dtype=F64) for name, shape in shapes.items()}


@on("reference", *FAST)
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("kl", 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        ("reverse_kl", 0.5 * math.log(1 / 1.5) + 0.5 * math.log(2)),
        ("js", 0.5 * (0.75 * math.log(1.2) + 0.25 * math.log(2 / 3) + 0.5 * math.log(0.8) + 0.5 * math.log(4 / 3))),
        ("hellinger", 1 - math.sqrt(0.375) - math.sqrt(0.125)),
        ("total_variation", 0.25),
    ],
)
def test_by_hand(backend: str, kind: str, expected: float) -> None:
    """(3/4, 1/4) and (1/2, 1/2)."""
    dtype = finest(backend)
    query, key = torch.ones(1, 1, 1, 1, dtype=dtype), torch.tensor([math.log(3.0), 0.0], dtype=dtype).view(1, 1, 2, 1)
    got = va.attention_divergence(query, key, query, torch.zeros_like(key), kind=kind, backend=backend)
    assert got.shape == (1, 1, 1) and abs(float(got) - expected) < 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
@on("reference", *FAST)
def test_the_mean_of_heads_is_that_of_their_weights(backend: str, kind: str) -> None:
    """Maps of which each row is one product, as a second way to the same numbers."""
    x = tensors(heads=4, others=2)
    sides = (("query", "key"), ("other_query", "other_key"))
    a, b = ((x[q] @ x[k].mT * x[q].shape[-1] ** -0.5).softmax(-1).mean(1, keepdim=True) for q, k in sides)
    expected = {
        "kl": (a * (a / b).log()).sum(-1),
        "reverse_kl": (b * (b / a).log()).sum(-1),
        "js": 0.3 * (a * (a / (0.3 * a + 0.7 * b)).log()).sum(-1) + 0.7 * (b * (b / (0.3 * a + 0.7 * b)).log()).sum(-1),
        "hellinger": 1 - (a * b).sqrt().sum(-1),
        "total_variation": (a - b).abs().sum(-1) / 2,
    }[kind]
    given, eps = as_dtype(x, finest(backend)), torch.finfo(finest(backend)).eps
    got = va.attention_divergence(**given, kind=kind, beta=0.3, head_mean=True, backend=backend)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=450 * eps)


@pytest.mark.parametrize("kind", KINDS)
@on(*FAST)
def test_weights_below_the_least_float(backend: str, kind: str) -> None:
    """Their logarithms are finite, and so are divergences and gradients."""
    x = {name: 60 * value.float() for name, value in tensors().items()}
    for head_mean in (False, True):
        for value in outputs_and_grads(
            partial(va.attention_divergence, kind=kind, head_mean=head_mean, backend=backend), x
        ).values():
            assert value.isfinite().all()


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "js", "hellinger"])  # total variation grows as the difference
@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
@on(*FAST)
def test_small_divergences_keep_their_digits(backend: str, kind: str, size: float) -> None:
    """A sum of A (S - S') less log-sum-exps is wrong by many times a divergence of 5e-9 in float32."""
    query, key = torch.randn(1, 1, 32, 64), torch.randn(1, 1, 512, 64)
    other = query + size * torch.randn_like(query)
    exact = va.attention_divergence(query.double(), key.double(), other.double(), key.double(), kind=kind)
    got = va.attention_divergence(query, key, other, key, kind=kind, backend=backend)
    assert float(((got - exact) / exact).abs().max()) < 1e-6 / size
    assert float(exact.max()) < 3 * size**2


@pytest.mark.parametrize("kind", KINDS)
@on(*FAST)
def test_a_divergence_beside_a_key_with_all_the_weight_keeps_its_digits(backend: str, kind: str) -> None:
    """Its two weights round to 1, or to what lies next to it; the other keys have 1e-9 and less."""
    query, key = torch.randn(1, 1, 16, 8), torch.randn(1, 1, 40, 8)
    other = query + 0.5 * torch.randn_like(query)
    query[..., 0], other[..., 0], key[..., 0] = 30.0, 30.0, 0.0
    key[:, :, 7] = torch.eye(8)[0]
    run = partial(va.attention_divergence, kind=kind, scale=1.0, other_scale=1.0)
    exact = run(*(x.double() for x in (query, key, other, key)), backend="reference")
    got = run(query, key, other, key, backend=backend)
    assert float(exact.max()) < 1e-6
    torch.testing.assert_close(got, exact.float(), rtol=1e-4, atol=0.0)


@pytest.mark.slow("triton")
@each("dtype", **{name: core(name) for name in FAST})
def test_equal_attentions_have_no_divergence(backend: str, dtype: torch.dtype) -> None:
    """Also of a frozen copy."""
    x = as_dtype(tensors(), dtype)
    own, copy = {name: x[name] for name in ("query", "key")}, {"other_query": x["query"], "other_key": x["key"]}
    for kind in KINDS:
        call = partial(va.attention_divergence, kind=kind, backend=backend)
        for got in (outputs_and_grads(call, own | copy), outputs_and_grads(partial(call, **copy), own)):
            assert all(not value.any() for value in got.values()), kind


X = torch.randn(2, 4, 7, 6)
Y = torch.randn(2, 4, 9, 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"beta": 1.0}, ValueError, "beta must be between 0 and 1; got 1.0"),
        ({"other_query": X[:, :2], "other_key": Y[:, :2]}, ValueError, "other_query must have query's 4 heads unless head_mean"),
        ({"key": Y[:, :2]}, ValueError, r"key must have query's B and D, and H heads \(fewer with enable_gqa=True\)"),
        ({"key": Y[:, :3], "enable_gqa": True}, ValueError, "key must have query's B and D, and a divisor of H heads"),
        ({"other_key": Y.double()}, TypeError, "other_key must have"),
        (
            {"other_query": X[:, :2], "other_key": Y[:, :2], "head_mean": True, "attn_mask": torch.ones(2, 4, 7, 9).bool()},
            ValueError,
            "attn_mask must broadcast",
        ),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"query": X, "key": Y, "other_query": X, "other_key": Y} | change
    with pytest.raises(error, match=message):
        va.attention_divergence(**given)
