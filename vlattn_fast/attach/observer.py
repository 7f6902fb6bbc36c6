"""The observer of a foreign model: it follows the modules that run and every attention call, and restores the model on exit.

A call reaches it in one of three ways. The model calls torch's scaled_dot_product_attention or nn.MultiheadAttention, or this
package's score_attention, which a mode of torch sees. transformers' attention interface hands it over, if `parts` of the model
name our function for the run. Or a module writes attention out by hand, which is followed (`attach.written`).

Each call is one `AttentionEvent`, which goes from subscriber to subscriber. `explain`, `intervene`, the losses on attention,
probes, prompt maps and QK-clip are subscribers.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vlattn_fast._ground.attachments import Records, add_hook, add_pre_hook
from vlattn_fast.attach.events import (
    RUNNING,
    SCORE_ATTENTION,
    SOFTMAX,
    Attend,
    AttentionEvent,
    ModuleRun,
    Subscriber,
    attention,
    first_argument,
)
from vlattn_fast.attach.multihead import heads, joined_masks
from vlattn_fast.attach.session import Steps, as_mode, overridden, visible
from vlattn_fast.attach.written import PRODUCTS, WrittenMaps, WrittenScores
from vlattn_fast.backends.inputs import ScoreAttentionInputs, schema_of
from vlattn_fast.ops._groups import bias_arguments
from vlattn_fast.ops._sinks import with_sink

_OF_THE_CALLER = (nn.Softmax, nn.Dropout)  # their caller computes the softmax


class _FastPath:
    """torch's process-wide switch for the fast path of nn.MultiheadAttention, as an attribute that `overridden` can set."""

    enabled = property(
        lambda _: torch.backends.mha.get_fastpath_enabled(), lambda _, value: torch.backends.mha.set_fastpath_enabled(value)
    )


_FAST_PATH = _FastPath()


class Observer(TorchFunctionMode):
    """A context in which `subscribers` are told of the runs of `model` in this thread and context.

    Args:
        model: the model, without wrappers.
        subscribers: in the order in which a call goes through them.
        parts: the parts of the model whose attention is replaced for the run, so that subscribers may compute it. None = the
            model runs unchanged, and subscribers only observe its attention; in a run of `va.intervene` the edited one.
        within: the part of the model whose modules have paths; "" = the whole model.
        starts: the modules whose run starts the observation; None = it observes everything.
        keeps_sdpa: configs of `parts` that name SDPA stay, since a mode of torch sees its calls.
        keeps_order: the patches of an image keep their order, which ViLT shuffles; in runs with `parts` they do in any case.
        further: (object, attribute, value) to set in the context, too.
        records: of the tensors of a run that `explains`; None = its own ones, of each pass.
    """

    def __init__(
        self,
        model: nn.Module,
        subscribers: Sequence[Subscriber],
        *,
        parts: Sequence[nn.Module] | None = None,
        within: str = "",
        starts: Iterable[nn.Module] | None = None,
        keeps_sdpa: bool = False,
        keeps_order: bool = False,
        further: Iterable[tuple[Any, str, Any]] = (),
        records: Records | None = None,
    ) -> None:
        super().__init__()
        self.model, self._subscribers, self._parts = model, tuple(subscribers), parts
        self.explains = any(each.explains for each in subscribers)
        self.trains = all(each.trains for each in subscribers)
        self.edits = next((each for each in subscribers if each.edits), None)
        self.of_user = any(each.of_user for each in subscribers)
        self._sees_all = all(each.sees_all for each in subscribers)
        self._paths, self._starts = ModulePaths(model, within), None if starts is None else {*starts}
        self._changes, self._keeps_order = (keeps_sdpa, further), keeps_order or parts is not None
        self._all, self._seeing_all = _Told(subscribers), _Told([each for each in subscribers if each.sees_all])
        self._told = self._all  # of functions of torch
        self.maps = WrittenMaps(records or Records(), keeps_graph=self.trains)
        self.runs: list[ModuleRun] = []  # under way, the outermost first
        self._count = 0  # of the runs so far
        self._before_sink: ScoreAttentionInputs | None = None  # of the operator that ran last, if a sink counts next
        self.is_over = True

    # --- the context, which is entered step by step; leaving undoes the steps that were taken, the last one first ---

    def __enter__(self) -> Self:
        ways_back = ExitStack()
        try:
            for way_back in self._steps():
                ways_back.callback(way_back)
        except BaseException:
            ways_back.close()
            raise
        self._ways_back = ways_back  # not before: entered within itself, it raises, and the outer one has its own
        return self

    def __exit__(self, *error: Any) -> None:
        self._ways_back.close()

    def _steps(self) -> Steps:
        for subscriber in self._subscribers:
            subscriber.before_run()
        self._thread, self._around = threading.get_ident(), RUNNING.get()
        changes = overridden([(_FAST_PATH, "enabled", False)])  # the fast path runs without calls of attention
        if self._parts is not None:
            keeps_sdpa, further = self._changes
            changes = visible(self._parts, keeps_sdpa, further)
        yield changes.__exit__
        changes.__enter__()
        yield self._end
        self.is_over = False
        self.runs[:] = [ModuleRun(None, "", 0)] if self._starts is None else []
        if self._parts is not None:
            RUNNING.set(self)
        else:
            _WATCHING.append(self)
        yield from as_mode(self)
        if self.explains:  # torch's global hooks also see modules of other models, which a hook may run
            yield add_pre_hook(None, self._enter_module)
            yield add_hook(None, self._leave_module, with_kwargs=True, always_call=True)
        else:  # and warn if a compiled model is called
            for module in self.model.modules():
                yield add_pre_hook(module, self.hook(self._enter_module), with_kwargs=True)
                yield add_hook(module, self.hook(self._leave_module), with_kwargs=True, always_call=True)
        for subscriber in self._subscribers:
            yield from subscriber.begins(self)

    def _end(self) -> None:
        self.is_over = True  # first: Ctrl-C may come in each of the calls below
        if RUNNING.last_set.get() == (threading.get_ident(), self):  # not in a finalizer, which may come in another run
            RUNNING.set(self._around)
        if self in _WATCHING:
            _WATCHING.remove(self)
        self.runs.clear()
        for subscriber in self._subscribers:
            subscriber.on_end()

    def is_on(self) -> bool:
        """Whether what runs now is observed: in this thread, and not in a run that began within and belongs to another
        observer."""
        if self._parts is not None:
            thread, last = RUNNING.last_set.get()
            return last is self and thread == threading.get_ident() and not self.is_over
        if threading.get_ident() != self._thread:
            return False
        running = RUNNING.get()
        return self._sees_all or running is None or running is self._around or running.of_user

    def hook(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook of a module, silent in runs that are not observed, and in copies of the model."""
        return _Hook(self, hook)

    # --- modules ---

    def _enter_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if isinstance(module, _OF_THE_CALLER) or not self.is_on():
            return
        begins_anew = module is self.model and not self.explains and not _runs_within_itself(module)
        if begins_anew:  # Ctrl-C may have left the pass before
            self.runs[:] = self.runs[:1] if self._starts is None else []
            self.maps = WrittenMaps(Records(), keeps_graph=self.trains)  # those of a run before have been multiplied
        around = self.runs[-1] if self.runs else None
        if around is not None:
            around.has_parts = True
            path = self._paths.of(module, around.path, around.number)
        elif module in (self._starts or ()):
            path = self._paths.of(module, None, 0)
        else:
            return  # a single part is not a forward pass of the model
        self._count += 1
        run = ModuleRun(module, path, self._count, around, begins_anew)
        self.runs.append(run)
        with torch._C.DisableTorchFunction():
            for on_enter in self._all.on_enter:
                on_enter(run, args, kwargs or {})

    def _leave_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(module, _OF_THE_CALLER) or not self.is_on() or module not in [run.module for run in self.runs]:
            return
        while (run := self.runs.pop()).module is not module:
            pass  # left by an error that the model has caught
        with torch._C.DisableTorchFunction():
            for on_leave in self._all.on_leave:
                on_leave(run, args, kwargs, output)

    # --- functions ---

    def _is_told(self) -> bool:
        """Whether it only watches, and the run that edits the attention tells it of the call that comes."""
        running = RUNNING.get()
        return self._parts is None and isinstance(running, Observer) and running.of_user and running._takes_calls()

    def _takes_calls(self) -> bool:
        """Whether a subscriber takes the attention that runs now."""
        return any(each.takes_calls() for each in self._subscribers)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # torch takes a mode off for each call, and may put it back after Ctrl-C in a run that has ended
        if self.is_over or not self.runs or not self.is_on():
            return func(*args, **kwargs)
        run, told = self.runs[-1], self._told
        takes_calls = bool(told.on_attention) and (not told.takes_calls or self._takes_calls())
        if takes_calls and func in _ATTENTION:
            if func is not functional.multi_head_attention_forward and self._is_told():
                return func(*args, **kwargs)
            if (attended := _ATTENTION[func](self, run, args, kwargs)) is not NotImplemented:
                return attended
        if func is torch.multinomial and self._keeps_order and _shuffles(run.module, args):
            return torch.arange(len(args[0]), device=args[0].device)
        result = NotImplemented
        for on_call in told.of_function(func) if func not in told.functions else told.functions[func]:
            result = on_call(run, func, args, kwargs)
            if result is not NotImplemented:
                break
        else:
            result = func(*args, **kwargs)
        if self.is_over or not (result is None or isinstance(result, (Tensor, tuple, list))) or isinstance(result, torch.Size):
            return result
        if takes_calls:
            if self._parts is None:
                self._scores(run, func, args, kwargs, result)
            elif func in SOFTMAX or self.maps.are_open:
                result = self._map(run, func, args, kwargs, result)
        for on_result in told.on_result:
            on_result(run, func, args, kwargs, result)
        return result

    # --- attention calls ---

    def _sdpa(self, run: ModuleRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sdpa = functional.scaled_dot_product_attention
        event = AttentionEvent.from_sdpa(run, args, kwargs)
        if event is not None:
            return self._answer(event, _computed if self._parts is not None else lambda _: sdpa(*args, **kwargs))
        if self._parts is not None:
            shapes = " and ".join(str(tuple(x.shape)) for x in (*args, *kwargs.values())[:2])
            raise ValueError(f"model must call attention with (B, H, N, D) tensors; got {shapes} in '{run.path}'")
        return sdpa(*args, **kwargs)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Any], module: nn.Module | None = None) -> Tensor:
        """The attention (B, H, N, Dv) of a call that transformers' interface hands over."""
        if not self._all.on_attention:
            return attention(query, key, value, masks)
        dropout_p = masks.pop("dropout_p", 0.0)
        event = AttentionEvent(self.runs[-1], query, key, value, masks, (query, key, value), dropout_p)
        output: Tensor = self._answer(event, _computed)
        return output

    def _score_attention(self, run: ModuleRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The operator's output and log-sum-exp. With a sink the attention ends afterwards, in `_with_sink`."""
        inputs = _SCHEMA.inputs(args)
        with self._unobserved():
            for subscriber in self._subscribers:
                inputs = subscriber.on_inputs(run, inputs)
            output, lse = SCORE_ATTENTION(*_SCHEMA.flat(inputs))
            for subscriber in self._subscribers:
                subscriber.on_lse(inputs, lse)
        if inputs.sink is not None:
            self._before_sink = inputs
            return output, lse
        return self._answer(replace(_scored(run, inputs), lse=lse), lambda _: output), lse

    def _with_sink(self, run: ModuleRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of the operator that ran last, with its sink; NotImplemented = none is waiting for one."""
        (output, lse, sink), inputs, self._before_sink = args, self._before_sink, None
        if inputs is None:
            return NotImplemented

        def compute(event: AttentionEvent) -> Tensor:
            assert event.lse is not None and event.sink is not None
            return with_sink(output, event.lse, event.sink)

        return self._answer(replace(_scored(run, inputs), sink=sink, lse=lse), compute)

    def _multihead(self, run: ModuleRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Projects query and key once more: nn.MultiheadAttention splits into heads in code that no mode sees. NotImplemented: a
        run that replaces attention, where it is an error of its subscriber."""
        if self._parts is not None:
            return NotImplemented
        forward = functional.multi_head_attention_forward
        bound = inspect.signature(forward).bind(*args, **kwargs)
        bound.apply_defaults()
        of = bound.arguments
        size = of["embed_dim_to_check"] // of["num_heads"]
        weights = of["q_proj_weight"], of["k_proj_weight"]
        if not of["use_separate_proj_weight"]:
            weights = of["in_proj_weight"].chunk(3)[:2]
        biases = (None, None) if of["in_proj_bias"] is None else of["in_proj_bias"].chunk(3)[:2]
        states = (x[:, None] if x.ndim == 2 else x for x in (of["query"], of["key"]))  # torch takes (N, C) as well as (N, B, C)
        # torch.utils.checkpoint counts saved tensors and runs the layer again unwatched, so its hooks must not see these tensors.
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            projected = [functional.linear(x.transpose(0, 1), w, b) for x, w, b in zip(states, weights, biases, strict=True)]
        query, key = (heads(x, size) for x in projected)
        masks = None
        if of["bias_k"] is None and not of["add_zero_attn"]:  # else there are more keys
            padding = of["key_padding_mask"]
            padding = padding[None] if padding is not None and padding.ndim == 1 else padding
            masks = {"attn_mask": joined_masks(query, 0, of["attn_mask"], padding), "is_causal": False, "scale": None}
        event = AttentionEvent(run, query, key, None, masks, (of["query"], of["key"], None), of["dropout_p"])
        return self._answer(event, lambda _: forward(*args, **kwargs))

    def _scores(self, run: ModuleRun, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Reports the softmax of a module over its own last product as a call."""
        if func in PRODUCTS and isinstance(result, Tensor) and result.ndim == 4:
            right = args[1] if len(args) > 1 else kwargs["other" if "other" in kwargs else "mat2"]
            run.product = WrittenScores(first_argument(args, kwargs), right, result)
        elif func in SOFTMAX:
            product, scores = run.product, first_argument(args, kwargs)
            if product is not None and product.shape == scores.shape:
                query, key = product.query, product.transposed_key
                masks = None if self._is_told() else product.masks(scores)  # which edits may change
                run.product = None
                event = AttentionEvent(run, query, key.transpose(-1, -2), None, masks, (query, key, None), written=product)
                for each in self._subscribers:
                    each.on_attention(event, lambda _: result)
        elif run.product is not None:
            run.product.follow(func, args, kwargs, result)

    def _map(self, run: ModuleRun, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """`result`, or the output of a call, if `result` is the product of a module's own map with values."""
        if func in SOFTMAX:
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            for heads_of_map in self._all.heads_of_map:
                if count := heads_of_map(run, result, dim, self.maps.count):
                    self.maps.take(run.path or "", result, None if result.ndim == 4 else count)
                    break
            return result
        product = self.maps.product(func, args, kwargs, result)
        if product is None:
            return result
        event = AttentionEvent(run, product.probabilities, product.value, product.value, {}, product.given, written=product)
        return self._answer(event, lambda _: product.output)

    def _answer(self, event: AttentionEvent, compute: Callable[[AttentionEvent], Any]) -> Any:
        """What the model continues with: the output of the call, computed by `compute`, after the subscribers."""
        watching = [_Watching(each) for each in [*_WATCHING] if each.runs and each.is_on()] if self.of_user else []
        subscribers = (*self._subscribers, *watching)
        with self._unobserved():
            output = self._through(subscribers, event, compute)
            result = output if self._parts is None else event.as_given(output)
            for subscriber in subscribers:
                subscriber.on_output(event, output, result)
        return result

    def _unobserved(self) -> AbstractContextManager[Any]:
        """A context in which a run does not observe its own computation; other modes may see what an unchanged model computes."""
        return nullcontext() if self._parts is None else torch._C.DisableTorchFunction()

    def _through(self, subscribers: Sequence[Subscriber], event: AttentionEvent, compute: Callable[[AttentionEvent], Any]) -> Any:
        if not subscribers:
            return compute(event)
        first, *others = subscribers
        return first.on_attention(event, lambda event: self._through(others, event, compute))

    # --- recurrences ---

    @property
    def recur(self) -> Callable[..., Any] | None:
        """Takes a call of a function in the table of recurrences; None = no subscriber needs it."""
        return self._recur if self._told.on_recurrence else None

    def _recur(self, reader: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.is_over:
            for on_recurrence in self._told.on_recurrence:
                result = on_recurrence(self.runs[-1], reader, function, args, kwargs)
                if result is not NotImplemented:
                    return result
        return function(*args, **kwargs)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A context in which only subscribers that see all are told of functions; other modes of torch see what runs."""
        before, self._told = self._told, self._seeing_all
        try:
            yield
        finally:
            self._told = before


class _Told:
    """The methods of some subscribers, by the event that they are told of."""

    def __init__(self, subscribers: Iterable[Subscriber]) -> None:
        def each(name: str) -> list[Any]:
            return [getattr(x, name) for x in subscribers if getattr(type(x), name) is not getattr(Subscriber, name)]

        self.on_enter, self.on_leave, self.on_call, self.on_result = map(each, ("on_enter", "on_leave", "on_call", "on_result"))
        self.on_attention, self.takes_calls = each("on_attention"), each("takes_calls")
        self.heads_of_map, self.on_recurrence = each("heads_of_map"), each("on_recurrence")
        self.functions: dict[Any, list[Any]] = {}  # by function of torch: the `on_call` that are told of it

    def of_function(self, func: Any) -> list[Any]:
        self.functions[func] = [on_call for on_call in self.on_call if on_call.__self__.takes_function(func)]
        return self.functions[func]


_SCHEMA = schema_of(ScoreAttentionInputs)
_ATTENTION: dict[Any, Callable[..., Any]] = {
    functional.scaled_dot_product_attention: Observer._sdpa,
    functional.multi_head_attention_forward: Observer._multihead,
    SCORE_ATTENTION: Observer._score_attention,
    with_sink: Observer._with_sink,
}
_WATCHING: list[Observer] = []  # those that only watch, of all threads


class _Watching(Subscriber):
    """An observer that only watches, told of the attention calls of an edited model, as they are computed. It follows attention
    that is written out by hand itself."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def on_attention(self, event: AttentionEvent, attend: Attend) -> Any:
        watching = self._observer
        if event.written is not None:
            return attend(event)
        return watching._through(watching._subscribers, replace(event, run=watching.runs[-1]), attend)

    def on_output(self, event: AttentionEvent, output: Any, result: Any) -> None:
        for subscriber in self._observer._subscribers:
            subscriber.on_output(event, output, result)


class ModulePaths:
    """The paths of the modules of `model` within a part of it, "" = the whole. A module that several parts share has several: in
    a run it has that of the part that calls it, and a list that holds it several times calls each in turn."""

    def __init__(self, model: nn.Module, within: str) -> None:
        self._names: dict[nn.Module, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            if not within or f"{path}.".startswith(f"{within}."):
                self._names.setdefault(module, []).append(path)
        self._times: Counter[tuple[int, nn.Module]] = Counter()  # how often a shared module ran within a run of another

    def of(self, module: nn.Module, around: str | None, run: int) -> str | None:
        """The path of a module that the one at `around` calls in its run number `run`; None = it is elsewhere."""
        names = self._names.get(module, [])
        if len(names) < 2:
            return names[0] if names else None
        names = [name for name in names if around and name.startswith(f"{around}.")] or names
        self._times[run, module] += 1
        return names[(self._times[run, module] - 1) % len(names)]


class _Hook:
    """A hook of a run. A model that is copied or pickled meanwhile copies its hooks: those of the copy do nothing."""

    def __init__(self, observer: Observer, hook: Callable[..., Any]) -> None:
        self._observer, self._hook = observer, hook

    def __call__(self, *args: Any) -> Any:
        observer = getattr(self, "_observer", None)
        return self._hook(*args) if observer is not None and observer.is_on() else None

    def __getstate__(self) -> None:
        return None


def _runs_within_itself(module: nn.Module) -> bool:
    """Whether a run of a module begins within another one of it, e.g. if a hook runs the whole model."""
    frame: FrameType | None = sys._getframe()
    count = 0
    while frame is not None:
        count += frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module
        frame = frame.f_back
    return count > 1


def _shuffles(module: Any, args: tuple[Any, ...]) -> bool:
    """Whether ViLT draws the positions of all its patches in the sequence at random."""
    kind = type(module)
    is_vilt = kind.__name__ == "ViltEmbeddings" and kind.__module__.startswith("transformers.")
    return is_vilt and len(args) == 2 and args[0].shape == (int(args[1]),)


def _scored(run: ModuleRun, inputs: ScoreAttentionInputs) -> AttentionEvent:
    """A call of score_attention."""
    x, value = inputs.attention, inputs.value
    masks = {name: getattr(x, name) for name in ("attn_mask", "key_mask", "is_causal", "scale")} | bias_arguments(x)
    return AttentionEvent(run, x.query, x.key, value, masks, (x.query, x.key, value), inputs.dropout_p, inputs=inputs)


def _computed(event: AttentionEvent) -> Tensor:
    """The call, computed by torch's function or by score_attention."""
    assert event.value is not None and event.masks is not None
    dropout = {"dropout_p": event.dropout_p} if event.dropout_p else {}
    return attention(event.query, event.key, event.value, {**event.masks, **dropout})
