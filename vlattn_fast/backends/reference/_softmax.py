"""The masked softmax that every reference formula shares, with the whole map in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import add_mask


def attend(
    score: Tensor,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over the keys of `score` (B, H, N, M): (probabilities, natural log-sum-exp).

    softcap bounds the score in front of the masks: softcap * tanh(score / softcap). sink (H,) is one more logit in each row's
    sum, whose probability is dropped.

    A float mask is added in the dtype of sums or its own, whichever is wider. Masked pairs get exactly 0; a fully masked row
    gives zeros and lse -inf, without a NaN in any gradient. The log-sum-exp is at least float32 where a float mask is added.
    """
    dtype = score.dtype
    score, visible = logits(score, attn_mask, key_mask, is_causal, softcap)
    if sink is not None:
        logit = sink.to(score.dtype)[:, None, None].expand(*score.shape[:-1], 1)
        score, visible = torch.cat([score, logit], -1), torch.cat([visible, ~torch.isneginf(logit)], -1)
    if score.shape[-1] == 0:
        return score.to(dtype), score.new_full(score.shape[:-1], -torch.inf)
    score = torch.where(visible, score, -torch.inf)
    empty = ~visible.any(-1, keepdim=True)
    score = torch.where(empty, 0.0, score)  # keeps softmax and its gradient finite; the row is set to zero below
    prob = torch.where(empty, 0.0, torch.softmax(score, dim=-1))
    # torch.logsumexp takes exp(score - rounded lse) in its backward pass: 1 for every key of a row masked by finfo.min throughout
    largest = score.amax(-1, keepdim=True).detach()
    lse = largest[..., 0] + torch.exp(score - largest).sum(-1).log()
    lse = torch.where(empty[..., 0], -torch.inf, lse)
    if sink is not None:
        prob = prob[..., :-1]
    return prob.to(dtype), lse


def logits(
    score: Tensor, attn_mask: Tensor | None, key_mask: Tensor | None, is_causal: bool, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The logits (B, H, N, M) behind softcap and float mask, and which pairs are visible."""
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    visible = torch.ones_like(score, dtype=torch.bool)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        visible = visible & ~torch.isneginf(attn_mask)
        score = add_mask(score, torch.where(torch.isneginf(attn_mask), 0.0, attn_mask))
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    if is_causal:
        visible = visible & torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril()
    return score, visible
