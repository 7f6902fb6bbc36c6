"""RG-LRU, the gated linear recurrence of Griffin and RecurrentGemma (De et al., arXiv 2402.19427): each channel has one number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlattn_fast.attach.recurrences.reading import FunctionCall, Reading, Recurrence, at_least_float32

_SHARPNESS = 8.0  # c of the paper's equation 3


def read(call: FunctionCall) -> Reading:
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t, with gates a and i of x. The values x are (B, N, C); where the position is 0, a
    sequence begins."""
    states, module = call["activations"], call.function
    value: Tensor = states.transpose(1, 2)[..., None]
    starts = (call["position_ids"] == 0)[:, None]
    log_decay = -_SHARPNESS * functional.softplus(module.recurrent_param)[:, None] * _gate(module, "recurrent", states)
    written = _gate(module, "input", states) * torch.where(starts, 1.0, (1 - (2 * log_decay).exp()).sqrt())
    log_decay = log_decay.masked_fill(starts, -torch.inf)
    key = written[..., None]
    goes_on = module.recurrent_states is not None
    return Reading(
        Recurrence(torch.ones_like(key), key, value, log_decay),
        run=lambda value: _scan(module, (value * key)[..., 0], log_decay, starts),
        output_of=lambda result: result.transpose(1, 2)[..., None],
        with_output=lambda result, output: output[..., 0].transpose(1, 2),
        channels=slice(None),
        refusal="goes on from the state of an earlier pass. Pass the whole sequence in one forward pass, without a cache"
        if goes_on
        else "",
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


CLASSES = {"RecurrentGemmaRglru": read}
