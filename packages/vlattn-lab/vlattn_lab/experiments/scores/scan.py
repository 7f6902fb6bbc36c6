"""Matching with the attention of SCAN as published (Lee et al., ECCV 2018, text to image, average): unit vectors, each region's
scores divided by their norm over the words, and a factor of 9 in the softmax over the regions."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast import stacked_cross_attention
from vlattn_lab.experiments.scores import matching
from vlattn_lab.experiments.scores.attend import BIASED_KEY, SCORES, UNIFORM, Attend

# A positive factor of all scores cancels in the norm, so `dot` and `scaled_dot` of unit vectors would repeat `cosine`.
ARMS = (*(arm for arm in SCORES if arm not in ("dot", "scaled_dot")), *BIASED_KEY, UNIFORM)
SMOOTH = 9.0
RATES, SIZES, SMOKE, measure = matching.RATES, matching.SIZES, matching.SMOKE, matching.measure


class Normalised(Attend):
    """The attention of pairs, with masks. `stacked_cross_attention` computes the same for all images and captions, of scores
    without an activation that are products of features."""

    def attention(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        """As in `Attend`."""
        score = self.score
        clipped = F.leaky_relu(score.default_scale(query.shape[-1]) * score.formula(query, key), 0.1)
        logits = SMOOTH * clipped / (clipped.norm(dim=2, keepdim=True) + 1e-8)
        if key_mask is not None:
            logits = logits.masked_fill(~key_mask[:, None, None], -torch.inf)
        return logits.softmax(-1).nan_to_num(0.0) @ value  # NaN: all regions are masked


class Scan(matching.Matcher):
    attention = Normalised

    def sides(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of regions and words."""
        regions, words = (F.normalize(side, dim=-1) for side in super().sides(images, ids))
        return regions, words

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """As in `Matcher`."""
        (regions, words), score = self.sides(images, ids), self.attend.score
        if score.is_linear and not self.attend.uniform:
            options: dict[str, Any] = {"first_norm": "clipped_l2norm", "smooth": SMOOTH, "aggregation": "mean"}
            return stacked_cross_attention(regions, words, score=score, **options)
        every = len(images), len(ids)
        pairs = (side.expand(*every, -1, -1).flatten(0, 1) for side in (words, regions[:, None]))
        return self._cosines(*pairs).mean(-1).unflatten(0, every)


train = functools.partial(matching.train, make=Scan)
