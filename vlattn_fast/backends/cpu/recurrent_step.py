"""recurrent_step by csrc/cpu/recurrent_step.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_strides
from vlattn_fast.backends.native import DTYPES, address, kernel, strided
from vlattn_fast.backends.streaming.recurrent_step import RecurrentStepInputs

_forward = kernel("recurrent_step_forward")


def forward(inputs: RecurrentStepInputs) -> Tensor:
    """relevancy @ Abar, (B, T, N) -> (B, T, N)."""
    by_gradient = inputs.rule == "gradient"
    value, grad_output = (inputs.value, inputs.grad_output) if by_gradient else (None, None)
    query, key, value, grad_output = unit_strides(inputs.query, inputs.key, value, grad_output)
    relevancy, log_decay = inputs.relevancy.to(torch.float32).contiguous(), _in_float32(inputs.log_decay)
    beta, diagonal = _in_float32(inputs.beta), _in_float32(inputs.diagonal)
    result = torch.empty_like(relevancy)
    batch, rows, length = relevancy.shape
    _forward(
        dtype=DTYPES[query.dtype],
        B=batch,
        H=inputs.num_heads,
        Hq=query.shape[1],
        Hk=key.shape[1],
        N=length,
        D=query.shape[3],
        Dv=0 if value is None else value.shape[3],
        T=rows,
        gradient=by_gradient,
        row_normalize=inputs.row_normalize,
        decays=0 if log_decay is None else log_decay.shape[3] if log_decay.dim() == 4 else 1,
        query=strided(query),
        key=strided(key),
        value=strided(value),
        grad_output=strided(grad_output),
        log_decay=address(log_decay),
        beta=address(beta),
        diagonal=address(diagonal),
        relevancy=address(relevancy),
        result=address(result),
    )
    return result.to(inputs.relevancy.dtype)


def _in_float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()
