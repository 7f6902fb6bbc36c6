"""paged_attention_statistics in plain PyTorch, on any device and dtype, request by request.

The keys that one request sees of one head lie gathered at a time, in the dtype of sums; the rows of a tile are those of all query
heads that share them. The host reads lengths and query_starts, and so waits for a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._ground.groups import sums_of_groups
from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.backends.inputs import PagedAttentionStatisticsInputs
from vlattn_fast.backends.streaming import _tiles
from vlattn_fast.backends.streaming._scores import score_tile
from vlattn_fast.backends.streaming._tiles import probabilities


def forward(inputs: PagedAttentionStatisticsInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mass (T, H, G), entropy, maximum (T, H), received (R, H, M), max_logit, lse (T, H); anything for what `statistics` does not
    name."""
    query, asked = inputs.query, inputs.statistics.split()
    (tokens, heads, _), dtype, key_heads = query.shape, compute_dtype(query), inputs.key_cache.shape[1]
    room = inputs.block_table.shape[1] * inputs.key_cache.shape[2]
    mass = query.new_zeros(tokens, heads, inputs.num_groups, dtype=dtype)
    entropy, maximum = (query.new_zeros(tokens, heads, dtype=dtype) for _ in range(2))
    received = query.new_zeros(inputs.lengths.shape[0], heads, room if "received" in asked else 0, dtype=dtype)
    max_logit = query.new_full((tokens, heads), -torch.inf, dtype=dtype)
    starts = inputs.query_starts.tolist()
    for r, length in enumerate(inputs.lengths.tolist()):
        first, end = max(0, starts[r]), min(starts[r + 1], tokens)
        ahead = length - starts[r + 1]  # from a token's number to its position
        low = max(0, first + ahead - inputs.window + 1) if inputs.window else 0
        high = min(end + ahead, room)
        if first >= end or low >= high:
            continue
        groups, is_key = _groups(inputs, r, low, high), _is_key(inputs, r, low, high)
        for key_head in range(key_heads):
            key = _keys(inputs, r, low, high, key_head)
            h = slice(key_head * heads // key_heads, (key_head + 1) * heads // key_heads)
            step = max(1, _tiles.tile_elements(query) // ((high - low) * max(1, heads // key_heads)))
            for start in range(first, end, step):
                i = slice(start, min(start + step, end))
                visible = _visible(i, ahead, low, is_key, inputs.window)
                logits = _scores(inputs, query[i, h].to(dtype), key).masked_fill(~visible, -torch.inf)  # (h, i, M)
                prob = probabilities(logits, dtype)
                entropy[i, h] = torch.special.entr(prob).sum(-1).mT
                maximum[i, h] = prob.amax(-1).mT
                max_logit[i, h] = logits.amax(-1).mT
                if groups is not None:
                    sums = sums_of_groups(prob.flatten(0, 1).mT[None, None], groups, inputs.num_groups)
                    mass[i, h] = sums[0, 0].mT.unflatten(0, prob.shape[:2]).transpose(0, 1)
                if "received" in asked:
                    received[r, h, low:high] += torch.where(visible, prob, 0.0).sum(1)
    lse = torch.where(torch.isneginf(max_logit), max_logit, max_logit - maximum.log())
    return mass, entropy, maximum, received, max_logit, lse


def _scores(inputs: PagedAttentionStatisticsInputs, query: Tensor, key: Tensor) -> Tensor:
    """The scores (h, i, M) of tokens (i, h, D) with keys (M, D)."""
    rows = query.transpose(0, 1).flatten(0, 1)
    scores = score_tile(inputs.score, rows[None, None], key[None, None], None, inputs.parameter)[0, 0]
    return (scores * inputs.scale).unflatten(0, (query.shape[1], query.shape[0]))


def _keys(inputs: PagedAttentionStatisticsInputs, r: int, low: int, high: int, key_head: int) -> Tensor:
    """The keys low to high of a request, (high - low, D)."""
    blocks, _, block_size, _ = inputs.key_cache.shape
    first = low // block_size
    table = inputs.block_table[r, first : -(-high // block_size)].clamp(0, blocks - 1)
    keys = inputs.key_cache[:, key_head].index_select(0, table).flatten(0, 1)
    return keys[low - first * block_size :][: high - low].to(compute_dtype(keys))


def _is_key(inputs: PagedAttentionStatisticsInputs, r: int, low: int, high: int) -> Tensor:
    """Which of these keys lie in blocks that the cache has."""
    block = inputs.block_table[r, torch.arange(low, high, device=inputs.query.device) // inputs.key_cache.shape[2]]
    return (block >= 0) & (block < inputs.key_cache.shape[0])


def _visible(i: slice, ahead: int, low: int, is_key: Tensor, window: int) -> Tensor:
    """Which keys these queries see, (i, M)."""
    position = torch.arange(i.start + ahead, i.stop + ahead, device=is_key.device)[:, None]
    j = torch.arange(low, low + is_key.shape[0], device=is_key.device)
    visible = is_key & (j <= position)
    return visible & (j > position - window) if window else visible


def _groups(inputs: PagedAttentionStatisticsInputs, r: int, low: int, high: int) -> Tensor | None:
    """The groups of these keys, (1, high - low); None if no mass is asked for."""
    if inputs.key_groups is None or inputs.num_groups == 0:
        return None
    groups = inputs.key_groups[r, low:high].long()
    return F.pad(groups, (0, high - low - groups.shape[0]), value=-1)[None]
