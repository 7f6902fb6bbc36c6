"""Tokens that receive attention without content, found in each attention call.

They are tokens of the input. A learned sink is not one of them: it is one more logit of a head's softmax, see `ops/_sinks.py`.

A is the attention of one call with H heads, v_hj the value of key j in head h. Each call is judged separately:

    a_j = sum_i mean_h A_hij / (number of queries i that attend to j)     the attention that j receives
    n_j = sqrt(mean_h |v_hj|^2)                                     the norm of its values
    j is such a token if a_j >= TIMES * median_k a_k and n_j <= NORM * median_k n_k

a_j is the importance score of Gu et al. (ICLR 2025, arXiv 2410.10781) as a mean over the heads. Attention adds A_hij v_hj to
query i, so a token with small values adds little, however much attention it receives (Kobayashi et al., EMNLP 2020, arXiv
2004.10102).
The medians are over the tokens that some query attends to, and padding queries do not count. It takes a pass of the attention
and O(N) memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.traced_call import Recursion, TracedCall
from vlattn_fast.interpret.relevancy.tracking.token_positions import Moved

CHOICES = KEEP, REMOVE = "keep", "remove"
REPORT = "report"  # of `find_sinks`, which makes no map
TIMES, NORM = 5.0, 0.8


class Findings(NamedTuple):
    """The findings of one call about its N keys that are tokens."""

    layer: int  # its number; a pooling head has the next one
    shares: Tensor  # (B, N), of the call's attention
    norms: Tensor  # (B, N), of the values, over their median
    sinks: Tensor  # bool (B, N)
    token_positions: Moved | None  # the positions of the keys, unless they are all of the tower's, in order


def without_sinks(sinks: str, tower: TowerTrace, call: TracedCall) -> tuple[TracedCall, Findings]:
    """A call from the tokens of `tower` without the keys that `sinks` says to remove, and what was found about its keys."""
    if call.part:
        raise refused(sinks, call, call.part)
    real = tower.attended
    if real is not None and (real.shape != (call.query.shape[0], call.query.shape[2]) or call.token_positions is not None):
        real = None
    found = judge(call, real, tower.layer + tower.pooled)
    removes = sinks == REMOVE and bool(found.sinks.any())
    return replace(call, left_out=call.over_keys(found.sinks, False)) if removes else call, found


def refused(sinks: str, call: TracedCall, why: str) -> ValueError:
    """The error for models in which a call is not of whole maps."""
    asked = f"sinks must be {KEEP!r} for models" if sinks == REMOVE else "find_sinks does not support models"
    return ValueError(f"{asked} in which {why}; got attention '{call.path}'")


@torch.no_grad()
def judge(call: TracedCall, real: Tensor | None, layer: int) -> Findings:
    """The findings of a call about its keys. real: bool (B, N), False = a query that is padding; None = none is."""
    batch, _, queries, _ = call.query.shape
    counted = torch.ones(batch, queries, dtype=compute_dtype(call.query), device=call.query.device)
    counted = counted if real is None else counted * real.to(counted)
    received = call.step(counted[:, None], None, Recursion("attention"))[:, 0]
    attending = call.at_tokens(_attending_queries(call, counted, real))
    norms = call.at_tokens(call.value.to(counted.dtype).square().sum(-1).mean(1).sqrt())
    attention, visible = received / attending.clamp(min=1), attending > 0
    relative = norms / _median(norms, visible).clamp(min=torch.finfo(norms.dtype).tiny)
    sinks = visible & (attention > 0) & (attention >= TIMES * _median(attention, visible)) & (relative <= NORM)
    return Findings(layer, received / counted.sum(-1, keepdim=True).clamp(min=1), relative, sinks, call.token_positions)


def _median(values: Tensor, chosen: Tensor) -> Tensor:
    """(B, 1), the lower median of the chosen values (B, N); 0 if none is."""
    return values.masked_fill(~chosen, torch.nan).nanmedian(-1, keepdim=True).values.nan_to_num(0.0)


def _attending_queries(call: TracedCall, counted: Tensor, real: Tensor | None) -> Tensor:
    """(B, M), how many of the queries, 1 in `counted` (B, N), attend to each key; the mean over heads if the mask differs from
    head to head."""
    count, masks = call.key.shape[2], call.masks
    mask, is_causal, keys = masks["attn_mask"], masks["is_causal"], masks.get("key_mask")
    if mask is not None:
        visible = mask[(None,) * (4 - mask.ndim)]
        if mask.dtype != torch.bool:  # some models hide a key by -10000, at which the softmax is zero, too
            hidden = (visible.amax(-1, keepdim=True) - 1000.0).clamp(min=torch.finfo(mask.dtype).min / 2)
            visible = visible > hidden
        visible = visible.expand(-1, -1, counted.shape[1], count)
        visible = visible if real is None else visible & real[:, None, :, None].to(visible.device)
        counts = (visible.tril() if is_causal else visible).sum(2).to(counted).mean(1)
    elif is_causal:  # query j and later ones attend to key j
        counts = functional.pad(counted.flip(1).cumsum(1).flip(1), (0, count - counted.shape[1]))
    else:
        counts = counted.sum(1, keepdim=True).expand(-1, count)
    return counts if keys is None else counts * keys.to(counts)
