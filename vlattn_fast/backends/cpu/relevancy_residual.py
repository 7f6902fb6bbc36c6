"""The weights of relevancy_residual by csrc/cpu/relevancy_residual.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_strides
from vlattn_fast.backends.inputs import ResidualWeightsInputs
from vlattn_fast.backends.native import DTYPES, address, kernel, part
from vlattn_fast.backends.reference.relevancy_residual import BY_ROWS

_weights = kernel("residual_weights")
_rows = part("residual_weights", "branch")


def backward(inputs: ResidualWeightsInputs) -> tuple[Tensor, Tensor]:
    """Returns a and b (B, N), by which the backward pass multiplies the carriers' gradients."""
    rows = unit_strides(inputs.residual, inputs.branch, inputs.grad)
    batch, tokens, features = inputs.residual.shape
    a, b = (inputs.residual.new_empty(batch, tokens, dtype=torch.float32) for _ in range(2))
    sizes = {"dtype": DTYPES[inputs.residual.dtype], "B": batch, "N": tokens, "C": features}
    residual, branch, grad = (_rows()(data=x.data_ptr(), stride_b=x.stride(0), stride_n=x.stride(1)) for x in rows)
    tensors = {"residual": residual, "branch": branch, "grad": grad, "a": address(a), "b": address(b)}
    _weights(**sizes, weighting=BY_ROWS.index(inputs.weighting), **tensors)
    return a, b
