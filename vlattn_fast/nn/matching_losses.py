"""The losses that train image-text matching on attended words and regions: SCAN's hinge and DAMSM's two-way cross-entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_bool, check_choice, check_number, describe
from vlattn_fast.ops import BACKEND_NAMES
from vlattn_fast.ops.stacked_cross_attention import check_options, check_positive, damsm_similarity, stacked_cross_attention
from vlattn_fast.scores import Score


class ScanLoss(nn.Module):
    """Computes SCAN's triplet loss over `stacked_cross_attention`.

    Returns a scalar, a sum over the batch. The cost is that of stacked_cross_attention for B x B pairs.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> loss = va.nn.ScanLoss(direction="i2t")
        >>> loss(torch.randn(4, 36, 16), torch.randn(4, 7, 16), torch.tensor([7, 4, 5, 6])).shape
        torch.Size([])

    With S_ij the similarity of image i and caption j, pair i being (image i, caption i):
    sum_i [margin - S_ii + S_ij]_+ + [margin - S_ii + S_ji]_+, over the hardest j of each pair, or summed over all j.

    Args:
        margin: least difference of a true pair to a false one.
        hardest: use only the hardest caption of each image and the hardest image of each caption.
        direction, first_norm, smooth, aggregation, lambda_lse, score, backend: see `stacked_cross_attention`. The tensors of a
            score are the caller's: the loss registers no parameters.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it).

    Reference: Lee et al., ECCV 2018, eq. 8 to 10.
    """

    def __init__(
        self,
        margin: float = 0.2,
        hardest: bool = True,
        *,
        direction: str = "t2i",
        first_norm: str | None = "clipped_l2norm",
        smooth: float = 9.0,
        aggregation: str = "logsumexp",
        lambda_lse: float = 6.0,
        score: str | Score = "dot",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_number("margin", margin, low=0.0)
        check_bool(hardest=hardest)
        check_options(direction, first_norm, smooth, aggregation, lambda_lse, score)
        check_choice("backend", backend, BACKEND_NAMES)
        self.margin, self.hardest = margin, hardest
        self.options: dict[str, Any] = {"direction": direction, "first_norm": first_norm, "smooth": smooth}
        self.options |= {"aggregation": aggregation, "lambda_lse": lambda_lse, "score": score, "backend": backend}

    def forward(
        self,
        images: Tensor,
        captions: Tensor,
        caption_lengths: Tensor | None = None,
        image_lengths: Tensor | None = None,
        *,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Computes the loss of images (B, R, D) and captions (B, T, D), pair by pair, with their lengths: a scalar.

        Args:
            ids: int (B). Pairs with equal ids, such as two captions of one image, are not false pairs of each other.
        """
        similarity = stacked_cross_attention(images, captions, caption_lengths, image_lengths, **self.options)
        return triplet_loss(similarity, _same(similarity, ids), self.margin, self.hardest)

    def extra_repr(self) -> str:
        return ", ".join([f"margin={self.margin}, hardest={self.hardest}", *(f"{k}={v!r}" for k, v in self.options.items())])


def triplet_loss(similarity: Tensor, same: Tensor, margin: float = 0.2, hardest: bool = True) -> Tensor:
    """Returns the sum of `ScanLoss` over any similarities (B, B); same: bool (B, B), the pairs that are not false."""
    true = similarity.diagonal()
    captions_of = (margin + similarity - true[:, None]).clamp(min=0).masked_fill(same, 0.0)
    images_of = (margin + similarity - true[None, :]).clamp(min=0).masked_fill(same, 0.0)
    if not hardest:
        return captions_of.sum() + images_of.sum()
    if not len(true):
        return similarity.sum()
    return captions_of.amax(1).sum() + images_of.amax(0).sum()


class DamsmLoss(nn.Module):
    """Computes AttnGAN's word-level matching loss over `damsm_similarity`.

    Returns a scalar, a mean over the batch. The cost is that of damsm_similarity for B x B pairs.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> va.nn.DamsmLoss()(torch.randn(4, 289, 16), torch.randn(4, 7, 16), torch.tensor([7, 4, 5, 6])).shape
        torch.Size([])

    With R_ij the score of image i and caption j: -log softmax_j(gamma3 R_ij) - log softmax_i(gamma3 R_ij) at j = i, averaged over
    the batch. The paper's sentence-level loss, a cosine of two vectors, is not included. R is gamma2 times the paper's R, as in
    the authors' code.

    Args:
        gamma1, gamma2: see `damsm_similarity`.
        gamma3: factor in the softmax over images and over captions.
        backend: see `damsm_similarity`.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it).

    Reference: Xu et al., CVPR 2018, eq. 10 to 12.
    """

    def __init__(self, gamma1: float = 4.0, gamma2: float = 5.0, gamma3: float = 10.0, *, backend: str = "auto") -> None:
        super().__init__()
        for name, gamma in (("gamma1", gamma1), ("gamma2", gamma2), ("gamma3", gamma3)):
            check_number(name, gamma, low=0.0)
        check_positive("gamma2", gamma2)
        check_choice("backend", backend, BACKEND_NAMES)
        self.gamma1, self.gamma2, self.gamma3, self.backend = gamma1, gamma2, gamma3, backend

    def forward(
        self,
        images: Tensor,
        captions: Tensor,
        caption_lengths: Tensor | None = None,
        image_lengths: Tensor | None = None,
        *,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Computes the loss of images (B, R, D) and captions (B, T, D), pair by pair, with their lengths: a scalar.

        Args:
            ids: int (B). Pairs with equal ids, such as images of one class, are not false pairs of each other.
        """
        options: dict[str, Any] = {"gamma1": self.gamma1, "gamma2": self.gamma2, "backend": self.backend}
        scores = self.gamma3 * damsm_similarity(images, captions, caption_lengths, image_lengths, **options)
        same = _same(scores, ids)
        if not len(scores):
            return scores.sum()
        equal_ids = same & ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(equal_ids, -torch.inf)
        true = torch.arange(len(scores), device=scores.device)
        return nn.functional.cross_entropy(scores, true) + nn.functional.cross_entropy(scores.T, true)

    def extra_repr(self) -> str:
        return f"gamma1={self.gamma1}, gamma2={self.gamma2}, gamma3={self.gamma3}"


def _same(similarity: Tensor, ids: Tensor | None) -> Tensor:
    """Returns bool (B, B), the pairs that are true, or have equal ids."""
    pairs, captions = similarity.shape
    if pairs != captions:
        raise ValueError(f"captions must be as many as images, pair by pair; got {captions} for {pairs} images")
    if ids is None:
        return torch.eye(pairs, dtype=torch.bool, device=similarity.device)
    if not isinstance(ids, Tensor) or ids.shape != (pairs,) or ids.is_floating_point():
        raise ValueError(f"ids must be an integer tensor of shape ({pairs},); got {describe(ids)}")
    ids = ids.to(similarity.device)
    return ids[:, None] == ids[None, :]
