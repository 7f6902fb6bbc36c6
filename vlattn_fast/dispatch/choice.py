"""Which backend runs a call: the one that the caller names, or the first without refusals. Choices are kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from vlattn_fast import scores
from vlattn_fast._ground.checks import check_choice
from vlattn_fast.backends import native
from vlattn_fast.backends.cuda import _shared_library
from vlattn_fast.dispatch import call as calls
from vlattn_fast.dispatch.call import Call
from vlattn_fast.dispatch.table import BACKEND_NAMES, Table

AUTO = os.environ.get("VLATTN_BACKEND", "auto")  # the backend that "auto" stands for, in calls of models, too


def select(backends: Table, call: Call, backend: Any) -> str:
    """The name of the backend that runs `call`: `backend`, or for "auto" the first without refusals.

    On the CPU "auto" takes no GPU kernel: Triton's interpreter and the host build of CUDA C++ are there for tests, by name. Where
    the environment has VLATTN_BACKEND, its value takes the place of "auto".
    Raises ValueError with all reasons where the named backend refuses the call, and where a variable of the environment names a
    library that is not there.
    """
    check_choice("backend", backend, BACKEND_NAMES)
    if backend == "auto" and AUTO != "auto":
        check_choice("VLATTN_BACKEND in the environment", AUTO, BACKEND_NAMES)
        backend = AUTO
    for name, library in (("cpu", native.library), ("cuda", _shared_library.library)):
        if library.error and (backend == name or (backend == "auto" and call.device_type == library.device_type)):
            raise ValueError(library.error)
    if backend == "auto":
        for name, candidate in backends.items():
            if not candidate.refusals(call) and not (name in ("triton", "cuda") and call.device_type == "cpu"):
                return name
    reasons = backends[backend].refusals(call)
    if reasons:
        raise ValueError(f"backend={backend!r} cannot run {call}: {'; '.join(reasons)}")
    return str(backend)


def choose(
    describe: Callable[..., Call], backends: Table, backend: Any, tensors: tuple[Any, ...], options: tuple[Any, ...]
) -> str:
    """select(backends, describe(*tensors, *options), backend) with a cache, where `describe` checks the arguments of the public
    call. A call with the key of an earlier one skips both. Errors are not cached. stacked_cross_attention, whose checks read
    values, and congruence_loss, whose arguments nest, call `select` directly.
    """
    key = None if torch.compiler.is_compiling() else _cache_key(describe, tensors, (*options, backend))
    chosen = None if key is None else _CHOSEN.get(key)
    if chosen is None:
        chosen = select(backends, describe(*tensors, *options), backend)
        if key is not None:
            if len(_CHOSEN) >= 4096:
                _CHOSEN.clear()
            _CHOSEN[key] = chosen
    return chosen


_CHOSEN: dict[tuple[Any, ...], str] = {}
_PLAIN = {str, bool, int, float, type(None)}
_SCORES = frozenset(scores.SCORES.values())


def _cache_key(describe: Callable[..., Call], tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that checks and refusals read, which is no tensor's values. None, so that nothing is cached, where they may read more:
    subclasses of tensors, forward-mode tangents, options that are neither plain values nor score functions."""
    kinds = tuple(map(type, options))  # since 1 is equal to True
    if not _PLAIN.issuperset(kinds):
        tensors, options = _unpack_scores(tensors, options)
        kinds = tuple(map(type, options))
    if not _PLAIN.issuperset(kinds) or getattr(forward_ad, "_current_level", -1) >= 0:
        return None
    properties: list[Any] = []
    for x in tensors:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            properties.append((x.is_nested or x.shape, x.dtype, x.device, x.layout, x.requires_grad))
        elif x is None:
            properties.append(x)
        else:
            return None
    return (
        describe,
        options,
        kinds,
        *properties,
        torch.is_grad_enabled(),
        torch._C._is_any_autocast_enabled() and (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        calls.on_cpu,
        native.library.exists,
        _shared_library.library.exists,
        _shared_library.library.device_type,
    )


def _unpack_scores(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Replaces a score function among the options by the name of its class and its fields. Fields that are tensors move to the
    tensors; their names stay among the options."""
    parameters: list[Any] = []
    plain: list[Any] = []
    for x in options:
        if type(x) not in _SCORES:  # a subclass may check more than its fields
            plain.append(x)
            continue
        plain.append(type(x).__name__)
        for name, value in vars(x).items():
            if isinstance(value, Tensor):
                parameters.append(value)
                plain.append(name)
            else:
                plain.append(value)
    return (*tensors, *parameters), tuple(plain)
