"""Marks on tensors: names of attributes, and bits that a result takes over from what it was computed from."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

_numbers = itertools.count()


def new_mark(name: str) -> str:
    """A new name for the marks of a run on tensors; an id() would not do: models may keep tensors that earlier runs marked."""
    return f"_vlattn_{name}_{next(_numbers)}"


def read_mark(values: Iterable[Any], mark: str) -> int:
    """The union of the bits that the tensors in `values`, also in nested tuples and lists, have as `mark`."""
    bits = 0
    for value in values:
        if isinstance(value, Tensor):
            bits |= getattr(value, mark, 0)
        elif isinstance(value, (tuple, list)):
            bits |= read_mark(value, mark)
    return bits


def add_mark(value: Any, mark: str, bits: int, keep: bool = True) -> None:
    """Marks a tensor, or each in a tuple, list or mapping, with `bits`, in addition to those that it has if they are to stay."""
    if isinstance(value, Tensor):
        setattr(value, mark, bits | (getattr(value, mark, 0) if keep else 0))
    elif isinstance(value, (tuple, list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            add_mark(part, mark, bits, keep)
