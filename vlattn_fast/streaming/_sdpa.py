"""PyTorch's own fused attention: with its own backward pass, or with the log-sum-exp that our passes recompute from.

It takes one kind of mask; what it cannot take runs tile by tile in the caller. On CPU it is a flash kernel that recomputes
from a rounded log-sum-exp: its float32 gradients were seen at up to 3.3 times the error of the plain formula, so float32
calls of at most one tile run in float64 or as a tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._tensors import additive, expand_heads
from vlattn_fast.streaming import _tiles
from vlattn_fast.streaming._tiles import Masks


def takes(masks: Masks, scale: float) -> bool:
    """Whether it knows these masks."""
    if masks.is_causal and scale <= 0.0:  # it scales its causal -inf too: +inf, or NaN
        return False
    return (masks.attn_mask is not None) + (masks.key_mask is not None) + masks.is_causal <= 1


def attention(query: Tensor, key: Tensor, value: Tensor, masks: Masks, scale: float) -> Tensor:
    """out (B,H,N,Dv) of scaled_dot_product_attention, the fastest there is; key and value may have fewer heads than query."""
    size, dtype, num_heads = value.shape[3], query.dtype, query.shape[1]
    if query.device.type == "cpu":
        if _inexact(query, key):
            query, key, value = query.double(), key.double(), value.double()
        # the CPU kernel also wants equal head counts and head sizes, and falls back to whole maps
        query, key, value = _same_size(query, expand_heads(key, num_heads), expand_heads(value, num_heads))
    elif key.shape[1] != value.shape[1]:
        value = expand_heads(value, key.shape[1])
    mask = _mask(masks)
    if mask is not None:
        mask = additive(mask[(None,) * (4 - mask.dim())], query.dtype)  # the fused kernel takes four dimensions, not three
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=masks.is_causal, scale=scale, enable_gqa=key.shape[1] != num_heads
    )
    return out[..., :size].to(dtype)


def runs(query: Tensor, key: Tensor, value: Tensor, masks: Masks, dropout_p: float, scale: float) -> bool:
    """Whether forward and backward below compute this dot-product attention."""
    sizes = (*query.shape, *key.shape[1:3], value.shape[3])
    fits = query.device.type == "cpu" and dropout_p == 0.0 and all(size > 0 for size in sizes)
    return fits and takes(masks, scale) and not _inexact(query, key)


def forward(query: Tensor, key: Tensor, value: Tensor, masks: Masks, scale: float) -> tuple[Tensor, Tensor]:
    """(out (B,H,N,Dv), lse (B,H,N)) of heads-expanded query, key, value."""
    q, k, v = _same_size(query, key, value)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, masks.is_causal, attn_mask=_additive(query, key, masks), scale=scale
    )
    empty = _empty_rows(masks)  # the kernel gives them zeros, and lse 0
    return out[..., : value.shape[3]], lse if empty is None else torch.where(empty, -torch.inf, lse)


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, masks: Masks, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of heads-expanded query, key and value."""
    q, k, v = _same_size(query, key, value)
    grad_out, out = (F.pad(x, (0, v.shape[3] - x.shape[3])) for x in (grad_out, out))
    grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out,
        q,
        k,
        v,
        out,
        torch.where(torch.isneginf(lse), 0.0, lse),
        0.0,
        masks.is_causal,
        attn_mask=_additive(query, key, masks),
        scale=scale,
    )
    return grad_q[..., : query.shape[3]], grad_k[..., : key.shape[3]], grad_v[..., : value.shape[3]]


def _inexact(query: Tensor, key: Tensor) -> bool:
    """Whether the CPU kernel is less exact than a call of this dtype and size can easily be."""
    pairs = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    return query.dtype == torch.float32 and pairs <= _tiles.TILE_ELEMENTS


def _same_size(*tensors: Tensor) -> list[Tensor]:
    """Padded with zeros to one head size, with a last stride of 1: what the kernel asks for."""
    size = max(x.shape[3] for x in tensors)
    padded = [x if x.shape[3] == size else F.pad(x, (0, size - x.shape[3])) for x in tensors]
    return [x if x.stride(3) == 1 else x.contiguous() for x in padded]


def _mask(masks: Masks) -> Tensor | None:
    """The one mask there is, broadcastable to (B,H,N,M)."""
    return masks.attn_mask if masks.key_mask is None else masks.key_mask[:, None, None, :]


def _additive(query: Tensor, key: Tensor, masks: Masks) -> Tensor | None:
    """The mask as the kernel takes it: added, in the query's dtype, expanded without a copy."""
    mask = _mask(masks)
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = query.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    return additive(mask, query.dtype).expand(*query.shape[:3], key.shape[2])


def _empty_rows(masks: Masks) -> Tensor | None:
    """(broadcastable to B,H,N) rows without a visible key; None where there can be none."""
    if masks.key_mask is not None:
        return ~masks.key_mask.any(-1)[:, None, None]
    if masks.attn_mask is None:
        return None
    mask = masks.attn_mask if masks.attn_mask.dtype == torch.bool else ~torch.isneginf(masks.attn_mask)
    return ~mask.any(-1)
