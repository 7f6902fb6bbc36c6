"""How far an indexer of sparse attention is from the attention whose keys it chooses: KL(mean_h A_h || softmax_j I_ij), by row.

I_ij = sum_h w_ih relu(q_ih . k_j) is the lightning indexer of DeepSeek-V3.2 (DeepSeek-AI, 2025, equation 1), the divergence its
training loss: equation 3 over all keys, equation 4 over those of topk_indices. With whole maps, on any device, differentiated by
plain autograd. Shapes: query (B, H, N, D), key (B, Hkv, M, D), index_query (B, Hi, N, Di), index_key (B, M', Di), index_weights
(B, Hi, N), topk_indices (B, N, K), teacher_lse (B, H, N); M' blocks of key_block keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import (
    blocks_of_keys,
    compute_dtype,
    expand_heads,
    mask_padding,
    product,
    resolve_scale,
    scaled_dot_default,
)
from vlattn_fast.backends.reference._softmax import logits
from vlattn_fast.backends.reference.attention_divergence import log_attention, log_sum, terms_of


def indexer_divergence(
    query: Tensor,
    key: Tensor,
    index_query: Tensor,
    index_key: Tensor,
    index_weights: Tensor,
    *,
    topk_indices: Tensor | None = None,
    teacher_lse: Tensor | None = None,
    key_block: int = 1,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Computes the formulas of vlattn_fast.indexer_divergence; the same arguments and shapes, without `backend`."""
    dtype = compute_dtype(query)
    (key,) = mask_padding(key_mask, key)
    block_mask = None if key_mask is None else blocks_of_keys(key_mask, key_block, False).any(-1)
    (index_key,) = mask_padding(block_mask, index_key[:, None])
    scale = resolve_scale(scale, scaled_dot_default(query.shape[-1]))
    scores = scale * product(query.to(dtype), expand_heads(key, query.shape[1]).to(dtype).mT)
    products = product(index_query.to(dtype), index_key.to(dtype).mT)
    index_scores = (index_weights[..., None].to(dtype) * products.relu()).sum(1, keepdim=True)
    scores = logits(scores, attn_mask, key_mask, is_causal, None)
    masks = logits(torch.zeros_like(scores[:, :1]), attn_mask, key_mask, is_causal, None)  # a block has the largest of its keys
    masks = blocks_of_keys(masks, key_block, -torch.inf).amax(-1)
    index_scores = torch.where(torch.isneginf(masks), -torch.inf, index_scores + masks)
    if topk_indices is not None:
        chosen = chosen_keys(topk_indices, index_scores.shape[-1])
        index_scores = index_scores.masked_fill(~chosen, -torch.inf)
        scores = scores.masked_fill(~chosen.repeat_interleave(key_block, -1)[..., : scores.shape[-1]], -torch.inf)
    a, visible = log_attention(scores, head_mean=True, lse=teacher_lse)
    b, _ = log_attention(index_scores, head_mean=True)
    if a.shape[-1] == 0:
        return ((a.sum(-1) + b.sum(-1)) * 0.0)[:, 0]
    visible = blocks_of_keys(visible, key_block, False)
    a = log_sum(blocks_of_keys(a, key_block, 0.0), visible, -1)[..., 0]
    visible = visible.any(-1)
    terms = terms_of("kl", a, b, 0.5) + b.exp() - a.exp()  # the sums of both are 1, but for those of a given lse's rounding
    return torch.where(visible, terms, 0.0).sum(-1)[:, 0].to(dtype)


def chosen_keys(topk_indices: Tensor, keys: int) -> Tensor:
    """bool (B, 1, N, M): the keys that are among a query's indices."""
    inside = (topk_indices >= 0) & (topk_indices < keys)
    chosen = torch.zeros(*topk_indices.shape[:2], keys + 1, dtype=torch.bool, device=topk_indices.device)
    return chosen.scatter(2, torch.where(inside, topk_indices, keys).long(), True)[:, None, :, :keys]
