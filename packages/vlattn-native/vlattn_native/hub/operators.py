"""The operators of torch.library behind the functions, forward and backward, with their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import as_fake_outputs, empty_rows_first
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
    named,
    queries_and_keys,
)
from vlattn_fast.backends.reference.congruence_loss import num_gradients, of_all_blocks
from vlattn_fast.ops._registration import Saved, define, differentiable, once_differentiable
from vlattn_native.hub.triton_kernels import KERNELS, LSE, STATISTICS_OF_ROWS

_OF_MAP = "query", "key", "value", "grad_output", "lse"
STATISTICS = ("mass", "entropy", "maximum", "argmax", "received", *STATISTICS_OF_ROWS)


def _operator(name: str, inputs_type: Any, outputs: int, fake: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The operator with that many tensors as its outputs; without a kernel here the one that a library has registered."""
    returns = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    return define(name, inputs_type, returns, KERNELS.get(name), fake)


def _rows(like: Tensor, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return like.new_empty(*like.shape[:3], *sizes, dtype=dtype)


def _attended(inputs: Any) -> tuple[Tensor, Tensor]:
    query = inputs.attention.query
    return empty_rows_first(query, query.shape[1], query.shape[2], inputs.value.shape[3]), _rows(query, dtype=LSE)


def _gradients(inputs: Any) -> list[Tensor]:
    needed, tensors = getattr(inputs, "need_inputs", True), (inputs.attention.query, inputs.attention.key, inputs.value)
    return [empty_rows_first(x, *x.shape[1:]) if needed else x.new_empty(0) for x in tensors]


def _like(inputs: Any, *names: str, **others: Any) -> tuple[Tensor, ...]:
    """Gradients of these arguments, but for `others`."""
    x = named(inputs) | others
    made = as_fake_outputs([x[name] for name in names])
    return tuple([inputs.attention.query.new_empty(0) if y is None else y for y in made])


def _relevancy_fake(inputs: RelevancyAttentionInputs) -> tuple[Tensor, ...]:
    out, lse = _attended(inputs)
    return out, inputs.carrier.new_empty(inputs.carrier.shape), lse, out.new_empty(0)


def _step_gradients(x: RelevancyStepBackwardInputs) -> tuple[Tensor, ...]:
    absent = dict.fromkeys(_OF_MAP, None) if not x.need_inputs else {} if x.need_lse else {"lse": None}
    return _like(
        x, "relevancy", *_OF_MAP, "row_bias", **absent, row_bias=None, **({} if x.need_relevancy else {"relevancy": None})
    )


def _map_fake(inputs: AttentionMapInputs) -> Tensor:
    query, key = inputs.attention.query, inputs.attention.key
    return query.new_empty(query.shape[0], query.shape[2], key.shape[2], dtype=torch.float32)


def _statistics_fake(inputs: AttentionStatisticsInputs) -> tuple[Tensor, ...]:
    query = inputs.attention.query
    received = query.new_empty(*query.shape[:2], inputs.attention.key.shape[2], dtype=torch.float32)
    of_rows = [_rows(query) if STATISTICS_OF_ROWS else query.new_empty(0) for _ in range(2)]
    of_keys = _rows(query, inputs.num_groups), _rows(query), _rows(query), _rows(query, dtype=torch.int64), received
    return *of_keys, query.new_empty(0), *of_rows


def _congruence_fake(inputs: CongruenceLossInputs) -> tuple[Tensor, Tensor]:
    text, image = inputs.text_query, inputs.image_query
    numbers = num_gradients(inputs.kind) * (text.numel() + image.numel()) if inputs.saves else 0
    return text.new_empty(text.shape[0], dtype=torch.float32), text.new_empty(numbers, dtype=torch.float32)


def _congruence_gradients(x: CongruenceLossBackwardInputs) -> tuple[Tensor, ...]:
    blocks = enumerate(sum(queries_and_keys(x), []))
    return tuple(each.new_empty(each.shape if k % 4 < num_gradients(x.kind) else 0) for k, each in blocks)


score_op = _operator("score_attention", ScoreAttentionInputs, 2, _attended)
_score_backward = _operator(
    "score_attention_backward",
    ScoreAttentionBackwardInputs,
    5,
    lambda x: (*_gradients(x), *_like(x, "vector", "row_bias", row_bias=None)),
)
relevancy_op = _operator("relevancy_attention", RelevancyAttentionInputs, 4, _relevancy_fake)
_relevancy_backward = _operator(
    "relevancy_attention_backward",
    RelevancyAttentionBackwardInputs,
    5,
    lambda x: (*_gradients(x), *_like(x, "grad_carrier", "row_bias", row_bias=None)),
)
step_op = _operator(
    "relevancy_step", RelevancyStepInputs, 1, lambda x: x.relevancy.new_empty(*x.relevancy.shape[:2], x.attention.key.shape[2])
)
_step_backward = _operator("relevancy_step_backward", RelevancyStepBackwardInputs, 7, _step_gradients)
map_op = _operator("attention_map", AttentionMapInputs, 1, _map_fake)
_map_backward = _operator(
    "attention_map_backward",
    AttentionMapBackwardInputs,
    6,
    lambda x: _like(x, *_OF_MAP, "row_bias", row_bias=None, **({} if x.need_lse else {"lse": None})),
)
statistics_op = _operator("attention_statistics", AttentionStatisticsInputs, 8, _statistics_fake)
_statistics_backward = _operator(
    "attention_statistics_backward",
    AttentionStatisticsBackwardInputs,
    4,
    lambda x: _like(x, "query", "key", "row_weight", "row_bias", row_bias=None),
)
congruence_op = _operator("congruence_loss", CongruenceLossInputs, 2, _congruence_fake)
_congruence_backward = _operator("congruence_loss_backward", CongruenceLossBackwardInputs, 8, _congruence_gradients)

_of_scores = Saved(ScoreAttentionInputs, ScoreAttentionBackwardInputs, outputs=("out", "lse"), grads=("grad_out", "grad_lse"))
_of_relevancy = Saved(
    RelevancyAttentionInputs,
    RelevancyAttentionBackwardInputs,
    outputs=("out", "lse"),
    grads=("grad_out", "grad_carrier", "grad_lse", "grad_behind_sink", "need_inputs"),
)
_of_step = Saved(RelevancyStepInputs, RelevancyStepBackwardInputs, grads=("grad", "need_relevancy", "need_inputs", "need_lse"))
_of_map = Saved(AttentionMapInputs, AttentionMapBackwardInputs, grads=("grad", "need_lse"))
_of_statistics = Saved(
    AttentionStatisticsInputs,
    AttentionStatisticsBackwardInputs,
    outputs=("mass", "maximum", "argmax", "row_max", "mean_x"),
    grads=("grad_mass", "grad_entropy", "grad_maximum", "grad_received"),
)
_of_congruence = Saved(CongruenceLossInputs, CongruenceLossBackwardInputs, outputs=("gradients",), grads=("grad_loss",))


def _score_autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> dict[str, Tensor]:
    inputs = _of_scores.inputs(ctx, grad_out, grad_lse)
    if grad_out is None:
        inputs = inputs._replace(grad_out=torch.zeros_like(inputs.out))
    return dict(zip(("query", "key", "value", "vector"), _score_backward(inputs), strict=False))


def _relevancy_autograd(ctx: Any, grad_out: Tensor | None, grad_carrier: Tensor | None, _: Any, __: Any) -> dict[str, Tensor]:
    names = "query", "key", "value"
    need_inputs = grad_out is not None and not _of_relevancy.needed(ctx).isdisjoint(names)
    *grads, carrier, _ = _relevancy_backward(_of_relevancy.inputs(ctx, grad_out, grad_carrier, None, None, need_inputs))
    made = dict(zip(names, grads, strict=True)) if need_inputs else {}
    return made if grad_carrier is None else made | {"carrier": carrier}


def _step_autograd(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    needed = _of_step.needed(ctx)
    needs = "relevancy" in needed, not needed.isdisjoint(_OF_MAP), "lse" in needed
    return dict(zip(("relevancy", *_OF_MAP), _step_backward(_of_step.inputs(ctx, grad, *needs)), strict=False))


def _map_autograd(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    return dict(zip(_OF_MAP, _map_backward(_of_map.inputs(ctx, grad, "lse" in _of_map.needed(ctx))), strict=False))


def _statistics_saved(ctx: Any, inputs: AttentionStatisticsInputs, output: tuple[Tensor, ...]) -> None:
    mass, _, maximum, argmax, _, max_logit, *rows = output
    ctx.mark_non_differentiable(argmax, max_logit, *rows)
    _of_statistics.save(ctx, inputs, mass, maximum, argmax, *rows)


def _statistics_autograd(ctx: Any, mass: Any, entropy: Any, maximum: Any, _: Any, received: Any, *__: Any) -> dict[str, Tensor]:
    inputs = _of_statistics.inputs(ctx, mass, entropy, maximum, received)
    return dict(zip(("query", "key", "row_weight"), _statistics_backward(inputs), strict=False))


def _congruence_saved(ctx: Any, inputs: CongruenceLossInputs, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _of_congruence.save(ctx, inputs, output[1])


def _congruence_autograd(ctx: Any, grad_loss: Tensor, _: Any) -> dict[str, Tensor | None]:
    inputs = _of_congruence.inputs(ctx, grad_loss)
    grads, n = _congruence_backward(inputs), num_gradients(inputs.kind)
    return dict(zip(CongruenceLossInputs._fields, of_all_blocks([*grads[:n], *grads[4 : 4 + n]]), strict=False))


_DERIVATIVES: dict[str, tuple[Any, Any]] = {
    "score_attention": (_score_autograd, lambda ctx, inputs, output: _of_scores.save(ctx, inputs, *output)),
    "relevancy_attention": (
        _relevancy_autograd,
        lambda ctx, inputs, output: _of_relevancy.save(ctx, inputs, output[0], output[2]),
    ),
    "relevancy_step": (_step_autograd, lambda ctx, inputs, output: _of_step.save(ctx, inputs)),
    "attention_map": (_map_autograd, lambda ctx, inputs, output: _of_map.save(ctx, inputs)),
    "attention_statistics": (_statistics_autograd, _statistics_saved),
    "congruence_loss": (_congruence_autograd, _congruence_saved),
}
for _name, (_autograd, _save) in _DERIVATIVES.items():
    differentiable(_name, _autograd, _save)
    once_differentiable(f"{_name}_backward")
