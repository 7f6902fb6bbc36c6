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
)
from vlattn_fast.backends.reference.congruence_loss import num_gradients, of_all_blocks
from vlattn_fast.ops._registration import Saved, define, differentiable, once_differentiable
from vlattn_native.hub.triton_kernels import KERNELS, LSE, STATISTICS_OF_ROWS

STATISTICS = ("mass", "entropy", "maximum", "argmax", "received", *STATISTICS_OF_ROWS)


def _operator(name: str, inputs_type: Any, outputs: int, fake: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The operator with that many tensors as its outputs; without a kernel here the one that a library has registered."""
    returns = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    return define(name, inputs_type, returns, KERNELS.get(name), fake)


def _rows(like: Tensor, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return like.new_empty(*like.shape[:3], *sizes, dtype=dtype)


def _attended(inputs: Any) -> tuple[Tensor, Tensor]:
    query = inputs.query
    return empty_rows_first(query, query.shape[1], query.shape[2], inputs.value.shape[3]), _rows(query, dtype=LSE)


def _gradients(inputs: Any) -> list[Tensor]:
    needed = getattr(inputs, "need_inputs", True)
    return [empty_rows_first(x, *x.shape[1:]) if needed else x.new_empty(0) for x in (inputs.query, inputs.key, inputs.value)]


def _relevancy_fake(inputs: RelevancyAttentionInputs) -> tuple[Tensor, ...]:
    out, lse = _attended(inputs)
    return out, inputs.carrier.new_empty(inputs.carrier.shape), lse, inputs.query.new_empty(0)


def _step_gradients(x: RelevancyStepBackwardInputs) -> tuple[Tensor, ...]:
    inputs = (x.query, x.key, x.value, x.grad_output, x.lse if x.need_lse else None) if x.need_inputs else (None,) * 5
    return as_fake_outputs(x.query, (x.relevancy if x.need_relevancy else None, *inputs, None))


def _map_fake(inputs: AttentionMapInputs) -> Tensor:
    batch, _, num_queries, _ = inputs.query.shape
    return inputs.query.new_empty(batch, num_queries, inputs.key.shape[2], dtype=torch.float32)


def _statistics_fake(inputs: AttentionStatisticsInputs) -> tuple[Tensor, ...]:
    query = inputs.query
    received = query.new_empty(*query.shape[:2], inputs.key.shape[2], dtype=torch.float32)
    of_rows = [_rows(query) if STATISTICS_OF_ROWS else query.new_empty(0) for _ in range(2)]
    of_keys = _rows(query, inputs.num_groups), _rows(query), _rows(query), _rows(query, dtype=torch.int64), received
    return *of_keys, query.new_empty(0), *of_rows


def _congruence_fake(inputs: CongruenceLossInputs) -> tuple[Tensor, Tensor]:
    text, image = inputs.text_query, inputs.image_query
    numbers = num_gradients(inputs.kind) * (text.numel() + image.numel()) if inputs.saves else 0
    return text.new_empty(text.shape[0], dtype=torch.float32), text.new_empty(numbers, dtype=torch.float32)


def _congruence_gradients(x: CongruenceLossBackwardInputs) -> tuple[Tensor, ...]:
    blocks = enumerate((*x.queries, *x.keys))
    return tuple(each.new_empty(each.shape if k % 4 < num_gradients(x.kind) else 0) for k, each in blocks)


score_op = _operator("score_attention", ScoreAttentionInputs, 2, _attended)
_score_backward = _operator(
    "score_attention_backward",
    ScoreAttentionBackwardInputs,
    5,
    lambda x: (*_gradients(x), *as_fake_outputs(x.query, (x.vector, None))),
)
relevancy_op = _operator("relevancy_attention", RelevancyAttentionInputs, 4, _relevancy_fake)
_relevancy_backward = _operator(
    "relevancy_attention_backward",
    RelevancyAttentionBackwardInputs,
    5,
    lambda x: (*_gradients(x), *as_fake_outputs(x.query, (x.grad_carrier, None))),
)
step_op = _operator(
    "relevancy_step", RelevancyStepInputs, 1, lambda x: x.relevancy.new_empty(*x.relevancy.shape[:2], x.key.shape[2])
)
_step_backward = _operator("relevancy_step_backward", RelevancyStepBackwardInputs, 7, _step_gradients)
map_op = _operator("attention_map", AttentionMapInputs, 1, _map_fake)
_map_backward = _operator(
    "attention_map_backward",
    AttentionMapBackwardInputs,
    6,
    lambda x: as_fake_outputs(x.query, (x.query, x.key, x.value, x.grad_output, x.lse if x.need_lse else None, None)),
)
statistics_op = _operator("attention_statistics", AttentionStatisticsInputs, 8, _statistics_fake)
_statistics_backward = _operator(
    "attention_statistics_backward",
    AttentionStatisticsBackwardInputs,
    4,
    lambda x: as_fake_outputs(x.query, (x.query, x.key, x.row_weight, None)),
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


def _score_autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = _of_scores.inputs(ctx, grad_out, grad_lse)
    if grad_out is None:
        inputs = inputs._replace(grad_out=torch.zeros_like(inputs.out))
    grad_q, grad_k, grad_v, grad_vector, _ = _score_backward(inputs)
    return grad_q, grad_k, grad_v, None if inputs.vector is None else grad_vector


def _relevancy_autograd(
    ctx: Any, grad_out: Tensor | None, grad_carrier: Tensor | None, _: Any, __: Any
) -> tuple[Tensor | None, ...]:
    need_inputs = grad_out is not None and any(ctx.needs_input_grad[:3])
    *grads, carrier, _ = _relevancy_backward(_of_relevancy.inputs(ctx, grad_out, grad_carrier, None, None, need_inputs))
    return *(grads if need_inputs else (None,) * 3), None if grad_carrier is None else carrier


def _needed(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))


def _step_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_relevancy, *need_inputs = ctx.needs_input_grad[:6]
    grads = _step_backward(_of_step.inputs(ctx, grad, need_relevancy, any(need_inputs), need_inputs[-1]))
    return _needed(ctx, grads[:6])


def _map_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _needed(ctx, _map_backward(_of_map.inputs(ctx, grad, ctx.needs_input_grad[4]))[:5])


def _statistics_saved(ctx: Any, inputs: AttentionStatisticsInputs, output: tuple[Tensor, ...]) -> None:
    mass, _, maximum, argmax, _, max_logit, *rows = output
    ctx.mark_non_differentiable(argmax, max_logit, *rows)
    _of_statistics.save(ctx, inputs, mass, maximum, argmax, *rows)


def _statistics_autograd(ctx: Any, mass: Any, entropy: Any, maximum: Any, _: Any, received: Any, *__: Any) -> tuple[Any, ...]:
    inputs = _of_statistics.inputs(ctx, mass, entropy, maximum, received)
    grad_q, grad_k, grad_weight, _ = _statistics_backward(inputs)
    return grad_q, grad_k, None, None if inputs.row_weight is None else grad_weight


def _congruence_saved(ctx: Any, inputs: CongruenceLossInputs, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _of_congruence.save(ctx, inputs, output[1])


def _congruence_autograd(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    inputs = _of_congruence.inputs(ctx, grad_loss)
    grads, n = _congruence_backward(inputs), num_gradients(inputs.kind)
    return of_all_blocks([*grads[:n], *grads[4 : 4 + n]])


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
