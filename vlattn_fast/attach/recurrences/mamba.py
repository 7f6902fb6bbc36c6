"""Selective state spaces: Mamba (Gu, Dao, arXiv 2312.00752) and Mamba-2 (Dao, Gu, arXiv 2405.21060), whose map is that of Ali,
Zimerman, Wolf (arXiv 2403.01590).

Models: Mamba, FalconMamba and Jamba, in which each channel has its own state; Mamba-2, Bamba, FalconH1, GraniteMoeHybrid,
NemotronH and Zamba2, in which each head has one. Zamba's groups of channels have queries and keys of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlattn_fast.attach.recurrences.reading import (
    GOES_ON,
    PACKED,
    FunctionCall,
    Reading,
    Recurrence,
    at_least_float32,
    first_of,
    with_first,
)


def read_channels(call: FunctionCall) -> Reading:
    """Mamba: the values are (B, C, N), dt (B, C, N), A (C, Dk), B and C (B, Dk, N). The gate z multiplies the output."""
    value: Tensor = call["hidden_states"][..., None]
    step = _step(call, call["delta_bias"], -1)
    key, query = (at_least_float32(call[name]).transpose(1, 2)[:, None] for name in "BC")  # of all channels
    diagonal = None if call["D"] is None else call["D"][None, :, None].expand_as(step)
    if call["z"] is not None:
        gate = functional.silu(at_least_float32(call["z"]))
        query, diagonal = query * gate[..., None], None if diagonal is None else diagonal * gate
    return Reading(
        Recurrence(query, step[..., None] * key, value, step[..., None] * call["A"][:, None], diagonal=diagonal),
        run=lambda value: call.run(hidden_states=value[..., 0]),
        output_of=lambda result: first_of(result)[..., None],
        with_output=lambda result, output: with_first(result, output[..., 0]),
        channels=slice(None),
        unsupported=PACKED if call["seq_idx"] is not None else "",
    )


def read_heads(call: FunctionCall) -> Reading:
    """Mamba-2: the values are (B, N, H, Dv), dt (B, N, H), A (H), B and C (B, N, G, Dk) of groups of heads."""
    value: Tensor = call["hidden_states"].transpose(1, 2)
    least, largest = call["dt_limit"]
    step = _step(call, call["dt_bias"], None).clamp(least, largest).transpose(1, 2)
    key, query = (at_least_float32(call[name]).transpose(1, 2) for name in "BC")
    key = key.repeat_interleave(value.shape[1] // key.shape[1], 1)
    diagonal = None if call["D"] is None else call["D"][None, :, None].expand_as(step)
    return Reading(
        Recurrence(query, step[..., None] * key, value, step * call["A"][:, None], diagonal=diagonal),
        run=lambda value: call.run(hidden_states=value.transpose(1, 2)),
        output_of=lambda result: first_of(result).transpose(1, 2),
        with_output=lambda result, output: with_first(result, output.transpose(1, 2)),
        channels=slice(value.shape[1] * value.shape[3]),  # before those of keys and queries
        unsupported=GOES_ON if call["initial_states"] is not None else PACKED if call["seq_idx"] is not None else "",
    )


def read_groups(call: FunctionCall) -> Reading:
    """Zamba: each of several groups of channels has its own call of Mamba's function."""
    each = [read_channels(FunctionCall(call["scan"], arguments, {}, call.module)) for arguments in call["arguments"]]
    maps = [reading.mixer for reading in each]
    value: Tensor = call["states"][..., None]
    parts: dict[str, Any] = {
        name: torch.cat([getattr(one, name) for one in maps], 1) for name in ("query", "key", "log_decay", "diagonal")
    }
    return Reading(
        Recurrence(value=value, **parts),
        run=lambda value: call.run(states=value[..., 0]),
        output_of=lambda result: result[..., None],
        with_output=lambda result, output: output[..., 0],
        channels=slice(None),
    )


def scanned(scan: Callable[..., Tensor], states: Tensor, arguments: Sequence[Sequence[Any]]) -> Tensor:
    """The outputs (B, C, N) for groups of channels of the states; `arguments` are those of each call, the first its states."""
    groups = states.chunk(len(arguments), 1)
    return torch.cat([scan(part, *others) for part, (_, *others) in zip(groups, arguments, strict=True)], 1)


def forward(
    module: Any, handed: Callable[..., Any], hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **_: Any
) -> Tensor:
    """ZambaMambaMixer, without a cache."""
    if cache_params is not None:
        raise ValueError(f"model must run without a cache; got cache_params in {type(module).__name__}")
    file, groups = sys.modules[type(module).__module__], module.n_mamba_heads
    real = 1 if attention_mask is None else attention_mask[..., None].to(hidden_states.dtype)
    projected = module.in_proj(hidden_states * real).transpose(1, 2)
    states, gate = projected.unflatten(1, (-1, 2)).unbind(2)
    weight = module.conv1d.weight.squeeze(1)
    states = file.causal_conv1d_fn(states, weight, module.conv1d.bias, activation=module.activation)
    states = (states.transpose(1, 2) * real).transpose(1, 2)
    each = states.chunk(groups, 1)
    sizes = module.time_step_rank, module.ssm_state_size, module.ssm_state_size
    arguments = []
    for group, (part, z) in enumerate(zip(each, gate.chunk(groups, 1), strict=True)):
        step, key, query = (module.x_proj_weight[group] @ part).split(sizes, 1)
        decay, diagonal = -module.A_log[group].float().exp(), module.D[group].float()
        step, bias = module.dt_proj_weight[group] @ step, module.dt_proj_bias[group].float()
        arguments.append((part, step, decay, key, query, diagonal, z, bias, True))
    output = handed(read_groups, scanned)(file.mamba_selective_scan, states, arguments)
    return module.out_proj(output.transpose(1, 2).to(hidden_states.dtype))


def read_update(call: FunctionCall) -> Reading:
    """One token of generation, which has the tokens before it in a state."""
    value: Tensor = call["hidden_states"][..., None]
    return Reading(
        Recurrence(value, value, value),
        run=lambda value: call.run(hidden_states=value[..., 0]),
        output_of=lambda result: result[..., None],
        with_output=lambda result, output: output[..., 0],
        unsupported=GOES_ON,
    )


def _step(call: FunctionCall, bias: Tensor | None, dim: int | None) -> Tensor:
    """The length of each step in time, in the shape of dt; `dim` of dt is that of tokens, after the channels of the bias."""
    step = at_least_float32(call["dt"])
    if bias is not None:
        step = step + (bias if dim is None else bias[:, None])
    return functional.softplus(step) if call["dt_softplus"] or call["delta_softplus"] else step


FUNCTIONS = {
    "mamba_selective_scan": read_channels,
    "mamba_selective_state_update": read_update,
    "mamba2_chunk_scan": read_heads,
    "mamba2_selective_state_update": read_update,
}
FORWARDS = {"ZambaMambaMixer": forward}
