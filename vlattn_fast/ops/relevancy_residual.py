"""A residual sum that weights relevancy by the contribution of each term (our reading of Huang et al. 2023).

Formula, and the autograd.Function around the weights: reference/relevancy_residual.py. Backends differ in one function of the
backward pass, the weights (B, N): the rest is a sum and two products with rows.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from vlattn_fast import kernels
from vlattn_fast._ground.checks import (
    FLOAT_DTYPES,
    check_choice,
    check_device,
    check_floating,
    check_tensor,
    describe,
    is_dtensor,
)
from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.backends import reference
from vlattn_fast.backends.cpu import relevancy_residual as cpu
from vlattn_fast.backends.inputs import ResidualWeightsInputs
from vlattn_fast.backends.reference.relevancy_residual import BY_ROWS, WEIGHTINGS, Weighting, residual_sum
from vlattn_fast.backends.streaming import relevancy_residual as streaming
from vlattn_fast.dispatch.call import CallShape, call_shape
from vlattn_fast.dispatch.choice import launcher, planned, selecting
from vlattn_fast.dispatch.operator import Operator
from vlattn_fast.dispatch.table import table
from vlattn_fast.ops._registration import define, not_differentiable
from vlattn_fast.ops._shards import over_shards


def _limits(call: CallShape) -> list[tuple[str, bool]]:
    return [("a callable weighting runs in PyTorch", call.flags["weighting"] == "callable")]


BACKENDS = table(
    streaming, cpu=cpu, triton=lambda: kernels.relevancy_residual, limits={"cpu": _limits, "triton": _limits}, masks_padding=()
)


def relevancy_residual(
    residual: Tensor,
    branch: Tensor,
    residual_carrier: Tensor,
    branch_carrier: Tensor,
    *,
    weighting: str | Weighting = "contribution",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Computes the residual sum y = x + o, and weights relevancy by the contribution of each term in the backward pass.

    Returns (residual + branch, residual_carrier). In the backward pass "cpu" and "triton" read x, o and g once and store only the
    weights, (B, N).

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
    - "magnitude": the same with c_x = sum_c |g x| and c_o = sum_c |g o|, in which features of opposite signs do not cancel.
    - "equal": a = b = 1, Chefer's rule.
    - a callable (residual, branch, g) -> (a, b).

    With relevancy_attention(..., residual_weight=0.0) giving branch_carrier this is weighted relevancy,
    R <- diag(a) R + diag(b) Abar R.

    Args:
        residual, branch: (B, N, C), float16, bfloat16, float32 or float64.
        residual_carrier, branch_carrier: (B, T, N) in one dtype.
        weighting: "contribution", "norm", "magnitude", "equal" or a callable.
        backend: "auto", "reference", "streaming", "cpu" or "triton". "cpu" and "triton" support no callable.

    Returns:
        The sum (B, N, C) and the carrier (B, T, N). Differentiable any number of times. The weights a and b are constants of the
        rule: no derivative goes through them, so the second derivative of a carrier is that of r -> (r * a, r * b).

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it), or the requested backend does not support the call.

    Reference: our reading of Huang et al. 2023.
    """
    if is_dtensor(residual):
        return over_shards(relevancy_residual, locals(), ["bqc", "bqc"])
    tensors = residual, branch, residual_carrier, branch_carrier
    backend = planned(_backend, backend, *tensors, weighting)
    if backend == "reference" or weighting not in BY_ROWS:
        return reference.relevancy_residual(*tensors, weighting=weighting)
    return residual_sum(*tensors, partial(_weights, weighting=weighting, backend=backend))


def _describe(
    residual: Tensor, branch: Tensor, residual_carrier: Tensor, branch_carrier: Tensor, weighting: str | Weighting
) -> CallShape:
    """Checks a call, and returns its metadata."""
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
    first, second = residual_carrier, branch_carrier
    if second.shape != first.shape or second.dtype != first.dtype:
        raise ValueError(
            f"branch_carrier must have residual_carrier's shape and dtype; got {describe(first)} and {describe(second)}"
        )
    if not callable(weighting):
        check_choice("weighting", weighting, WEIGHTINGS)
    sizes = dict(zip(("batch", "tokens", "features"), residual.shape, strict=True)) | {"rows": first.shape[1]}
    return call_shape("relevancy_residual", residual, sizes, {"weighting": "callable" if callable(weighting) else weighting})


_backend = selecting(BACKENDS, _describe)


def _weights(residual: Tensor, branch: Tensor, grad: Tensor, *, weighting: str, backend: str) -> tuple[Tensor, Tensor]:
    a, b = _op(ResidualWeightsInputs(residual, branch, grad, weighting, backend))
    return a, b


def _fake(inputs: ResidualWeightsInputs) -> tuple[Tensor, Tensor]:
    a, b = (inputs.residual.new_empty(inputs.residual.shape[:2], dtype=compute_dtype(inputs.residual)) for _ in range(2))
    return a, b


_op = define("residual_weights", ResidualWeightsInputs, "(Tensor a, Tensor b)", launcher(BACKENDS, streaming.backward), _fake)
not_differentiable("residual_weights", "the weights are constants of the rule; detach residual, branch and grad")

OPERATOR = Operator(relevancy_residual, _describe, BACKENDS)
