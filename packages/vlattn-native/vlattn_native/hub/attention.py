"""Attention for transformers: `attn_implementation="OWNER/vlattn-fast"` takes `flash_attn_forward`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.tensors import masks_of
from vlattn_fast.ops._sinks import with_sink
from vlattn_native.hub.functions import score_attention

supports_flash_attn = True  # beside a function of this name transformers passes the masks that it makes for SDPA


def flash_attn_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, H, N, D), key and value (B, Hkv, M, D) in, (output (B, N, H, Dv), None) out.

    Caches, padding, sliding windows and causality come as the mask of SDPA; grouped keys, softcaps, sinks and a position bias are
    those of the model. Trains, but no position bias.
    """
    masks = masks_of(module, query, key, attention_mask, causal_by_module=True, **options)
    if (mask := masks["attn_mask"]) is not None and mask.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"model must have a constant position bias, since its gradient is not computed; got one that requires a gradient in "
            f"{type(module).__name__}. Run it under torch.no_grad(), or set_attn_implementation('sdpa')"
        )
    softcap, sink = masks.pop("softcap", None), masks.pop("sink", None)
    del masks["enable_gqa"]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    capped: dict[str, Any] = {} if softcap is None else {"score": "dot_softcap", "parameter": scale / softcap}
    rate = dropout if module.training else 0.0
    out, lse = score_attention(query, key, value, **masks, **capped, dropout_p=rate, scale=scale if softcap is None else softcap)
    if sink is not None:
        out = with_sink(out, lse, sink[:, None])
    return out.transpose(1, 2).contiguous(), None
