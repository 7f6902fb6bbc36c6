"""Second derivatives: relevancy_residual is linear and has them; the others say that they have none."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import vlattn_fast as va
from tests.helpers.ops.every_call import CALLS, leaves, outputs_of

A, B = torch.rand(2, 4, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64)


def constants(residual: Tensor, branch: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return A, B


def inputs() -> list[Tensor]:
    shapes = ((2, 4, 3), (2, 4, 3), (2, 5, 4), (2, 5, 4))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("weighting", ["contribution", "norm", "equal", constants])
def test_the_sum_of_relevancy_residual(weighting: object) -> None:
    residual, branch, *carriers = inputs()

    def cubed(x: Tensor, o: Tensor) -> Tensor:
        return va.relevancy_residual(x, o, *carriers, weighting=weighting)[0] ** 3

    assert gradcheck(cubed, (residual, branch))
    assert gradgradcheck(cubed, (residual, branch))


@pytest.mark.parametrize("weighting", ["equal", constants])
def test_the_carrier_of_relevancy_residual(weighting: object) -> None:
    """Of constant weights: then the derivatives by differences know of no other part either."""
    residual, branch, *carriers = inputs()

    def carrier(r: Tensor, s: Tensor) -> Tensor:
        return va.relevancy_residual(residual.detach(), branch.detach(), r, s, weighting=weighting)[1] ** 3

    cotangent = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(carrier(*carriers), carriers, cotangent, create_graph=True)
    a, b = (A, B) if weighting is constants else (torch.ones_like(A), torch.ones_like(B))
    third = 3 * carriers[0] ** 2
    torch.testing.assert_close(first[0], cotangent * third * a[:, None])
    torch.testing.assert_close(first[1], cotangent * third * b[:, None])
    seeds = [torch.randn_like(x) for x in first]
    (by_cotangent,) = torch.autograd.grad(first, cotangent, seeds, retain_graph=True)
    torch.testing.assert_close(by_cotangent, third * (seeds[0] * a[:, None] + seeds[1] * b[:, None]))
    (by_carrier,) = torch.autograd.grad(first[0], carriers[0], seeds[0])
    torch.testing.assert_close(by_carrier, seeds[0] * cotangent * 6 * carriers[0] * a[:, None] * a[:, None])


def test_weights_are_constants() -> None:
    """No derivative goes through a and b of "contribution", though they are functions of the data and the cotangent."""
    residual, branch, *carriers = inputs()
    total, carrier = va.relevancy_residual(residual, branch, *carriers)
    g = torch.randn_like(total).requires_grad_()
    r = torch.randn_like(carrier).requires_grad_()
    grads = torch.autograd.grad([total, carrier], [residual, *carriers], [g, r], create_graph=True)
    by_data = torch.autograd.grad(grads[1].sum(), [residual, branch, g], retain_graph=True, allow_unused=True)
    assert by_data == (None, None, None)
    a = ((g * residual).sum(-1).abs() / ((g * residual).sum(-1).abs() + (g * branch).sum(-1).abs())).detach()
    (by_r,) = torch.autograd.grad(grads[1].sum(), r)
    torch.testing.assert_close(by_r, a[:, None].expand_as(r))


ONCE = [name for name, every in CALLS.items() if every.differentiable and name != "relevancy_residual"]


@pytest.mark.parametrize("name", ONCE)
def test_the_others_have_none(name: str) -> None:
    run = partial(CALLS[name].call, backend="streaming")
    x = leaves(CALLS[name].make(4))
    total = sum(y.sum() for y in outputs_of(run(x)) if y.requires_grad)
    grads = torch.autograd.grad(total, list(x.values()), create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        sum(g.sum() for g in grads if g is not None and g.requires_grad).backward()
