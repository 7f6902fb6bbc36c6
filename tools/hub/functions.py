"""Attention with any score function, relevancy, maps and statistics of attention, and losses on it, in Triton.

No function holds an N x M map per head, forward or backward, but `attention_map`, which gives the map reduced over the heads.
B batch, H query heads, Hkv heads of key and value (Hkv divides H), N queries, M keys, D head_dim, Dv value_dim, T carried rows.
Everywhere: query (B, H, N, D), key (B, Hkv, M, D), value (B, Hkv, M, Dv) in float16, bfloat16 or float32 with D <= 256; attn_mask
bool (True = may attend) or float (added), broadcastable to (B, H, N, M); key_mask bool (B, M), True = a real token; is_causal:
query i sees keys j <= i; scale multiplies the score, default 1/sqrt(D). A row without visible keys gives zeros, lse -inf. All
functions are differentiable once, in every floating tensor but attn_mask.

GPUs need compute capability 8.0. No device has run this version.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_attention, check_choice, check_masks
from vlattn_fast._ground.tensors import as_gradient, empty_rows_first, rows_first
from vlattn_fast.backends.inputs import (
    AttentionMapBackwardInputs,
    AttentionMapInputs,
    AttentionStatisticsBackwardInputs,
    AttentionStatisticsInputs,
    CongruenceLossBackwardInputs,
    CongruenceLossInputs,
    RelevancyAttentionBackwardInputs,
    RelevancyAttentionInputs,
    RelevancyStepBackwardInputs,
    RelevancyStepInputs,
    ScoreAttentionBackwardInputs,
    ScoreAttentionInputs,
)
from vlattn_fast.backends.reference.congruence_loss import block_inputs, num_gradients
from vlattn_fast.kernels import attention_map as _map
from vlattn_fast.kernels import attention_statistics as _statistics
from vlattn_fast.kernels import congruence_loss as _congruence
from vlattn_fast.kernels import relevancy_attention as _relevancy
from vlattn_fast.kernels import score_attention as _scores
from vlattn_fast.kernels._tiles import INTERPRETED
from vlattn_fast.ops._registration import Saved, define, differentiable, once_differentiable, returned, returned_fake

__all__ = ["attention_map", "attention_statistics", "congruence_loss", "relevancy_attention", "relevancy_step", "score_attention"]
SCORES = (
    "dot",
    "dot_relu",
    "dot_leaky_relu",
    "dot_tanh",
    "dot_sigmoid",
    "dot_softcap",
    "cosine",
    "additive",
    "hadamard_tanh",
    "hadamard_sigmoid",
)


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
    if (vector is not None) != score.startswith(("additive", "hadamard")):
        raise ValueError(f"vector must be (H, D) for additive and hadamard scores, and None for others; got {score!r}")
    if scale is None:
        scale = _scale(query) if score == "dot" else 1.0
    masks: dict[str, Any] = {"attn_mask": attn_mask, "key_mask": key_mask, "is_causal": is_causal}
    options: dict[str, Any] = {
        "score": score,
        "parameter": parameter,
        "scale": float(scale),
        "dropout_p": 0.0,
        "seed": None,
        "sink": None,
        **masks,
    }
    out, lse = _score_attention(ScoreAttentionInputs(query, key, value, vector, **options, backend="triton"))
    return out, lse


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
    tensors = query, key, value, carrier, None, None, attn_mask, key_mask, None
    options = rule, row_normalize, "dot", 0.0, _scale(query, scale), is_causal, "triton"
    out, carried, _ = _relevancy_attention(RelevancyAttentionInputs(*tensors, *options))
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
    tensors = relevancy, query, key, value, grad_output, lse, attn_mask, key_mask
    options = rule, row_normalize, "dot", 0.0, _scale(query, scale), is_causal, "triton"
    return _relevancy_step(RelevancyStepInputs(*tensors, *options))


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
    tensors = query, key, value, grad_output, lse, attn_mask, key_mask
    options = rule, head_reduction, row_normalize, "dot", 0.0, _scale(query, scale), is_causal, "triton"
    return _attention_map(AttentionMapInputs(*tensors, *options))


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
    tensors = query, key, key_groups, row_weight, attn_mask, key_mask
    options = num_groups, " ".join(_STATISTICS), "dot", 0.0, _scale(query, scale), is_causal, "triton"
    *statistics, _ = _attention_statistics(AttentionStatisticsInputs(*tensors, *options))
    return tuple(statistics)


def congruence_loss(
    text: tuple[Tensor, Tensor],
    image: tuple[Tensor, Tensor],
    cross: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    *,
    kind: str = "cacr",
    direction: str = "both",
    text_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The loss of each sample (B) that compares the attention within a modality with what the other one implies for it.

    text, image: (query, key) of L and of V tokens, each (B, H, L or V, D). cross: ((text query, image key), (image query, text
    key)), default those of text and image. kind: "cacr", "iais_singular" or "iais_distributed"; direction: "text", "image" or
    "both". Masks bool (B, L), (B, V).
    """
    check_choice("kind", kind, ("cacr", "iais_singular", "iais_distributed"))
    check_choice("direction", direction, ("text", "image", "both"))
    _check_device(text[0])
    queries, keys = block_inputs(text, image, cross, None, None)  # the kernels mask padding
    options = kind, direction, _scale(text[0], scale), "triton"
    loss, _ = _congruence_loss(CongruenceLossInputs(queries, keys, text_mask, image_mask, *options))
    return loss


def _scale(query: Tensor, scale: float | None = None) -> float:
    return 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else float(scale)


def _check(query: Any, key: Any, attn_mask: Any, key_mask: Any, is_causal: Any, **tensors: Any) -> None:
    check_attention(query, key, True, **tensors)
    check_masks(query, key, attn_mask, key_mask, is_causal)
    if query.dtype == torch.float64 or max(query.shape[3], key.shape[3]) > 256:
        raise ValueError(f"query must be float16, bfloat16 or float32 with a head_dim of at most 256; got {query.dtype}")
    _check_device(query)


def _check_device(query: Tensor) -> None:
    if query.device.type != "cuda" and not INTERPRETED and not torch.compiler.is_compiling():
        raise ValueError(f"query must be on a CUDA device (on the CPU in Triton's interpreter); got {query.device}")
    if query.device.type == "cuda" and torch.cuda.get_device_capability(query.device) < (8, 0):
        raise ValueError("query must be on a GPU of compute capability 8.0 or more")


# --- operators of torch.library ---


def _rows(like: Tensor) -> Tensor:
    return like.new_empty(like.shape[:3], dtype=torch.float32)


def _empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def _forward(inputs: ScoreAttentionInputs) -> tuple[Tensor, Tensor]:
    out, lse = _scores.forward(inputs)
    return rows_first(out), lse


def _out_fake(inputs: Any) -> Tensor:
    _, heads, length, _ = inputs.query.shape
    return empty_rows_first(inputs.query, heads, length, inputs.value.shape[3])


def _gradients(grads: Any, like: tuple[Tensor, ...]) -> list[Tensor]:
    return [like[0].new_empty(0) if grad is None else as_gradient(grad, x) for grad, x in zip(grads, like, strict=True)]


def _gradients_fake(*like: Tensor) -> list[Tensor]:
    return [empty_rows_first(x, *x.shape[1:]) for x in like]


def _backward(inputs: ScoreAttentionBackwardInputs) -> tuple[Tensor, ...]:
    *grads, grad_vector = _scores.backward(inputs)
    return *_gradients(grads, (inputs.query, inputs.key, inputs.value)), _empty(grad_vector, inputs.query)


def _backward_fake(inputs: ScoreAttentionBackwardInputs) -> tuple[Tensor, ...]:
    vector = inputs.query.new_empty(0 if inputs.vector is None else inputs.vector.shape)
    return *_gradients_fake(inputs.query, inputs.key, inputs.value), vector


_score_attention = define(
    "score_attention", ScoreAttentionInputs, "(Tensor, Tensor)", _forward, lambda x: (_out_fake(x), _rows(x.query))
)
_score_backward = define(
    "score_attention_backward", ScoreAttentionBackwardInputs, "(Tensor, Tensor, Tensor, Tensor)", _backward, _backward_fake
)
_of_scores = Saved(ScoreAttentionInputs, ScoreAttentionBackwardInputs, outputs=("out", "lse"), grads=("grad_out", "grad_lse"))


def _score_autograd(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    inputs = _of_scores.inputs(ctx, grad_out, grad_lse)
    *grads, grad_vector = _score_backward(inputs)
    return *grads, None if inputs.vector is None else grad_vector


def _relevancy_forward(inputs: RelevancyAttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    out, carrier, lse = _relevancy.forward(inputs)
    return rows_first(out), carrier, lse


def _relevancy_backward(inputs: RelevancyAttentionBackwardInputs) -> tuple[Tensor, ...]:
    *grads, grad_carrier = _relevancy.backward(inputs)
    assert grad_carrier is not None
    return *_gradients(grads, (inputs.query, inputs.key, inputs.value)), grad_carrier.contiguous()


_relevancy_attention = define(
    "relevancy_attention",
    RelevancyAttentionInputs,
    "(Tensor, Tensor, Tensor)",
    _relevancy_forward,
    lambda x: (_out_fake(x), torch.empty_like(x.carrier), _rows(x.query)),
)
_relevancy_gradients = define(
    "relevancy_attention_backward",
    RelevancyAttentionBackwardInputs,
    "(Tensor, Tensor, Tensor, Tensor)",
    _relevancy_backward,
    lambda x: (*_gradients_fake(x.query, x.key, x.value), torch.empty_like(x.grad_carrier)),
)
_of_relevancy = Saved(
    RelevancyAttentionInputs,
    RelevancyAttentionBackwardInputs,
    outputs=("out", "lse"),
    grads=("grad_out", "grad_carrier", "grad_lse", "need_inputs"),
)


def _relevancy_autograd(ctx: Any, grad_out: Tensor, grad_carrier: Tensor, _: Any) -> tuple[Tensor, ...]:
    return _relevancy_gradients(_of_relevancy.inputs(ctx, grad_out, grad_carrier, None, True))


_relevancy_step = define(
    "relevancy_step",
    RelevancyStepInputs,
    "Tensor",
    _relevancy.step,
    lambda x: x.relevancy.new_empty(*x.relevancy.shape[:2], x.key.shape[2]),
)


def _step_gradients_fake(x: RelevancyStepBackwardInputs) -> tuple[Tensor, ...]:
    inputs = (x.query, x.key, x.value, x.grad_output, x.lse if x.need_lse else None) if x.need_inputs else (None,) * 5
    return returned_fake(x.query, (x.relevancy if x.need_relevancy else None, *inputs))


_step_gradients = define(
    "relevancy_step_backward",
    RelevancyStepBackwardInputs,
    f"({', '.join(['Tensor'] * 6)})",
    lambda x: returned(x.query, _relevancy.step_backward(x)),
    _step_gradients_fake,
)
_of_step = Saved(RelevancyStepInputs, RelevancyStepBackwardInputs, grads=("grad", "need_relevancy", "need_inputs", "need_lse"))


def _needed(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))


def _step_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_relevancy, *need_inputs = ctx.needs_input_grad[:6]
    return _needed(ctx, _step_gradients(_of_step.inputs(ctx, grad, need_relevancy, any(need_inputs), need_inputs[-1])))


_attention_map = define(
    "attention_map",
    AttentionMapInputs,
    "Tensor",
    _map.forward,
    lambda x: x.query.new_empty(x.query.shape[0], x.query.shape[2], x.key.shape[2], dtype=torch.float32),
)
_map_gradients = define(
    "attention_map_backward",
    AttentionMapBackwardInputs,
    f"({', '.join(['Tensor'] * 5)})",
    lambda x: returned(x.query, _map.backward(x)),
    lambda x: returned_fake(x.query, (x.query, x.key, x.value, x.grad_output, x.lse if x.need_lse else None)),
)
_of_map = Saved(AttentionMapInputs, AttentionMapBackwardInputs, grads=("grad", "need_lse"))


def _map_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _needed(ctx, _map_gradients(_of_map.inputs(ctx, grad, ctx.needs_input_grad[4])))


_STATISTICS = ("mass", "entropy", "maximum", "argmax", "received", "rows")


def _statistics_fake(inputs: AttentionStatisticsInputs) -> tuple[Tensor, ...]:
    row, (batch, heads, num_queries, _) = _rows(inputs.query), inputs.query.shape
    received = row.new_empty(batch, heads, inputs.key.shape[2])
    mass, rows = row.new_empty(*row.shape, inputs.num_groups), row.new_empty(2, batch, heads, num_queries)
    return mass, row, row.clone(), row.new_empty(row.shape, dtype=torch.int64), received, rows


def _statistics_backward(inputs: AttentionStatisticsBackwardInputs) -> tuple[Tensor, ...]:
    grad_q, grad_k, grad_weight = _statistics.backward(inputs)
    return grad_q, grad_k, _empty(grad_weight, inputs.query)


_attention_statistics = define(
    "attention_statistics", AttentionStatisticsInputs, f"({', '.join(['Tensor'] * 6)})", _statistics.forward, _statistics_fake
)
_statistics_gradients = define(
    "attention_statistics_backward",
    AttentionStatisticsBackwardInputs,
    "(Tensor, Tensor, Tensor)",
    _statistics_backward,
    lambda x: (
        torch.empty_like(x.query),
        torch.empty_like(x.key),
        x.query.new_empty(0) if x.row_weight is None else x.row_weight,
    ),
)
_of_statistics = Saved(
    AttentionStatisticsInputs,
    AttentionStatisticsBackwardInputs,
    outputs=("mass", "maximum", "argmax", "rows"),
    grads=("grad_mass", "grad_entropy", "grad_maximum", "grad_received"),
)


def _statistics_saved(ctx: Any, inputs: AttentionStatisticsInputs, output: tuple[Tensor, ...]) -> None:
    mass, _, maximum, argmax, _, rows = output
    ctx.mark_non_differentiable(argmax, rows)
    ctx.set_materialize_grads(False)
    _of_statistics.save(ctx, inputs, mass, maximum, argmax, rows)


def _statistics_autograd(ctx: Any, mass: Any, entropy: Any, maximum: Any, _: Any, received: Any, __: Any) -> tuple[Any, ...]:
    inputs = _of_statistics.inputs(ctx, mass, entropy, maximum, received)
    grad_q, grad_k, grad_weight = _statistics_gradients(inputs)
    return grad_q, grad_k, None, None if inputs.row_weight is None else grad_weight


_congruence_loss = define(
    "congruence_loss",
    CongruenceLossInputs,
    "(Tensor, Tensor)",
    _congruence.forward,
    lambda x: tuple(x.queries[0].new_empty(size, dtype=torch.float32) for size in (x.queries[0].shape[0], 0)),
)
_congruence_gradients = define(
    "congruence_loss_backward",
    CongruenceLossBackwardInputs,
    "(Tensor[], Tensor[])",
    _congruence.backward,
    lambda x: tuple([torch.empty_like(each) for each in xs[: num_gradients(x.kind)]] for xs in (x.queries, x.keys)),
)


def _congruence_saved(ctx: Any, inputs: CongruenceLossInputs, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs.queries, *inputs.keys, inputs.text_mask, inputs.image_mask, output[1])
    ctx.options = inputs.kind, inputs.direction, inputs.scale, inputs.backend


def _congruence_autograd(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[list[Any], list[Any]]:
    *blocks, text_mask, image_mask, maps = ctx.saved_tensors
    inputs = CongruenceLossBackwardInputs(grad_loss, maps, blocks[:4], blocks[4:], text_mask, image_mask, *ctx.options)
    grad_queries, grad_keys = _congruence_gradients(inputs)
    none = [None] * (4 - len(grad_queries))
    return [*grad_queries, *none], [*grad_keys, *none]


differentiable("score_attention", _score_autograd, lambda ctx, inputs, output: _of_scores.save(ctx, inputs, *output))
differentiable(
    "relevancy_attention", _relevancy_autograd, lambda ctx, inputs, output: _of_relevancy.save(ctx, inputs, output[0], output[2])
)
differentiable("attention_statistics", _statistics_autograd, _statistics_saved)
differentiable("congruence_loss", _congruence_autograd, _congruence_saved)
differentiable("relevancy_step", _step_autograd, lambda ctx, inputs, output: _of_step.save(ctx, inputs))
differentiable("attention_map", _map_autograd, lambda ctx, inputs, output: _of_map.save(ctx, inputs))
for _name in __all__:
    once_differentiable(f"{_name}_backward")
