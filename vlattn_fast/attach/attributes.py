"""Attributes that a run overrides on the modules of a model, counted, so that runs may overlap.

Several threads may explain one model, and a hook may explain the model that it belongs to. The first run over an attribute
saves it, and the last one puts it back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

_ABSENT = object()


@dataclass
class _Overridden:
    target: Any  # held, so that no new object takes its id
    before: Any
    runs: int = 0


_lock = threading.Lock()
_overridden: dict[tuple[int, str], _Overridden] = {}


class overridden:  # noqa: N801 (used as a function is)
    """A context in which each (object, attribute, value) of `changes` holds.

    Where another run overrides the attribute already, its value stays: all runs over a model ask for equal values. Attributes
        that hold the value anyway are left alone, as in most modules of a model in eval mode.

    Ctrl-C may come while attributes are set or put back. A generator would then stay suspended as long as anybody holds the
    traceback, so the context is a class. Only Python's first step into `__exit__`, before its first line, is unprotected.
    """

    def __init__(self, changes: Iterable[tuple[Any, str, Any]]) -> None:
        self._changes, self._entered = changes, list[tuple[int, str]]()

    def __enter__(self) -> None:
        try:
            with _lock:
                for target, name, value in self._changes:
                    _enter(target, name, value, self._entered)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            _leave(self._entered)
        except KeyboardInterrupt:
            _leave(self._entered)  # the attributes that an interrupt left
            raise


def _enter(target: Any, name: str, value: Any, entered: list[tuple[int, str]]) -> None:
    """Notes in `entered` that the attribute is to be put back, then sets it."""
    key = (id(target), name)
    held = _overridden.get(key)
    if held is not None:
        held.runs += 1
        entered.append(key)  # no interrupt comes before the next line: Python looks for one after a call
        return
    # An attribute that a module inherits from its class must be absent from the instance again afterwards.
    before = vars(target).get(name, _ABSENT) if isinstance(target, nn.Module) else getattr(target, name)
    if before is not value:
        held = _Overridden(target, before, 1)
        _overridden[key] = held
        entered.append(key)
        setattr(target, name, value)


def _leave(entered: list[tuple[int, str]]) -> None:
    """Takes this run off each attribute of `entered`, last first; may be called again after an interrupt."""
    with _lock:
        while entered:
            key = entered[-1]
            held = _overridden[key]
            if held.runs == 1:
                _put_back(held.target, key[1], held.before)
                del _overridden[key]
            else:
                held.runs -= 1
            entered.pop()


def _put_back(target: Any, name: str, before: Any) -> None:
    if before is not _ABSENT:
        if getattr(target, name) is not before:
            setattr(target, name, before)
    elif name in vars(target):
        delattr(target, name)


def is_entered(mode: TorchFunctionMode) -> bool:
    """Whether torch still has the mode: Ctrl-C while torch hands a call to a mode may remove the mode."""
    return any(each is mode for each in _get_current_function_mode_stack())
