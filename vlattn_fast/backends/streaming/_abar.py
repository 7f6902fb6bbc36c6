"""One tile of Abar, the map A or relu(A * dA) reduced over the heads, for relevancy and attention maps."""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.backends.streaming._scores import score_tile
from vlattn_fast.backends.streaming._tiles import Masks, Tiling, probabilities


def abar_tile(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grad_output: Tensor | None,
    lse: Tensor | None,
    masks: Masks,
    rule: str,
    row_normalize: bool,
    scale: float,
    b: slice,
    i: slice,
    head_reduction: str = "mean",
    score: str = "dot",
    vector: Tensor | None = None,
    parameter: float = 0.0,
) -> Tensor:
    """Rows i of Abar of the samples b, (b, i, M). Key and value have query's heads; lse (B, H, N) as in `probabilities`.

    rule "attention": A; "gradient": relu(A * dA), dA = grad_output @ value^T. row_normalize divides each row by its sum; a
    zero row stays zero. score, vector, parameter: the core score, as in score_attention.
    """
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    dtype = compute_dtype(query)
    abar: Tensor | None = None
    for h in Tiling(*shape).heads():
        q, k = query[b, h, i].to(dtype), key[b, h].to(dtype)
        if score == "dot":
            tile = (q * scale) @ k.mT
        else:
            tile = score_tile(score, q, k, None if vector is None else vector[h].to(dtype), parameter) * scale
        logits = masks.apply(tile, shape, b, h, i)
        tile = probabilities(logits, dtype, None if lse is None else lse[b, h, i].to(dtype))
        if rule == "gradient":
            assert value is not None and grad_output is not None
            tile = tile.mul_(grad_output[b, h, i].to(dtype) @ value[b, h].to(dtype).mT).clamp_min_(0.0)
        if head_reduction == "mean":
            tile = tile[:, 0] if tile.shape[1] == 1 else tile.sum(1)
            abar = tile if abar is None else abar.add_(tile)
        else:
            reduce, combine = (torch.amax, torch.maximum) if head_reduction == "max" else (torch.amin, torch.minimum)
            tile = reduce(tile, 1)
            abar = tile if abar is None else combine(abar, tile)
    if abar is None:  # no heads
        return query.new_zeros((b.stop - b.start, i.stop - i.start, key.shape[2]), dtype=dtype)
    if head_reduction == "mean" and not row_normalize:
        abar = abar.mul_(1.0 / shape[1])
    if row_normalize:
        total = abar.sum(-1, keepdim=True)
        abar = abar / torch.where(total == 0, 1.0, total)
    return abar
