"""The attention core of the package's models, under the interface of Hugging Face's attention functions."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[Tensor, None]:
    """torch's SDPA under the Hugging Face attention interface.

    query (B, H, N, D), key, value (B, H, M, D); attention_mask None or bool, broadcastable to (B, H, N, M), True = may be
    attended; without a mask, module.is_causal says whether later keys are masked. Returns (out (B, N, H, D), None).
    """
    causal = bool(module.is_causal) and attention_mask is None
    out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, causal, scale=scaling)
    return out.transpose(1, 2), None
