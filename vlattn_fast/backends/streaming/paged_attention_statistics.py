"""paged_attention_statistics in plain PyTorch, on any device and dtype, request by request.

The keys that some heads of one request see lie gathered at a time, as many as fill a tile, or those of one head. The host reads
lengths and query_starts, and so waits for a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._ground.groups import sums_of_groups
from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.backends.inputs import PagedAttentionStatisticsInputs
from vlattn_fast.backends.streaming import _tiles
from vlattn_fast.backends.streaming._tiles import Masks, probabilities
from vlattn_fast.backends.streaming.score_attention import logit_tiles


def forward(inputs: PagedAttentionStatisticsInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mass (T, H, G), entropy, maximum (T, H), received (R, H, M), max_logit, lse (T, H); anything for what `statistics` does not
    name."""
    query, asked = inputs.query, inputs.statistics.split()
    (tokens, heads, size), dtype = query.shape, compute_dtype(query)
    room = inputs.block_table.shape[1] * inputs.key_cache.shape[2]
    mass = query.new_zeros(tokens, heads, inputs.num_groups, dtype=dtype)
    entropy, maximum = (query.new_zeros(tokens, heads, dtype=dtype) for _ in range(2))
    received = query.new_zeros(inputs.lengths.shape[0], heads, room if "received" in asked else 0, dtype=dtype)
    max_logit = query.new_full((tokens, heads), -torch.inf, dtype=dtype)
    starts = inputs.query_starts.tolist()
    for r, length in enumerate(inputs.lengths.tolist()):
        first, end = max(0, starts[r]), min(starts[r + 1], tokens)
        ahead = length - starts[r + 1]  # of a token's number its position is
        low = max(0, first + ahead - inputs.window + 1) if inputs.window else 0
        high = min(end + ahead, room)
        if first >= end or low >= high:
            continue
        step_i = max(1, min(end - first, _tiles.TILE_ELEMENTS // (high - low)))
        step_h = max(1, _tiles.TILE_ELEMENTS // ((high - low) * max(step_i, size)))
        groups = _groups(inputs, r, low, high)
        for start_h in range(0, heads, step_h):
            h = slice(start_h, min(start_h + step_h, heads))
            key, is_key = _keys(inputs, r, low, high, h)
            for start in range(first, end, step_i):
                i = slice(start, min(start + step_i, end))
                visible = _visible(i, ahead, low, is_key, inputs.window)
                masks = Masks(visible, None, None, None, False)
                rows = query[i, h].transpose(0, 1)[None]
                how = inputs.score, inputs.parameter, inputs.scale
                for _, part_h, part_i, logits in logit_tiles(rows, key, None, masks, *how):
                    place = _part(i, part_i), _part(h, part_h)
                    prob = probabilities(logits, dtype)[0]  # (h, i, M)
                    entropy[place] = torch.special.entr(prob).sum(-1).mT
                    maximum[place] = prob.amax(-1).mT
                    max_logit[place] = logits[0].amax(-1).mT
                    if groups is not None:
                        mass[place] = sums_of_groups(prob.mT[None], groups, inputs.num_groups)[0].permute(2, 0, 1)
                    if "received" in asked:
                        received[r, place[1], low:high] += torch.where(visible[part_i], prob, 0.0).sum(1)
    lse = torch.where(torch.isneginf(max_logit), max_logit, max_logit - maximum.log())
    return mass, entropy, maximum, received, max_logit, lse


def _part(whole: slice, part: slice) -> slice:
    return slice(whole.start + part.start, whole.start + part.stop)


def _keys(inputs: PagedAttentionStatisticsInputs, r: int, low: int, high: int, h: slice) -> tuple[Tensor, Tensor]:
    """The keys low to high of a request for these query heads, (1, h, high - low, D), and which of them are keys: those in blocks
    that the cache has."""
    blocks, key_heads, block_size, _ = inputs.key_cache.shape
    o_h = torch.arange(h.start, h.stop, device=inputs.query.device) // (inputs.query.shape[1] // key_heads)
    o_kv = torch.arange(low, high, device=inputs.query.device)
    block = inputs.block_table[r, o_kv // block_size].long()
    is_key = (block >= 0) & (block < blocks)
    return inputs.key_cache[torch.where(is_key, block, 0), o_h[:, None], o_kv % block_size][None], is_key


def _visible(i: slice, ahead: int, low: int, is_key: Tensor, window: int) -> Tensor:
    """Which keys these queries see, (i, M)."""
    position = torch.arange(i.start + ahead, i.stop + ahead, device=is_key.device)[:, None]
    j = torch.arange(low, low + is_key.shape[0], device=is_key.device)
    visible = is_key & (j <= position)
    return visible & (j > position - window) if window else visible


def _groups(inputs: PagedAttentionStatisticsInputs, r: int, low: int, high: int) -> Tensor | None:
    """The groups of these keys, (1, high - low); None where no mass is asked for."""
    if inputs.key_groups is None or inputs.num_groups == 0:
        return None
    groups = inputs.key_groups[r, low:high].long()
    return F.pad(groups, (0, high - low - groups.shape[0]), value=-1)[None]
