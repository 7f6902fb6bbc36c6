"""A residual sum that weights relevancy by what each of its two terms brings (our reading of Huang et al. 2023).

It is written in PyTorch alone: it reads each tensor once, and torch.compile fuses it with its surroundings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._checks import check_choice, check_device, check_floating, check_tensor, describe
from vlattn_fast._tensors import compute_dtype
from vlattn_fast.ops._shards import ROWS, over_shards

WEIGHTINGS = ("contribution", "norm", "equal")
Weighting = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@over_shards(dict.fromkeys(("residual", "branch", "residual_carrier", "branch_carrier"), ROWS), [ROWS, ROWS])
def relevancy_residual(
    residual: Tensor,
    branch: Tensor,
    residual_carrier: Tensor,
    branch_carrier: Tensor,
    *,
    weighting: str | Weighting = "contribution",
) -> tuple[Tensor, Tensor]:
    """The residual sum y = x + o with relevancy weighted by what each term brings (our reading of Huang et al. 2023).

    Forward: (residual + branch, residual_carrier). Backward: the cotangent g of the sum flows to both terms. The cotangent r
    of the carrier becomes r * a for residual_carrier and r * b for branch_carrier, with a, b (B, N) by `weighting`:

    - "contribution": c_x = |sum_c g x|, c_o = |sum_c g o|, a = c_x / (c_x + c_o), b = 1 - a; 1/2 each where both are zero.
    - "norm": the same with the L2 norms |x| and |o|.
    - "equal": a = b = 1, Chefer's rule.
    - a callable (residual, branch, g) -> (a, b).

    With relevancy_attention(..., residual_weight=0.0) giving branch_carrier this is weighted relevancy,
    R <- diag(a) R + diag(b) Abar R.

    Differentiable any number of times. The weights a and b are constants of the rule: no derivative goes through them, so the
    second derivative of a carrier is that of r -> (r * a, r * b).

    Args:
        residual, branch: (B, N, C), float16, bfloat16, float32 or float64.
        residual_carrier, branch_carrier: (B, T, N) in one dtype.
        weighting: "contribution", "norm", "equal" or a callable.

    Returns:
        The sum (B, N, C) and the carrier (B, T, N).

    Raises:
        ValueError, TypeError: an argument is wrong (it is named).
    """
    check_tensor("residual", residual, rank=3, shape="(B, N, C)")
    check_tensor("branch", branch, rank=3, shape="(B, N, C)")
    check_floating(residual=residual, branch=branch)
    if branch.shape != residual.shape:
        raise ValueError(f"branch must have residual's shape {tuple(residual.shape)}; got {describe(branch)}")
    for name, carrier in (("residual_carrier", residual_carrier), ("branch_carrier", branch_carrier)):
        check_tensor(name, carrier, rank=3, shape="(B, T, N)")
        check_device(name, carrier, "residual", residual)
        if (carrier.shape[0], carrier.shape[2]) != (residual.shape[0], residual.shape[1]):
            raise ValueError(f"{name} must have shape (B, T, N) with residual's B and N; got {describe(carrier)}")
    if branch_carrier.shape != residual_carrier.shape or branch_carrier.dtype != residual_carrier.dtype:
        raise ValueError(
            f"branch_carrier must have residual_carrier's shape and dtype; got {describe(residual_carrier)} and "
            f"{describe(branch_carrier)}"
        )
    if not callable(weighting):
        check_choice("weighting", weighting, WEIGHTINGS)
    total, carrier = _Residual.apply(residual, branch, residual_carrier, branch_carrier, weighting)
    return total, carrier


class _Residual(torch.autograd.Function):
    """An autograd.Function, since a weighting may be any callable; torch.compile traces into it and fuses it."""

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, branch: Tensor, residual_carrier: Tensor, branch_carrier: Tensor, weighting: str | Weighting
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(residual, branch)
        ctx.weighting = weighting
        return residual + branch, residual_carrier.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        residual, branch = ctx.saved_tensors
        with torch.no_grad():  # constants of the rule; everything else here is linear in grad and r
            a, b = residual_weights(residual, branch, grad, ctx.weighting)
        return grad, grad, r * a[:, None].to(r.dtype), r * b[:, None].to(r.dtype), None


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
    else:
        by_residual, by_branch = x.norm(dim=-1), o.norm(dim=-1)
    total = by_residual + by_branch
    a = torch.where(total == 0, 0.5, by_residual / torch.where(total == 0, 1.0, total))  # NaN stays NaN
    return a, 1 - a
