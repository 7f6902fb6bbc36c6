"""The operators of torch.library behind the functions on GPUs, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import as_fake_outputs, as_gradient, as_outputs, empty_rows_first, rows_first
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
from vlattn_fast.kernels import attention_map as _map
from vlattn_fast.kernels import attention_statistics as _statistics
from vlattn_fast.kernels import congruence_loss as _congruence
from vlattn_fast.kernels import relevancy_attention as _relevancy
from vlattn_fast.kernels import score_attention as _scores
from vlattn_fast.kernels._tiles import INTERPRETED, OLD_TRITON
from vlattn_fast.ops._registration import Saved, define, differentiable, once_differentiable

BACKEND = "triton"
STATISTICS = ("mass", "entropy", "maximum", "argmax", "received")


def check_device(query: Tensor) -> None:
    if query.device.type != "cuda" and not INTERPRETED and not torch.compiler.is_compiling():
        raise ValueError(f"query must be on a CUDA device (on the CPU in Triton's interpreter); got {query.device}")
    if query.device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(query.device)
    if capability < (8, 0):
        raise ValueError("query must be on a GPU of compute capability 8.0 or more")
    if capability[0] in (10, 11) and OLD_TRITON.value:
        raise ValueError("Triton before 3.9 compiles races and wrong addresses for sm_100: install triton 3.9")


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
    *grads, grad_vector, _ = _scores.backward(inputs)
    return *_gradients(grads, (inputs.query, inputs.key, inputs.value)), _empty(grad_vector, inputs.query)


def _backward_fake(inputs: ScoreAttentionBackwardInputs) -> tuple[Tensor, ...]:
    vector = inputs.query.new_empty(0 if inputs.vector is None else inputs.vector.shape)
    return *_gradients_fake(inputs.query, inputs.key, inputs.value), vector


score_op = define("score_attention", ScoreAttentionInputs, "(Tensor, Tensor)", _forward, lambda x: (_out_fake(x), _rows(x.query)))
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
    *grads, grad_carrier, _ = _relevancy.backward(inputs)
    assert grad_carrier is not None
    return *_gradients(grads, (inputs.query, inputs.key, inputs.value)), grad_carrier.contiguous()


relevancy_op = define(
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
    grads=("grad_out", "grad_carrier", "grad_lse", "grad_behind_sink", "need_inputs"),
)


def _relevancy_autograd(ctx: Any, grad_out: Tensor, grad_carrier: Tensor, _: Any) -> tuple[Tensor, ...]:
    return _relevancy_gradients(_of_relevancy.inputs(ctx, grad_out, grad_carrier, None, None, True))


step_op = define(
    "relevancy_step",
    RelevancyStepInputs,
    "Tensor",
    _relevancy.step,
    lambda x: x.relevancy.new_empty(*x.relevancy.shape[:2], x.key.shape[2]),
)


def _step_gradients_fake(x: RelevancyStepBackwardInputs) -> tuple[Tensor, ...]:
    inputs = (x.query, x.key, x.value, x.grad_output, x.lse if x.need_lse else None) if x.need_inputs else (None,) * 5
    return as_fake_outputs(x.query, (x.relevancy if x.need_relevancy else None, *inputs))


_step_gradients = define(
    "relevancy_step_backward",
    RelevancyStepBackwardInputs,
    f"({', '.join(['Tensor'] * 6)})",
    lambda x: as_outputs(_relevancy.step_backward(x)[:6]),
    _step_gradients_fake,
)
_of_step = Saved(RelevancyStepInputs, RelevancyStepBackwardInputs, grads=("grad", "need_relevancy", "need_inputs", "need_lse"))


def _needed(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))


def _step_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_relevancy, *need_inputs = ctx.needs_input_grad[:6]
    return _needed(ctx, _step_gradients(_of_step.inputs(ctx, grad, need_relevancy, any(need_inputs), need_inputs[-1])))


map_op = define(
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
    lambda x: as_outputs(_map.backward(x)[:5]),
    lambda x: as_fake_outputs(x.query, (x.query, x.key, x.value, x.grad_output, x.lse if x.need_lse else None)),
)
_of_map = Saved(AttentionMapInputs, AttentionMapBackwardInputs, grads=("grad", "need_lse"))


def _map_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _needed(ctx, _map_gradients(_of_map.inputs(ctx, grad, ctx.needs_input_grad[4])))


def _statistics_fake(inputs: AttentionStatisticsInputs) -> tuple[Tensor, ...]:
    row, (batch, heads, *_) = _rows(inputs.query), inputs.query.shape
    mass, received = row.new_empty(*row.shape, inputs.num_groups), row.new_empty(batch, heads, inputs.key.shape[2])
    argmax, max_logit = row.new_empty(row.shape, dtype=torch.int64), row.new_empty(0)
    return mass, row, row.clone(), argmax, received, max_logit, row.clone(), row.clone()


def _statistics_backward(inputs: AttentionStatisticsBackwardInputs) -> tuple[Tensor, ...]:
    grad_q, grad_k, grad_weight, _ = _statistics.backward(inputs)
    return grad_q, grad_k, _empty(grad_weight, inputs.query)


statistics_op = define(
    "attention_statistics", AttentionStatisticsInputs, f"({', '.join(['Tensor'] * 8)})", _statistics.forward, _statistics_fake
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
    outputs=("mass", "maximum", "argmax", "row_max", "mean_x"),
    grads=("grad_mass", "grad_entropy", "grad_maximum", "grad_received"),
)


def _statistics_saved(ctx: Any, inputs: AttentionStatisticsInputs, output: tuple[Tensor, ...]) -> None:
    mass, _, maximum, argmax, _, max_logit, *rows = output
    ctx.mark_non_differentiable(argmax, max_logit, *rows)
    ctx.set_materialize_grads(False)
    _of_statistics.save(ctx, inputs, mass, maximum, argmax, *rows)


def _statistics_autograd(ctx: Any, mass: Any, entropy: Any, maximum: Any, _: Any, received: Any, *__: Any) -> tuple[Any, ...]:
    inputs = _of_statistics.inputs(ctx, mass, entropy, maximum, received)
    grad_q, grad_k, grad_weight = _statistics_gradients(inputs)
    return grad_q, grad_k, None, None if inputs.row_weight is None else grad_weight


congruence_op = define(
    "congruence_loss",
    CongruenceLossInputs,
    "(Tensor, Tensor)",
    _congruence.forward,
    lambda x: tuple(x.text_query.new_empty(size, dtype=torch.float32) for size in (x.text_query.shape[0], 0)),
)
_congruence_gradients = define(
    "congruence_loss_backward",
    CongruenceLossBackwardInputs,
    f"({', '.join(['Tensor'] * 8)})",
    _congruence.backward,
    lambda x: tuple(
        each.new_empty(each.shape if k % 4 < num_gradients(x.kind) else 0) for k, each in enumerate((*x.queries, *x.keys))
    ),
)
_of_congruence = Saved(CongruenceLossInputs, CongruenceLossBackwardInputs, outputs=("gradients",), grads=("grad_loss",))


def _congruence_saved(ctx: Any, inputs: CongruenceLossInputs, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _of_congruence.save(ctx, inputs, output[1])


def _congruence_autograd(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    inputs = _of_congruence.inputs(ctx, grad_loss)
    grads, n = _congruence_gradients(inputs), num_gradients(inputs.kind)
    return of_all_blocks([*grads[:n], *grads[4 : 4 + n]])


differentiable("score_attention", _score_autograd, lambda ctx, inputs, output: _of_scores.save(ctx, inputs, *output))
differentiable(
    "relevancy_attention", _relevancy_autograd, lambda ctx, inputs, output: _of_relevancy.save(ctx, inputs, output[0], output[2])
)
differentiable("attention_statistics", _statistics_autograd, _statistics_saved)
differentiable("congruence_loss", _congruence_autograd, _congruence_saved)
differentiable("relevancy_step", _step_autograd, lambda ctx, inputs, output: _of_step.save(ctx, inputs))
differentiable("attention_map", _map_autograd, lambda ctx, inputs, output: _of_map.save(ctx, inputs))
for _stem in (
    "score_attention",
    "relevancy_attention",
    "relevancy_step",
    "attention_map",
    "attention_statistics",
    "congruence_loss",
):
    once_differentiable(f"{_stem}_backward")
