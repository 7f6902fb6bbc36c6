"""The operators behind the functions on CPUs: those that libvlattn_torch.so registers, forward passes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import empty_rows_first
from vlattn_fast.backends.inputs import (
    AttentionMapInputs,
    AttentionStatisticsInputs,
    CongruenceLossInputs,
    RelevancyAttentionInputs,
    RelevancyStepInputs,
    ScoreAttentionInputs,
)
from vlattn_fast.ops._ops import NAMESPACE, add_op_namespace_prefix

BACKEND = "cpu"
STATISTICS = ("mass", "entropy", "maximum", "argmax", "received")


def check_device(query: Tensor) -> None:
    if query.device.type != "cpu":
        raise ValueError(f"query must be on the CPU, for whose kernels this was built; got {query.device}")


def _forward(name: str, inputs_type: Any, fake: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The operator as a function of its inputs; `fake` gives outputs without values, for torch.compile."""
    operator = getattr(getattr(torch.ops, NAMESPACE), name)
    torch.library.register_fake(add_op_namespace_prefix(name), lambda *args: fake(inputs_type(*args)))

    def call(inputs: Any) -> Any:
        if torch.is_grad_enabled() and any([x.requires_grad for x in inputs if isinstance(x, Tensor)]):
            raise ValueError(
                f"{name} must get tensors without gradients: on CPUs it has a forward pass alone. Call it under "
                "torch.no_grad(), or install the package vlattn_fast, which has the backward pass"
            )
        return operator(*inputs)

    return call


def _rows(inputs: Any, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return inputs.query.new_empty(*inputs.query.shape[:3], *sizes, dtype=dtype)


def _out(inputs: Any) -> Tensor:
    return empty_rows_first(inputs.query, *inputs.query.shape[1:3], inputs.value.shape[3])


def _map(inputs: Any) -> Tensor:
    batch, _, num_queries, _ = inputs.query.shape
    return inputs.query.new_empty(batch, num_queries, inputs.key.shape[2], dtype=torch.float32)


def _statistics(inputs: AttentionStatisticsInputs) -> tuple[Tensor, ...]:
    received = inputs.query.new_empty(*inputs.query.shape[:2], inputs.key.shape[2], dtype=torch.float32)
    none = inputs.query.new_empty(0)
    argmax = _rows(inputs, dtype=torch.int64)
    return _rows(inputs, inputs.num_groups), _rows(inputs), _rows(inputs), argmax, received, none, none.clone(), none.clone()


def _congruence(inputs: CongruenceLossInputs) -> tuple[Tensor, Tensor]:
    text = inputs.text_query
    return text.new_empty(text.shape[0], dtype=torch.float32), text.new_empty(0, dtype=torch.float32)


_score = _forward("score_attention", ScoreAttentionInputs, lambda x: (_out(x), _rows(x, dtype=torch.float64)))
_relevancy = _forward(
    "relevancy_attention",
    RelevancyAttentionInputs,
    lambda x: (_out(x), x.carrier.new_empty(x.carrier.shape), _rows(x, dtype=torch.float64), x.query.new_empty(0)),
)
step_op = _forward("relevancy_step", RelevancyStepInputs, lambda x: x.relevancy.new_empty(*x.relevancy.shape[:2], x.key.shape[2]))
map_op = _forward("attention_map", AttentionMapInputs, _map)
statistics_op = _forward("attention_statistics", AttentionStatisticsInputs, _statistics)
congruence_op = _forward("congruence_loss", CongruenceLossInputs, _congruence)


def score_op(inputs: ScoreAttentionInputs) -> tuple[Tensor, Tensor]:
    out, lse = _score(inputs)
    return out, lse.float()


def relevancy_op(inputs: RelevancyAttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    out, carrier, lse, _ = _relevancy(inputs)
    return out, carrier, lse
