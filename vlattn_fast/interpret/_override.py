"""Attributes that a run overrides on the modules of a model, counted, so that runs may overlap.

Several threads may explain one model, and a hook may explain the model that it belongs to. The first run over an attribute
saves it, and the last one puts it back.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

_ABSENT = object()


@dataclass
class _Overridden:
    target: Any  # held, so that no new object takes its id
    before: Any
    runs: int = 0


_lock = threading.Lock()
_overridden: dict[tuple[int, str], _Overridden] = {}


@contextlib.contextmanager
def overridden(changes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Within it, each (object, attribute, value) of `changes` holds.

    Where another run overrides the same attribute already, its value stays: all runs over a model ask for equal ones. What has
    the value anyway is left alone, as most modules of a model in eval mode are.
    """
    entered: list[tuple[int, str]] = []
    try:
        with _lock:
            for target, name, value in changes:
                if _enter(target, name, value):
                    entered.append((id(target), name))
        yield
    finally:
        with _lock:
            for key in reversed(entered):
                _leave(key)


def _enter(target: Any, name: str, value: Any) -> bool:
    """Whether there is something to put back."""
    held = _overridden.get((id(target), name))
    if held is None:
        # What a module inherits from its class is absent from the instance, and must be so again afterwards.
        before = vars(target).get(name, _ABSENT) if isinstance(target, nn.Module) else getattr(target, name)
        if before is value:
            return False
        setattr(target, name, value)
        held = _overridden[id(target), name] = _Overridden(target, before)
    held.runs += 1
    return True


def _leave(key: tuple[int, str]) -> None:
    held = _overridden[key]
    held.runs -= 1
    if held.runs:
        return
    del _overridden[key]
    if held.before is _ABSENT:
        delattr(held.target, key[1])
    elif getattr(held.target, key[1]) is not held.before:
        setattr(held.target, key[1], held.before)
