"""What an `Observer` tells its subscribers about a model: which modules run, and each attention call.

A call is one `AttentionEvent`, whether the model calls torch's scaled_dot_product_attention, nn.MultiheadAttention, transformers'
attention interface or this package's score_attention, or writes attention out by hand. `RUNNING` is the run that takes the calls
of this thread.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlattn_fast.attach.written import WrittenScores
from vlattn_fast.backends.inputs import ScoreAttentionInputs
from vlattn_fast.ops.score_attention import score_attention

_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(eq=False)
class ModuleRun:
    """A module that runs."""

    module: nn.Module | None  # None = what runs before the first module
    path: str | None  # of the module in the model; None = of another model, or of a part that is not observed
    number: int  # no other run of a module has it
    around: ModuleRun | None = None  # the run that it is within
    begins_anew: bool = False  # it is a pass of the whole model, within no other
    product: WrittenScores | None = None  # the module's last matmul, which may be the scores of attention
    lengths: list[Any] = field(default_factory=list)  # roots in it by which vectors get unit length: nodes of the graph
    magnitudes: set[Any] = field(default_factory=set)  # what is divided in it by a magnitude of another kind
    has_parts: bool = False  # modules ran within it


@dataclass(frozen=True, eq=False)
class AttentionEvent:
    """One attention call."""

    run: ModuleRun  # of the module that calls
    # (B, H, N, D), as the operators take it; keys and values of grouped-query attention have fewer heads. Of a written map that
    # is multiplied with values: the map, and twice the values.
    query: Tensor
    key: Tensor  # (B, H, M, D)
    value: Tensor | None  # (B, H, M, Dv); None = the call is known by its softmax, and the model goes on with the map
    # The options of the call for scaled_dot_product_attention and score_attention; None = attention that is written out by hand
    # does more than scale and mask its scores.
    masks: Mapping[str, Any] | None
    given: tuple[Any, Any, Any]  # query, key and value as the model has them
    dropout_p: float = 0.0
    inputs: ScoreAttentionInputs | None = None  # for a call of score_attention
    sink: Tensor | None = None  # the logit of its sink, which is applied afterwards
    lse: Tensor | None = None  # its log-sum-exp, which the sink joins
    written: Any = None  # for attention that is written out by hand: the `WrittenProduct`
    # What `TokenKinds` adds.
    kinds: int = 0  # the inputs that the tokens of the queries come from, as bits (TEXT, IMAGE)
    key_kinds: int = 0  # and those of the keys
    score: str = "dot"  # the core score
    again: bool = False  # the module has called attention with these kinds before in this run, e.g. for one image after another
    image: Tensor | None = None  # bool (N) or (B, N), which tokens of a joint sequence are of the image; None = not known

    @property
    def is_one_head(self) -> bool:
        """Whether the model has query, key and value as (B, N, D)."""
        return self.written is None and self.given[0].ndim == 3

    @classmethod
    def from_sdpa(cls, run: ModuleRun, args: Sequence[Any], kwargs: Mapping[str, Any]) -> AttentionEvent | None:
        """A call of scaled_dot_product_attention; None if the tensors have neither three nor four dimensions each."""
        options: dict[str, Any] = {"attn_mask": None, "is_causal": False, "scale": None, "enable_gqa": False}
        options |= {**dict(zip(_SDPA, args, strict=False)), **kwargs}
        given = options.pop("query"), options.pop("key"), options.pop("value")
        dropout_p, mask = options.pop("dropout_p", 0.0), options["attn_mask"]
        query, key, value = given
        if query.ndim == key.ndim == value.ndim == 3:
            query, key, value = (x.unsqueeze(1) for x in given)
            options["attn_mask"] = mask.unsqueeze(1) if mask is not None and mask.ndim == 3 else mask
        elif query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
            return None
        elif not options["enable_gqa"]:  # torch's function broadcasts batch and heads, as for multi-query attention
            shapes = [x.shape[:2] for x in given]
            if shapes.count(shapes[0]) < 3:
                shape = torch.broadcast_shapes(*shapes)
                query, key, value = (x.expand(*shape, -1, -1) for x in given)
        return cls(run, query, key, value, options, given, dropout_p)

    def as_given(self, output: Tensor) -> Tensor:
        """The output (B, H, N, Dv) in the shape in which the model goes on with it."""
        if self.written is not None:
            result: Tensor = self.written.as_product(output)
            return result
        return output.squeeze(1) if self.is_one_head else output


Attend = Callable[[AttentionEvent], Any]


class Subscriber:
    """What an `Observer` tells, for a subclass to override.

    `on_attention` gets a function that goes on: to the next subscriber, at the end to the model's own computation. If parts of
    the model are replaced, the output (B, H, N, Dv) that it returns replaces the model's.
    """

    explains: ClassVar[bool] = False  # it belongs to `explain`, and others do not observe its runs
    edits: ClassVar[bool] = False  # it changes the attention, as `intervene` does
    of_user: bool = False  # the user runs the edited model, so other observers that only watch are told of its attention
    trains: bool = True  # the model runs as it is, with its dropout
    sees_all: ClassVar[bool] = False  # it is told of functions that run aside, too, and of runs that others observe

    def before_run(self) -> None:
        """The observer is entered; an error prevents it."""

    def begins(self, observer: Any) -> Iterator[Callable[[], object]]:
        """What it attaches to the model itself: yields a function that undoes each step."""
        yield from ()

    def on_enter(self, run: ModuleRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module begins to run. In a run of `explain` without `kwargs`: torch's hooks of all modules do not get them."""

    def on_leave(self, run: ModuleRun, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A module ends; `output` is None if it failed."""

    def on_inputs(self, run: ModuleRun, inputs: ScoreAttentionInputs) -> ScoreAttentionInputs:
        """score_attention is called; returns what it computes with. The call follows."""
        return inputs

    def takes_calls(self) -> bool:
        """Whether it takes the attention that runs now. If no subscriber does, the model's functions run unchanged, and other
        modes of torch see them."""
        return True

    def on_attention(self, event: AttentionEvent, attend: Attend) -> Any:
        """An attention call."""
        return attend(event)

    def on_output(self, event: AttentionEvent, output: Any, result: Any) -> None:
        """The model goes on with `result`: the output of a call in the shape that the model asked for."""

    def on_lse(self, inputs: ScoreAttentionInputs, lse: Tensor) -> None:
        """score_attention also gave the model this log-sum-exp."""

    def takes_function(self, func: Any) -> bool:
        """Whether `on_call` is told of this function of torch; asked once a run."""
        return True

    def on_call(self, run: ModuleRun, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Another function of torch is called; NotImplemented = it runs, else the result that replaces the function's."""
        return NotImplemented

    def heads_of_map(self, run: ModuleRun, probabilities: Tensor, dim: Any, number: int) -> int:
        """The heads of a softmax (B, H, N, M) or (B * H, N, M) over `dim` that a module computes itself. It is then followed to
        its product with the values, an attention call with this `number` among the written ones; 0 = it is not followed."""
        return 0

    def on_result(self, run: ModuleRun, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Another function of torch gave this result: a tensor, several, or None. Not of a shape, a dtype or a number, which
        many calls give."""

    def on_recurrence(
        self, run: ModuleRun, reader: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A function in the table of recurrences is called; NotImplemented = it runs, else the result."""
        return NotImplemented

    def on_end(self) -> None:
        """The observer has ended, possibly with an error."""


class Attends(Protocol):
    """Takes the calls of transformers' attention interface during a run. `explains`: the run belongs to `explain`. `trains`: the
    model runs as it is, with its dropout. `edits`: what changes the attention in it, as `intervene` does, if anything. `of_user`:
    others observe it. `is_over`: it has ended, maybe in another thread, as the run of a generator that Python collects there."""

    explains: bool
    trains: bool
    of_user: bool
    is_over: bool
    edits: Any

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Any], module: nn.Module | None = None
    ) -> Tensor: ...


class _Running:
    """The innermost run of this thread and context.

    A run is only that of the thread that set it: a thread may have a copy of another one's context. Free-threaded Python starts
    each thread with one, other Pythons do so if they are asked (`-X thread_inherit_context=1`), and so does asyncio.to_thread.
    """

    def __init__(self) -> None:
        self.last_set = contextvars.ContextVar[tuple[int, Attends | None]]("vlattn_running", default=(0, None))

    def get(self) -> Attends | None:
        thread, run = self.last_set.get()
        return run if thread == threading.get_ident() and run is not None and not run.is_over else None

    def set(self, run: Attends | None) -> contextvars.Token[tuple[int, Attends | None]]:
        return self.last_set.set((threading.get_ident(), run))

    def reset(self, token: contextvars.Token[tuple[int, Attends | None]]) -> None:
        self.last_set.reset(token)


RUNNING = _Running()
SOFTMAX = (torch.softmax, functional.softmax, Tensor.softmax, torch.special.softmax)
SCORE_ATTENTION = torch.ops.vlattn.score_attention


def is_map(scores: Tensor, dim: Any) -> bool:
    """Whether a softmax is over the keys of attention maps: (B, H, N, M) with several queries, or (B, N, N)."""
    if dim not in (-1, scores.ndim - 1) or scores.shape[-2] == 1:
        return False
    return scores.ndim == 4 or (scores.ndim == 3 and scores.shape[1] == scores.shape[2])


class Plain:
    """Attends as torch does."""

    explains = trains = of_user = is_over = False
    edits: Any = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Any], module: nn.Module | None = None) -> Tensor:
        return attention(query, key, value, masks)


def edits_of(model: nn.Module | None) -> Any:
    """The edits of the attention of `model` in this thread (`intervening.editing`); None = no edits.

    Raises:
        ValueError: a run edits attention of another model, or `model` is None: the caller would not see its edits.
    """
    running: Any = RUNNING.get()
    if running is None or running.edits is None:
        return None
    if running.model is not model:
        raise ValueError(
            "model must not be inside of va.intervene when another run observes its attention; got a call inside. There, use "
            "only va.intervene, and va.explain with methods that use attention, both with the edited model"
        )
    return running.edits


def attention(query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> Tensor:
    """torch's scaled_dot_product_attention with these options, or score_attention if torch lacks one of them."""
    if not options.keys().isdisjoint(("softcap", "sink", "group_bias")):
        return score_attention(query, key, value, **options)
    return functional.scaled_dot_product_attention(query, key, value, **options)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """A context in which calls of transformers' attention interface become calls of torch, which every mode sees."""
    token = RUNNING.set(Plain())
    try:
        yield
    finally:
        RUNNING.reset(token)


def first_argument(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The first argument of a torch function, by position or by the name "input"."""
    return args[0] if args else kwargs["input"]
