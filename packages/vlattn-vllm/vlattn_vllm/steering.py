"""Edited attention of one request, computed again with its keys and values, in the place of the engine's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vlattn_vllm.ask import Edit, groups_of_sets

_AT_ONCE = 1 << 24  # logits; a prompt is split into pieces of its queries


class Edits:
    """The edits of a request, as one bias for each pair of groups of tokens: so their number does not matter.

    Args:
        tokens: positions that the request can have, at the most.
        heads: numbers of the heads here.
    """

    def __init__(self, edits: Sequence[Edit], tokens: int, heads: range) -> None:
        self.layers = frozenset(layer for edit in edits for layer in edit.layers)
        self._layers = [edit.layers for edit in edits]
        sides = [edit.queries for edit in edits], [edit.keys for edit in edits]
        (self.queries, queries), (self.keys, keys) = (groups_of_sets(sets, tokens) for sets in sides)
        self._pairs = (queries[:, :, None] & keys[:, None]).float()  # (edits, query groups, key groups)
        self._heads = torch.tensor([[head in edit.heads for head in heads] for edit in edits]).float()
        self._cuts = torch.tensor([edit.weight == 0 for edit in edits])
        self._logs = torch.tensor([0.0 if edit.weight == 0 else math.log(edit.weight) for edit in edits])
        self._bias: dict[tuple[bool, ...], Tensor] = {}

    def bias(self, layer: int) -> Tensor:
        """(heads here, query groups, key groups) float32, which is added to the logits of a layer."""
        here = tuple(layer in layers for layers in self._layers)
        if here not in self._bias:
            some = torch.tensor(here)
            bias = torch.einsum("eh,eqk->hqk", self._heads[some], self._pairs[some] * self._logs[some, None, None])
            cut = torch.einsum("eh,eqk->hqk", *(part[some & self._cuts] for part in (self._heads, self._pairs))) > 0
            self._bias[here] = bias.masked_fill(cut, -torch.inf)
        return self._bias[here]


def edited_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    query_groups: Tensor,
    key_groups: Tensor,
    *,
    start: int,
    first_key: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    counted_from: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs (queries, heads, D), weights of the last query (heads, keys), weights added over queries (heads, keys)).

    query: (queries, heads, D) of the positions from `start`; keys, values: (keys, key heads, D) of those from `first_key`.
    bias, query_groups, key_groups: of `Edits`, for these heads, queries and keys. counted_from: the first query that is added.
    """
    heads, shared = query.shape[1], query.shape[1] // keys.shape[1]
    keys, values = (each.float().repeat_interleave(shared, 1).transpose(0, 1) for each in (keys, values))
    seen_at = torch.arange(first_key, first_key + keys.shape[1], device=query.device)
    added = query.new_zeros(heads, len(seen_at), dtype=torch.float32)
    pieces, weights = [], added
    step = max(1, _AT_ONCE // (heads * len(seen_at)))
    for begin in range(0, len(query), step):
        some = query[begin : begin + step].float().transpose(0, 1)
        at = torch.arange(start + begin, start + begin + some.shape[1], device=query.device)
        logits = some @ keys.mT * scale
        if softcap is not None:
            logits = (logits / softcap).tanh() * softcap
        logits += bias[:, query_groups[begin : begin + step]][:, :, key_groups]
        hidden = seen_at > at[:, None]
        if window is not None:
            hidden |= seen_at <= at[:, None] - window
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)  # a query without keys gives zeros
        pieces.append((weights @ values).transpose(0, 1))
        added += weights[:, max(0, counted_from - begin) :].sum(1)
    return torch.cat(pieces).to(query.dtype), weights[:, -1], added
