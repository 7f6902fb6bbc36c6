"""A residual sum that weights relevancy by the contribution of each term (our reading of Huang et al. 2023).

The formula, reference/relevancy_residual.py, reads each tensor once and fuses under torch.compile: the only backend.
"""

from __future__ import annotations

from torch import Tensor

from vlattn_fast._ground.checks import FLOAT_DTYPES, check_device, check_floating, check_tensor, describe, is_dtensor
from vlattn_fast.backends import reference
from vlattn_fast.backends.reference.relevancy_residual import Weighting
from vlattn_fast.ops._shards import NO_HEADS, over_shards

_SHARDED = dict.fromkeys(("residual", "branch", "residual_carrier", "branch_carrier"), NO_HEADS)


def relevancy_residual(
    residual: Tensor,
    branch: Tensor,
    residual_carrier: Tensor,
    branch_carrier: Tensor,
    *,
    weighting: str | Weighting = "contribution",
) -> tuple[Tensor, Tensor]:
    """Computes the residual sum y = x + o, and weights relevancy by the contribution of each term in the backward pass.

    Returns (residual + branch, residual_carrier). The weights are (B, N), so memory is that of the tensors. Each tensor
    is read once, and torch.compile fuses the call.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> residual, branch = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8)
        >>> carriers = torch.zeros(2, 1, 5, requires_grad=True), torch.zeros(2, 1, 5, requires_grad=True)
        >>> y, carrier = va.relevancy_residual(residual, branch, *carriers, weighting="norm")
        >>> r, = torch.autograd.grad([y.sum(), carrier], [carriers[0]], [torch.tensor(1.0), torch.ones(2, 1, 5)])
        >>> bool((0 <= r).all() and (r <= 1).all())  # r * a, with a in [0, 1]
        True

    Backward, the gradient g of the sum flows to both terms. The gradient r of the carrier becomes r * a for residual_carrier and
    r * b for branch_carrier, with a, b (B, N) by `weighting`:

    - "contribution": c_x = |sum_c g x|, c_o = |sum_c g o|, a = c_x / (c_x + c_o), b = 1 - a; 1/2 each if both are zero.
    - "norm": the same with the L2 norms |x| and |o|.
    - "equal": a = b = 1, Chefer's rule.
    - a callable (residual, branch, g) -> (a, b).

    With relevancy_attention(..., residual_weight=0.0) giving branch_carrier this is weighted relevancy,
    R <- diag(a) R + diag(b) Abar R.

    Args:
        residual, branch: (B, N, C), float16, bfloat16, float32 or float64.
        residual_carrier, branch_carrier: (B, T, N) in one dtype.
        weighting: "contribution", "norm", "equal" or a callable.

    Returns:
        The sum (B, N, C) and the carrier (B, T, N). Differentiable any number of times. The weights a and b are constants of the
        rule: no derivative goes through them, so the second derivative of a carrier is that of r -> (r * a, r * b).

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it).

    Reference: our reading of Huang et al. 2023.
    """
    if is_dtensor(residual):
        return over_shards(relevancy_residual, locals(), _SHARDED, [NO_HEADS, NO_HEADS])
    check_tensor("residual", residual, rank=3, shape="(B, N, C)")
    check_tensor("branch", branch, rank=3, shape="(B, N, C)")
    check_floating(residual=residual, branch=branch)
    if branch.shape != residual.shape:
        raise ValueError(f"branch must have residual's shape {tuple(residual.shape)}; got {describe(branch)}")
    for name, carrier in (("residual_carrier", residual_carrier), ("branch_carrier", branch_carrier)):
        check_tensor(name, carrier, rank=3, shape="(B, T, N)")
        check_device(name, carrier, "residual", residual)
        if carrier.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be floating point; got {describe(carrier)}")
        if (carrier.shape[0], carrier.shape[2]) != (residual.shape[0], residual.shape[1]):
            raise ValueError(f"{name} must have shape (B, T, N) with residual's B and N; got {describe(carrier)}")
    if branch_carrier.shape != residual_carrier.shape or branch_carrier.dtype != residual_carrier.dtype:
        raise ValueError(
            f"branch_carrier must have residual_carrier's shape and dtype; got {describe(residual_carrier)} and "
            f"{describe(branch_carrier)}"
        )
    return reference.relevancy_residual(residual, branch, residual_carrier, branch_carrier, weighting=weighting)
