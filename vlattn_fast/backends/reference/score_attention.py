"""softmax(scale * score(q, k) + mask) v with every score function written out (Cao et al., COLING 2022, Table 1).

Shapes: B batch, H heads, N queries, M keys, D head_dim; query (B, H, N, Dq), key (B, Hkv, M, Dk), value (B, Hkv, M, Dv).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast import scores
from vlattn_fast._ground.tensors import (
    cast_finite,
    compute_dtype,
    expand_heads,
    mask_padding,
    product,
    resolve_scale,
    unit_vectors,
)
from vlattn_fast.backends.reference._softmax import attend


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
) -> Any:
    """The formula behind vlattn_fast.score_attention; the same arguments and shapes, without `backend`."""
    score = scores.resolve(score)
    padded = *mask_padding(key_mask, key, fill=score.masked_key), *mask_padding(key_mask, value)
    key, value = (expand_heads(x, query.shape[1]) for x in padded)
    logits = resolve_scale(scale, score.default_scale(query.shape[-1])) * score_map(score, query, key)
    prob, lse = attend(logits, attn_mask, key_mask, is_causal, softcap, sink)
    out = product(F.dropout(prob, dropout_p), value)
    return (out, cast_finite(lse, compute_dtype(query))) if return_lse else out


def score_map(score: Any, q: Tensor, k: Tensor) -> Tensor:
    """The scores before scale and masks, (B, H, N, M)."""
    match score:
        case scores.ScaledDot() | scores.Dot():
            return product(q, k.mT)
        case scores.Cosine(eps=eps):
            return _cosine(q, k, eps)
        case scores.General(projects="key"):
            return _activate(score, product(q, _affine(score, k).mT))
        case scores.General(projects="query"):
            return _activate(score, product(_affine(score, q), k.mT))
        case scores.Additive():
            a = q if score.query_weight is None else product(q, score.query_weight.mT)
            b = k if score.key_weight is None else product(k, score.key_weight.mT)
            units = a[..., :, None, :] + b[..., None, :, :]
            if score.bias is not None:
                units = units + score.bias[..., None, None, :]
            return (torch.tanh(units) * score.vector[..., None, None, :]).sum(-1)
        case scores.Hadamard(projects=projects):
            a, b = (q, _affine(score, k)) if projects == "key" else (_affine(score, q), k)
            offset = score.offset.reshape(()) if isinstance(score.offset, Tensor) else score.offset
            units = _activate(score, a[..., :, None, :] * b[..., None, :, :])
            return (units * score.vector[..., None, None, :]).sum(-1) + offset
    raise TypeError(f"score must be a va.scores object; got {score!r}")


def _cosine(q: Tensor, k: Tensor, eps: float) -> Tensor:
    """q . k / max(|q| |k|, eps). The norms are taken in the dtype of sums: float16 would round eps to 0 and entries of 9000 to
    an infinite norm."""
    (unit_q, norm_q), (unit_k, norm_k) = unit_vectors(q, eps), unit_vectors(k, eps)
    cosine = product(unit_q.to(q.dtype), unit_k.to(k.dtype).mT)
    if eps == 0.0:
        return cosine
    norms = norm_q[..., :, None] * norm_k[..., None, :]
    clamped = (q.to(norms.dtype) @ k.to(norms.dtype).mT) / eps
    return torch.where(norms < eps, clamped.to(q.dtype), cosine)  # of an infinite vector the norms are NaN, and so is the cosine


def _affine(score: Any, x: Tensor) -> Tensor:
    y = x if score.weight is None else product(x, score.weight.mT)
    return y if score.bias is None else y + score.bias[..., None, :]


def _activate(score: Any, x: Tensor) -> Tensor:
    match score.activation:
        case "relu":
            return torch.relu(x)
        case "leaky_relu":
            return F.leaky_relu(x, score.negative_slope)
        case "tanh":
            return torch.tanh(x)
        case "sigmoid":
            return torch.sigmoid(x)
    return x
