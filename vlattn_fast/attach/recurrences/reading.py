"""A call as a reader describes it: the map over tokens, and the conversion from and to the model's tensors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.tensors import compute_dtype

# Why relevancy cannot go through a call, see `Reading.unsupported`.
GOES_ON = "continues from the state of an earlier pass. Pass the whole sequence in one forward pass, without a cache"
PACKED = "takes several sequences as one. Pass them as a batch"


@dataclass(frozen=True, eq=False)
class Recurrence:
    """o_t = sum_{s <= t} A_ts v_s, one A per head, which `va.reference.recurrent_map` writes out:

        S_t = diag(exp(log_decay_t)) S_{t-1}
        S_t = S_t + beta_t k_t (v_t - S_t^T k_t)^T   with beta, the delta rule;   S_t = S_t + k_t v_t^T   without
        o_t = S_t^T q_t + diagonal_t v_t

    The query is already scaled and normalised. The number of heads of query and key may divide that of the value. A channel with
    its own state is a head with Dv = 1.
    """

    query: Tensor  # (B, H, N, Dk)
    key: Tensor  # (B, H, N, Dk)
    value: Tensor  # (B, H, N, Dv)
    log_decay: Tensor | None = None  # (B, H, N) or (B, H, N, Dk); None = nothing is forgotten
    beta: Tensor | None = None  # (B, H, N)
    diagonal: Tensor | None = None  # (B, H, N)
    reads_before: bool = False  # o_t = S_{t-1}^T q_t + diagonal_t v_t: the state that a token uses is without itself

    def outputs(self) -> Tensor:
        """o (B, H, N, Dv), token by token."""
        value = at_least_float32(self.value)
        query, key = (x.to(value).repeat_interleave(value.shape[1] // x.shape[1], 1) for x in (self.query, self.key))
        decay = None if self.log_decay is None else self.log_decay.to(value).exp().reshape(*value.shape[:3], -1, 1)
        state, outputs = torch.zeros_like(key[:, :, 0, :, None] * value[:, :, 0, None]), []
        for t in range(value.shape[2]):
            before, written, k = state, value[:, :, t, None], key[:, :, t, :, None]
            state = state if decay is None else state * decay[:, :, t]
            if self.beta is not None:
                written = self.beta[:, :, t, None, None].to(value) * (written - k.mT @ state)
            state = state + k * written
            outputs.append(query[:, :, t, None] @ (before if self.reads_before else state))
        output = torch.cat(outputs, 2)
        return output if self.diagonal is None else output + self.diagonal[..., None].to(value) * value


@dataclass(frozen=True, eq=False)
class Convolution:
    """o_u = gate_u * (sum_w weight_w x_{u-W+1+w} + bias) of each channel: depthwise, causal, W taps. The activation multiplies
    the sum by the gate, act(z) / z."""

    value: Tensor  # (B, C, N), x
    weight: Tensor  # (C, W), the tap of the token itself is the last
    gate: Tensor | None = None  # (B, C, N); None = without an activation
    projection: Tensor | None = None  # (values, C), from its output to values; None = the output is the values

    def outputs(self, bias: Tensor | None) -> Tensor:
        """o (B, C, N)."""
        weight = at_least_float32(self.weight)
        padded = nn.functional.pad(self.value.to(weight), (weight.shape[1] - 1, 0))
        bias = None if bias is None else bias.to(weight)
        summed = nn.functional.conv1d(padded, weight[:, None], bias, groups=len(weight))
        return summed if self.gate is None else summed * self.gate

    def part(self, channels: slice, count: int) -> Convolution:
        """That of some channels, for the last `count` tokens: a cache puts zeros before them."""
        gate = None if self.gate is None else self.gate[:, channels, -count:]
        return Convolution(self.value[:, channels, -count:], self.weight[channels], gate)


def first_of(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output of a function that may also return its last state."""
    return result[0] if isinstance(result, tuple) else result


def with_first(result: Tensor | tuple[Tensor, ...], output: Tensor) -> Tensor | tuple[Tensor, ...]:
    return (output, *result[1:]) if isinstance(result, tuple) else output


@dataclass(frozen=True, eq=False)
class Reading:
    """A call of a function in the table.

    Attributes:
        mixer: what mixes its tokens, which has a map.
        run: the result of the model's function for other values, in the shape and the dtype of `mixer.value`.
        output_of: the output in a result, in the shape of the values: (B, H, N, Dv) of a recurrence, (B, C, N) of a convolution.
        with_output: the result with another output, as the model continues with it.
        channels: the channels of the values, (H, Dv) in order, in a short convolution that the module called before; None = this
            function has no convolution before it.
        convolution: one that the function itself applies before its values, with only their channels.
        is_only_mixer: a convolution that is the only mixer of its module.
        unsupported: why relevancy cannot go through this call, to follow "which"; "" = it can.
    """

    mixer: Recurrence | Convolution
    run: Callable[[Tensor], Any]
    output_of: Callable[[Any], Tensor] = first_of
    with_output: Callable[[Any, Tensor], Any] = with_first
    channels: slice | None = None
    convolution: Convolution | None = None
    is_only_mixer: bool = False
    unsupported: str = ""


class FunctionCall:
    """A call as the model makes it. `module`: the module whose forward it is, or that calls the function."""

    def __init__(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], module: nn.Module) -> None:
        self.function, self.args, self.kwargs, self.module = function, tuple(args), dict(kwargs), module
        self._parameters = _signature(function.forward if isinstance(function, nn.Module) else function).parameters
        self._named = dict(zip(self._parameters, self.args, strict=False)) | self.kwargs

    def __getitem__(self, name: str) -> Any:
        """The argument, or its default; None if the function has no such argument."""
        if name in self._named or name not in self._parameters:
            return self._named.get(name)
        default = self._parameters[name].default
        return None if default is inspect.Parameter.empty else default

    def run(self, **changed: Any) -> Any:
        """The function's result with some of its arguments changed. The others keep their positions: a kernel of another package
        may have other names for them."""
        names = list(self._parameters)
        args = [changed.get(name, value) for name, value in zip(names, self.args, strict=False)]
        kwargs = {name: changed.get(name, value) for name, value in self.kwargs.items()}
        return self.function(*args, **kwargs)


Reader = Callable[[FunctionCall], Reading]


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is float64."""
    return tensor.to(compute_dtype(tensor))
