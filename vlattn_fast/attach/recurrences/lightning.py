"""Lightning attention (Qin et al., arXiv 2401.04658): linear attention with one decay per head. MiniMax writes it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.attach.recurrences.chunks import recurred
from vlattn_fast.attach.recurrences.reading import FunctionCall, Reading, Recurrence


def lightning_attention(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """o_t = sum_{s <= t} exp(-slope (t - s)) (q_t . k_s) v_s, (B, H, N, Dv); slopes are (H)."""
    return recurred(query, key, value, _log_decay(value, slopes))


def _log_decay(value: Tensor, slopes: Tensor) -> Tensor:
    return -slopes[:, None].expand(value.shape[:3])


def read(call: FunctionCall) -> Reading:
    value: Tensor = call["value"]
    return Reading(
        Recurrence(call["query"], call["key"], value, _log_decay(value, call["slopes"])), run=lambda value: call.run(value=value)
    )


def forward(
    module: Any,
    handed: Callable[..., Any],
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """MiniMaxLightningAttention, without a cache; False in `attention_mask` (B, N) = padding."""
    if past_key_values is not None:
        raise ValueError(f"model must run without a cache; got past_key_values in {type(module).__name__}")
    packed = module.act_fn(module.qkv_proj(hidden_states))
    packed = packed if attention_mask is None else packed * attention_mask[..., None].to(packed.dtype)
    packed = packed.unflatten(-1, (module.num_attention_heads, 3 * module.head_dim)).transpose(1, 2)
    output = handed(read, lightning_attention)(*packed.chunk(3, -1), module.slope_rate.flatten())
    output = module.norm(output.transpose(1, 2).flatten(2))
    return module.out_proj(torch.sigmoid(module.output_gate(hidden_states)) * output), None


FORWARDS = {"MiniMaxLightningAttention": forward}
