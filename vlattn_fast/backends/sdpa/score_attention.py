"""score_attention by torch.nn.functional.scaled_dot_product_attention, with torch's own backward pass.

It takes scores that are dot products of features, with key_mask or the causal flag. torch adds -inf to the scores that a mask
hides, and NaN or Inf in a hidden key would stay NaN. So it takes no attn_mask; the public call writes zeros over the keys that
key_mask hides, and the causal flag by itself writes -inf over scores. Float masks torch's kernels want in the query's dtype
besides, and their backward passes take P = exp(logit - lse) from a rounded log-sum-exp, which is wrong if a finite mask such
as finfo.min stands in a whole row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._ground.tensors import expand_heads, has_short_backward, pad_head_dim
from vlattn_fast.backends.inputs import Attention


def attention(x: Attention, value: Tensor) -> Tensor:
    """out (B, H, N, Dv) with value (B, Hv, M, Dv); Hkv and Hv divide H. Keys and values that key_mask hides are finite."""
    query, key, is_causal, scale = x.query, x.key, x.is_causal, x.scale
    size, dtype, num_heads = value.shape[3], query.dtype, query.shape[1]
    mask = None if x.key_mask is None else x.key_mask[:, None, None, :]  # the fused kernels take no three dimensions
    if mask is not None:
        query = torch.where(mask.any(-1, keepdim=True), query, 0.0)  # NaN in a query without a key
    if query.device.type == "cpu":
        # torch's fused CPU kernel recomputes P from a rounded log-sum-exp: float32 gradients had 4.1 times the error of
        # the plain formula, on short rows. The output itself is as exact as the formula's.
        if dtype == torch.float32 and has_short_backward(query, key, value):
            query, key, value = query.double(), key.double(), value.double()
        if mask is None and not is_causal and key.shape[2] < 16:
            # without a mask the kernel treats a row of NaN as masked if no vector register is full of keys
            mask = query.new_zeros(1, 1, 1, key.shape[2])
        shares_heads = key.shape[1] == value.shape[1]
        query, key, value = pad_head_dim(query, key, value)  # the kernel wants one head_dim
    else:
        query, key, value = _aligned(query), _aligned(key), _aligned(value)
        # Among torch's fused GPU kernels only flash attention shares heads, on some GPUs up to a head_dim of 192. A call that no
        # fused kernel takes runs with whole maps.
        flash = mask is None and dtype != torch.float32 and value.shape[3] == key.shape[3] <= 192
        shares_heads = flash and key.shape[1] == value.shape[1] and not (is_causal and query.shape[2] != key.shape[2])
    if not shares_heads:
        key, value = expand_heads(key, num_heads), expand_heads(value, num_heads)
    grouped = True if key.shape[1] != num_heads else False  # bool() of torch.compile's symbol stays a symbol
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    return out[..., :size].to(dtype)


def _aligned(x: Tensor) -> Tensor:
    """(B, H, N, *) with rows of whole 16 bytes and a last stride of 1: what torch's fused GPU kernels ask for."""
    x = F.pad(x, (0, -x.shape[3] % 8)) if x.shape[3] % 8 else x
    return x if x.stride(3) == 1 else x.contiguous()
