"""The score `Distance`: digits beside long vectors, sinks, padding, empty sizes, wrong values."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from vlattn_fast import scores as S

F64 = torch.float64


def inputs(n: int = 5, m: int = 7, d: int = 4) -> list[Tensor]:
    return [torch.randn(2, 3, size, d, dtype=F64, requires_grad=True) for size in (n, m, m)]


@pytest.mark.parametrize("backend", ("streaming", "sdpa", "cpu"))
def test_a_distance_does_not_depend_on_what_all_vectors_share(backend: str) -> None:
    """Beside 1000 in each number float32 has four digits of a distance left; around a point amid the keys it has them all."""
    query, key, value = (x.detach().float() for x in inputs())
    moved = [x + torch.tensor(1000.0) for x in (query, key)]
    score = S.Distance(torch.tensor(0.5))
    got = va.score_attention(*moved, value, score=score, backend=backend)
    want = va.reference.score_attention(*(x.double() for x in moved), value.double(), score=S.Distance(0.5))
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
    low = [x.bfloat16() for x in moved]
    got = va.score_attention(*low, value.bfloat16(), score=S.Distance(0.5), backend=backend)
    want = va.reference.score_attention(*(x.double() for x in (*low, value.bfloat16())), score=S.Distance(0.5))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("backend", ("cpu", "streaming"))
@pytest.mark.parametrize("masked", ("most keys", "a long key"))
def test_masked_keys_take_no_digits_of_a_distance(masked: str, backend: str) -> None:
    """Padding is zeros, far from keys beside 1000; and a long key in the future would draw a mean away from all others."""
    query, key, value = (torch.randn(1, 2, n, 8) for n in (5, 40, 40))
    options: dict[str, Any] = {"is_causal": True}
    if masked == "most keys":
        query, key, options = query + 1000, key + 1000, {"key_mask": (torch.arange(40) < 4)[None]}
    else:
        key[:, :, -1] = 1e6
    got = va.score_attention(query, key, value, score=S.Distance(1.7), backend=backend, **options)
    want = va.reference.score_attention(query.double(), key.double(), value.double(), score=S.Distance(1.7), **options)
    torch.testing.assert_close(got.double(), want, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("sigma", (0.7, 1.3, 11.0))
def test_the_features_of_long_vectors_keep_a_small_distance(sigma: float) -> None:
    """Their product in float64 has it: the square beside the feature w q is that of the feature as it is rounded."""
    key = 40 * torch.randn(1, 2, 200, 8)
    query, score = key + 0.01 * torch.randn(key.shape), S.Distance(sigma)
    core, exact = score.core(query, key), score.formula(query.double(), key.double())
    errors = (core.query.double() @ core.key.double().mT - exact).diagonal(dim1=2, dim2=3)
    assert errors.abs().max() < 1e-5 / sigma**2


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("sigma", (300.0, 3e19, 1e300, torch.tensor(torch.inf)), ids=str)
def test_a_sigma_whose_square_has_no_place_attends_evenly(sigma: float | Tensor, dtype: torch.dtype) -> None:
    x = torch.randn(1, 1, 3, 4).to(dtype)
    score = S.Distance(sigma.to(dtype) if isinstance(sigma, Tensor) else sigma)
    for operator in (va.score_attention, va.reference.score_attention):
        out = operator(x, x, x, score=score)
        torch.testing.assert_close(out.float(), x.float().mean(2, keepdim=True).expand(x.shape), rtol=0, atol=0.01)
    with pytest.raises(ValueError, match="sigma must be at least 1e-19 for .*, to have a square; got 1e-30"):
        va.score_attention(x, x, x, score=S.Distance(1e-30))


@pytest.mark.parametrize("score", ("distance", "general"))
def test_gradients_beside_a_sink_that_has_nearly_all(score: str) -> None:
    """A term of the row counts by the keys' share, here 1e-9, and not as the difference of two numbers near 1."""
    query, key, value = (x.detach().float().requires_grad_() for x in inputs())
    parameter = torch.randn(4, requires_grad=True) if score == "general" else torch.tensor(1.3, requires_grad=True)
    leaves = query, key, value, parameter

    def gradients(operator: Any, query: Tensor, key: Tensor, value: Tensor, parameter: Tensor) -> tuple[Tensor, ...]:
        made = S.General(torch.eye(4).to(query), parameter) if score == "general" else S.Distance(parameter)
        sink = torch.full((3,), 20.0).to(query)
        out, lse = operator(query, key, value, score=made, sink=sink, return_lse=True)
        return torch.autograd.grad(out.sum() + lse.sum(), (query, key, value, parameter))

    want = gradients(va.reference.score_attention, *(x.detach().double().requires_grad_() for x in leaves))
    for x, y in zip(gradients(va.score_attention, *leaves), want, strict=True):
        assert (x - y).abs().max() < 1e-5 * y.abs().max()


def test_distance_has_second_derivatives() -> None:
    query, key, value = (x.detach()[:1, :1, :3].requires_grad_() for x in inputs())
    sigma = torch.tensor(1.5, dtype=F64, requires_grad=True)
    call = lambda q, k, v, s: va.score_attention(q, k, v, score=S.Distance(s), return_lse=True, backend="streaming")  # noqa: E731
    assert torch.autograd.gradgradcheck(call, (query, key, value, sigma))


@pytest.mark.parametrize("backend", ("streaming", "reference"))
@pytest.mark.parametrize(
    ("sigma", "error", "words"),
    (
        (0.0, ValueError, "sigma must be above 0; got 0.0"),
        (math.nan, ValueError, "sigma must be a finite number"),
        ("1", TypeError, "sigma must be a real number"),
        (torch.tensor(-1.0), ValueError, r"sigma must be above 0; got tensor\(-1.\)"),
        (torch.tensor([1.0, 1.0, math.nan]), ValueError, "sigma must be above 0"),
        (torch.ones(1), ValueError, r"sigma must have shape \(\), or \(3,\) for one per head"),
        (torch.ones((), dtype=F64), TypeError, "sigma must have the dtype of query"),
    ),
    ids=str,
)
def test_a_wrong_sigma_is_refused(backend: str, sigma: Any, error: type[Exception], words: str) -> None:
    x = torch.randn(1, 3, 2, 4)
    va.score_attention(x, x, x, score=S.Distance(torch.ones(())), backend=backend)  # a choice that is kept
    with pytest.raises(error, match=words):
        va.score_attention(x, x, x, score=S.Distance(sigma), backend=backend)
