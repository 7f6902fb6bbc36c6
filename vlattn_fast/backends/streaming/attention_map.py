"""attention_map in plain PyTorch, on any device and dtype; no per-head map is larger than a tile."""

from __future__ import annotations

from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype, expand_heads
from vlattn_fast.backends.streaming._abar import abar_tile
from vlattn_fast.backends.streaming._tiles import Masks, Tiling


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grad_output: Tensor | None,
    lse: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    rule: str,
    head_reduction: str,
    row_normalize: bool,
    scale: float,
    is_causal: bool,
    score: str = "dot",
    vector: Tensor | None = None,
    parameter: float = 0.0,
) -> Tensor:
    """Abar (B, N, M); also for the other core scores of score_attention."""
    batch, num_heads, num_queries, num_keys = *query.shape[:3], key.shape[2]
    key = expand_heads(key, num_heads)
    value = None if value is None else expand_heads(value, num_heads)
    masks = Masks(attn_mask, key_mask, is_causal)
    abar = query.new_empty(batch, num_queries, num_keys, dtype=compute_dtype(query))
    tensors, core = (query, key, value, grad_output, lse), (score, vector, parameter)
    for b, i in Tiling(batch, num_heads, num_queries, num_keys).rows():
        abar[b, i] = abar_tile(*tensors, masks, rule, row_normalize, scale, b, i, head_reduction, *core)
    return abar
