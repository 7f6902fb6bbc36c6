"""The weights of relevancy_residual by csrc/cpu/relevancy_residual.cpp."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_strides
from vlattn_fast.backends.inputs import ResidualWeightsInputs
from vlattn_fast.backends.native import DTYPES, Struct, address, each, kernel
from vlattn_fast.backends.reference.relevancy_residual import BY_ROWS


class Rows(Struct):
    __slots__ = ()
    _fields_ = (("data", c_void_p), *each(c_int64, "stride_b stride_n"))


class ResidualWeights(Struct):
    __slots__ = ()
    _fields_ = (*each(c_int64, "dtype B N C weighting"), *each(Rows, "residual branch grad"), *each(c_void_p, "a b"))


_weights = kernel("residual_weights", ResidualWeights)


def backward(inputs: ResidualWeightsInputs) -> tuple[Tensor, Tensor]:
    """Returns a and b (B, N), by which the backward pass multiplies the carriers' gradients."""
    rows = unit_strides(inputs.residual, inputs.branch, inputs.grad)
    batch, tokens, features = inputs.residual.shape
    a, b = (inputs.residual.new_empty(batch, tokens, dtype=torch.float32) for _ in range(2))
    call = ResidualWeights(DTYPES[inputs.residual.dtype], batch, tokens, features, BY_ROWS.index(inputs.weighting))
    call.residual, call.branch, call.grad = (Rows(x.data_ptr(), *x.stride()[:2]) for x in rows)
    call.a, call.b = address(a), address(b)
    _weights(call)
    return a, b
