"""RG-LRU, the gated linear recurrence of Griffin and RecurrentGemma (De et al., arXiv 2402.19427): a channel has one number."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlattn_fast.attach.recurrences.reading import Convolution, FunctionCall, Reading, Recurrence, at_least_float32

_SHARPNESS = 8.0  # c of the paper's equation 3


def read(convolution: Convolution | None, call: FunctionCall) -> Reading:
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t, with gates a and i of x. The function is the module of the recurrence, the
    values x are (B, N, C); a sequence begins at each position 0."""
    states: Tensor = call["activations"]
    module: Any = call.function
    value: Tensor = states.transpose(1, 2)[..., None]
    starts = (call["position_ids"] == 0)[:, None]
    log_decay = -_SHARPNESS * functional.softplus(module.recurrent_param)[:, None] * _gate(module, "recurrent", states)
    written = _gate(module, "input", states) * torch.where(starts, 1.0, (1 - (2 * log_decay).exp()).sqrt())
    log_decay = log_decay.masked_fill(starts, -torch.inf)
    key = written[..., None]
    return Reading(
        Recurrence(torch.ones_like(key), key, value, log_decay),
        run=lambda value: _scan(module, (value * key)[..., 0], log_decay, starts),
        output_of=lambda result: result.transpose(1, 2)[..., None],
        with_output=lambda result, output: output[..., 0].transpose(1, 2),
        convolution=convolution,
    )


def _gate(module: Any, name: str, states: Tensor) -> Tensor:
    """(B, C, N): a block of channels gives those of its own."""
    weight, bias = (at_least_float32(getattr(module, f"{name}_gate_{part}")) for part in ("weight", "bias"))
    blocks = at_least_float32(states).unflatten(-1, weight.shape[:2])  # (B, N, blocks, width)
    return (torch.einsum("bnhi,hij->bnhj", blocks, weight) + bias).flatten(-2).sigmoid().transpose(1, 2)


def _scan(module: Any, written: Tensor, log_decay: Tensor, starts: Tensor) -> Tensor:
    """The model's own recurrence, with its gates held fixed."""
    written, decay = written.transpose(1, 2), log_decay.exp().transpose(1, 2)
    output: Tensor = module._rnn_scan(written, decay, starts.transpose(1, 2).expand_as(decay), None)[0]
    return output


def forward(
    module: Any, handed: Callable[..., Any], input_states: Tensor, position_ids: Tensor, use_cache: bool = True, **_: Any
) -> tuple[Tensor, None]:
    """RecurrentGemmaRecurrentBlock, without a cache."""
    if use_cache:
        raise ValueError(f"model must run without a cache; got use_cache=True in {type(module).__name__}")
    module.conv1d_state = module.rg_lru.recurrent_states = None
    gate, states = module.act_fn(module.linear_y(input_states)), module.linear_x(input_states).transpose(1, 2)
    convolution = Convolution(states, module.conv_1d.weight[:, 0])
    values = module.conv_1d(states)[..., : states.shape[2]].transpose(1, 2)
    output = handed(partial(read, convolution), module.rg_lru)(values, position_ids)
    return module.linear_out(output * gate), None


FORWARDS = {"RecurrentGemmaRecurrentBlock": forward}
