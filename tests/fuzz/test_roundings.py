"""The formula with other roundings errs where the plain one is exact by luck, and about as much as it where it is not."""

import pytest
import torch
from torch import Tensor

from vlattn_fast.backends import reference
from vlattn_fast.checking.roundings import OtherRoundings, unluckiest

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def gradients(query: Tensor, key: Tensor, value: Tensor, cotangent: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out = reference.score_attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_of_the_numbers_move_to_a_neighbour(dtype: torch.dtype) -> None:
    x = torch.randn(10_000).to(dtype)
    x[:100] = 0.0
    with OtherRoundings("seed", dtype):
        same, moved = x.clone(), x * 1.0
    assert torch.equal(same, x) and (moved[:100] == 0).all()
    assert 0.45 < (moved != x)[100:].double().mean() < 0.55
    assert ((moved - x).abs() <= 2 * torch.finfo(dtype).eps * x.abs()).all()
    assert torch.equal(moved[x == x[200]], moved[200].expand((x == x[200]).sum()))  # ties are kept


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_below_the_least_normal_one_move(dtype: torch.dtype) -> None:
    """In float16 those below 6e-5, which are farther apart than their size says: gradients beside a large sink are as small."""
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the least of all
    x = least * torch.randint(1, 100, (10_000,)).to(dtype) * torch.tensor([-1, 1]).repeat(5000)
    with OtherRoundings("seed", dtype, keeps_ties=False):
        moved = x * 1.0
    steps = (moved.double() - x.double()) / least
    assert 0.45 < (steps != 0).double().mean() < 0.55 and set(steps.unique().tolist()) == {-1.0, 0.0, 1.0}


def test_nearly_equal_numbers_move_apart() -> None:
    """Logits of a row masked by -1e9 differ in their last digits, in which float64 still has the scores."""
    x = -1e9 + torch.linspace(0.0, 1.0, 1000, dtype=torch.float64)
    with OtherRoundings("seed", torch.float64):
        moved = x * 1.0
    assert 0.4 < (moved != x).double().mean() < 0.6


def test_equal_numbers_may_become_different() -> None:
    x = torch.tensor([0.0, 0.3]).repeat(5000)
    with OtherRoundings("seed", torch.float32, keeps_ties=False):
        moved = x * 1.0
    assert (moved[0::2] == 0).all() and 0.45 < (moved != x)[1::2].double().mean() < 0.55 and len(moved.unique()) == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_number_stays_finite(dtype: torch.dtype) -> None:
    """Logits of padding are finfo.min. A step below it is -inf, of which the backward pass makes NaN."""
    x = torch.full((10_000,), torch.finfo(dtype).min, dtype=dtype)
    with OtherRoundings("seed", dtype, keeps_ties=False):
        moved = x * 1.0
    assert moved.isfinite().all() and 0.2 < (moved != x).double().mean() < 0.3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [1, 4])
def test_a_gradient_that_is_zero_by_luck_errs(keys: int, dtype: torch.dtype) -> None:
    """A single key, or equal keys: no query changes the output, and the plain formula may say so to the last bit."""
    generator = torch.Generator().manual_seed(keys)
    query, value, cotangent = (torch.randn(1, 1, n, 8, generator=generator, dtype=torch.float64).to(dtype) for n in (3, keys, 3))
    key = torch.full((1, 1, keys, 8), 0.75, dtype=dtype)
    tensors = (query, key, value, cotangent)
    exact = gradients(*(x.double() for x in tensors))
    found = []
    for n in range(8):
        with OtherRoundings(str(n), dtype):
            found.append({"query": gradients(*tensors)[1]})
    worst = unluckiest(found, {"query": exact[1]})["query"]
    assert 0.01 * torch.finfo(dtype).eps < worst.abs().max() < 20 * torch.finfo(dtype).eps


def test_generic_errors_stay_in_bounds() -> None:
    """On normal numbers the error of every result is one to four times that of the plain formula."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 2, 32, 16, generator=generator) for _ in range(4)]
    exact, plain = gradients(*(x.double() for x in tensors)), gradients(*tensors)
    with OtherRoundings("seed", torch.float32):
        other = gradients(*tensors)
    for x, y, truth in zip(other, plain, exact, strict=True):
        ratio = float((x - truth).square().mean().sqrt() / (y - truth).square().mean().sqrt())
        assert 1.0 < ratio < 4.0


def test_rows_masked_by_finite_numbers_stay_exact() -> None:
    """There lse is -1e9, and nothing may be taken from its roundings."""
    logits = torch.full((1, 8), -1e9)
    with OtherRoundings("seed", torch.float32):
        prob = torch.softmax(logits, dim=-1)
    torch.testing.assert_close(prob, torch.full_like(prob, 1 / 8), rtol=1e-6, atol=0.0)
