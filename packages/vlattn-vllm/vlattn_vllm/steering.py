"""Edited attention of one request, computed again with its keys and values, in the place of the engine's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vlattn_vllm.ask import Edit, Span

_AT_ONCE = 1 << 24  # logits; a prompt is split into pieces of its queries


def edited_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    edits: Sequence[Edit],
    *,
    start: int,
    first_key: int,
    first_head: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    counted_from: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs (queries, heads, D), weights of the last query (heads, keys), weights added over queries (heads, keys)).

    query: (queries, heads, D) of the positions from `start`; keys, values: (keys, key heads, D) of those from `first_key`.
    edits: those of this layer. first_head: the number of the first head here. counted_from: the first query that is added.
    """
    heads, shared = query.shape[1], query.shape[1] // keys.shape[1]
    keys, values = (each.float().repeat_interleave(shared, 1).transpose(0, 1) for each in (keys, values))
    seen_at = torch.arange(first_key, first_key + keys.shape[1], device=query.device)
    numbers = torch.arange(first_head, first_head + heads)
    added = query.new_zeros(heads, len(seen_at), dtype=torch.float32)
    pieces, weights = [], added
    step = max(1, _AT_ONCE // (heads * len(seen_at)))
    for begin in range(0, len(query), step):
        some = query[begin : begin + step].float().transpose(0, 1)
        at = torch.arange(start + begin, start + begin + some.shape[1], device=query.device)
        logits = some @ keys.mT * scale
        if softcap is not None:
            logits = (logits / softcap).tanh() * softcap
        for edit in edits:
            of_head = torch.isin(numbers, torch.tensor(edit.heads)).to(query.device)
            edge = of_head[:, None, None] & inside(edit.queries, at)[:, None] & inside(edit.keys, seen_at)
            logits = torch.where(edge, logits + math.log(edit.weight) if edit.weight else -torch.inf, logits)
        hidden = seen_at > at[:, None]
        if window is not None:
            hidden |= seen_at <= at[:, None] - window
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)  # a query without keys gives zeros
        pieces.append((weights @ values).transpose(0, 1))
        added += weights[:, max(0, counted_from - begin) :].sum(1)
    return torch.cat(pieces).to(query.dtype), weights[:, -1], added


def inside(spans: Sequence[Span], positions: Tensor) -> Tensor:
    """Whether each position lies in one of the spans."""
    within = torch.zeros_like(positions, dtype=torch.bool)
    for start, end in spans:
        within |= (positions >= start) & (positions < (math.inf if end is None else end))
    return within
