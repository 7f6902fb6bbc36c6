"""The weights of relevancy_residual in Triton.

Shapes: residual, branch and grad (B, N, C); weights a and b (B, N).
Roofline: memory, one read of the three tensors: no product of matrices.
Trick: a program is one warp with one row, so no sum goes through shared memory, and an SM loads two dozen rows or more at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast._ground.tensors import unit_strides
from vlattn_fast.backends.inputs import ResidualWeightsInputs
from vlattn_fast.kernels._device import on_device

MOST_FEATURES = 512  # of a step: 16 numbers a thread of each tensor


@on_device
def backward(inputs: ResidualWeightsInputs) -> tuple[Tensor, Tensor]:
    """Returns a and b (B, N), by which the backward pass multiplies the carriers' gradients."""
    batch, tokens, features = inputs.residual.shape
    a, b = (inputs.residual.new_empty(batch, tokens, dtype=torch.float32) for _ in range(2))
    if a.numel() > 0:
        rows = unit_strides(inputs.residual, inputs.branch, inputs.grad)
        _weights_kernel[(batch * tokens,)](
            rows=tuple((x, x.stride(0), x.stride(1)) for x in rows),
            p_a=a,
            p_b=b,
            N=tokens,
            C=features,
            WEIGHTING=inputs.weighting,
            BLOCK_C=max(32, min(MOST_FEATURES, triton.next_power_of_2(features))),
            num_warps=1,
            enable_fp_fusion=True,
        )
    return a, b


@triton.jit
def _row(x, i_b, i_n):
    p, stride_b, stride_n = x
    return p + (i_b * stride_b + i_n * stride_n)


@triton.jit
def _weights_kernel(rows, p_a, p_b, N, C, WEIGHTING: tl.constexpr, BLOCK_C: tl.constexpr):
    """a and b of one row. rows: residual, branch and grad, each with its strides of samples and tokens."""
    residual, branch, grad = rows
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_n = i_row // N, i_row % N
    p_residual, p_branch, p_grad = _row(residual, i_b, i_n), _row(branch, i_b, i_n), _row(grad, i_b, i_n)
    b_by_x = tl.zeros((BLOCK_C,), tl.float32)
    b_by_o = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, C, BLOCK_C):
        o_c = first + tl.arange(0, BLOCK_C)
        b_x = tl.load(p_residual + o_c, mask=o_c < C, other=0.0).to(tl.float32)
        b_o = tl.load(p_branch + o_c, mask=o_c < C, other=0.0).to(tl.float32)
        if WEIGHTING == "norm":
            b_by_x += b_x * b_x
            b_by_o += b_o * b_o
        else:
            b_g = tl.load(p_grad + o_c, mask=o_c < C, other=0.0).to(tl.float32)
            if WEIGHTING == "magnitude":
                b_by_x += tl.abs(b_g * b_x)
                b_by_o += tl.abs(b_g * b_o)
            else:
                b_by_x += b_g * b_x
                b_by_o += b_g * b_o
    by_x, by_o = tl.sum(b_by_x), tl.sum(b_by_o)
    if WEIGHTING == "norm":
        by_x, by_o = tl.sqrt_rn(by_x), tl.sqrt_rn(by_o)
    else:
        by_x, by_o = tl.abs(by_x), tl.abs(by_o)
    total = by_x + by_o
    a = tl.where(total == 0.0, 0.5, tl.div_rn(by_x, tl.where(total == 0.0, 1.0, total)))
    tl.store(p_a + i_row, a)
    tl.store(p_b + i_row, 1.0 - a)
