"""Calls of recurrences and short convolutions, as a trace gets them, and the modules that it does not support."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.attach.events import RUNNING
from vlattn_fast.attach.handwritten import defining_class
from vlattn_fast.attach.recurrences.reading import Convolution, FunctionCall, Reader, Reading, Recurrence
from vlattn_fast.attach.recurrences.table import CLASSES, CONVOLUTIONS, FORWARDS, FUNCTIONS
from vlattn_fast.attach.session import is_checkpointed, named
from vlattn_fast.attach.tensor_parallel import has_dtensors
from vlattn_fast.interpret.relevancy.mixing_call import MixingCall

# The packages whose functions compute what their names say. Others may have another recurrence under such a name.
_KNOWN = ("transformers.", "vlattn_fast.")
# By the end of the class's name: attention that is not a softmax of one map over tokens.
_ATTENTION = {
    "DeformableAttention": "which samples values at a few learned points and has no softmax over keys",
    "BiMultiHeadAttention": "which takes two softmaxes of one clamped score matrix, over its rows and over its columns",
    "CvtSelfAttention": "which makes queries, keys and values by convolutions over tokens",
    "NystromformerSelfAttention": "which multiplies three maps over landmarks, and adds a convolution over tokens",
}
# And what mixes tokens in parallel to attention.
_MIXERS = {
    "ConvBertSelfAttention": "which adds a convolution over tokens to attention",
    "ShortConvolution": "which mixes neighbouring tokens in parallel to attention",
    "MobileBertEmbeddings": "which joins each token with its neighbours before attention",
    "BridgeTowerLinkTower": "which adds up two streams of the same tokens, whose relevancies no published rule joins",
}
# Modules with a recurrence or a short convolution over tokens, by the end of the class's name. The functions that
# they call for it are in `attach.recurrences`.
RECURRENT = (
    *("MambaMixer", "Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "MambaLayer"),
    *("GatedDeltaNet", "DeltaAttention", "LightningAttention", "RecurrentBlock", "ShortConv", "xLSTMLayer"),
    *("RwkvSelfAttention", "RwkvFeedForward"),
)


def run_call(
    reader: Reader, call: FunctionCall, path: str, aside: Callable[[], AbstractContextManager[None]]
) -> tuple[Any, Reading, Tensor]:
    """The result of a model's call, computed as the model does, `aside` of the trace; what the call is, and the output of its
    mixer. ValueError if relevancy cannot go through it."""
    is_foreign = not str(getattr(call.function, "__module__", "")).startswith(_KNOWN)
    try:
        with _unsaved():  # a checkpoint's second run has no reader
            reading = reader(call)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # of other arguments
        if is_foreign:
            raise _another(path, call.module) from error
        raise
    _check(reading, call, path)
    with aside():
        result = call.function(*call.args, **call.kwargs)
        output = reading.output_of(result)
        if is_foreign and not _computes(reading.mixer, call, output):
            raise _another(path, call.module)
    return result, reading, output


def _check(reading: Reading, call: FunctionCall, path: str) -> None:
    """ValueError if relevancy cannot go through a call of a module at `path`."""
    why = reading.unsupported
    if has_dtensors(call.module):
        why = "has its heads in several processes. Run it in one"
    if why:
        raise ValueError(f"model must run each layer on its whole sequence; got {named(path, call.module)}, which {why}")


@torch.no_grad()
def _computes(mixer: Recurrence | Convolution, call: FunctionCall, output: Tensor) -> bool:
    """Whether a function's output is what its name stands for."""
    expected = mixer.outputs() if isinstance(mixer, Recurrence) else mixer.outputs(call["bias"])
    return output.shape == expected.shape and not (output.to(expected) - expected).norm() > 0.05 * expected.norm()


def _another(path: str, module: nn.Module) -> ValueError:
    return ValueError(
        f"model must use supported functions for its recurrence; got {named(path, module)}, whose function has the name of one "
        "in transformers, but other arguments or another result. method='input_gradient' supports any layer"
    )


def mixing_call(
    path: str,
    module: nn.Module,
    reading: Reading,
    output: Tensor,
    before: tuple[Reading, Tensor] | None,
    computing: Callable[[], AbstractContextManager[None]],
) -> MixingCall:
    """The call of a recurrence, or of only a convolution.

    Args:
        output: as the model computed it.
        before: the short convolution that the module called last, and its output; None = none.
        computing: a context in which the model's function runs once more.
    """

    def run(value: Tensor) -> Tensor:
        with computing():
            return reading.output_of(reading.run(value))

    mixer, masks = reading.mixer, {"attn_mask": None}
    if isinstance(mixer, Convolution):
        value = mixer.value[..., None]
        return MixingCall(path, value, value, value, masks, mixer=mixer, run=run, ran=output[..., None])
    convolution = reading.convolution
    if convolution is None and reading.channels is not None:
        convolution = _convolution_before(path, module, mixer.value, reading.channels, before)
    return MixingCall(path, mixer.query, mixer.key, mixer.value, masks, mixer=mixer, convolution=convolution, run=run, ran=output)


def _convolution_before(
    path: str, module: nn.Module, value: Tensor, channels: slice, before: tuple[Reading, Tensor] | None
) -> Convolution | None:
    """The convolution that gave the values (B, H, N, Dv), of their channels; None without one."""
    if before is None:
        if any(isinstance(part, nn.Conv1d) for part in module.modules()):
            raise unseen_convolution(path, module)
        return None
    (reading, output), count = before, value.shape[2]
    values = value.detach().transpose(2, 3).flatten(1, 2)
    convolved = (
        output.detach()[:, channels, -count:].to(values.dtype).masked_fill((values == 0).all(1, keepdim=True), 0)
    )  # padding
    if not torch.allclose(convolved, values, rtol=0, atol=0, equal_nan=True):
        raise ValueError(
            f"model must use the output of its short convolution unchanged as values; got {named(path, module)}, which changes it"
        )
    assert isinstance(reading.mixer, Convolution)
    return reading.mixer.part(channels, count)


def unseen_convolution(path: str, module: nn.Module) -> ValueError:
    where = named(path, module)
    return ValueError(f"model must call its short convolutions with causal_conv1d_fn; got {where}, whose own cannot be traced")


@contextlib.contextmanager
def _unsaved() -> Iterator[None]:
    """A context whose graph keeps its tensors itself, also inside of a checkpoint, whose second run would miss them."""
    if not is_checkpointed():
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield


# --- what replaces these functions during a run ---


def replacements(root: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """(object, attribute, function) for what the table names below `root`; for `overridden`. Each function runs as the model has
    it, and the run of this thread gets the call."""
    seen = set[int]()
    of_classes: dict[type[nn.Module], tuple[Reader | None, Any, list[Any]]] = {}
    for module in root.modules():
        kind = type(module)
        if kind not in of_classes:
            reader = next((CLASSES[base.__name__] for base in kind.__mro__ if base.__name__ in CLASSES), None)
            of_classes[kind] = reader, FORWARDS.get(defining_class(kind).__name__), _files(kind)
        reader, written, files = of_classes[kind]
        attribute = "_old_forward" if hasattr(module, "_hf_hook") and "_old_forward" in vars(module) else "forward"
        if reader is not None:
            yield module, attribute, _handed(reader, getattr(module, attribute))
        elif written is not None:
            yield module, attribute, functools.partial(_run_written, written, module, getattr(module, attribute))
        for target in files if FUNCTIONS.keys().isdisjoint(vars(module)) else (module, *files):
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
    """Whether the file of a module's class has a recurrence: then its short convolutions stand before it."""
    return any(name in FUNCTIONS for target in (module, *_files(type(module))) for name in named_in(target)) or any(
        kind.__name__ in CLASSES for part in module.modules() for kind in type(part).__mro__
    )


def _files(kind: type[nn.Module]) -> list[Any]:
    """The files of a class and of its bases."""
    files = [sys.modules.get(base.__module__) for base in kind.__mro__ if base not in (nn.Module, object)]
    return [file for file in files if file is not None]


def _run_written(written: Callable[..., Any], module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The output of a forward that `written` replaces. Other threads run the model's own, maybe with a cache."""
    if getattr(RUNNING.get(), "recur", None) is None:
        return forward(*args, **kwargs)
    return written(module, _handed, *args, **kwargs)


class _Handed:
    """Replaces a function of a model, and passes its calls to the run."""

    def __init__(self, reader: Reader, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._reader, self._function = reader, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running: Any = RUNNING.get()
        recur = getattr(running, "recur", None)
        return self._function(*args, **kwargs) if recur is None else recur(self._reader, self._function, args, kwargs)


def _handed(reader: Reader, function: Any) -> _Handed:
    return function if isinstance(function, _Handed) else _Handed(reader, function)  # by another run


def check_rules(model: nn.Module, parts: Sequence[str], mixers: bool = True) -> None:
    """ValueError, naming the modules, if the rules for relevancy do not cover the parts of `model` at these paths: their
    attention, and with `mixers` what mixes tokens in parallel to it."""
    uncovered: dict[str, str] = {}
    reasons = _ATTENTION | _MIXERS if mixers else _ATTENTION
    below = ((name, module) for part in parts for name, module in model.get_submodule(part).named_modules(prefix=part))
    for name, module in below:
        kind = type(module).__name__
        for ending, reason in reasons.items():
            if kind.endswith(ending) and getattr(module, "trigram_input", True):  # of MobileBERT
                uncovered.setdefault(ending, f"'{name}' ({kind}), {reason}")
    if uncovered:
        raise ValueError(
            f"towers must only have modules that a published rule covers; got {'; '.join(uncovered.values())}. "
            "method='input_gradient' supports any module"
        )


def check_recurrences(ran: Mapping[str, nn.Module], called: Sequence[str]) -> None:
    """ValueError, naming the module, if a recurrence among the modules that ran is not among those that `called` one that is
    traced: in parallel to attention in the same layer it would be left out."""
    # a class of a user may be built on one of them
    kinds = {kind: any(base.__name__.endswith(RECURRENT) for base in kind.__mro__) for kind in {*map(type, ran.values())}}
    for path, module in ran.items():
        if kinds[type(module)] and not any(f"{caller}.".startswith(f"{path}.") for caller in called):
            raise ValueError(
                f"model must use supported functions for its recurrence; got {named(path, module)}, whose recurrence cannot be "
                "traced. method='input_gradient' supports any layer"
            )
