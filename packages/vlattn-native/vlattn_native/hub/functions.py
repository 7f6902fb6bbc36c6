"""Attention with any score function, relevancy, maps and statistics of attention, and losses on it.

No function holds an N x M map per head, forward or backward, but `attention_map`, which gives the map reduced over the heads.
B batch, H query heads, Hkv heads of key and value (Hkv divides H), N queries, M keys, D head_dim, Dv value_dim, T carried rows.
Everywhere: query (B, H, N, D), key (B, Hkv, M, D), value (B, Hkv, M, Dv) in float16, bfloat16 or float32 with D <= 256; attn_mask
bool (True = may attend) or float (added), broadcastable to (B, H, N, M); key_mask bool (B, M), True = a real token; is_causal:
query i sees keys j <= i; scale multiplies the score, default 1/sqrt(D). A row without visible keys gives zeros, lse -inf.

All functions are differentiable once, in every floating tensor but attn_mask. On GPUs of compute capability 8.0 or more the
kernels are Triton's, and no device has run this version. On CPUs they are C++ behind torch's stable ABI.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_attention, check_choice, check_masks
from vlattn_fast._ground.score_kinds import UNIT_KINDS, in_kernels
from vlattn_fast.backends.inputs import (
    Attention,
    AttentionMapInputs,
    AttentionStatisticsInputs,
    CongruenceLossInputs,
    RelevancyAttentionInputs,
    RelevancyStepInputs,
    ScoreAttentionInputs,
)
from vlattn_fast.backends.reference.congruence_loss import DIRECTIONS, KINDS, NORMALIZATIONS, block_inputs
from vlattn_native.hub.operators import STATISTICS, congruence_op, map_op, relevancy_op, score_op, statistics_op, step_op
from vlattn_native.hub.triton_kernels import BACKEND, check_device

__all__ = ["attention_map", "attention_statistics", "congruence_loss", "relevancy_attention", "relevancy_step", "score_attention"]
SCORES = in_kernels(BACKEND)


def score_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: str = "dot",
    vector: Tensor | None = None,
    parameter: float = 0.0,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv) and the natural log-sum-exp of the rows (B, H, N).

    score: of SCORES. "dot_*" is the activation of q . k (`parameter`: the slope of leaky_relu), "dot_softcap" tanh(parameter
    q . k), "cosine" q . k / max(|q| |k|, parameter), "additive" vector . tanh(q + k), "hadamard_*" vector . act(q * k), with
    vector (H, D). The projections of a learned score go into query and key before. scale: default 1/sqrt(D) for "dot", else 1.
    """
    _check(query, key, attn_mask, key_mask, is_causal, value=value)
    check_choice("score", score, SCORES)
    if (vector is not None) != (score in UNIT_KINDS):
        raise ValueError(f"vector must be (H, D) for {', '.join(UNIT_KINDS)}, and None for others; got {score!r}")
    if scale is None:
        scale = _scale(query) if score == "dot" else 1.0
    attention = Attention(query, key, vector, attn_mask, key_mask, None, None, score, parameter, float(scale), is_causal)
    seed = torch.randint(0, 2**62, (), device=query.device) if dropout_p > 0.0 else None
    out, lse = score_op(ScoreAttentionInputs(attention, value, seed, None, float(dropout_p), BACKEND))
    return out, lse.float()


def relevancy_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    carrier: Tensor,
    *,
    rule: str = "gradient",
    row_normalize: bool = False,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Self-attention out (B, H, N, Dv), and a copy of the float32 carrier (B, T, N), whose cotangent r becomes r + r Abar.

    Abar = mean_h relu(A * dA) with dA = grad_out @ value^T (rule "gradient"), or mean_h A ("attention"). row_normalize: each row
    of Abar divided by its sum. So one backward pass through a model carries relevancy from its outputs to its inputs.
    """
    _check(query, key, attn_mask, key_mask, is_causal, value=value)
    check_choice("rule", rule, ("gradient", "attention"))
    attention = _attention(query, key, attn_mask, key_mask, scale, is_causal)
    inputs = RelevancyAttentionInputs(attention, value, carrier, None, None, None, rule, row_normalize, BACKEND)
    out, carried, _, _ = relevancy_op(inputs)
    return out, carried


def relevancy_step(
    relevancy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    grad_output: Tensor | None = None,
    *,
    rule: str = "gradient",
    row_normalize: bool = False,
    lse: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """relevancy (B, T, N) @ Abar -> (B, T, M) behind any attention, Abar as in `relevancy_attention`; value and the attention
    output's gradient grad_output (B, H, N, Dv) for rule "gradient". lse: (B, H, N) of the attention, computed anew without it; a
    detached one counts as computed from query and key."""
    _check(query, key, attn_mask, key_mask, is_causal, **({} if value is None else {"value": value}))
    check_choice("rule", rule, ("gradient", "attention"))
    if rule == "gradient" and (value is None or grad_output is None):
        raise ValueError("value and grad_output must be tensors for rule='gradient'; got None")
    if rule == "attention":  # it reads neither
        value = grad_output = None
    attention = _attention(query, key, attn_mask, key_mask, scale, is_causal)
    return step_op(RelevancyStepInputs(relevancy, attention, value, grad_output, lse, rule, row_normalize, BACKEND))


def attention_map(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    grad_output: Tensor | None = None,
    *,
    rule: str = "attention",
    head_reduction: str = "mean",
    row_normalize: bool = False,
    lse: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """A or relu(A * dA), reduced over the heads by "mean", "max" or "min": (B, N, M) float32. lse: as in relevancy_step."""
    _check(query, key, attn_mask, key_mask, is_causal, **({} if value is None else {"value": value}))
    check_choice("rule", rule, ("attention", "gradient"))
    check_choice("head_reduction", head_reduction, ("mean", "max", "min"))
    if (rule == "gradient") != (value is not None and grad_output is not None):
        raise ValueError(f"value and grad_output must be tensors for rule='gradient' alone; got rule={rule!r}")
    attention = _attention(query, key, attn_mask, key_mask, scale, is_causal)
    return map_op(AttentionMapInputs(attention, value, grad_output, lse, rule, head_reduction, row_normalize, BACKEND))


def attention_statistics(
    query: Tensor,
    key: Tensor,
    *,
    key_groups: Tensor | None = None,
    num_groups: int = 0,
    row_weight: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mass (B, H, N, G) by groups of keys, entropy, largest weight and its key (B, H, N), and what each key receives (B, H, M).

    key_groups: int64 (B, M), -1 = none. row_weight: float32 (B, N), of each query in what the keys receive. The key of the
    largest weight has no gradient.
    """
    _check(query, key, attn_mask, key_mask, is_causal)
    if row_weight is not None:
        row_weight = row_weight[:, None].expand(query.shape[:3])
    attention = _attention(query, key, attn_mask, key_mask, scale, is_causal)._replace(key_groups=key_groups)
    outputs = statistics_op(AttentionStatisticsInputs(attention, row_weight, num_groups, " ".join(STATISTICS), BACKEND))
    return tuple(outputs[:5])


def congruence_loss(
    text: tuple[Tensor, Tensor],
    image: tuple[Tensor, Tensor],
    cross: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    *,
    kind: str = "cacr",
    normalize: str = "softmax",
    direction: str = "both",
    text_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The loss of each sample (B) that compares the attention within a modality with what the other one implies for it.

    text, image: (query, key) of L and of V tokens, each (B, H, L or V, D). cross: ((text query, image key), (image query, text
    key)), default those of text and image. kind: "cacr", "iais_singular" or "iais_distributed"; normalize: "softmax" or "none";
    direction: "text", "image" or "both". Masks bool (B, L), (B, V).
    """
    check_choice("kind", kind, KINDS)
    check_choice("normalize", normalize, NORMALIZATIONS)
    check_choice("direction", direction, DIRECTIONS)
    check_device(text[0])
    queries, keys = block_inputs(text, image, cross, None, None)  # the kernels mask padding
    saves = BACKEND == "cpu" and torch.is_grad_enabled() and any([x.requires_grad for x in (*queries, *keys)])
    blocks = *queries, *keys, text_mask, image_mask
    loss, _ = congruence_op(CongruenceLossInputs(*blocks, kind, normalize, direction, _scale(text[0], scale), saves, BACKEND))
    return loss


def _scale(query: Tensor, scale: float | None = None) -> float:
    return 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else float(scale)


def _attention(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, key_mask: Tensor | None, scale: float | None, is_causal: bool
) -> Attention:
    return Attention(query, key, None, attn_mask, key_mask, scale=_scale(query, scale), is_causal=is_causal)


def _check(query: Any, key: Any, attn_mask: Any, key_mask: Any, is_causal: Any, **tensors: Any) -> None:
    check_attention(query, key, True, **tensors)
    check_masks(query, key, attn_mask, key_mask, is_causal)
    if query.dtype == torch.float64 or max(query.shape[3], key.shape[3]) > 256:
        raise ValueError(f"query must be float16, bfloat16 or float32 with a head_dim of at most 256; got {query.dtype}")
    check_device(query)
