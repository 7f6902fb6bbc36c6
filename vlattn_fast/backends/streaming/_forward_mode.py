"""Tangents of a pass by forward mode through its tiles: beside each tensor of a tile is its tangent, and there is no graph.

So a pass in bounded memory has its derivative in bounded memory, too: a forward pass the tangents of its outputs, and a backward
pass the second derivative.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from vlattn_fast._ground.checks import has_forward_mode

Named = dict[str, Tensor]


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
        made = zip([*[y for y, _ in pairs], *[y for _, y in pairs]], [*by_outputs, *by_tangents], strict=True)
        terms = [(y, grad.to(y.dtype)) for y, grad in made if y is not None and grad is not None and y.requires_grad]
        leaves = [*x.values(), *u.values()]
        if not terms:
            gradients = [torch.zeros_like(leaf) for leaf in leaves]
        else:
            ys, grads = zip(*terms, strict=True)
            gradients = list(torch.autograd.grad(ys, leaves, grads, allow_unused=True, materialize_grads=True))
    return dict(zip(x, gradients[: len(x)], strict=True)), dict(zip(u, gradients[len(x) :], strict=True))


def tangents_of(run: Callable[[Any], Sequence[Tensor | None]], inputs: Any, kind: Any, fields: Sequence[str]) -> tuple[Any, ...]:
    """Returns the tangents of the outputs of run(x), where x, a `kind`, has the fields of `inputs`, and None for others.

    Those of `fields` are in `inputs` as `<field>_tangent`; None stands for zero, and an output for None has none.
    """
    x = kind._make([getattr(inputs, field, None) for field in kind._fields])
    tangents = {field: getattr(inputs, f"{field}_tangent") for field in fields}
    with forward_mode(), torch.no_grad():
        given = [(name, getattr(x, name).detach().contiguous(), y) for name, y in tangents.items() if y is not None]
        duals = {name: forward_ad.make_dual(y, tangent.to(y.dtype)) for name, y, tangent in given}  # which must not overlap
        made = [(None, None) if y is None else forward_ad.unpack_dual(y) for y in run(x._replace(**duals))]
        return tuple([y if y is None else torch.zeros_like(y) if tangent is None else tangent for y, tangent in made])


@contextmanager
def forward_mode() -> Iterator[None]:
    """A level for tangents, or the caller's, since torch has no second one. The kernels of operators run below autograd, where
    tangents would be dropped."""
    excluded = _C._dispatch_tls_local_exclude_set() - _ABOVE
    above = _C._ForceDispatchKeyGuard(_C._dispatch_tls_local_include_set(), excluded)
    level = nullcontext() if has_forward_mode() else forward_ad.dual_level()
    before, _thread.differentiates = differentiates(), True
    try:
        with above, forward_ad._set_fwd_grad_enabled(True), level:
            yield
    finally:
        _thread.differentiates = before


def differentiates() -> bool:
    """Returns whether a pass runs within `forward_mode`. A caller's level alone is none of a kernel's business."""
    return getattr(_thread, "differentiates", False)


_thread = threading.local()


# Of any device. Below a dispatch mode zero tangents without memory are no longer looked for, either
_ABOVE = functools.reduce(
    operator.or_, [_C.DispatchKeySet(getattr(_C.DispatchKey, name)) for name in ("AutogradCPU", "ADInplaceOrView", "ZeroTensor")]
)
