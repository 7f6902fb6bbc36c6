"""Statistics of attention over paged keys, gathered: the formula."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Results(NamedTuple):
    mass: Tensor
    entropy: Tensor
    maximum: Tensor
    received: Tensor


def paged_attention_statistics(
    query: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    *,
    key_groups: Tensor | None,
    num_groups: int,
    statistics: Any,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Results:
    size, heads = key_cache.shape[2], query.shape[1]
    out = [[], [], [], []]
    most = block_table.shape[1] * size
    for r, length in enumerate(lengths.tolist()):
        q = query[query_starts[r] : query_starts[r + 1]].float().transpose(0, 1)
        k = key_cache[block_table[r, : -(-length // size)].long()].transpose(1, 2).flatten(0, 1)[:length].float().transpose(0, 1)
        logits = scale * q @ k.repeat_interleave(heads // k.shape[0], 0).mT
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        at = torch.arange(length - q.shape[1], length)[:, None] - torch.arange(length)
        seen = (at >= 0) & (at < (window or length))
        a = logits.masked_fill(~seen, -torch.inf).softmax(-1).transpose(0, 1)  # (N, H, M)
        if key_groups is not None:
            groups = torch.full((length,), -1)
            groups[: key_groups.shape[1]] = key_groups[r, :length].long()
            out[0].append(torch.stack([a[..., groups == g].sum(-1) for g in range(num_groups)], -1))
        out[1].append(-torch.special.xlogy(a, a).sum(-1))
        out[2].append(a.amax(-1))
        out[3].append(torch.nn.functional.pad(a.sum(0), (0, most - length)))
    mass, entropy, maximum = (torch.cat(part) if part else None for part in out[:3])
    return Results(mass, entropy, maximum, torch.stack(out[3]))
