"""The softmax that the reference formulas share, masked and plain, with the whole map in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.checks import has_forward_mode
from vlattn_fast._ground.tensors import as_dtype, compute_dtype, masked_logits


def attend(
    score: Tensor,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    sink: Tensor | None = None,
    pair_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the softmax over the keys of `score` (B, H, N, M): (probabilities, natural log-sum-exp).

    softcap bounds the score before the masks: softcap * tanh(score / softcap). sink (H,) is one more logit in each row's
    sum, whose probability is dropped. pair_bias (B, H, N, M): see `pair_bias_of`.

    A float mask or bias is added in the dtype of sums or its own, whichever is wider. Masked pairs get exactly 0; a fully masked
    row gives zeros and lse -inf, without a NaN in any gradient. The log-sum-exp is at least float32 if one is added.
    """
    dtype = score.dtype
    score = logits(score, attn_mask, key_mask, is_causal, softcap, pair_bias)
    if sink is not None:
        score = torch.cat([score, sink.to(score.dtype)[:, None, None].expand(*score.shape[:-1], 1)], -1)
    if score.shape[-1] == 0:
        return score.to(dtype), score.new_full(score.shape[:-1], -torch.inf)
    empty = torch.isneginf(score).all(-1, keepdim=True)
    score = torch.where(empty, 0.0, score)  # keeps softmax and its gradient finite; the row is set to zero below
    prob = torch.where(empty, 0.0, softmax(score, -1))
    # torch.logsumexp takes exp(score - rounded lse) in its backward pass: 1 for every key of a row masked by finfo.min throughout
    largest = score.amax(-1, keepdim=True).detach()
    lse = largest[..., 0] + torch.exp(score - largest).sum(-1).log()
    lse = torch.where(empty[..., 0], -torch.inf, lse)
    if sink is not None:
        prob = prob[..., :-1]
    return prob.to(dtype), lse


def pair_bias_of(group_bias: Tensor | None, query_groups: Tensor | None, key_groups: Tensor | None) -> Tensor | None:
    """Returns group_bias[b, h, query_groups[b, i], key_groups[b, j]] for each pair, (B, H, N, M) or (1, H, N, M).

    It is 0 if one of the two has no group. group_bias (H, Gq, Gk) or (B, H, Gq, Gk), groups (N) or (B, N), and (M) or (B, M).
    """
    if group_bias is None or query_groups is None or key_groups is None:
        return None
    bias = as_dtype(group_bias, compute_dtype(group_bias))  # 16 bits would lose the sums of its gradient
    bias = bias if bias.dim() == 4 else bias[None]
    rows, columns = (x if x.dim() == 2 else x[None] for x in (query_groups, key_groups))
    rows, columns = rows[:, None, :, None], columns[:, None, None, :]
    has_group = (rows >= 0) & (rows < bias.shape[2]) & (columns >= 0) & (columns < bias.shape[3])
    sample, head = (torch.arange(size, device=bias.device) for size in bias.shape[:2])
    pairs = bias[
        sample[:, None, None, None], head[:, None, None], rows.clamp(0, bias.shape[2] - 1), columns.clamp(0, bias.shape[3] - 1)
    ]
    return torch.where(has_group, pairs, 0.0)


def gated(out: Tensor, head_gate: Tensor | None) -> Tensor:
    """Returns the output (B, H, N, Dv) with each head times its gate, (H,) or (B, H)."""
    return out if head_gate is None else (out * head_gate[..., None, None]).to(out.dtype)


def logits(
    score: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    is_causal: bool,
    softcap: float | None,
    pair_bias: Tensor | None = None,
) -> Tensor:
    """Returns the logits (B, H, N, M) after softcap, float mask and bias; -inf for masked pairs."""
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    rows = torch.arange(score.shape[-2], device=score.device)[:, None] if is_causal else None
    return masked_logits(score, attn_mask, key_mask, rows, pair_bias)


# In forward mode softmax and log-sum-exp are written out: torch's edit their tangents in place, and a backward pass through them
# would raise. Elsewhere torch's keep fewer maps.


def softmax(x: Tensor, dim: int) -> Tensor:
    """torch.softmax, which has all derivatives."""
    if not has_forward_mode():
        return torch.softmax(x, dim)
    each = torch.exp(x - x.amax(dim, keepdim=True).detach())
    return each / each.sum(dim, keepdim=True)


def log_softmax(x: Tensor, dim: int) -> Tensor:
    """torch.log_softmax, which has all derivatives."""
    if not has_forward_mode():
        return torch.log_softmax(x, dim)
    x = x - x.amax(dim, keepdim=True).detach()
    return x - torch.exp(x).sum(dim, keepdim=True).log()


def logsumexp(x: Tensor, dim: int) -> Tensor:
    """torch.logsumexp, which has all derivatives."""
    if not has_forward_mode():
        return torch.logsumexp(x, dim)
    largest = x.amax(dim, keepdim=True).detach()
    return (largest + torch.exp(x - largest).sum(dim, keepdim=True).log()).squeeze(dim)
