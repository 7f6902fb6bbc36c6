"""Chooses the backend of a call, and gives its functions.

It is the backend that the caller names, or the first that supports the call. Plans of calls are cached.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from operator import attrgetter, itemgetter
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, TypeVarTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from vlattn_fast import scores
from vlattn_fast._ground.checks import check_choice
from vlattn_fast._ground.tensors import as_outputs, mask_padding
from vlattn_fast.backends import native
from vlattn_fast.backends.cuda import _shared_library
from vlattn_fast.backends.inputs import named, replaced
from vlattn_fast.dispatch import call as calls
from vlattn_fast.dispatch.call import AttentionArguments, CallShape
from vlattn_fast.dispatch.table import BACKEND_NAMES, Table, refusals

Arguments = TypeVarTuple("Arguments")
Plan = TypeVar("Plan")
AUTO = os.environ.get("VLATTN_BACKEND", "auto")  # the backend that "auto" stands for, in calls of models, too


def select(backends: Table, call: CallShape, backend: Any) -> str:
    """Returns the name of the backend that runs `call`: `backend`, or for "auto" the first that supports it. Backends that lead
    are tried first.

    On the CPU "auto" takes no GPU kernel: Triton's interpreter and the host build of CUDA C++ are only for tests, by name. If the
    environment has VLATTN_BACKEND, its value replaces "auto". Raises ValueError with all reasons if the named backend does not
    support the call, and if a variable of the environment names a library that does not exist.
    """
    check_choice("backend", backend, BACKEND_NAMES)
    if backend == "auto" and AUTO != "auto":
        check_choice("VLATTN_BACKEND in the environment", AUTO, BACKEND_NAMES)
        backend = AUTO
    for name, library in (("cpu", native.library), ("cuda", _shared_library.library)):
        if library.error and (backend == name or (backend == "auto" and call.device_type == library.device_type)):
            raise ValueError(library.error)
    if backend == "auto":
        leading = [name for name, one in backends.items() if one.leads is not None and one.leads(call)]
        for name in (*leading, *backends):
            if not backends[name].refusals(call) and not (name in ("triton", "cuda") and call.device_type == "cpu"):
                return name
    reasons = refusals(backends, backend, call)
    if reasons:
        raise ValueError(f"backend={backend!r} cannot run {call}: {'; '.join(reasons)}")
    return str(backend)


def load(backends: Table, name: str) -> ModuleType:
    """Returns the backend's module."""
    module = backends[name].module
    return module if isinstance(module, ModuleType) else module()


def launcher(backends: Table, of_streaming: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `of_streaming`, a function of "streaming"; inputs that name another backend are given to its function of that name,
    if it has one."""
    name = of_streaming.__name__
    return lambda inputs: getattr(load(backends, inputs.backend), name, of_streaming)(inputs)


def gradients(backends: Table, of_streaming: Callable[..., Any]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Like `launcher`. The inputs have an attention, and may have tangents. Gradients have the layout of `as_outputs`."""
    name = of_streaming.__name__

    def run(inputs: Any) -> tuple[Tensor | None, ...]:
        chosen = inputs.backend if hasattr(load(backends, inputs.backend), name) else "streaming"
        if not backends[chosen].masks_padding and inputs.attention.key_mask is not None:
            given = named(inputs)
            keys = {each: given[each] for each in ("key", "value", "key_tangent", "value_tangent") if each in given}
            masked = mask_padding(inputs.attention.key_mask, *keys.values())
            inputs = replaced(inputs, **dict(zip(keys, masked, strict=True)))
        return as_outputs(getattr(load(backends, chosen), name)(inputs))

    return run


def planned(plan: Callable[[*Arguments], Plan], *arguments: *Arguments) -> Plan:
    """Returns plan(*arguments), cached for later calls with the same metadata.

    `arguments` are those of a public call. `plan` checks them, selects the backend, and uses no value of a tensor. So a call
    with the metadata of an earlier one skips all of that. Errors are not cached. Traced code caches nothing: its sizes are
    symbols.
    """
    key = None if torch.compiler.is_compiling() else _key(plan, arguments)
    if key is None:
        return plan(*arguments)
    chosen_plan: Plan | None = _PLANS.get(key)
    if chosen_plan is None:
        chosen_plan = plan(*arguments)
        if len(_PLANS) >= 4096:
            _PLANS.clear()
        _PLANS[key] = chosen_plan
    return chosen_plan


def selecting(backends: Table, describe: Callable[[*Arguments], CallShape]) -> Callable[[str, *Arguments], str]:
    """Returns a plan that is only the backend: `select` for the arguments that `describe` takes, after the caller's `backend`."""
    return lambda backend, *arguments: select(backends, describe(*arguments), backend)


_PLANS: dict[tuple[Any, ...], Any] = {}
_PLAIN = {str, bool, int, float, type(None)}


def _key(plan: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Returns plain values, and the metadata of tensors, including those in score functions and sequences: checks and limits use
    no more. None if they may: for subclasses of tensors, forward mode and torch.func, other options."""
    if type(arguments[0]) is AttentionArguments:
        arguments = *arguments[0], *arguments[1:]
    kinds = tuple(map(type, arguments))
    sorts = _SORTS.get(kinds) or _sort(kinds)
    if sorts.with_parts:
        for i, parts_of in sorts.with_parts:
            parts = parts_of(arguments[i])
            arguments, kinds = arguments + parts, kinds + tuple(map(type, parts))
        sorts = _SORTS.get(kinds) or _sort(kinds)
    if (
        not sorts.has_all
        or getattr(forward_ad, "_current_level", -1) >= 0
        or torch._C._functorch.maybe_current_level() is not None
    ):
        return None
    metadata: list[Any] = []
    try:
        for x in sorts.tensors(arguments):
            metadata += x.shape, x.dtype, x.device, x.layout, x.requires_grad
    except RuntimeError:  # of nested tensors, which have no shape
        return None
    return (
        plan,
        sorts.plain,  # stands for the types of all arguments: without them 1, 1.0 and True would be one key
        sorts.plain(arguments),
        torch.is_grad_enabled(),
        torch._C._is_any_autocast_enabled() and (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        calls.on_cpu,
        native.library.exists,
        _shared_library.library.exists,
        _shared_library.library.device_type,
        *metadata,
    )


Pick = Callable[[Any], tuple[Any, ...]]


def _fields(kind: type[scores.Score]) -> Pick:
    """Returns a function that returns the fields of such a score."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return attrgetter(*names) if len(names) > 1 else lambda score: tuple([getattr(score, name) for name in names])


def _items(x: Any) -> tuple[Any, ...]:
    """Returns the items of a sequence, flat, each sequence after its length."""
    items = [len(x)]
    for each in x:
        items += _items(each) if type(each) in (tuple, list) else (each,)
    return tuple(items)


_PARTS: dict[type, Pick] = {kind: _fields(kind) for kind in scores.SCORES.values()} | dict.fromkeys((tuple, list), _items)


class _Sorts(NamedTuple):
    """For values of some types: functions that pick the plain ones and the tensors; the indices of score functions and sequences,
    and functions that unpack them; whether there are no others. A subclass of tensors or score functions is another: it may have
    more metadata than its fields."""

    plain: Pick
    tensors: Pick
    with_parts: list[tuple[int, Pick]]
    has_all: bool


_SORTS: dict[tuple[type, ...], _Sorts] = {}


def _sort(kinds: tuple[type, ...]) -> _Sorts:
    plain, tensors = [[i for i, kind in enumerate(kinds) if kind in sort] for sort in (_PLAIN, {Tensor, Parameter})]
    with_parts = [(i, _PARTS[kind]) for i, kind in enumerate(kinds) if kind in _PARTS]
    has_all = len(plain) + len(tensors) + len(with_parts) == len(kinds)
    if len(_SORTS) >= 4096:
        _SORTS.clear()
    sorts = _SORTS[kinds] = _Sorts(_picking(plain), _picking(tensors), with_parts, has_all)
    return sorts  # another thread may clear them meanwhile


def _picking(numbers: list[int]) -> Pick:
    """Returns a function that takes a tuple and returns these items of it."""
    return itemgetter(*numbers) if len(numbers) > 1 else lambda values: tuple([values[i] for i in numbers])
