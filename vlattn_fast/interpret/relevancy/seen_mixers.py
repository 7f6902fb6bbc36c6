"""Calls of recurrences and short convolutions, as a trace sees them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.attach.events import ModuleRun
from vlattn_fast.attach.observer import Observer
from vlattn_fast.attach.recurrences.reading import Convolution, FunctionCall, Reader, Reading, Recurrence
from vlattn_fast.attach.session import is_checkpointed, named
from vlattn_fast.attach.tensor_parallel import has_dtensors
from vlattn_fast.interpret.relevancy.mixing_call import MixingCall
from vlattn_fast.interpret.relevancy.recurrent_calls import recurs
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.traced_call import TracedCall
from vlattn_fast.interpret.relevancy.tracking.tensor_marks import TensorMarks

# The packages whose functions compute what their names say. Others may have another recurrence under such a name.
_KNOWN = ("transformers.", "vlattn_fast.")


class SeesMixers:
    """The part of a trace that takes these calls."""

    model: nn.Module
    observer: Observer
    _marks: TensorMarks
    _concerns: Callable[[str], bool]
    _marked_as: Callable[..., Tensor]
    _attend: Callable[[ModuleRun, TracedCall, int], tuple[Tensor, TowerTrace | None]]
    _attended: Callable[[TracedCall, TowerTrace | None, int, Tensor], None]

    def _begin_mixers(self) -> None:
        self._convolutions: dict[int, tuple[Reading, Tensor]] = {}  # by the module's run: the last one, and its output
        self._convolved = set[int]()  # the runs of modules that called torch's convolution themselves

    def on_recurrence(
        self, run: ModuleRun, reader: Reader, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The result as the model computes it; relevancy goes along."""
        path = run.path
        if path is None or not self._concerns(path):
            return NotImplemented
        module = self.model.get_submodule(path)
        call = FunctionCall(function, args, kwargs, module)
        is_foreign = not str(getattr(function, "__module__", "")).startswith(_KNOWN)
        try:
            with _unsaved():  # a checkpoint's second run has no reader
                reading = reader(call)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # of other arguments
            if is_foreign:
                raise _another(path, module) from error
            raise
        _check(reading, call, path)
        with self.observer.aside():
            result = function(*args, **kwargs)
            output, mixer = reading.output_of(result), reading.mixer
            if is_foreign and not _computes(mixer, call, output):
                raise _another(path, module)
        if isinstance(mixer, Convolution) and recurs(module):
            self._convolutions[run.number] = reading, output
            return reading.with_output(result, self._marked_as(output, mixer.value))
        if isinstance(mixer, Convolution) and not reading.alone:
            raise ValueError(
                f"model must recur by functions that are known; got {named(path, module)}, whose short convolution stands in "
                "front of a recurrence that is not seen, or of attention"
            )
        before = self._convolutions.get(run.number)
        if before is None and run.number in self._convolved and reading.channels is not None:
            raise _unseen_convolution(path, module)
        seen = _mixing_call(path, module, reading, output, before, self.observer.aside)
        with torch._C.DisableTorchFunction():
            if isinstance(mixer, Convolution):
                self._marked_as(seen.query, mixer.value, 3)
            calls = self._marks.calls((seen.query, seen.value))
            output, owner = self._attend(run, seen, calls)
            self._attended(seen, owner, calls, output)
        return reading.with_output(result, output[..., 0] if isinstance(mixer, Convolution) else output)


def _check(reading: Reading, call: FunctionCall, path: str) -> None:
    """ValueError where relevancy cannot go through a call of a module at `path`."""
    why = reading.refusal
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
        f"model must recur by functions that are known; got {named(path, module)}, whose function has the name of one of "
        "transformers, and has other arguments or computes something else. method='input_gradient' needs no rule"
    )


def _mixing_call(
    path: str,
    module: nn.Module,
    reading: Reading,
    output: Tensor,
    before: tuple[Reading, Tensor] | None,
    computing: Callable[[], AbstractContextManager[None]],
) -> MixingCall:
    """The call of a recurrence, or of a convolution alone.

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
    of_values = reading.convolution
    if of_values is None and reading.channels is not None:
        of_values = _in_front_of(path, module, mixer.value, reading.channels, before)
    return MixingCall(path, mixer.query, mixer.key, mixer.value, masks, mixer=mixer, convolution=of_values, run=run, ran=output)


def _in_front_of(
    path: str, module: nn.Module, value: Tensor, channels: slice, before: tuple[Reading, Tensor] | None
) -> Convolution | None:
    """The convolution that gave the values (B, H, N, Dv), of their channels; None without one."""
    if before is None:
        if any(isinstance(part, nn.Conv1d) for part in module.modules()):
            raise _unseen_convolution(path, module)
        return None
    (reading, output), count = before, value.shape[2]
    values = value.detach().transpose(2, 3).flatten(1, 2)
    convolved = (
        output.detach()[:, channels, -count:].to(values.dtype).masked_fill((values == 0).all(1, keepdim=True), 0)
    )  # padding
    if not torch.allclose(convolved, values, rtol=0, atol=0, equal_nan=True):
        raise ValueError(
            f"model must take its values from its short convolution as they are; got {named(path, module)}, which changes them"
        )
    assert isinstance(reading.mixer, Convolution)
    return reading.mixer.part(channels, count)


def _unseen_convolution(path: str, module: nn.Module) -> ValueError:
    where = named(path, module)
    return ValueError(f"model must call its short convolutions by causal_conv1d_fn; got {where}, whose own is not seen")


@contextlib.contextmanager
def _unsaved() -> Iterator[None]:
    """A context whose graph keeps its tensors itself, also inside of a checkpoint, whose second run would miss them."""
    if not is_checkpointed():
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield
