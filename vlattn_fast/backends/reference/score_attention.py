"""softmax(scale * score(q, k) + mask) v: the formula of each score function is in its class (vlattn_fast/scores/).

Shapes: B batch, H heads, N queries, M keys, D head_dim; query (B, H, N, Dq), key (B, Hkv, M, Dk), value (B, Hkv, M, Dv).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._ground.tensors import cast_finite, compute_dtype, expand_heads, mask_padding, product, resolve_scale
from vlattn_fast.backends.reference._softmax import attend, gated, pair_bias_of
from vlattn_fast.scores import resolve


def score_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: Any = "scaled_dot",
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    softcap: float | None = None,
    sink: Tensor | None = None,
    query_groups: Tensor | None = None,
    key_groups: Tensor | None = None,
    group_bias: Tensor | None = None,
    head_gate: Tensor | None = None,
) -> Any:
    """Computes the formula of vlattn_fast.score_attention; the same arguments and shapes, without `backend`."""
    score = resolve(score)
    padded = *mask_padding(key_mask, key, fill=score.masked_key), *mask_padding(key_mask, value)
    key, value = (expand_heads(x, query.shape[1]) for x in padded)
    logits = resolve_scale(scale, score.default_scale(query.shape[-1])) * score.formula(query, key)
    prob, lse = attend(logits, attn_mask, key_mask, is_causal, softcap, sink, pair_bias_of(group_bias, query_groups, key_groups))
    out = gated(product(F.dropout(prob, dropout_p), value), head_gate)
    return (out, cast_finite(lse, compute_dtype(query))) if return_lse else out
