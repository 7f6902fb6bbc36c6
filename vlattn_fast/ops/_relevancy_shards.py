"""Relevancy if several processes share the heads: Abar is a mean over all heads.

r Abar is linear in Abar, so each process computes its heads' part, and an all-reduce adds the parts. Normalised rows of Abar need
their sums over all heads first: one more all-reduce, of (B, N).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_bool
from vlattn_fast._ground.tensors import not_zero
from vlattn_fast.ops._groups import gated
from vlattn_fast.ops._shards import Local, Shards
from vlattn_fast.ops.attention_map import attention_map

_MASKS = ("attn_mask", "key_mask", "is_causal", "scale", "enable_gqa", "softcap", "sink")
_GROUPS = ("query_groups", "key_groups", "group_bias")


def attention(call: Callable[..., Any], shards: Shards, x: Local) -> Any:
    """Runs relevancy_attention on the heads of this process. The gradient of its carrier is this process's part of the sum."""
    check_bool(row_normalize=x["row_normalize"])
    if not shards.by_heads:
        return call(**x)
    if not x["row_normalize"]:
        weights = {name: _part_of(x[name], shards.share) for name in ("residual_weight", "attention_weight")}
        return call(**{**x, **weights})
    _check_backend(x)
    shards.check_heads()
    out, _ = call(**{**x, "row_normalize": False, "head_gate": None})
    out, carrier = _Normalized.apply(out, x["carrier"], x, shards)
    return out if x["head_gate"] is None else gated(out, x["head_gate"]), carrier


def step(call: Callable[..., Any], shards: Shards, x: Local) -> Tensor:
    """Runs relevancy_step, summed over all heads."""
    check_bool(row_normalize=x["row_normalize"])
    if not shards.by_heads:
        return call(**x)
    part = call(**{**x, "row_normalize": False}) * shards.share  # which also checks the arguments
    if x["row_normalize"]:
        _check_backend(x)
        shards.check_heads()
        carried = x["relevancy"]
        part = _normalized(carried, x, x["grad_output"], shards).to(carried.dtype)
    return shards.over_heads(part)


def _part_of(weight: Any, share: float) -> Any:
    if weight is None:
        return share
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    return weight * share if is_number or isinstance(weight, Tensor) else weight  # the call raises for anything else


def _check_backend(x: Local) -> None:
    if x["backend"] != "auto":
        raise ValueError(f"backend must be 'auto' for rows normalized over sharded heads; got {x['backend']!r}")


def _normalized(carried: Tensor, x: Local, grad_output: Tensor | None, shards: Shards) -> Tensor:
    """Returns this process's part of carried (B, T, N) @ Abar, whose rows are divided by their sums over all heads."""
    by_gradient = x["rule"] == "gradient"
    tensors = (x["value"], grad_output) if by_gradient else (None, None)
    masks = {name: x[name] for name in (*_MASKS, *_GROUPS)}
    abar = attention_map(x["query"], x["key"], *tensors, rule=x["rule"], **masks) * shards.share
    total = shards.over_heads(abar.sum(-1), goes_on=True)
    return (carried.to(abar.dtype) / not_zero(total)[:, None]) @ abar


class _Normalized(torch.autograd.Function):
    """The identity on the output of attention. Backward: the gradient r becomes this process's part of r * a + (r * b) Abar."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, carrier: Tensor, x: Local, shards: Shards) -> tuple[Tensor, Tensor]:
        names = [name for name, value in x.items() if isinstance(value, Tensor)]
        ctx.save_for_backward(*(x[name].detach() for name in names))
        ctx.names, ctx.shards = names, shards
        ctx.constants = {name: value for name, value in x.items() if name not in names}
        return out.view_as(out), carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, r: Tensor) -> tuple[Tensor | None, ...]:
        x = {**ctx.constants, **dict(zip(ctx.names, ctx.saved_tensors, strict=True))}
        a, b = (_weight(x[name]) for name in ("residual_weight", "attention_weight"))
        attended = _normalized(r * b, x, grad, ctx.shards).to(r.dtype)
        return grad, r * a * ctx.shards.share + attended, None, None


def _weight(weight: Any) -> Any:
    """A weight of (B, N) as one of (B, 1, N), or a number."""
    return 1.0 if weight is None else weight[:, None] if isinstance(weight, Tensor) else weight
