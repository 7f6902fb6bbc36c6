"""The statistics of attention maps (reference/attention_statistics.py) over keys that lie in a paged cache.

A paged cache: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023, eq. 4.
Shapes: T query tokens of R requests, H heads, D head_dim, G groups of keys; M = W * block size keys, for which a request's W
numbers of blocks have room.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._ground.checks import check_names
from vlattn_fast._ground.tensors import compute_dtype, expand_heads, product, resolve_scale, scaled_dot_default
from vlattn_fast.backends.reference._softmax import attend
from vlattn_fast.backends.reference.attention_statistics import attention_statistics


class PagedAttentionStatistics(NamedTuple):
    """Holds statistics of the attention of each token, float32 (float64 for float64 input). None = not asked for."""

    mass: Tensor
    """(T, H, G): the attention of a query on each group of keys."""
    entropy: Tensor
    """(T, H): the entropy of a query's attention in nats."""
    maximum: Tensor
    """(T, H): the largest weight of a query."""
    received: Tensor
    """(R, H, M): the attention that a key receives from its request's queries; 0 from the request's length on."""
    max_logit: Tensor
    """(T, H): the largest logit, after the softcap; -inf for a query without a visible key."""
    lse: Tensor
    """(T, H): the natural log-sum-exp of the logits; -inf for a query without a visible key."""
    diagonal: Tensor
    """(T, H): the attention of a query on the key of its own position."""


STATISTICS = PagedAttentionStatistics._fields
DEFAULT = STATISTICS[:4]


def chosen_statistics(values: Iterable[Tensor | None], names: Collection[str]) -> PagedAttentionStatistics:
    """Returns the statistics with these `names`; None for the others."""
    return PagedAttentionStatistics(*[x if name in names else None for name, x in zip(STATISTICS, values, strict=True)])  # type: ignore[arg-type]


def paged_attention_statistics(
    query: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    *,
    statistics: Collection[str] | None = None,
    key_groups: Tensor | None = None,
    num_groups: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> PagedAttentionStatistics:
    """Computes the formulas of vlattn_fast.paged_attention_statistics; the same arguments and shapes, without `backend`.

    All R * M keys are those of one call of attention_statistics, whose mask lets each token attend only to its own request.
    """
    asked = DEFAULT if statistics is None else check_names("statistics", statistics, STATISTICS)
    scale = resolve_scale(scale, scaled_dot_default(query.shape[-1]))
    tokens, (blocks, _, block_size, _) = query.shape[0], key_cache.shape

    is_block = (block_table >= 0) & (block_table < blocks)
    gathered = key_cache[torch.where(is_block, block_table, 0).long()]  # (R, W, Hkv, block size, D)
    keys = gathered.permute(2, 0, 1, 3, 4).flatten(1, 3)  # (Hkv, R * M, D)
    is_key = is_block.repeat_interleave(block_size, 1)  # (R, M)

    token, j = (torch.arange(size, device=query.device) for size in (tokens, is_key.shape[1]))
    starts, ends = query_starts[:-1], query_starts[1:]
    is_request = (starts <= token[:, None]) & (token[:, None] < ends)  # (T, R)
    position = (lengths - ends + token[:, None])[..., None]  # (T, R, 1), of a query among its request's keys
    visible = is_request[..., None] & is_key & (j <= position)  # (T, R, M)
    if window is not None:
        visible = visible & (j > position - window)

    if key_groups is None:
        groups = None
    else:
        if num_groups is None:
            num_groups = int(key_groups.max()) + 1 if key_groups.numel() else 0
        groups = F.pad(key_groups.long(), (0, is_key.shape[1] - key_groups.shape[1]), value=-1).flatten()  # (R * M)
    query, keys, mask = query.transpose(0, 1)[None], expand_heads(keys[None], query.shape[1]), visible.flatten(1)
    statistics_of_rows = attention_statistics(
        query,
        keys,
        statistics=("mass", "entropy", "maximum", "max_logit", "lse"),
        key_groups=groups,
        num_groups=num_groups,
        attn_mask=mask,
        scale=scale,
        softcap=softcap,
    )
    prob, _ = attend(scale * product(query, keys.mT), mask, softcap=softcap)  # A (1, H, T, R * M)
    received = torch.where(mask, prob, 0.0).sum(2).to(compute_dtype(query))  # NaN in a query does not reach what it does not see
    named = {name: x[0].transpose(0, 1) for name, x in statistics_of_rows._asdict().items() if x is not None}  # (T, H, ...)
    own = is_request[..., None] & (j == position)
    named["diagonal"] = (prob[0] * own.flatten(1)).sum(-1).to(compute_dtype(query)).transpose(0, 1)
    named["received"] = received[0].unflatten(1, is_key.shape).transpose(0, 1)  # (R, H, M)
    return chosen_statistics([named[name].contiguous() for name in STATISTICS], asked)
