"""attention_map by csrc/cpu/attention_map.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_strides
from vlattn_fast.backends.cpu._attention import FIELDS, fields, masks
from vlattn_fast.backends.native import kernel, pointer, rows

_run = kernel("attention_map", f"={FIELDS} 4q 3q q q")
_REDUCTIONS = ("mean", "max", "min")  # Reduction of the kernel


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grad_output: Tensor | None,
    lse: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    rule: str,
    head_reduction: str,
    row_normalize: bool,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """Abar (B, N, M)."""
    query, key, value, grad_output = unit_strides(query, key, value, grad_output)
    seen = masks(attn_mask, key_mask, is_causal, query, key)
    lse = None if lse is None else lse.double().contiguous()
    abar = query.new_empty(query.shape[0], query.shape[2], key.shape[2], dtype=torch.float32)
    _run(
        *fields(query, key, value, seen, scale),
        *rows(grad_output),
        *(rule == "gradient", _REDUCTIONS.index(head_reduction), row_normalize),
        pointer(lse),
        pointer(abar),
    )
    return abar
