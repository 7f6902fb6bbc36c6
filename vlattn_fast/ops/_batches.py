"""torch.func.vmap of an operator: its samples become part of the batch, or run in turn if the operator has not one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.backends.inputs import Schema

_BROADCAST = {"attn_mask": 4, "sink": 3, "residual_weight": 2, "attention_weight": 2}  # fields, with the rank that has the batch
_OF_ALL_SAMPLES = ("vector", "seed")  # a score's parameter, whose gradient is a sum over the batch, and one seed for the batch
_NO_BATCH = ("images", "queries", "key_cache")  # fields of operators on all pairs of two batches, and of requests in one tensor


def over_batches(operator: Callable[..., Any], schema: Schema) -> Callable[..., Any]:
    """Returns the rule for torch.library.register_vmap."""
    fields = tuple(schema.types)
    has_no_batch = any(field in fields for field in _NO_BATCH)

    def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        named = dict(zip(fields, args, strict=True))
        in_turn = has_no_batch or any(named.get(field) is not None for field in _OF_ALL_SAMPLES)
        first = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(args, dims, strict=True)]
        batched = [dim is not None for dim in dims]
        return (_in_turn if in_turn else _folded)(operator, fields, info.batch_size, first, batched)

    return rule


def _in_turn(
    operator: Callable[..., Any], fields: tuple[str, ...], size: int, args: list[Any], batched: list[bool]
) -> tuple[Any, Any]:
    """Runs the samples one by one."""
    each = [operator(*[x[n] if of_samples else x for x, of_samples in zip(args, batched, strict=True)]) for n in range(size)]
    if isinstance(each[0], Tensor):
        return torch.stack(each), 0
    outputs = tuple([torch.stack(list(of_samples)) for of_samples in zip(*each, strict=True)])
    return outputs, (0,) * len(outputs)


def _folded(
    operator: Callable[..., Any], fields: tuple[str, ...], size: int, args: list[Any], batched: list[bool]
) -> tuple[Any, Any]:
    """Runs all samples as one batch."""
    batch = next(
        x.shape[1] if of_samples else x.shape[0]
        for field, x, of_samples in zip(fields, args, batched, strict=True)
        if isinstance(x, Tensor) and field not in _BROADCAST
    )
    folded = [_fold(*each, size, batch) for each in zip(fields, args, batched, strict=True)]
    outputs = operator(*folded)
    if isinstance(outputs, Tensor):
        return _unfold(outputs, size, batch)
    tensors, dims = zip(*[_unfold(x, size, batch) for x in outputs], strict=True)
    return tensors, dims


def _fold(field: str, x: Any, of_samples: bool, size: int, batch: int) -> Any:
    if field == "saves":
        return False  # what is saved has no batch
    if not isinstance(x, Tensor):
        return x
    if field == "gradients" or (x.shape[int(of_samples) :] == (0,) and batch):  # one row of no batch, made again; one for None
        return x.new_empty(0)
    if field in _BROADCAST:
        missing = _BROADCAST[field] - (x.dim() - of_samples)
        x = x.reshape(*x.shape[: int(of_samples)], *(1,) * missing, *x.shape[int(of_samples) :])
        if not of_samples and x.shape[0] == 1:
            return x
    x = x if of_samples else x.expand(size, *x.shape)
    return x.expand(size, batch, *x.shape[2:]).reshape(size * batch, *x.shape[2:])


def _unfold(x: Tensor, size: int, batch: int) -> tuple[Tensor, int | None]:
    """An output with its dimension of samples. An empty one, which stands for None, has none."""
    if x.dim() == 1 and x.shape[0] == 0 and batch:
        return x, None
    return x.unflatten(0, (size, batch)), 0
