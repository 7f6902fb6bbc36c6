"""SCAN's similarity of every image with every caption (Lee et al., ECCV 2018, eq. 1-8), and DAMSM's (Xu et al., CVPR 2018).

One pair at a time with whole maps, on any device, differentiated by plain autograd; 16-bit input is computed in float32.
Shapes: images (Bi, R, D), captions (Bc, T, D); of one pair, queries q (n, D) and contexts c (m, D) without their padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._ground.checks import check_choice
from vlattn_fast._ground.tensors import compute_dtype, product, unit_vectors
from vlattn_fast.backends.reference._softmax import logsumexp, softmax
from vlattn_fast.scores import Score, resolve

DIRECTIONS = ("t2i", "i2t")
FIRST_NORMS = ("softmax", "l2norm", "l1norm", "clipped_l2norm", "clipped_l1norm", "clipped", None)
AGGREGATIONS = ("logsumexp", "max", "sum", "mean")


def split_norm(first_norm: str | None) -> tuple[bool, str | None]:
    """One of FIRST_NORMS as whether scores are clipped, and the norm after that: "softmax", "l2norm", "l1norm" or None."""
    if first_norm is None or not first_norm.startswith("clipped"):
        return False, first_norm
    return True, None if first_norm == "clipped" else first_norm.removeprefix("clipped_")


def stacked_cross_attention(
    images: Tensor,
    captions: Tensor,
    caption_lengths: Tensor | None = None,
    image_lengths: Tensor | None = None,
    *,
    direction: str = "t2i",
    first_norm: str | None = "clipped_l2norm",
    smooth: float = 9.0,
    aggregation: str = "logsumexp",
    lambda_lse: float = 6.0,
    score: str | Score = "dot",
) -> Tensor:
    """Computes the formula of vlattn_fast.stacked_cross_attention; the same arguments and shapes, without `backend`."""
    check_choice("direction", direction, DIRECTIONS)
    check_choice("first_norm", first_norm, FIRST_NORMS)
    check_choice("aggregation", aggregation, AGGREGATIONS)
    dtype = compute_dtype(images)
    images, captions, score = images.to(dtype), captions.to(dtype), resolve(score).to(dtype)
    regions = [images.shape[1]] * images.shape[0] if image_lengths is None else image_lengths.tolist()
    words = [captions.shape[1]] * captions.shape[0] if caption_lengths is None else caption_lengths.tolist()
    # zeros that depend on both inputs, so that empty sets and empty batches have gradients, too
    similarity = images[:, :0].sum((1, 2))[:, None] + captions[:, :0].sum((1, 2))
    pairs = []  # stacked at the end: torch.func.vmap over one of the inputs takes no result in place
    for i, num_regions in enumerate(regions):
        for j, num_words in enumerate(words):
            pairs.append(similarity[i, j])
            if num_regions > 0 and num_words > 0:
                image, caption = images[i, :num_regions], captions[j, :num_words]
                q, c = (caption, image) if direction == "t2i" else (image, caption)
                r = _relevance(q, c, score, first_norm, smooth)
                pairs[-1] = _aggregate(r, aggregation, lambda_lse)
    return torch.stack(pairs).view_as(similarity) if pairs else similarity


def damsm_similarity(
    images: Tensor,
    captions: Tensor,
    caption_lengths: Tensor | None = None,
    image_lengths: Tensor | None = None,
    *,
    gamma1: float = 4.0,
    gamma2: float = 5.0,
) -> Tensor:
    """Computes the formula of vlattn_fast.damsm_similarity (AttnGAN eq. 7-10): log sum_t exp(gamma2 cos(e_t, c_t)).

    words_loss of taoxugit/AttnGAN, code/miscc/losses.py, has the same; the paper's eq. 10 divides it by gamma2.
    """
    lengths = caption_lengths, image_lengths
    return gamma2 * stacked_cross_attention(images, captions, *lengths, first_norm="softmax", smooth=gamma1, lambda_lse=gamma2)


def _relevance(q: Tensor, c: Tensor, score: Score, first_norm: str | None, smooth: float) -> Tensor:
    """Returns r_q = cos(q, a_q), (n,): how close each query is to the context that it attends to."""
    s = _scores(score, q, c)  # eq. 1
    alpha = softmax(smooth * _normalize(s, first_norm), dim=1)  # over contexts, eq. 3
    a = product(alpha, c)  # eq. 2
    return (q * a).sum(1) / (q.norm(dim=1) * a.norm(dim=1)).clamp(min=1e-8)  # eq. 4


def _scores(score: Score, q: Tensor, c: Tensor) -> Tensor:
    """Returns the score of each query with each context, (n, m); a cosine has no eps, and is 0 for a zero vector."""
    if score.kind == "cosine":
        (unit_q, _), (unit_c, _) = unit_vectors(q, 1.0), unit_vectors(c, 1.0)
        return product(unit_q, unit_c.mT)
    return score.default_scale(q.shape[1]) * score.formula(q[None, None], c[None, None])[0, 0]


def _normalize(s: Tensor, first_norm: str | None) -> Tensor:
    """Normalises each context's column of s (n, m) over the queries. (norm has gradient 0 at a zero column; sqrt has NaN.)"""
    clips, norm = split_norm(first_norm)
    if clips:
        s = F.leaky_relu(s, 0.1)
    match norm:
        case "softmax":
            return softmax(s, dim=0)
        case "l2norm":
            return s / (s.norm(dim=0) + 1e-8)
        case "l1norm":
            return s / (s.abs().sum(dim=0) + 1e-8)
    return s


def _aggregate(r: Tensor, aggregation: str, lambda_lse: float) -> Tensor:
    """One similarity from the queries' r (n,), n > 0: eq. 5 and its alternatives."""
    match aggregation:
        case "logsumexp":
            # of one column: torch's tangent of a quotient without dimensions is float64
            return (logsumexp(lambda_lse * r[:, None], dim=0) / lambda_lse)[0]
        case "max":
            return r.amax(0)
        case "sum":
            return r.sum(0)
    return r.mean(0)
