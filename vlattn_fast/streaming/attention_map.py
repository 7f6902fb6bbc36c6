"""attention_map with no per-head map larger than a tile, in plain PyTorch, on any device and dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._tiles import Masks, Tiling, compute_dtype, expand_heads, logsumexp, probabilities

_REDUCE: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "mean": (torch.sum, torch.add),
    "max": (torch.amax, torch.maximum),
    "min": (torch.amin, torch.minimum),
}  # within a tile, and from tile to tile


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grad_output: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    rule: str,
    head_reduction: str,
    row_normalize: bool,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """Abar (B,N,M)."""
    masks, dtype = Masks(attn_mask, key_mask, is_causal), compute_dtype(query)
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    key = expand_heads(key, shape[1])
    value = None if value is None else expand_heads(value, shape[1])
    tiling, (reduce, combine) = Tiling(*shape), _REDUCE[head_reduction]
    abar = query.new_empty(shape[0], *shape[2:], dtype=dtype)
    for b, i in tiling.rows():
        reduced: Tensor | None = None
        for h in tiling.heads():
            logits = masks.apply((query[b, h, i].to(dtype) @ key[b, h].to(dtype).mT) * scale, shape, b, h, i)
            tile = probabilities(logits, logsumexp(logits))
            if rule == "gradient":
                assert value is not None and grad_output is not None
                tile = torch.relu(tile * (grad_output[b, h, i].to(dtype) @ value[b, h].to(dtype).mT))
            part = reduce(tile, 1)
            reduced = part if reduced is None else combine(reduced, part)
        assert reduced is not None
        if head_reduction == "mean":
            reduced = reduced / shape[1]
        if row_normalize:
            total = reduced.sum(-1, keepdim=True)
            reduced = reduced / torch.where(total == 0, 1.0, total)
        abar[b, i] = reduced
    return abar
