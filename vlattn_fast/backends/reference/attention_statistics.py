"""The statistics that probes take from an attention map A = softmax(scale * q k^T + mask).

Cao et al., "Behind the Scene", ECCV 2020 (VALUE).
Shapes: B batch, H heads, N queries, M keys, G groups of keys; query (B, H, N, D), key (B, Hkv, M, D).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._ground.checks import check_names
from vlattn_fast._ground.tensors import (
    cast_finite,
    compute_dtype,
    expand_heads,
    mask_padding,
    product,
    resolve_scale,
    scaled_dot_default,
)
from vlattn_fast.backends.reference._softmax import attend, logits, pair_bias_of


class AttentionStatistics(NamedTuple):
    """Holds statistics of A (B, H, N, M), float32 (float64 for float64 input); argmax is int64. None = not asked for.

    A row of A sums to 1, or to less with a sink: the statistics are of the weights on the keys.
    """

    mass: Tensor
    """(B, H, N, G): the attention of a query on each group of keys, sum_{j in g} A_ij."""
    entropy: Tensor
    """(B, H, N): -sum_j A_ij log A_ij in nats."""
    maximum: Tensor
    """(B, H, N): max_j A_ij."""
    argmax: Tensor
    """(B, H, N) int64: the first key with that weight; -1 if no key has any, e.g. in a fully masked row."""
    received: Tensor
    """(B, H, M): the attention a key receives, sum_i row_weight_i A_ij."""


class LogitStatistics(NamedTuple):
    """Holds the fields of AttentionStatistics and more: the result of a call that names one of the further fields."""

    mass: Tensor
    entropy: Tensor
    maximum: Tensor
    argmax: Tensor
    received: Tensor
    max_logit: Tensor
    """(B, H, N): the largest logit, after softcap and masks, without a gradient; -inf in a fully masked row."""
    lse: Tensor
    """(B, H, N): the natural log-sum-exp of the logits and the sink, without a gradient; -inf in an empty row."""
    diagonal: Tensor
    """(B, H, N): A_ii, the attention of a token on itself; 0 where it is masked, and for i >= M."""
    distance: Tensor
    """(B, H, N): how far a query looks, sum_j A_ij |i - j| in tokens."""

    def max_logit_of_heads(self) -> Tensor:
        """Returns (H,), the largest logit of each head over all samples and queries, as QK-clip needs it."""
        if self.max_logit is None:
            raise ValueError("max_logit was not computed; name it in statistics")
        heads = self.max_logit.transpose(0, 1).flatten(1)
        return heads.amax(1) if heads.shape[1] else heads.new_full(heads.shape[:1], -torch.inf)


def chosen_statistics(values: Iterable[Tensor | None], names: Collection[str]) -> AttentionStatistics:
    """Returns the statistics with these `names`; None for the others.

    Most calls ask for all that weigh: to type checkers those fields are tensors, of the type that has no more.
    """
    chosen = [x if name in names else None for name, x in zip(LogitStatistics._fields, values, strict=True)]
    if {*names} <= {*AttentionStatistics._fields}:
        return AttentionStatistics(*chosen[: len(AttentionStatistics._fields)])  # type: ignore[arg-type]
    return LogitStatistics(*chosen)  # type: ignore[arg-type, return-value]


def attention_statistics(
    query: Tensor,
    key: Tensor,
    *,
    statistics: Collection[str] | None = None,
    key_groups: Tensor | None = None,
    num_groups: int | None = None,
    row_weight: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    sink: Tensor | None = None,
    query_groups: Tensor | None = None,
    group_bias: Tensor | None = None,
) -> AttentionStatistics:
    """Computes the formulas of vlattn_fast.attention_statistics; the same arguments and shapes, without `backend`."""
    default = AttentionStatistics._fields
    asked = default if statistics is None else check_names("statistics", statistics, LogitStatistics._fields)
    (key,) = mask_padding(key_mask, key)
    key = expand_heads(key, query.shape[1])
    scale = resolve_scale(scale, scaled_dot_default(query.shape[-1]))
    pair_bias = pair_bias_of(group_bias, query_groups, key_groups)
    scores = scale * product(query, key.mT)
    prob, lse = attend(scores, attn_mask, key_mask, is_causal, softcap, sink, pair_bias)  # A (B, H, N, M)
    masked = logits(scores, attn_mask, key_mask, is_causal, softcap, pair_bias)
    if key_groups is None:
        key_groups, num_groups = key.new_full((key.shape[2],), -1, dtype=torch.int64), 0
    elif group_bias is not None:
        num_groups = group_bias.shape[-1]
    elif num_groups is None:
        num_groups = int(key_groups.max()) + 1 if key_groups.numel() else 0
    member = key_groups[..., None] == torch.arange(num_groups, device=key.device)  # (M, G) or (B, M, G)
    weight = query.new_ones(query.shape[2]) if row_weight is None else row_weight.to(prob.dtype)  # (N) or (B, N)

    mass = product(prob, member.expand(query.shape[0], -1, -1)[:, None].to(prob.dtype))  # sum_{j in g} A_ij
    entropy = -(prob * torch.where(prob > 0, prob, 1.0).log()).sum(-1)  # -sum_j A_ij log A_ij, 0 log 0 = 0
    received = (weight.expand(query.shape[0], -1)[:, None, :, None] * prob).sum(2)  # sum_i w_i A_ij
    if prob.shape[-1] > 0:
        maximum, argmax = prob.max(-1)
        argmax = torch.where(maximum == 0, -1, argmax)
    else:
        maximum, argmax = prob.sum(-1), torch.full_like(prob.sum(-1), -1, dtype=torch.int64)
    max_logit = F.pad(masked, (0, 1), value=-torch.inf).amax(-1)
    dtype = compute_dtype(prob)
    weight_statistics = mass.to(dtype), entropy.to(dtype), maximum.to(dtype), argmax, received.to(dtype)
    logit_statistics = cast_finite(max_logit.detach(), dtype), cast_finite(lse.detach(), dtype)
    i, j = (torch.arange(size, device=key.device) for size in prob.shape[2:])
    diagonal = (prob * (i[:, None] == j)).sum(-1)
    distance = (prob * (i[:, None] - j).abs()).sum(-1)  # sum_j A_ij |i - j|
    return chosen_statistics((*weight_statistics, *logit_statistics, diagonal.to(dtype), distance.to(dtype)), asked)
