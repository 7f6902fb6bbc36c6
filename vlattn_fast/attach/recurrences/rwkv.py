"""RWKV-4 (Peng et al., arXiv 2305.13048): each channel is a head whose weights fall with distance, except the token's own.

A token's features are mixed with those of the token before it, a convolution with two taps: before the recurrence, and before
the feed-forward layer, where it is the only mixer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlattn_fast.attach.recurrences.chunks import recurred
from vlattn_fast.attach.recurrences.reading import Convolution, FunctionCall, Reading, Recurrence, at_least_float32

_CHUNK = 16  # a chunk's map is one of each channel


def read(convolution: Convolution | None, call: FunctionCall) -> Reading:
    """Key and value are (B, N, C), time_decay and time_first (C). With w = exp(time_decay) and u = time_first

    o_t = (sum_{s < t} exp(-(t - 1 - s) w + k_s) v_s + exp(u + k_t) v_t) / (the same sum without values).

    States are those of the tokens before, divided by exp(m_t), the largest weight of a token so far.
    """
    value: Tensor = call["value"].transpose(1, 2)[..., None]
    key = call["key"].double().transpose(1, 2)
    speed, first = (call[name].double()[:, None] for name in ("time_decay", "time_first"))
    speed = speed.exp()
    since_start = speed * torch.arange(key.shape[-1], device=key.device)
    largest = (key + since_start).cummax(-1).values - since_start  # m_t = max(m_{t-1} - w, k_t)
    before = functional.pad(largest, (1, -1), value=-torch.inf)  # m_{t-1}
    log_decay = (before - speed - largest).nan_to_num(neginf=0.0)  # nothing is before the first token
    written = (key - largest).exp()[..., None]
    sums = recurred(torch.ones_like(written), written, torch.ones_like(written), log_decay, _CHUNK)[..., 0]
    top = torch.maximum(before, first + key)
    earlier, itself = (before - top).exp(), (first + key - top).exp()
    below = earlier * functional.pad(sums, (1, -1)) + itself
    query, written, log_decay, diagonal = (
        x.to(at_least_float32(value).dtype) for x in ((earlier / below)[..., None], written, log_decay, itself / below)
    )
    return Reading(
        Recurrence(query, written, value, log_decay, diagonal=diagonal, reads_before=True),
        run=lambda value: call.run(value=value[..., 0].transpose(1, 2)),
        output_of=lambda result: result[0].transpose(1, 2)[..., None],
        with_output=lambda result, output: (output[..., 0].transpose(1, 2), *result[1:]),
        convolution=convolution,
    )


def read_shift(call: FunctionCall) -> Reading:
    return Reading(Convolution(call["states"], call["weight"]), run=lambda states: call.run(states=states), is_only_mixer=True)


def shifted(states: Tensor, weight: Tensor) -> Tensor:
    """states (B, C, N), each token with that before it, weighted by `weight` (C, 2)."""
    return weight[:, :1] * functional.pad(states, (1, -1)) + weight[:, 1:] * states


def _taps(mix: Tensor) -> Tensor:
    """(C, 2), from the share (1, 1, C) of the token itself."""
    return torch.stack([1 - mix.flatten(), mix.flatten()], -1)


def mixes_time(module: Any, handed: Callable[..., Any], hidden: Tensor, state: Any = None, **_: Any) -> tuple[Tensor, None]:
    """RwkvSelfAttention, without a state."""
    _check_no_state(module, state)
    states = hidden.transpose(1, 2)
    key_taps, value_taps, gate_taps = (_taps(getattr(module, f"time_mix_{name}")) for name in ("key", "value", "receptance"))
    key, value, gate = (shifted(states, taps).transpose(1, 2) for taps in (key_taps, value_taps, gate_taps))
    convolution = Convolution(states, value_taps, projection=module.value.weight)
    function = sys.modules[type(module).__module__].rwkv_linear_attention
    weights = module.time_decay, module.time_first
    output, _ = handed(partial(read, convolution), function)(*weights, module.key(key), module.value(value))
    return module.output(torch.sigmoid(module.receptance(gate)) * output), None


def mixes_channels(module: Any, handed: Callable[..., Any], hidden: Tensor, state: Any = None) -> tuple[Tensor, None]:
    """RwkvFeedForward, without a state."""
    _check_no_state(module, state)
    states = hidden.transpose(1, 2)
    taps = torch.cat([_taps(module.time_mix_key), _taps(module.time_mix_receptance)])
    both = handed(read_shift, shifted)(torch.cat([states, states], 1), taps)
    key, gate = both.transpose(1, 2).chunk(2, -1)
    return torch.sigmoid(module.receptance(gate)) * module.value(torch.relu(module.key(key)).square()), None


def _check_no_state(module: Any, state: Any) -> None:
    if state is not None:
        raise ValueError(f"model must run without a cache; got a state in {type(module).__name__}")


FORWARDS = {"RwkvSelfAttention": mixes_time, "RwkvFeedForward": mixes_channels}
