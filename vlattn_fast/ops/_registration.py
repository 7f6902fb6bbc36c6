"""Registration of the operators with torch.library under the namespace `vlattn`.

`Library.define`/`impl` instead of `custom_op`: the latter costs each eager call several microseconds more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._checks import varies
from vlattn_fast._tensors import without_autocast

_LIBRARY = torch.library.Library("vlattn", "DEF")


_SYMBOLIC = "_symbolic"
_HAS_TWIN: set[str] = set()


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers `name(args) -> outputs` for every device and returns the function that calls it.

    torch.compile makes a graph for each value of a float that an operator takes. So an operator with floats gets a twin that
    takes 0-dim tensors in their places: compiled code calls it where a float varies.
    """
    name = schema.split("(", 1)[0]
    operator = _register(schema, implementation, fake)
    floats = [i for i, x in enumerate(operator.default._schema.arguments) if str(x.type) == "float"]
    if not floats:
        return operator

    def with_floats(*args: Any) -> Any:
        return implementation(*(float(x) if i in floats else x for i, x in enumerate(args)))

    _HAS_TWIN.add(name)
    twin = _register(schema.replace(name, name + _SYMBOLIC, 1).replace("float ", "Tensor "), with_floats, fake)

    def call(*args: Any) -> Any:
        if isinstance(args[floats[0]], Tensor):  # the backward pass of the twin
            return twin(*args)
        if torch.compiler.is_compiling() and any([varies(args[i]) for i in floats]):
            one = torch.ones((), dtype=torch.float64, device="cpu")  # times it: a product is what torch.compile makes a tensor of
            return twin(*[one * x if i in floats else x for i, x in enumerate(args)])
        return operator(*args)

    return call


def _register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Autocast is off inside: the public calls cast their arguments, and it would round the float32 products of a tile.

    No output is a view to autograd, whatever the backend made it from, so that a caller may edit it in place.
    """
    name = schema.split("(", 1)[0]

    def run(*args: Any) -> Any:
        tensors = (x for arg in args for x in (arg if isinstance(arg, list) else (arg,)) if isinstance(x, Tensor))
        with without_autocast(next(tensors).device.type):
            return _without_views(implementation(*args))

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vlattn::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.vlattn, name)


def _without_views(outputs: Any) -> Any:
    """The same memory in tensors that are no views; it copies nothing."""
    if isinstance(outputs, Tensor):
        if outputs._base is None:
            return outputs
        place = outputs.storage_offset(), outputs.shape, outputs.stride()
        return outputs.new_empty(0).set_(outputs.untyped_storage(), *place)
    return type(outputs)(_without_views(x) for x in outputs)


def rows_first(x: Tensor) -> Tensor:
    """(B, H, N, D) laid out as (B, N, H, D): the layout that fake implementations promise, whatever a backend returned.

    It is SDPA's, so that heads merge without a copy; nothing is copied where `x` already has it.
    """
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def empty_rows_first(like: Tensor, num_heads: int, length: int, size: int) -> Tensor:
    """An uninitialised (B, H, N, D) tensor in the layout of `rows_first`."""
    batch = like.shape[0]
    strides = (length * num_heads * size, size, num_heads * size, 1)
    return like.new_empty_strided((batch, num_heads, length, size), strides)


def differentiable(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Gives the operator and its twin their backward formula."""
    for each in (name, name + _SYMBOLIC) if name in _HAS_TWIN else (name,):
        torch.library.register_autograd(f"vlattn::{each}", backward, setup_context=setup_context, lib=_LIBRARY)


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
