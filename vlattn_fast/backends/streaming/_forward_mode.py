"""Tangents of a pass by forward mode through its tiles: beside each tensor of a tile is its tangent, and there is no graph.

So a pass in bounded memory has its derivative in bounded memory, too: a forward pass the tangents of its outputs, and a backward
pass the second derivative.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from vlattn_fast._ground.checks import has_forward_mode
from vlattn_fast.backends.inputs import named, schema_of

Named = dict[str, Tensor]
_Outputs = TypeVar("_Outputs", bound=Sequence[Tensor | None])


def jvp(f: Callable[[Named], Any], x: Named, u: Named) -> tuple[Any, Any]:
    """f(x) and its tangent, for the tangents `u` of some of `x`."""
    with forward_mode(), torch.no_grad():
        outputs, tree = tree_flatten(f(x | {name: forward_ad.make_dual(x[name], y) for name, y in u.items()}))
        pairs = [forward_ad.unpack_dual(y) for y in outputs]
        tangents = [torch.zeros_like(y) if tangent is None else tangent + 0.0 for y, tangent in pairs]  # with memory
        return tree_unflatten([y for y, _ in pairs], tree), tree_unflatten(tangents, tree)


def gradients_of_jvp(f: Callable[[Named], Any], x: Named, u: Named, by_outputs: Any, by_tangents: Any) -> tuple[Named, Named]:
    """The gradients by `x`, and by `u`, of `by_outputs` times f(x) and `by_tangents` times its tangent; None for zero."""
    with forward_mode(), torch.enable_grad():
        x, u = ({name: y.detach().requires_grad_() for name, y in named.items()} for named in (x, u))
        outputs = tree_leaves(f(x | {name: forward_ad.make_dual(x[name], y) for name, y in u.items()}))
        pairs = [forward_ad.unpack_dual(y) for y in outputs]
        ys = [*[y for y, _ in pairs], *[y for _, y in pairs]]
        by_leaf = _by_leaves(ys, [*x.values(), *u.values()], [*by_outputs, *by_tangents])
    return dict(zip(x, by_leaf[: len(x)], strict=True)), dict(zip(u, by_leaf[len(x) :], strict=True))


def _by_leaves(outputs: Sequence[Tensor | None], leaves: list[Tensor], by_outputs: Sequence[Tensor | None]) -> list[Tensor]:
    pairs = zip(outputs, by_outputs, strict=True)
    terms = [(y, grad.to(y.dtype).expand_as(y)) for y, grad in pairs if y is not None and grad is not None and y.requires_grad]
    if not terms:
        return [torch.zeros_like(leaf) for leaf in leaves]
    ys, grads = zip(*terms, strict=True)
    return list(torch.autograd.grad(ys, leaves, grads, allow_unused=True, materialize_grads=True))


def vjp(f: Callable[[Named], _Outputs], x: Named) -> tuple[_Outputs, Callable[[Sequence[Tensor | None]], Named]]:
    """f(x), and a function that takes `by_outputs` and gives the gradients of their product with f(x) by `x`; None for zero. Of
    tensors with tangents all have tangents."""
    no_cycles = _GraphlessTangents() if differentiates() else nullcontext()
    with _above_kernels(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(differentiates()), no_cycles:
        leaves = {name: y.view_as(y).requires_grad_() for name, y in x.items()}  # `detach` would drop tangents
        outputs = f(leaves)

    def pull(by_outputs: Sequence[Tensor | None]) -> Named:
        with _above_kernels(), forward_ad._set_fwd_grad_enabled(differentiates()):
            return dict(zip(x, _by_leaves(outputs, list(leaves.values()), by_outputs), strict=True))

    return outputs, pull


class _GraphlessTangents(TorchFunctionMode):
    """Drops the graphs of tangents. That of an exponential holds the exponential, which holds its tangent: a cycle that torch
    frees only with the level, so that all tiles of a pass would stay in memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for y in tree_leaves(result):
            tangent = forward_ad.unpack_dual(y).tangent if isinstance(y, Tensor) else None
            if tangent is not None and tangent.requires_grad and not tangent._is_view():
                tangent.detach_()
        return result


def outputs_and_gradients(
    f: Callable[[Named], _Outputs], x: Named, by_outputs: Sequence[Tensor | None] | Callable[[_Outputs], Sequence[Tensor | None]]
) -> tuple[_Outputs, Named]:
    """f(x), and the gradients of `by_outputs` times it by `x`. `by_outputs` may be a function of f(x)."""
    outputs, pull = vjp(f, x)
    if callable(by_outputs):
        with torch.no_grad():
            by_outputs = by_outputs(outputs)
    return outputs, pull(by_outputs)


def gradients(f: Callable[[Named], Sequence[Tensor | None]], x: Named, by_outputs: Sequence[Tensor | None]) -> Named:
    """The gradients alone."""
    return outputs_and_gradients(f, x, by_outputs)[1]


def tangents_of(run: Callable[[Any], Sequence[Tensor | None]], inputs: Any, kind: Any, fields: Sequence[str]) -> tuple[Any, ...]:
    """Returns the tangents of the outputs of run(x), where x, a `kind`, has the arguments of `inputs`, and None for others.

    Those of `fields` are in `inputs` as `<field>_tangent`; None stands for zero, and an output for None has none.
    """
    x = defaultdict(lambda: None, named(inputs))
    tangents = {field: x[f"{field}_tangent"] for field in fields}
    with forward_mode(), torch.no_grad():
        parts = [(name, x[name].detach().contiguous(), y) for name, y in tangents.items() if y is not None]
        duals = {name: forward_ad.make_dual(y, tangent.to(y.dtype)) for name, y, tangent in parts}  # which must not overlap
        pairs = [(None, None) if y is None else forward_ad.unpack_dual(y) for y in run(schema_of(kind).from_named(x | duals))]
        return tuple([y if y is None else torch.zeros_like(y) if u is None else u.to(y.dtype) for y, u in pairs])


def derivatives(
    forward: Callable[[Any], Tensor],
    backward: Callable[[Any], Sequence[Tensor | None]],
    kinds: tuple[Any, Any],
    fields: Sequence[str],
) -> tuple[Callable[[Any], tuple[Any, ...]], ...]:
    """Returns `jvp`, which gives the tangent of the result of `forward`, and `second`, which gives those of all gradients of
    `fields` by `backward`, the gradients of that tangent's product with `grad`. Both take inputs with tangents; `kinds` are the
    inputs of the two passes."""

    def jvp(inputs: Any) -> tuple[Any, ...]:
        return tangents_of(lambda x: (forward(x),), inputs, kinds[0], fields)

    def second(inputs: Any) -> tuple[Any, ...]:
        asked = {field: True for field in kinds[1]._fields if field.startswith("need_")}
        asked |= {"need_lse": inputs.lse_tangent is not None} if "need_lse" in asked else {}
        made = tangents_of(lambda x: backward(x._replace(**asked)), inputs, kinds[1], fields)
        given = map(named(inputs).get, fields)  # a backward pass gives None for a gradient that it leaves out
        return tuple([torch.zeros_like(x) if y is None and x is not None else y for x, y in zip(given, made, strict=True)])

    return jvp, second


@contextmanager
def forward_mode() -> Iterator[None]:
    """A level for tangents, or the caller's, since torch has no second one."""
    level = nullcontext() if has_forward_mode() else forward_ad.dual_level()
    before, _thread.differentiates = differentiates(), True
    try:
        with _above_kernels(), forward_ad._set_fwd_grad_enabled(True), level:
            yield
    finally:
        _thread.differentiates = before


def _above_kernels() -> Any:
    """The kernels of operators run below autograd, where graphs and tangents would be dropped."""
    excluded = _C._dispatch_tls_local_exclude_set() - _ABOVE
    return _C._ForceDispatchKeyGuard(_C._dispatch_tls_local_include_set(), excluded)


def differentiates() -> bool:
    """Returns whether a pass runs within `forward_mode`. A caller's level alone is none of a kernel's business."""
    return getattr(_thread, "differentiates", False)


_thread = threading.local()


# Of any device. Below a dispatch mode zero tangents without memory are no longer looked for, either
_ABOVE = functools.reduce(
    operator.or_, [_C.DispatchKeySet(getattr(_C.DispatchKey, name)) for name in ("AutogradCPU", "ADInplaceOrView", "ZeroTensor")]
)
