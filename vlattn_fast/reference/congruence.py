"""Congruence losses as their papers write them: CACR (Pandey et al., ACL 2023, eq. 6-9: attention within one modality against
that of the other modality moved by a change of basis) and IAIS (Ren et al., ACL 2021, eq. 3-9: singular, distributed).

Maps and all, any device, any floating dtype, differentiated by plain autograd. Shapes: B batch, H heads, L text tokens, V image
tokens, D head size. The blocks LL (B,L,L), VV (B,V,V), LV (B,L,V), VL (B,V,L) are four separate softmaxes, each over the keys of
its own block, averaged over the heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..ops._checks import resolve_scale, scaled_dot_default
from ._softmax import attend, hide

EPSILON = 1e-6  # in the logarithms of iais_distributed


def congruence_loss(
    text: tuple[Tensor, Tensor],
    image: tuple[Tensor, Tensor],
    cross: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    *,
    kind: str = "cacr",
    direction: str = "both",
    text_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    scale: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The formula behind vlattn_fast.congruence_loss; the same arguments and shapes, without `backend`."""
    (text_query, text_key), (image_query, image_key) = hide(text_mask, *text), hide(image_mask, *image)
    if cross is None:
        text_to_image, image_to_text = (text_query, image_key), (image_query, text_key)
    else:
        (cross_text_query, cross_image_key), (cross_image_query, cross_text_key) = cross
        cross_text_query, cross_text_key = hide(text_mask, cross_text_query, cross_text_key)
        cross_image_query, cross_image_key = hide(image_mask, cross_image_query, cross_image_key)
        text_to_image, image_to_text = (cross_text_query, cross_image_key), (cross_image_query, cross_text_key)
    batch, _, num_words, head_size = text_query.shape
    num_regions = image_query.shape[2]
    words = text_mask if text_mask is not None else text_query.new_ones(batch, num_words, dtype=torch.bool)
    regions = image_mask if image_mask is not None else text_query.new_ones(batch, num_regions, dtype=torch.bool)
    scale = resolve_scale(scale, scaled_dot_default(head_size))

    loss = text_query.flatten(1)[:, :0].sum(1)  # zeros (B) that autograd knows
    if num_words > 0 and num_regions > 0:
        log_ll, log_vv = _log_block(text_query, text_key, words, scale), _log_block(image_query, image_key, regions, scale)
        log_lv, log_vl = _log_block(*text_to_image, regions, scale), _log_block(*image_to_text, words, scale)
        if direction in ("text", "both"):
            loss = loss + _one_direction(kind, log_ll, log_vv, log_lv, log_vl, words, regions)
        if direction in ("image", "both"):
            loss = loss + _one_direction(kind, log_vv, log_ll, log_vl, log_lv, regions, words)
    loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
    return loss.sum() / max(batch, 1) if reduction == "mean" else loss


def _log_block(query: Tensor, key: Tensor, key_mask: Tensor, scale: float) -> Tensor:
    """log of mean_h softmax(scale Q_h K_h^T), (B,N,M); -inf at padding. By logarithms: no weight underflows to log 0."""
    _, lse = attend(scale * query @ key.mT, key_mask=key_mask)
    seen = key_mask[:, None, None, :]
    log_prob = torch.where(seen, scale * query @ key.mT - torch.where(torch.isneginf(lse), 0.0, lse)[..., None], 0.0)
    return torch.where(seen[:, 0], torch.logsumexp(log_prob, dim=1) - math.log(query.shape[1]), -torch.inf)


def _one_direction(
    kind: str, log_own: Tensor, log_other: Tensor, log_cross: Tensor, log_back: Tensor, own: Tensor, other: Tensor
) -> Tensor:
    """The loss (B) that compares `own` (LL for the text) with what the other modality says: VV, LV and VL for the text."""
    visible = own[:, :, None] & own[:, None, :]
    if kind == "cacr":
        change = torch.exp(log_cross).detach()
        log_p = _log_softmax(torch.exp(log_own), own)
        log_t = _log_softmax(change @ torch.exp(log_other) @ change.mT, own)
    elif kind == "iais_singular":
        index = log_cross.argmax(-1)
        rows = torch.exp(log_other).gather(1, index[:, :, None].expand(-1, -1, log_other.shape[2]))
        log_p = log_own
        log_t = _log_softmax(rows.gather(2, index[:, None, :].expand(-1, index.shape[1], -1)), own)
    else:
        p, t = torch.exp(log_own), torch.exp(log_cross) @ torch.exp(log_back)
        positive = visible & (t > 0)  # 0 log 0 = 0
        log_t = torch.where(positive, torch.log(torch.where(positive, t, 1.0)), 0.0)
        log_p = torch.where(visible, log_own, 0.0)
        terms = t * (log_t - torch.log(p + EPSILON)) + p * (log_p - torch.log(t + EPSILON))
        return _row_mean(terms, visible, own, other)
    log_p, log_t = torch.where(visible, log_p, 0.0), torch.where(visible, log_t, 0.0)
    p, t = torch.exp(log_p), torch.exp(log_t)
    return _row_mean(t * (log_t - log_p) + p * (log_p - log_t), visible, own, other)


def _log_softmax(x: Tensor, columns: Tensor) -> Tensor:
    """Of each row (B,N,N) over the columns of real tokens; 0 elsewhere."""
    seen = columns[:, None, :]
    lowest = torch.finfo(x.dtype).min  # not -inf: a sample without tokens must not make NaN
    return torch.where(seen, torch.log_softmax(torch.where(seen, x, lowest), dim=-1), 0.0)


def _row_mean(terms: Tensor, visible: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """KLDivLoss 'batchmean' of a sample: the sum of its terms by its number of rows; 0 where a modality has no token."""
    loss = torch.where(visible, terms, 0.0).sum((1, 2)) / own.sum(1).clamp(min=1)
    return torch.where(own.any(1) & other.any(1), loss, 0.0)
