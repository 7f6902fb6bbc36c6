"""The inputs of the backends of `recurrent_step`, as vlattn_fast/backends/inputs.py has those of the other operators.

B batch, H heads, N tokens, Dk features of queries and keys, Dv of values, T carried rows.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RecurrentStepInputs(NamedTuple):
    """relevancy (B, T, N), query (B, Hq, N, Dk), key (B, Hk, N, Dk), value and grad_output (B, H, N, Dv), log_decay (B, H, N) or
    (B, H, N, Dk), beta and diagonal (B, H, N). Hq and Hk divide num_heads = H."""

    relevancy: Tensor
    query: Tensor
    key: Tensor
    value: Tensor | None
    grad_output: Tensor | None
    log_decay: Tensor | None
    beta: Tensor | None
    diagonal: Tensor | None
    num_heads: int
    rule: str
    row_normalize: bool
    backend: str


class RecurrentStepBackwardInputs(NamedTuple):
    """grad (B, T, N), the gradient of the result; the others as in RecurrentStepInputs. need_*: which gradients are asked for;
    need_inputs stands for all but relevancy's."""

    grad: Tensor
    relevancy: Tensor
    query: Tensor
    key: Tensor
    value: Tensor | None
    grad_output: Tensor | None
    log_decay: Tensor | None
    beta: Tensor | None
    diagonal: Tensor | None
    num_heads: int
    rule: str
    row_normalize: bool
    need_relevancy: bool
    need_inputs: bool
    backend: str
