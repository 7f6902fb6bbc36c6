"""attention_map by csrc/cpu/attention_map.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_strides
from vlattn_fast.backends.cpu._attention import FIELDS, fields, masks
from vlattn_fast.backends.inputs import AttentionMapInputs
from vlattn_fast.backends.native import kernel, pointer, rows

_run = kernel("attention_map", f"={FIELDS} 4q 3q q q")
_REDUCTIONS = ("mean", "max", "min")  # Reduction of the kernel


def forward(inputs: AttentionMapInputs) -> Tensor:
    """Abar (B, N, M)."""
    query, key, value, grad_output = unit_strides(inputs.query, inputs.key, inputs.value, inputs.grad_output)
    seen = masks(inputs.attn_mask, inputs.key_mask, inputs.is_causal, query, key)
    lse = None if inputs.lse is None else inputs.lse.double().contiguous()
    rule, head_reduction, row_normalize = inputs.rule, inputs.head_reduction, inputs.row_normalize
    scale = inputs.scale
    abar = query.new_empty(query.shape[0], query.shape[2], key.shape[2], dtype=torch.float32)
    _run(
        *fields(query, key, value, seen, scale),
        *rows(grad_output),
        *(rule == "gradient", _REDUCTIONS.index(head_reduction), row_normalize),
        pointer(lse),
        pointer(abar),
    )
    return abar
