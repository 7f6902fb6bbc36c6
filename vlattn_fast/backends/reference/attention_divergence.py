"""How far one attention is from another over the same keys: D_i = sum_j f(A_ij, A'_ij), row by row.

f-divergences: KL and its reverse, Jensen-Shannon, squared Hellinger (Csiszar, 1967; Lin, 1991), total variation. With whole maps,
on any device, differentiated by plain autograd. Shapes: query (B, H, N, D), key (B, Hkv, M, D), other_query (B, H', N, D'),
other_key (B, H'kv, M, D').
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_choice
from vlattn_fast._ground.tensors import (
    compute_dtype,
    expand_heads,
    lse_is_lost,
    mask_padding,
    product,
    resolve_scale,
    scaled_dot_default,
)
from vlattn_fast.backends.reference._softmax import logits

KINDS = ("kl", "reverse_kl", "js", "hellinger", "total_variation")


def attention_divergence(
    query: Tensor,
    key: Tensor,
    other_query: Tensor,
    other_key: Tensor,
    *,
    kind: str = "kl",
    beta: float = 0.5,
    head_mean: bool = False,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    other_scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Computes the formulas of vlattn_fast.attention_divergence; the same arguments and shapes, without `backend`."""
    check_choice("kind", kind, KINDS)
    dtype = compute_dtype(query)
    maps = []
    sides = (query, key, scale, "scale"), (other_query, other_key, other_scale, "other_scale")
    for q, k, factor, name in sides:
        (k,) = mask_padding(key_mask, k)
        factor = resolve_scale(factor, scaled_dot_default(q.shape[-1]), name)
        scores = factor * product(q.to(dtype), expand_heads(k, q.shape[1]).to(dtype).mT)
        maps.append(log_attention(logits(scores, attn_mask, key_mask, is_causal, None), head_mean))
    (a, visible), (b, _) = maps
    if a.shape[-1] == 0:
        return (a.sum(-1) + b.sum(-1)) * 0.0
    terms = terms_of(kind, a, b, beta)
    return torch.where(visible, terms, 0.0).sum(-1).to(dtype)


def log_attention(scores: Tensor, head_mean: bool, lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """log A of each head, or of their mean, and which pairs are visible; 0 for others, whose logits are -inf. lse (B, H, N): the
    rows' log-sum-exp, if it is given."""
    visible = ~torch.isneginf(scores)
    if scores.shape[-1]:
        empty = ~visible.any(-1, keepdim=True)
        scores = torch.where(empty, 0.0, scores)  # keeps the softmax and its gradient finite
        a = scores - scores.detach().amax(-1, keepdim=True)
        a = a - _logsumexp(a, -1)
        if lse is not None:
            shift = torch.where(empty, 0.0, lse[..., None])
            a = torch.where(lse_is_lost(shift), a, scores - shift)
        a = torch.where(visible, a, 0.0)
    else:
        a = scores
    if head_mean:
        a, visible = log_sum(a, visible, 1) - math.log(a.shape[1]), visible.any(1, keepdim=True)
        a = torch.where(visible, a, 0.0)
    return a, visible


def log_sum(a: Tensor, visible: Tensor, dim: int) -> Tensor:
    """The log of the sum of e^a over the visible entries along `dim`, which is kept; 0 without any."""
    seen = visible.any(dim, keepdim=True)
    return torch.where(seen, _logsumexp(torch.where(visible, a, torch.finfo(a.dtype).min / 4), dim), 0.0)


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """torch's own has no tangent of its gradient."""
    largest = x.detach().amax(dim, keepdim=True)
    return largest + (x - largest).exp().sum(dim, keepdim=True).log()


def terms_of(kind: str, a: Tensor, b: Tensor, beta: float) -> Tensor:
    """f(p, q) of each pair, for a = log p and b = log q."""
    p, q = a.exp(), b.exp()
    if kind == "kl":
        return p * (a - b)
    if kind == "reverse_kl":
        return q * (b - a)
    if kind == "js":
        mixed = _logsumexp(torch.stack([a + math.log(beta), b + math.log1p(-beta)]), 0)[0]
        return beta * p * (a - mixed) + (1 - beta) * q * (b - mixed)
    if kind == "hellinger":
        return ((a / 2).exp() - (b / 2).exp()).square() / 2
    return (p - q).abs() / 2
