"""Congruence losses: CACR (Pandey et al., ACL 2023; compute_soft_iais of KhoomeiK/CACR, model/model.py:330-345) and IAIS (Ren
et al., ACL 2021; singular and distributed, :300-328).

Shapes: B batch, H heads, L text tokens, V image tokens, D head_dim. The blocks LL (B, L, L), VV (B, V, V), LV (B, L, V),
VL (B, V, L) are four softmaxes, each over the keys of its block, averaged over the heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_choice
from vlattn_fast._ground.tensors import compute_dtype, mask_padding, product, resolve_scale, scaled_dot_default
from vlattn_fast.backends.reference._softmax import log_softmax, logsumexp, softmax

Blocks = tuple[Tensor, Tensor, Tensor, Tensor]  # one tensor of each of LL, VV, LV, VL
EPSILON = 1e-6  # in the logarithms of iais_distributed, and of normalize="none"
KINDS = ("cacr", "iais_singular", "iais_distributed")
DIRECTIONS = ("text", "image", "both")
NORMALIZATIONS = ("softmax", "none")
REDUCTIONS = ("mean", "none")


def congruence_loss(
    text: tuple[Tensor, Tensor],
    image: tuple[Tensor, Tensor],
    cross: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    *,
    kind: str = "cacr",
    normalize: str = "softmax",
    direction: str = "both",
    text_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    scale: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Computes the formula of vlattn_fast.congruence_loss; the same arguments and shapes, without `backend`."""
    check_choice("kind", kind, KINDS)
    check_choice("normalize", normalize, NORMALIZATIONS)
    check_choice("direction", direction, DIRECTIONS)
    check_choice("reduction", reduction, REDUCTIONS)
    queries, keys = block_inputs(text, image, cross, text_mask, image_mask)
    (batch, num_heads, L, head_dim), V = queries[0].shape, queries[1].shape[2]
    text_tokens = text_mask if text_mask is not None else queries[0].new_ones(batch, L, dtype=torch.bool)
    image_tokens = image_mask if image_mask is not None else queries[0].new_ones(batch, V, dtype=torch.bool)
    scale = resolve_scale(scale, scaled_dot_default(head_dim))

    loss = queries[0].flatten(1)[:, :0].sum(1)  # zeros (B) that autograd knows
    if num_heads > 0 and L > 0 and V > 0:
        columns = (text_tokens, image_tokens, image_tokens, text_tokens)
        ll, vv, lv, vl = (_logits(*block, scale) for block in zip(queries, keys, columns, strict=True))
        if direction in ("text", "both"):
            loss = loss + _one_direction(kind, normalize, ll, vv, lv, vl, text_tokens, image_tokens)
        if direction in ("image", "both"):
            loss = loss + _one_direction(kind, normalize, vv, ll, vl, lv, image_tokens, text_tokens)
    loss = loss.to(compute_dtype(loss))
    return loss.sum() / max(batch, 1) if reduction == "mean" else loss


def block_inputs(
    text: tuple[Tensor, Tensor],
    image: tuple[Tensor, Tensor],
    cross: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
) -> tuple[Blocks, Blocks]:
    """Queries and keys of the four blocks, with zeros at padding. Every backend takes them in this order:

    queries: text, image, cross text, cross image, each (B, H, L or V, D);
    keys: text, image, cross image (the cross text queries attend to it), cross text (the cross image queries attend to it).

    So the blocks are LL, VV, LV, VL, and block i is softmax(scale queries[i] keys[i]^T).
    """
    text, image = mask_padding(text_mask, *text), mask_padding(image_mask, *image)
    if cross is None:
        return (text[0], image[0], text[0], image[0]), (text[1], image[1], image[1], text[1])
    (cross_text_query, cross_image_key), (cross_image_query, cross_text_key) = cross
    cross_text_query, cross_text_key = mask_padding(text_mask, cross_text_query, cross_text_key)
    cross_image_query, cross_image_key = mask_padding(image_mask, cross_image_query, cross_image_key)
    return (text[0], image[0], cross_text_query, cross_image_query), (text[1], image[1], cross_image_key, cross_text_key)


def num_gradients(kind: str) -> int:
    """Returns how many blocks have gradients: all of LL, VV, LV and VL, or the first two if the cross blocks are constants."""
    return 4 if kind == "iais_distributed" else 2


def of_all_blocks(gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Returns gradients of the queries and of the keys, `num_gradients` of each, with None for those of the other blocks."""
    n = len(gradients) // 2
    none = (None,) * (4 - n)
    return *gradients[:n], *none, *gradients[n:], *none


def _logits(query: Tensor, key: Tensor, columns: Tensor, scale: float) -> Tensor:
    """The logits of a block (B, H, N, M). Those of padding are so low that its weight is 0."""
    score = product(scale * query, key.mT)
    return torch.where(columns[:, None, None, :], score, torch.finfo(score.dtype).min)


def _one_direction(
    kind: str, normalize: str, ll: Tensor, vv: Tensor, lv: Tensor, vl: Tensor, text: Tensor, image: Tensor
) -> Tensor:
    """The loss (B) of the text direction from the logits of its blocks; `text` (B, L) and `image` (B, V) are True at real tokens.

    The image direction is the same with text and image swapped. p is the attention within the modality, t what the attention of
    the other modality and between the two predicts for it.
    """
    p = _block(ll)
    if kind == "cacr":
        change = _block(lv).detach()
        t = product(product(change, _block(vv)), change.mT)
    elif kind == "iais_singular":
        index = _block(lv).argmax(-1)  # the first of equals; no gradient
        picked = _block(vv).gather(1, index[:, :, None].expand(-1, -1, vv.shape[3]))
        t = picked.gather(2, index[:, None, :].expand(-1, index.shape[1], -1))
    else:
        t = product(_block(lv), _block(vl))
    if normalize == "none":
        # of rows that need not sum to 1: sum_ij (p log(p / t) - p + t) + (t log(t / p) - t + p), with eps at p and at t
        return _mean_over_rows((p - t) * (torch.log(p + EPSILON) - torch.log(t + EPSILON)), text, image)
    if kind == "iais_distributed":
        return _mean_over_rows(t * (_log(t) - torch.log(p + EPSILON)) + p * (_log(p) - torch.log(t + EPSILON)), text, image)
    log_t = _log_softmax(t, text)
    if kind == "cacr":
        log_p = _log_softmax(p, text)
        p = torch.exp(log_p)
    else:
        # log(mean_h P) by logarithms, so that a weight that underflows gives no infinite loss and no NaN gradient
        log_p = logsumexp(log_softmax(ll, dim=-1), dim=1) - math.log(ll.shape[1])
    t = torch.exp(log_t)
    return _mean_over_rows(t * (log_t - log_p) + p * (log_p - log_t), text, image)


def _block(logits: Tensor) -> Tensor:
    """Attention of a block, averaged over the heads after the softmax: (B, N, M)."""
    return softmax(logits, dim=-1).mean(1)


def _log(x: Tensor) -> Tensor:
    """log x, and 0 where x is 0, for 0 log 0 = 0."""
    return torch.where(x > 0, torch.log(torch.where(x > 0, x, 1.0)), 0.0)


def _log_softmax(x: Tensor, columns: Tensor) -> Tensor:
    """The log-softmax of each row (B, N, N) over real tokens, `columns` (B, N)."""
    return log_softmax(torch.where(columns[:, None, :], x, torch.finfo(x.dtype).min), dim=-1)


def _mean_over_rows(terms: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The sums of the rows (B, N, N), averaged over real tokens, `rows` (B, N): (B). 0 without any in `rows` or in `columns`."""
    real = rows[:, :, None] & rows[:, None, :] & columns.any(1)[:, None, None]
    return torch.where(real, terms, 0.0).sum((1, 2)) / rows.sum(1).clamp(min=1)
