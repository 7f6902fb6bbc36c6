"""How far an indexer of sparse attention is from the attention whose keys it chooses: KL(mean_h A_h || softmax_j I_ij), by row.

I_ij = sum_h w_ih relu(q_ih . k_j) is the lightning indexer of DeepSeek-V3.2 (DeepSeek-AI, 2025, equation 1), the divergence its
training loss: equation 3 over all keys, equation 4 over those of topk_indices. With whole maps, on any device, differentiated by
plain autograd. Shapes: query (B, H, N, D), key (B, Hkv, M, D), index_query (B, Hi, N, Di), index_key (B, M, Di), index_weights
(B, Hi, N), topk_indices (B, N, K).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype, expand_heads, mask_padding, product, resolve_scale, scaled_dot_default
from vlattn_fast.backends.reference._softmax import logits
from vlattn_fast.backends.reference.attention_divergence import log_attention, terms_of


def indexer_divergence(
    query: Tensor,
    key: Tensor,
    index_query: Tensor,
    index_key: Tensor,
    index_weights: Tensor,
    *,
    topk_indices: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Computes the formulas of vlattn_fast.indexer_divergence; the same arguments and shapes, without `backend`."""
    dtype = compute_dtype(query)
    key, index_key = mask_padding(key_mask, key, index_key[:, None])
    scale = resolve_scale(scale, scaled_dot_default(query.shape[-1]))
    scores = scale * product(query.to(dtype), expand_heads(key, query.shape[1]).to(dtype).mT)
    products = product(index_query.to(dtype), index_key.to(dtype).mT)
    index_scores = (index_weights[..., None].to(dtype) * products.relu()).sum(1, keepdim=True)
    maps = []
    for each in (scores, index_scores):
        each = logits(each, attn_mask, key_mask, is_causal, None)
        if topk_indices is not None:
            each = each.masked_fill(~_chosen(topk_indices, each.shape[-1]), -torch.inf)
        maps.append(log_attention(each, head_mean=True))
    (a, visible), (b, _) = maps
    if a.shape[-1] == 0:
        return ((a.sum(-1) + b.sum(-1)) * 0.0)[:, 0]
    return torch.where(visible, terms_of("kl", a, b, 0.5), 0.0).sum(-1)[:, 0].to(dtype)


def _chosen(topk_indices: Tensor, keys: int) -> Tensor:
    """bool (B, 1, N, M): the keys that are among a query's indices."""
    inside = (topk_indices >= 0) & (topk_indices < keys)
    chosen = torch.zeros(*topk_indices.shape[:2], keys + 1, dtype=torch.bool, device=topk_indices.device)
    return chosen.scatter(2, torch.where(inside, topk_indices, keys).long(), True)[:, None, :, :keys]
