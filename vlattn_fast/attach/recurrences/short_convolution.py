"""The causal depthwise convolution before a recurrence's queries, keys and values, or a layer's only mixer (LFM2)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from vlattn_fast.attach.recurrences.reading import GOES_ON, PACKED, Convolution, FunctionCall, Reading


def read(call: FunctionCall) -> Reading:
    """The states are (B, C, N)."""
    states, weight = call["hidden_states"], call["weight"]
    activation, unsupported = call["activation"], PACKED if call["seq_idx"] is not None else ""
    if not unsupported and activation not in (None, "silu", "swish"):
        unsupported = f"has the activation {activation!r}, whose gate is not known"
    gate = None if activation is None else gate_of_silu(states, weight, call["bias"])
    return Reading(
        Convolution(states, weight, gate),
        run=lambda states: call.run(hidden_states=states),
        is_only_mixer=type(call.module).__name__.endswith("ShortConv"),  # of LFM2: all others have a recurrence after it
        unsupported=unsupported,
    )


def gate_of_silu(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(z) / z of the sum z (B, C, N) of a convolution with `weight` (C, W)."""
    padded = functional.pad(states.to(weight.dtype), (weight.shape[1] - 1, 0))
    return functional.conv1d(padded, weight[:, None], bias, groups=len(weight)).sigmoid()


def read_update(call: FunctionCall) -> Reading:
    """One token of generation, which has the tokens before it in a cache."""
    convolution = Convolution(call["hidden_states"], call["weight"])
    return Reading(convolution, run=lambda states: call.run(hidden_states=states), unsupported=GOES_ON)


CONVOLUTIONS = {"causal_conv1d_fn": read, "causal_conv1d_update": read_update}
