"""torch's nn.MultiheadAttention as one call of scaled_dot_product_attention, and helpers for modules that split into heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.tensors import joined
from vlattn_fast.ops.attention_map import attention_map


def heads(states: Tensor, size: int) -> Tensor:
    """(B, N, H * size) to (B, H, N, size)."""
    return states.unflatten(-1, (-1, size)).transpose(1, 2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention of (B, H, N, D) tensors as (B, N, H * D), in one call."""
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale
    )
    return output.transpose(1, 2).flatten(2)


def multihead_attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """nn.MultiheadAttention with every option but maps per head. Its bool masks are True for masked keys."""
    if need_weights and not average_attn_weights:
        raise ValueError("model must not ask nn.MultiheadAttention for maps per head; got average_attn_weights=False")
    if is_causal and attn_mask is None:
        raise ValueError("attn_mask must be the causal mask if is_causal is set in nn.MultiheadAttention; got None")
    if query.is_nested or key.is_nested or value.is_nested:
        raise ValueError("query, key and value must be dense in nn.MultiheadAttention; got a nested tensor")
    batched = query.dim() == 3
    if not batched:
        query, key, value = query[None], key[None], value[None]
    elif not module.batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)

    weights: Any = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    if module._qkv_same_embed_dim:
        weights = module.in_proj_weight.chunk(3)
    biases: Any = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    projected = [nn.functional.linear(*each) for each in zip((query, key, value), weights, biases, strict=True)]
    for index, bias in ((1, module.bias_k), (2, module.bias_v)):  # keys that are not tokens
        if bias is not None:
            projected[index] = torch.cat([projected[index], bias.expand(query.shape[0], -1, -1)], 1)
        if module.add_zero_attn:
            projected[index] = nn.functional.pad(projected[index], (0, 0, 0, 1))
    queries, keys, values = (heads(states, module.head_dim) for states in projected)

    # As in torch, the hint replaces the mask if nothing else needs the mask.
    is_causal = is_causal and key_padding_mask is None and not need_weights
    mask = None
    if not is_causal:
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask[None]
        mask = joined_masks(queries, keys.shape[2] - key.shape[1], attn_mask, key_padding_mask)
    dropout_p = module.dropout if module.training else 0.0
    output = module.out_proj(attend(queries, keys, values, mask, is_causal, dropout_p=dropout_p))
    maps = attention_map(queries, keys, attn_mask=mask).to(output.dtype) if need_weights else None
    if not batched:
        return output[0], maps if maps is None else maps[0]
    return output if module.batch_first else output.transpose(0, 1), maps


def joined_masks(query: Tensor, extra: int, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    """nn.MultiheadAttention's masks (N, M) or (B * H, N, M) and (B, M), True or -inf for a masked key, as one mask for SDPA;
    `extra` last keys are visible to all. query: (B, H, N, D)."""
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (-1, query.shape[1]))
    total: Tensor | None = None
    for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]):
        if mask is None:
            continue
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"masks of nn.MultiheadAttention must be bool or float; got {mask.dtype}")
        mask = nn.functional.pad(mask, (0, extra))
        total = joined(total, ~mask if mask.dtype == torch.bool else mask.to(query.dtype))
    return total
