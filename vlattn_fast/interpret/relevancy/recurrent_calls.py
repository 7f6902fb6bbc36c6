"""Calls of the functions that the table of recurrences names, handed to the run that sees this thread."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from vlattn_fast.attach.current import RUNNING
from vlattn_fast.attach.handwritten import defining_class
from vlattn_fast.attach.recurrences.reading import Reader
from vlattn_fast.attach.recurrences.table import CLASSES, CONVOLUTIONS, FORWARDS, FUNCTIONS


def replacements(root: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """(object, attribute, function) for what the table names below `root`; for `overridden`. Each function runs as the model has
    it, and a run of this thread sees the call."""
    seen = set[int]()
    for module in root.modules():
        reader = next((CLASSES[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in CLASSES), None)
        written = FORWARDS.get(defining_class(type(module)).__name__)
        attribute = "_old_forward" if hasattr(module, "_hf_hook") and "_old_forward" in vars(module) else "forward"
        if reader is not None:
            yield module, attribute, _handed(reader, getattr(module, attribute))
        elif written is not None:
            yield module, attribute, functools.partial(_written, written, module, getattr(module, attribute))
        for target in _with_files(module):
            if id(target) in seen:
                continue
            seen.add(id(target))
            for name in named_in(target):
                reader = FUNCTIONS.get(name) or CONVOLUTIONS[name]
                yield target, name, _handed(reader, getattr(target, name))


def named_in(target: Any) -> list[str]:
    """The functions of the table among the attributes of a module of torch, or of a file."""
    if isinstance(target, nn.Module):  # as releases before had them; kernels that replace functions are submodules
        return [name for name, value in vars(target).items() if name in FUNCTIONS and callable(value)]
    return [name for name in (*FUNCTIONS, *CONVOLUTIONS) if callable(vars(target).get(name))]


def recurs(module: nn.Module) -> bool:
    """Whether the file of a module's class has a recurrence: then its short convolutions stand in front of it."""
    return any(name in FUNCTIONS for target in _with_files(module) for name in named_in(target)) or any(
        kind.__name__ in CLASSES for part in module.modules() for kind in type(part).__mro__
    )


def _with_files(module: nn.Module) -> list[Any]:
    """A module of torch, and the files of its classes."""
    files = [sys.modules.get(kind.__module__) for kind in type(module).__mro__ if kind not in (nn.Module, object)]
    return [module, *(file for file in files if file is not None)]


def _written(written: Callable[..., Any], module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The output of a forward that `written` takes the place of. Other threads run the model's own, maybe with a cache."""
    if getattr(RUNNING.get(), "recur", None) is None:
        return forward(*args, **kwargs)
    return written(module, _handed, *args, **kwargs)


class _Handed:
    """The function of a model, in whose place it stands."""

    def __init__(self, reader: Reader, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._reader, self._function = reader, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running: Any = RUNNING.get()
        recur = getattr(running, "recur", None)
        return self._function(*args, **kwargs) if recur is None else recur(self._reader, self._function, args, kwargs)


def _handed(reader: Reader, function: Any) -> _Handed:
    return function if isinstance(function, _Handed) else _Handed(reader, function)  # by another run
