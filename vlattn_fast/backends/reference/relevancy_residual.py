"""A residual sum that weights relevancy by the contribution of each of its two terms (our reading of Huang et al. 2023).

On any device and floating dtype. Shapes: residual and branch (B, N, C), carriers (B, T, N), weights (B, N).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_choice, describe, is_transformed
from vlattn_fast._ground.tensors import compute_dtype, not_zero

BY_ROWS = ("contribution", "norm", "magnitude")  # which read rows, and have kernels
WEIGHTINGS = (*BY_ROWS, "equal")
Weighting = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def relevancy_residual(
    residual: Tensor,
    branch: Tensor,
    residual_carrier: Tensor,
    branch_carrier: Tensor,
    *,
    weighting: str | Weighting = "contribution",
) -> tuple[Tensor, Tensor]:
    """Computes the formula of vlattn_fast.relevancy_residual: (residual + branch, carrier).

    In the backward pass the carrier's gradient r becomes r * a and r * b.
    """
    if not callable(weighting):
        check_choice("weighting", weighting, WEIGHTINGS)
    return residual_sum(residual, branch, residual_carrier, branch_carrier, partial(residual_weights, weighting=weighting))


def residual_sum(
    residual: Tensor, branch: Tensor, residual_carrier: Tensor, branch_carrier: Tensor, weigh: Weighting
) -> tuple[Tensor, Tensor]:
    """(residual + branch, carrier) with weights by `weigh`: (residual, branch, g) -> (a, b), tensors of the sum's dtype."""
    function: type[_ResidualToCompile] = _Residual
    if torch.compiler.is_compiling():
        if is_transformed():
            raise RuntimeError(
                "relevancy_residual inside torch.compile has no forward mode, and torch.func would give wrong gradients of its "
                "carriers; compile without them, or use them without torch.compile"
            )
        function = _ResidualToCompile
    total, carrier = function.apply(residual, branch, residual_carrier, branch_carrier, weigh)
    return total, carrier


class _ResidualToCompile(torch.autograd.Function):
    """An autograd.Function, since a weighting may be any callable; torch.compile traces into it, where it has no `jvp`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        residual: Tensor, branch: Tensor, residual_carrier: Tensor, branch_carrier: Tensor, weigh: Weighting
    ) -> tuple[Tensor, Tensor]:
        return residual + branch, residual_carrier.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        residual, branch, _, _, ctx.weigh = inputs
        ctx.save_for_backward(residual, branch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        residual, branch = ctx.saved_tensors
        with torch.no_grad():  # constants of the rule; everything else here is linear in grad and r
            a, b = ctx.weigh(*(x.detach().to(grad.dtype) for x in (residual, branch)), grad.detach())
        return grad, grad, r * a[:, None].to(r.dtype), r * b[:, None].to(r.dtype), None


class _Residual(_ResidualToCompile):
    """With forward mode."""

    @staticmethod
    def jvp(ctx: Any, residual: Tensor, branch: Tensor, residual_carrier: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return residual + branch, residual_carrier.clone()


def residual_weights(residual: Tensor, branch: Tensor, grad: Tensor, weighting: str | Weighting) -> tuple[Tensor, Tensor]:
    """a and b (B, N) of `relevancy_residual` from both terms and the gradient at their sum, (B, N, C)."""
    if callable(weighting):
        weights = weighting(residual, branch, grad)
        shape = residual.shape[:2]
        if not (isinstance(weights, tuple) and len(weights) == 2) or any(
            not isinstance(w, Tensor) or w.shape != shape for w in weights
        ):
            raise ValueError(
                f"weighting must return two tensors (a, b) of shape (B, N) = {tuple(shape)}; got {describe(weights)}"
            )
        return weights
    dtype = compute_dtype(residual)
    if weighting == "equal":
        ones = residual.new_ones(residual.shape[:2], dtype=dtype)
        return ones, ones
    x, o, g = residual.to(dtype), branch.to(dtype), grad.to(dtype)
    if weighting == "contribution":
        by_residual, by_branch = (g * x).sum(-1).abs(), (g * o).sum(-1).abs()
    elif weighting == "magnitude":
        by_residual, by_branch = (g * x).abs().sum(-1), (g * o).abs().sum(-1)
    else:
        by_residual, by_branch = x.norm(dim=-1), o.norm(dim=-1)
    total = by_residual + by_branch
    a = torch.where(total == 0, 0.5, by_residual / not_zero(total))
    return a, 1 - a
