"""A model during one run of `explain`: unwrapped, in eval mode, its attention visible to a trace; the paths of its modules."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from vlattn_fast.attach.events import edits_of, plain
from vlattn_fast.attach.handwritten import replacements
from vlattn_fast.attach.transformers_interface import configs, sdpa_function

P = ParamSpec("P")
R = TypeVar("R")
_INDEX = re.compile(r"^(?:(.*)\.)?(\d+)(?:\.|$)")

# --- attributes ---

_ABSENT = object()


@dataclass
class _Overridden:
    target: Any  # a reference, so that no new object takes its id
    before: Any
    runs: int = 0


_lock = threading.RLock()
_overridden: dict[tuple[int, str], _Overridden] = {}
_ended: list[list[tuple[int, str]]] = []  # what runs entered that have ended, until their attributes are put back


class overridden:  # used as a function is
    """A context in which each (object, attribute, value) of `changes` holds.

    Several threads may explain one model, and a hook may explain the model that it belongs to: the first run over an attribute
    saves it, and the last one puts it back. All runs over a model set equal values. Attributes that have the value already are
    not set, as in most modules of a model in eval mode.

    Ctrl-C may come while attributes are set or put back. A generator would then stay suspended as long as somebody holds the
    traceback, so the context is a class. Only Python's first step into `__exit__`, before its first line, is unprotected.

    Python may collect a generator that is suspended in such a context while this thread enters or leaves another one: its
    attributes are put back after that.
    """

    def __init__(self, changes: Iterable[tuple[Any, str, Any]]) -> None:
        self._changes, self._entered = changes, list[tuple[int, str]]()

    def __enter__(self) -> None:
        try:
            with _lock:
                for target, name, value in self._changes:
                    _enter(target, name, value, self._entered)
            _put_back()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: Any) -> None:
        _ended.append(self._entered)
        try:
            _put_back()
        except KeyboardInterrupt:
            _put_back()  # the attributes that an interrupt left
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


def _put_back() -> None:
    """Takes ended runs off each attribute that they entered, last first; may be called again after an interrupt. Does nothing
    in a finalizer while its thread holds the lock, and calls it afterwards."""
    while _ended and not _lock._is_owned():  # type: ignore[attr-defined]
        with _lock:
            while _ended:
                try:
                    _leave(_ended[0])
                except Exception:  # not to be tried again, as after an interrupt
                    del _ended[0]
                    raise
                del _ended[0]


def _leave(entered: list[tuple[int, str]]) -> None:
    while entered:
        key = entered[-1]
        held = _overridden[key]
        if held.runs > 1:
            held.runs -= 1
        else:
            if held.before is _ABSENT:
                vars(held.target).pop(key[1], None)
            elif getattr(held.target, key[1]) is not held.before:
                setattr(held.target, key[1], held.before)
            del _overridden[key]
        entered.pop()


# --- the model ---


def never_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, run as plain Python even in code that torch.compile compiles (a graph break)."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # `disable` imports Dynamo, which takes seconds
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def unwrapped(model: Any) -> nn.Module:
    """The model inside the wrappers of torch.compile, DataParallel, DDP and PEFT, or inside a pipeline. TypeError if there is
    no module, ValueError if PEFT prepends prompts, which the inner model lacks."""
    while True:
        if isinstance(model, nn.Module) and isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            if model.active_peft_config.is_prompt_learning:
                raise ValueError(f"model must take its prompts as inputs; got PEFT's {model.active_peft_config.peft_type}")
            model = model.get_base_model()
        elif not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
            model = model.model
        else:
            break
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share the model's weights by FSDP, so that all of them have to run it together."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(
        isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)) for module in model.modules()
    )


def check_has_gradients(model: nn.Module) -> None:
    """ValueError for a model made under inference mode, whose parameters torch excludes from every backward pass."""
    name = next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None)
    if name is not None:
        raise ValueError(
            f"model must be made outside of torch.inference_mode (or inside of torch.inference_mode(False)); got '{name}' "
            "made under it"
        )


@contextlib.contextmanager
def dispatched(model: nn.Module) -> Iterator[None]:
    """A context in which `model` attends by calls of scaled_dot_product_attention or score_attention, for torch's modes."""
    edits_of(None)
    with visible([model]), plain():
        yield


def visible(roots: Sequence[nn.Module], keeps_sdpa: bool = False, further: Iterable[tuple[Any, str, Any]] = ()) -> overridden:
    """A context in which a run can observe the attention below `roots`. `further`: changes to make in it, too."""
    return overridden(chain(configs(roots, keeps_sdpa), *(chain(replacements(root), _switches(root)) for root in roots), further))


def _switches(root: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for module in root.modules():
        # This package's models have an attribute `attention_function`.
        attends = vars(module).get("attention_function") or getattr(type(module), "attention_function", None)
        if callable(attends):
            yield module, "attention_function", sdpa_function
        # timm's attention calls torch's if its flag `fused_attn` is set, and otherwise writes it out by hand.
        if "fused_attn" in vars(module):  # even if another run has set the flag: that run may end first
            yield module, "fused_attn", True


def _plainly(modules: Iterable[nn.Module]) -> Iterator[tuple[Any, str, Any]]:
    """Runs compiled modules and functions as plain Python, in all threads: compiled code shows no attention."""
    for module in modules:
        if "_compiled_call_impl" in vars(module):
            yield module, "_compiled_call_impl", None
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    if hasattr(frames, "_stance") and hasattr(frames, "DynamoStance"):
        yield frames, "_stance", frames.DynamoStance("force_eager")


class uncompiled(overridden):  # used as a function is
    """A context in which a compiled model and its compiled parts run as plain Python; the last run puts everything back.

    Inside a compiled function this thread runs plain Python as well: Dynamo would trace the observing code, and may repeat sums.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__([*_plainly(model.modules())])

    def __enter__(self) -> None:
        self._tracer = set_eval_frame(None)
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        set_eval_frame(self._tracer)


def at_rest(model: nn.Module) -> overridden:
    """A context with the model in eval mode, frozen and not compiled; the last run over the model puts everything back."""
    # A compiled module shares the attributes of the module that it wraps, and `modules` lists that module as well.
    modules = list(model.modules())
    modes = [(module, "training", False) for module in modules if "_orig_mod" not in module._modules]
    # Tensors made under inference mode have no gradients, and torch does not let their flag be set outside of that mode.
    frozen = [(parameter, "requires_grad", False) for parameter in model.parameters() if not parameter.is_inference()]
    return overridden([*modes, *frozen, *_plainly(modules)])


# --- a run ---

Steps = Iterator[Callable[[], object]]  # what undoes each step, if possible before the step: Ctrl-C may come in between


def as_mode(mode: TorchFunctionMode) -> Steps:
    """The step by which torch hands its calls to `mode`. Ctrl-C while it does may have removed the mode, and modes that came
    later, such as those of callbacks that end in the order in which they began, may still be there."""

    def remove() -> None:
        later = []
        while any(each is mode for each in _get_current_function_mode_stack()):
            top = _pop_mode()
            if top is not mode:
                later.append(top)
        for each in reversed(later):
            _push_mode(each)

    yield remove
    TorchFunctionMode.__enter__(mode)


# --- the path of a module ---


def in_layers(path: str) -> bool:
    """Whether a module's path goes through a list of layers."""
    return _INDEX.match(path) is not None


def layers_of(path: str) -> str:
    """The innermost list of layers on a module's path: "encoder.layers" for "encoder.layers.3.attn". Otherwise the path
    itself."""
    return split_path(path)[0]


def split_path(path: str) -> tuple[str, int]:
    numbered = _INDEX.match(path)
    return (path, 0) if numbered is None else (numbered[1] or "", int(numbered[2]))


def named(path: str, module: nn.Module) -> str:
    """A module in an error."""
    return f"'{path}' ({type(module).__name__})"


def is_checkpointed() -> bool:
    """Whether torch.utils.checkpoint will run this part again in the backward pass, where no trace sees it."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", "")
