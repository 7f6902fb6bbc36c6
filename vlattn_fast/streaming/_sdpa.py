"""PyTorch's own fused attention where it can run a call and also returns the log-sum-exp that our passes recompute from.

On CPU that is the flash kernel behind scaled_dot_product_attention. It takes one kind of mask; what it cannot take runs
tile by tile in the caller. So does a float32 call of one tile: the kernel recomputes from a rounded log-sum-exp, and its
gradients were seen at up to 3.3 times the error of the plain formula.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._checks import additive
from . import _tiles
from ._tiles import Masks


def runs(query: Tensor, key: Tensor, value: Tensor, masks: Masks, dropout_p: float, scale: float) -> bool:
    """Whether the fused kernel computes this dot-product attention."""
    if masks.is_causal and scale <= 0.0:  # it scales its causal -inf too: +inf, or NaN
        return False
    if query.dtype == torch.float32 and query.shape[:3].numel() * key.shape[2] <= _tiles.TILE_ELEMENTS:
        return False
    kinds = (masks.attn_mask is not None) + (masks.key_mask is not None) + masks.is_causal
    sizes = (*query.shape, *key.shape[1:3], value.shape[3])
    return query.device.type == "cpu" and kinds <= 1 and dropout_p == 0.0 and all(size > 0 for size in sizes)


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
    grad_out, out = (torch.nn.functional.pad(x, (0, v.shape[3] - x.shape[3])) for x in (grad_out, out))
    grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, torch.where(torch.isneginf(lse), 0.0, lse), 0.0, masks.is_causal,
        attn_mask=_additive(query, key, masks), scale=scale,
    )  # fmt: skip
    return grad_q[..., : query.shape[3]], grad_k[..., : key.shape[3]], grad_v[..., : value.shape[3]]


def _same_size(*tensors: Tensor) -> list[Tensor]:
    """Padded with zeros to one head size, with a last stride of 1: what the kernel asks for."""
    size = max(x.shape[3] for x in tensors)
    padded = [x if x.shape[3] == size else torch.nn.functional.pad(x, (0, size - x.shape[3])) for x in tensors]
    return [x if x.stride(3) == 1 else x.contiguous() for x in padded]


def _additive(query: Tensor, key: Tensor, masks: Masks) -> Tensor | None:
    """The mask as the kernel takes it: added, in the query's dtype, expanded without a copy."""
    mask = masks.attn_mask if masks.key_mask is None else masks.key_mask[:, None, None, :]
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
