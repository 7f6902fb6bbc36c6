"""Tangents of a pass by forward mode through its tiles: beside each tensor of a tile is its tangent, and there is no graph.

So a pass in bounded memory has its derivative in bounded memory, too: a forward pass the tangents of its outputs, and a backward
pass the second derivative.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from vlattn_fast._ground.checks import has_forward_mode


def tangents_of(run: Callable[[Any], Sequence[Tensor]], inputs: Any, kind: Any, fields: Sequence[str]) -> tuple[Tensor, ...]:
    """Returns the tangents of the outputs of run(x), where x, a `kind`, has the fields of `inputs`, and None for others.

    Those of `fields` are in `inputs` as `<field>_tangent`; None stands for zero.
    """
    x = kind._make([getattr(inputs, field, None) for field in kind._fields])
    tangents = {field: getattr(inputs, f"{field}_tangent") for field in fields}
    with _forward_mode():
        duals = {name: forward_ad.make_dual(getattr(x, name).detach(), y) for name, y in tangents.items() if y is not None}
        made = [(y, forward_ad.unpack_dual(y).tangent) for y in run(x._replace(**duals))]
        return tuple([torch.zeros_like(y) if tangent is None else tangent for y, tangent in made])


@contextmanager
def _forward_mode() -> Iterator[None]:
    """A level for tangents, or the caller's, since torch has no second one. The kernels of operators run below autograd, where
    tangents would be dropped."""
    excluded = _C._dispatch_tls_local_exclude_set() - _ABOVE
    above = _C._ForceDispatchKeyGuard(_C._dispatch_tls_local_include_set(), excluded)
    level = nullcontext() if has_forward_mode() else forward_ad.dual_level()
    with above, torch.no_grad(), forward_ad._set_fwd_grad_enabled(True), level:
        yield


# Of any device. Below a dispatch mode zero tangents without memory are no longer looked for, either
_ABOVE = functools.reduce(
    operator.or_, [_C.DispatchKeySet(getattr(_C.DispatchKey, name)) for name in ("AutogradCPU", "ADInplaceOrView", "ZeroTensor")]
)
