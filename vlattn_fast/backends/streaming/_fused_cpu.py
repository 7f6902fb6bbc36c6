"""PyTorch's fused CPU attention with its log-sum-exp: a fast path for dot products.

`runs` and `runs_backward` read the data, which waits for no device on the CPU, and leave to the tiles what the kernel gets wrong.
The kernel recomputes P = exp(logit - lse) from a rounded lse: its float32 gradients were measured at 3.3 times the error of the
plain formula, so float32 calls of at most one tile run as a tile, and so does every backward pass with a large |lse|.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype, pad_head_dim, rows_first
from vlattn_fast.backends.inputs import Attention
from vlattn_fast.backends.streaming import _tiles
from vlattn_fast.backends.streaming._forward_mode import differentiates


def runs(x: Attention, value: Tensor, dropout_p: float) -> bool:
    """Whether `forward` computes this attention; key and value have a head for each of the query's."""
    query, key, scale = x.query, x.key, x.scale
    sizes = (*query.shape, *key.shape[1:3], value.shape[3])
    if x.score != "dot" or query.device.type != "cpu" or dropout_p > 0.0 or any(size == 0 for size in sizes):
        return False
    if differentiates():  # the kernel has no tangents
        return False
    if query.dtype == torch.float32 and query.shape[:3].numel() * key.shape[2] <= 2 * _tiles.TILE_ELEMENTS:
        return False
    if key.shape[2] < 16:  # the kernel treats a row of NaN as masked if no vector register is full of keys
        return False
    if x.row_bias is not None:  # as a mask of the kernel it would be N x M
        return False
    if x.is_causal and scale <= 0.0:  # the kernel multiplies its causal -inf by the scale
        return False
    # In 16 bit the kernel makes finite numbers of a logit of +inf; with masks it adds -inf to it, which gives NaN.
    if x.attn_mask is None:
        return compute_dtype(query) == query.dtype or _is_finite(query, key, scale)
    small = x.key_mask is None or _joined_mask_is_small(query, key, x.attn_mask)
    exact = x.attn_mask.dtype == torch.bool or _is_exact(x.attn_mask, compute_dtype(query))
    return small and exact and _is_finite(query, key, scale)


def runs_backward(query: Tensor, lse: Tensor) -> bool:
    """Whether `backward` is exact for a call that `runs`: every |lse| is so small that its rounding does not matter.

    In float32 |lse| <= 64 is rounded by at most 2^-18 = 4e-6, as much as logits of that size are; in 16 bit a rounding of
    1/64 ulp of the query's dtype is allowed. Rows of finfo.min or -1e9 lie far above it, whatever the logits are.
    """
    bound = max(64.0, torch.finfo(query.dtype).eps / torch.finfo(lse.dtype).eps / 32)
    return bool(((lse.abs() <= bound) | torch.isneginf(lse)).all())


def forward(x: Attention, value: Tensor) -> tuple[Tensor, Tensor]:
    """(out (B, H, N, Dv), lse (B, H, N))."""
    q, k, v = pad_head_dim(x.query, x.key, value)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, x.is_causal, attn_mask=_join_masks(x), scale=x.scale
    )
    empty = _empty_rows(x)
    if empty is not None:
        # the kernel gives fully masked rows an lse of 0, and NaN if only the causal flag leaves a row without keys
        out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
    return rows_first(out[..., : value.shape[3]]), lse.contiguous()


def backward(grad_out: Tensor, x: Attention, value: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    q, k, v = pad_head_dim(x.query, x.key, value)
    grad_out, out = (F.pad(y, (0, v.shape[3] - y.shape[3])) for y in (grad_out, out))
    lse, mask = torch.where(torch.isneginf(lse), 0.0, lse), _join_masks(x)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grad_q, grad_k, grad_v = kernel(grad_out, q, k, v, out, lse, 0.0, x.is_causal, attn_mask=mask, scale=x.scale)
    return grad_q[..., : x.query.shape[3]], grad_k[..., : x.key.shape[3]], grad_v[..., : value.shape[3]]


def _joined_mask_is_small(query: Tensor, key: Tensor, attn_mask: Tensor) -> bool:
    """Whether attn_mask, joined with a key_mask (B, M), takes at most 16 MiB in float32, or no more memory than the query."""
    _, heads, queries, _ = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    return query.shape[0] * heads * queries * key.shape[2] <= max(1 << 22, query.numel())


def _is_exact(mask: Tensor, dtype: torch.dtype) -> bool:
    """Whether a float mask loses nothing in `dtype` and has neither NaN nor +inf, which the kernel may drop."""
    if mask.numel() and not bool(mask.amax() < torch.inf):
        return False
    return torch.promote_types(mask.dtype, dtype) == dtype or torch.equal(mask.to(dtype).to(mask.dtype), mask)


def _is_finite(query: Tensor, key: Tensor, scale: float) -> bool:
    """Whether no score is Inf or NaN, by a bound."""
    (low_q, high_q), (low_k, high_k) = (map(float, x.aminmax()) for x in (query, key))
    largest = max(-low_q, high_q) * max(-low_k, high_k) * query.shape[-1] * max(1.0, abs(scale))
    return largest < torch.finfo(compute_dtype(query)).max


def _join_masks(x: Attention) -> Tensor | None:
    """attn_mask and key_mask as one float mask, expanded to (B, H, N, M) without a copy."""
    mask = x.attn_mask
    visible = None if x.key_mask is None else x.key_mask[:, None, None, :]
    if mask is not None and mask.dtype == torch.bool:
        visible, mask = mask if visible is None else mask & visible, None
    if mask is not None:
        mask = mask.to(compute_dtype(x.query))  # the dtype that the kernel adds masks in
        mask = mask if visible is None else torch.where(visible, mask, -torch.inf)
    elif visible is not None:
        mask = torch.zeros(visible.shape, dtype=x.query.dtype).masked_fill_(~visible, -torch.inf)
    return None if mask is None else mask.expand(*x.query.shape[:3], x.key.shape[2])


def _empty_rows(x: Attention) -> Tensor | None:
    """(broadcastable to (B, H, N)) rows without a visible key; None if there can be none."""
    if x.attn_mask is None and x.key_mask is None:
        return None
    visible = torch.ones((), dtype=torch.bool)
    if x.attn_mask is not None:
        visible = x.attn_mask if x.attn_mask.dtype == torch.bool else ~torch.isneginf(x.attn_mask)
    if x.key_mask is not None:
        visible = visible & x.key_mask[:, None, None, :]
    empty = ~visible.any(-1)
    if x.is_causal:  # the first visible key comes after the row
        empty = empty | (visible.to(torch.uint8).argmax(-1) > torch.arange(x.query.shape[2]))
    return empty
