"""recurrent_step by csrc/cpu/recurrent_step.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_strides
from vlattn_fast.backends.native import DTYPES, Fields, kernel
from vlattn_fast.backends.streaming.recurrent_step import RecurrentStepInputs

_FIELDS = Fields(
    "integer dtype B H Hq Hk N D Dv T gradient row_normalize decays, tensor query key value grad_output, "
    "pointer log_decay beta diagonal relevancy result"
)
_forward = kernel("recurrent_step_forward", _FIELDS)


def forward(inputs: RecurrentStepInputs) -> Tensor:
    """relevancy @ Abar, (B, T, N) -> (B, T, N)."""
    by_gradient = inputs.rule == "gradient"
    value, grad_output = (inputs.value, inputs.grad_output) if by_gradient else (None, None)
    query, key, value, grad_output = unit_strides(inputs.query, inputs.key, value, grad_output)
    relevancy, log_decay = inputs.relevancy.to(torch.float32).contiguous(), inputs.log_decay
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
        query=query,
        key=key,
        value=value,
        grad_output=grad_output,
        log_decay=_in_float32(log_decay),
        beta=_in_float32(inputs.beta),
        diagonal=_in_float32(inputs.diagonal),
        relevancy=relevancy,
        result=result,
    )
    return result.to(inputs.relevancy.dtype)


def _in_float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()
