"""A call through which tokens reach one another without a softmax: a recurrence, maybe behind a short convolution, or the
convolution alone. It does for relevancy what an attention call does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.attach.recurrences.reading import Convolution, FunctionCall, Reading
from vlattn_fast.attach.session import is_checkpointed
from vlattn_fast.attach.tensor_parallel import has_dtensors
from vlattn_fast.interpret.relevancy.traced_call import Recursion, Through, TracedCall
from vlattn_fast.ops.recurrent_step import recurrent_step

_GATES = ("log_decay", "beta", "diagonal")


@dataclass(frozen=True, eq=False)
class MixingCall(TracedCall):
    """One call of a recurrence or of a convolution. Its query, key and value are those of the map; of a convolution alone, whose
    channels are heads with Dv = 1, all three are the values (B, C, N, 1)."""

    of_one_sequence: ClassVar[bool] = True

    mixer: Any = None  # its map, a Recurrence or a Convolution
    # In front of the values: a banded map of its own, with rows that sum to one. It neither makes nor loses relevancy.
    convolution: Convolution | None = None
    run: Callable[[Tensor], Tensor] | None = None  # the output for other values
    ran: Tensor | None = None  # the output (B, H, N, Dv) as the model computed it
    differentiable: bool = False  # what the score's gradient makes of the convolution has a gradient, too

    def computed(self) -> Tensor:
        assert self.ran is not None
        return self.ran

    def through(self, carrier: Tensor, recursion: Recursion) -> tuple[Tensor, Tensor]:
        return Through.apply(self.computed(), carrier, self, recursion)

    def sink(self) -> Tensor | None:
        return None

    def over_row_sum(self) -> Any:
        return 0.5  # by rule "attention" the rows are divided by their sums

    def mean_map(self, grad_output: Tensor) -> Tensor:
        eye = torch.eye(self.tokens, dtype=compute_dtype(self.query), device=self.query.device)
        return self._step(eye.expand(len(self.query), -1, -1), grad_output, Recursion("gradient"))

    def rows_of_heads(self, start: Tensor, grad_output: Tensor | None) -> Tensor:
        """start (B, 1, N) @ relu(A_h * dA_h) of each head, (B, H, N); without a gradient @ |A_h|, its rows over their sums."""
        (batch, heads), rule = self.value.shape[:2], "attention" if grad_output is None else "gradient"
        rows = self._of_map(start.repeat_interleave(heads, 0), grad_output, Recursion(rule), apart=True)
        return self._in_front(rows.view(batch, heads, -1), grad_output, rule)

    # --- the map ---

    def _step(self, relevancy: Tensor, grad_output: Tensor | None, recursion: Recursion) -> Tensor:
        relevancy = relevancy.to(self.query.device)
        return self._in_front(self._of_map(relevancy, grad_output, recursion), grad_output, recursion.rule)

    def _of_map(self, relevancy: Tensor, grad_output: Tensor | None, recursion: Recursion, apart: bool = False) -> Tensor:
        """relevancy (B, T, N) @ Abar of the map; `apart`: (B * H, T, N), each head's row times its own."""
        by_gradient = recursion.rule == "gradient"
        if isinstance(self.mixer, Convolution):
            taps = self._taps(self.mixer, grad_output[..., 0] if by_gradient and grad_output is not None else None)
            if not by_gradient:
                taps = _shares(taps)
            taps = taps.flatten(0, 1) if apart else taps.mean(1)
            return through_band(relevancy, _shares(taps) if recursion.row_normalize else taps)
        dtype = compute_dtype(self.value)
        value, grad_output = (None if x is None or not by_gradient else x.to(dtype) for x in (self.value, grad_output))
        query, key = self.query.to(dtype), self.key.to(dtype)
        gates = {name: gate.to(dtype) for name in _GATES if (gate := getattr(self.mixer, name)) is not None}
        if apart:
            heads = self.value.shape[1]
            query, key = (x.repeat_interleave(heads // x.shape[1], 1) for x in (query, key))
            query, key, value, grad_output = (
                None if x is None else x.flatten(0, 1)[:, None] for x in (query, key, value, grad_output)
            )
            gates = {name: gate.flatten(0, 1)[:, None] for name, gate in gates.items()}
        how = {"rule": recursion.rule, "row_normalize": recursion.row_normalize}
        assert query is not None and key is not None
        return recurrent_step(relevancy, query, key, value, grad_output, **gates, **how)

    def _in_front(self, relevancy: Tensor, grad_output: Tensor | None, rule: str) -> Tensor:
        """relevancy (B, T, N) @ Abar of the convolution in front."""
        if self.convolution is None:
            return relevancy
        grad = None
        if rule == "gradient":
            assert grad_output is not None
            grad = self._value_gradient(grad_output).transpose(2, 3).flatten(1, 2)  # (B, H * Dv, N), the channels' order
        taps = _shares(self._taps(self.convolution, grad).mean(1))
        itself = functional.pad(torch.zeros_like(taps[..., 1:]), (0, 1), value=1.0)
        return through_band(relevancy, torch.where(taps.sum(-1, keepdim=True) == 0, itself, taps))

    def _value_gradient(self, grad_output: Tensor) -> Tensor:
        """The score's gradient at the values: the function is linear in them, and runs once more."""
        assert self.run is not None
        with torch.enable_grad():
            value = self.value.detach().requires_grad_()
            output = self.run(value)
            grad_output = grad_output.to(output.dtype)
            (grad,) = torch.autograd.grad(output, value, grad_output, create_graph=self.differentiable)
        return grad

    def _taps(self, convolution: Convolution, grad: Tensor | None) -> Tensor:
        """relu(K * dK) of the gradient at the output (B, C, N), else |K|, as (B, C, N, W): of token u the tap w is that of token
        u - W + 1 + w. Padding, whose values are all zero, has none."""
        value, weight = (x.to(compute_dtype(convolution.value)) for x in (convolution.value, convolution.weight))
        width = weight.shape[1]
        taps = weight[:, None] if convolution.gate is None else weight[:, None] * convolution.gate.to(weight)[..., None]
        windows = functional.pad(value, (width - 1, 0)).unfold(2, width, 1)
        if grad is not None:
            return (taps * grad.to(taps)[..., None] * (windows if self.differentiable else windows.detach())).relu()
        return taps.abs() * (windows != 0).any(1, keepdim=True)

    # --- for the backward pass ---

    def detached(self) -> MixingCall:
        parts = {name: getattr(self, name).detach() for name in ("query", "key", "value")}
        return replace(self, **parts, mixer=_detached(self.mixer), convolution=_detached(self.convolution), ran=None)

    def apart(self) -> tuple[tuple[Tensor | None, ...], Callable[..., TracedCall]]:
        return (), self.detached

    def kept(self, higher_order: bool) -> MixingCall:
        return replace(self, differentiable=higher_order, value=self.value if higher_order else self.value.detach(), ran=None)


# --- how a call is read ---


def check_reading(reading: Reading, call: FunctionCall, path: str) -> None:
    """ValueError where relevancy cannot go through a call of a module at `path`."""
    why = reading.refusal
    if has_dtensors(call.module):
        why = "has its heads in several processes. Run it in one"
    if why:
        raise ValueError(f"model must run each layer on its whole sequence; got '{path}' ({type(call.module).__name__}), which {why}")


def mixing_call(
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
    name, count = f"'{path}' ({type(module).__name__})", value.shape[2]
    if before is None:
        if any(isinstance(part, nn.Conv1d) for part in module.modules()):
            raise ValueError(f"model must call its short convolutions by causal_conv1d_fn; got {name}, whose own is not seen")
        return None
    reading, output = before
    values = value.transpose(2, 3).flatten(1, 2)
    if not torch.allclose(output[:, channels, -count:].to(values.dtype), values, rtol=0, atol=0, equal_nan=True):
        raise ValueError(f"model must take its values from its short convolution as they are; got {name}, which changes them")
    assert isinstance(reading.mixer, Convolution)
    return reading.mixer.part(channels, count)


@contextlib.contextmanager
def unsaved() -> Iterator[None]:
    """A context whose graph keeps its tensors itself, also inside of a checkpoint, whose second run would miss them."""
    if not is_checkpointed():
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield


def _detached(mixer: Any) -> Any:
    """A map, of constants."""
    if mixer is None:
        return None
    return replace(mixer, **{name: value.detach() for name, value in vars(mixer).items() if isinstance(value, Tensor)})


def _shares(taps: Tensor) -> Tensor:
    """Each row over its sum; a row of zeros stays one."""
    total = taps.sum(-1, keepdim=True)
    return taps / total.masked_fill(total == 0, 1.0)


def through_band(relevancy: Tensor, taps: Tensor) -> Tensor:
    """relevancy (B, T, N) @ the map whose row u has `taps` (B, N, W) at the tokens u - W + 1 to u."""
    width, count = taps.shape[-1], relevancy.shape[-1]
    moved = [
        functional.pad((relevancy * taps[:, None, :, w])[..., width - 1 - w :], (0, min(width - 1 - w, count)))
        for w in range(width)
    ]
    return torch.stack(moved).sum(0).to(relevancy.dtype)
