"""The run that sees this thread's attention calls, and the marks of a run on tensors."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlattn_fast.ops.score_attention import score_attention


class Attends(Protocol):
    """Takes the calls of transformers' attention interface during a run. `explains`: the run belongs to `explain`. `trains`: the
    model runs as it is, with its dropout."""

    explains: bool
    trains: bool

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Any], module: nn.Module | None = None
    ) -> Tensor: ...


# The innermost run of this thread.
RUNNING: contextvars.ContextVar[Attends | None] = contextvars.ContextVar("vlattn_trace", default=None)
_numbers = itertools.count()
SOFTMAX = (torch.softmax, functional.softmax, Tensor.softmax)
SCORE_ATTENTION = torch.ops.vlattn.score_attention


class Plain:
    """Attends as torch does."""

    explains = trains = False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Any], module: nn.Module | None = None) -> Tensor:
        return attention(query, key, value, masks)


def attention(query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> Tensor:
    """torch's scaled_dot_product_attention by its options, or score_attention where a softcap or a sink is among them."""
    if "softcap" in options or "sink" in options:
        return score_attention(query, key, value, **options)
    return functional.scaled_dot_product_attention(query, key, value, **options)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """A context in which calls of transformers' attention interface become calls of torch, which any mode sees."""
    token = RUNNING.set(Plain())
    try:
        yield
    finally:
        RUNNING.reset(token)


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
    """Marks a tensor, or each in a tuple, list or mapping, with `bits`, beside those that it has if they are to be kept."""
    if isinstance(value, Tensor):
        setattr(value, mark, bits | (getattr(value, mark, 0) if keep else 0))
    elif isinstance(value, (tuple, list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            add_mark(part, mark, bits, keep)


def first_argument(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The first argument of a torch function, by position or by the name "input"."""
    return args[0] if args else kwargs["input"]
