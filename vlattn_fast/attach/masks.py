"""Masks of a call of attention as the operators take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def joined(first: Tensor | None, second: Tensor) -> Tensor:
    """Two masks as one: bool if both are bool."""
    if first is None:
        return second
    if first.dtype != torch.bool and second.dtype != torch.bool:
        return first + second
    if first.dtype == second.dtype:
        return first & second
    visible, added = (first, second) if first.dtype == torch.bool else (second, first)
    return torch.where(visible, added, -torch.inf)


def masks_of(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    *,
    causal_by_module: bool,
    **kwargs: Any,
) -> dict[str, Any]:
    """attn_mask, is_causal and enable_gqa of a call of transformers' interface for SDPA; and softcap and sink for
    score_attention, if the call has them.

    A mask already contains causality and windows. Without a mask `is_causal` decides; if `is_causal` is None,
    `module.is_causal` decides if `causal_by_module` is set (SDPA's rule).

    Raises:
        ValueError: paged or packed sequences; a window without a mask.
    """
    unsupported = {"sinks": sinks, "cache": cache, "cu_seq_lens_q": cu_seq_lens_q}
    for name, option in unsupported.items():
        if option is not None:
            raise ValueError(f"model must not use {name}, which no attention operator supports; got {type(module).__name__}")
    if attention_mask is None and sliding_window is not None and sliding_window < key.shape[2]:
        raise ValueError(
            f"model must pass the mask of a sliding window; got {type(module).__name__} with window {sliding_window} and no mask"
        )

    causal = attention_mask is None and query.shape[2] > 1
    if causal:
        causal = getattr(module, "is_causal", True) if is_causal is None and causal_by_module else bool(is_causal)
    if position_bias is not None:
        if causal:
            attention_mask = torch.ones(position_bias.shape[-2:], dtype=torch.bool, device=position_bias.device).tril()
        attention_mask, causal = joined(attention_mask, position_bias), False
    also = {name: option for name, option in (("softcap", softcap), ("sink", s_aux)) if option is not None}
    return {"attn_mask": attention_mask, "is_causal": causal, "enable_gqa": key.shape[1] != query.shape[1], **also}
