"""score_attention by torch.nn.functional.scaled_dot_product_attention, with torch's own backward pass.

It takes scores that are dot products of features and bool masks. Float masks it refuses: torch's kernels want them in the
query's dtype, and their backward passes take P = exp(logit - lse) from a rounded log-sum-exp, which is wrong where a finite
mask such as finfo.min stands in a whole row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._tensors import expand_heads, has_short_backward, pad_head_dim


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, key_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """out (B, H, N, Dv) from query (B, H, N, D), key (B, Hkv, M, D) and value (B, Hv, M, Dv); Hkv and Hv divide H."""
    size, dtype, num_heads = value.shape[3], query.dtype, query.shape[1]
    mask, is_causal = _join_masks(query, key, attn_mask, key_mask, is_causal, scale)
    if query.device.type == "cpu":
        # torch's fused CPU kernel recomputes P from a rounded log-sum-exp: float32 gradients were seen at 4.1 times the error of
        # the plain formula, on short rows. The output itself is as exact as the formula's.
        if dtype == torch.float32 and has_short_backward(query, key, value):
            query, key, value = query.double(), key.double(), value.double()
        # torch's fused CPU kernel wants one head count and one head_dim; what has several runs with whole maps
        query, key, value = pad_head_dim(query, expand_heads(key, num_heads), expand_heads(value, num_heads))
    else:
        query, key, value = _aligned(query), _aligned(key), _aligned(value)
        # Of torch's fused GPU kernels flash attention alone shares heads, on some GPUs up to a head_dim of 192. What none of them
        # takes runs with whole maps.
        flash = mask is None and dtype != torch.float32 and value.shape[3] == key.shape[3] <= 192
        if not flash or key.shape[1] != value.shape[1] or (is_causal and query.shape[2] != key.shape[2]):
            key, value = expand_heads(key, num_heads), expand_heads(value, num_heads)
    grouped = True if key.shape[1] != num_heads else False  # noqa: SIM210 -- bool() of torch.compile's symbol stays a symbol
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    return out[..., :size].to(dtype)


def _aligned(x: Tensor) -> Tensor:
    """(B, H, N, *) with rows of whole 16 bytes and a last stride of 1: what torch's fused GPU kernels ask for."""
    x = F.pad(x, (0, -x.shape[3] % 8)) if x.shape[3] % 8 else x
    return x if x.stride(3) == 1 else x.contiguous()


def _join_masks(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, key_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor | None, bool]:
    """One bool mask of four dimensions (the fused kernels take no three), or the causal flag by itself.

    torch multiplies its causal -inf by the scale, so a scale of at most 0 gets the causal mask as a tensor.
    """
    if is_causal and attn_mask is None and key_mask is None and scale > 0.0:
        return None, True
    mask = None if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.dim())]
    if key_mask is not None:
        mask = key_mask[:, None, None, :] if mask is None else mask & key_mask[:, None, None, :]
    if is_causal:
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
        mask = causal if mask is None else mask & causal
    return mask, False
