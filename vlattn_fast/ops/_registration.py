"""Registration of the operators with torch.library under the namespace `vlattn`.

`Library.define`/`impl` instead of `custom_op`: the latter costs each eager call several microseconds more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("vlattn", "DEF")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers `name(args) -> outputs` for every device and returns the callable operator.

    Autocast is off inside: the public calls cast their arguments, and it would round the float32 products of a tile.
    """
    name = schema.split("(", 1)[0]

    def run(*args: Any) -> Any:
        tensors = (x for arg in args for x in (arg if isinstance(arg, list) else (arg,)) if isinstance(x, Tensor))
        device = next(tensors).device.type
        if not torch.is_autocast_enabled(device):
            return implementation(*args)
        with torch.autocast(device, enabled=False):
            return implementation(*args)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vlattn::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.vlattn, name)


def rows_first(x: Tensor) -> Tensor:
    """(B,H,N,D) laid out as (B,N,H,D): the layout that fake implementations promise, whatever a backend returned.

    It is SDPA's, so that heads merge without a copy; nothing is copied where `x` already has it.
    """
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def empty_rows_first(like: Tensor, num_heads: int, length: int, size: int) -> Tensor:
    """An uninitialised (B,H,N,D) tensor in the layout of `rows_first`."""
    return like.new_empty(like.shape[0], length, num_heads, size).transpose(1, 2)


def differentiable(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Gives the operator its backward formula."""
    torch.library.register_autograd(f"vlattn::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def not_differentiable(name: str, why: str) -> None:
    """Makes a backward pass through the operator an error that says why, where torch would give silence or jargon."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"vlattn::{name}: {why}")

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    differentiable(name, backward, setup_context)


def once_differentiable(name: str) -> None:
    """For a backward operator: second derivatives are refused."""
    stem = name.removesuffix("_backward")
    not_differentiable(name, f"{stem} has no second derivative; it is once differentiable (create_graph=True asked for more)")
