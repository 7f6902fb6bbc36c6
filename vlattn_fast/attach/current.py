"""The run that sees this thread's attention calls."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlattn_fast.ops.score_attention import score_attention


class Attends(Protocol):
    """Takes the calls of transformers' attention interface during a run. `explains`: the run belongs to `explain`. `trains`: the
    model runs as it is, with its dropout. `edits`: what changes the attention in it, as `intervene` does, if anything."""

    explains: bool
    trains: bool
    edits: Any

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Any], module: nn.Module | None = None
    ) -> Tensor: ...


# The innermost run of this thread.
RUNNING: contextvars.ContextVar[Attends | None] = contextvars.ContextVar("vlattn_trace", default=None)
SOFTMAX = (torch.softmax, functional.softmax, Tensor.softmax)
SCORE_ATTENTION = torch.ops.vlattn.score_attention


def is_map(scores: Tensor, dim: Any) -> bool:
    """Whether a softmax is over the keys of attention maps: (B, H, N, M) with several queries, or (B, N, N)."""
    if dim not in (-1, scores.ndim - 1) or scores.shape[-2] == 1:
        return False
    return scores.ndim == 4 or (scores.ndim == 3 and scores.shape[1] == scores.shape[2])


class Plain:
    """Attends as torch does."""

    explains = trains = False
    edits: Any = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Any], module: nn.Module | None = None) -> Tensor:
        return attention(query, key, value, masks)


def edits_of(model: nn.Module | None) -> Any:
    """What edits the attention of `model` in this thread (`intervening.editing`); None = nothing does.

    Raises:
        ValueError: a run edits attention of another model, or `model` is None: the caller would not see its edits.
    """
    running: Any = RUNNING.get()
    if running is None or running.edits is None:
        return None
    if running.model is not model:
        raise ValueError(
            "model must be left by va.intervene before another run sees its attention; got a call inside of one. Put all edits "
            "into one intervene; inside of it, va.explain takes the edited model alone, by methods that read its attention"
        )
    return running.edits


def attention(query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> Tensor:
    """torch's scaled_dot_product_attention by its options, or score_attention where it has not all of them."""
    if not options.keys().isdisjoint(("softcap", "sink", "group_bias")):
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


def first_argument(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The first argument of a torch function, by position or by the name "input"."""
    return args[0] if args else kwargs["input"]
