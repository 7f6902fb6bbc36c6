"""Recurrences and convolutions that modules write out in their methods, as functions of their values: for `mixers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def lightning(module: Any) -> Callable[..., Any]:
    """The forward of MiniMaxLightningAttention, whose recurrence goes through `recurrence`: a function of a function of values,
    and of the values (B, N, H, D)."""
    original, heads, size = module.forward, module.num_attention_heads, module.head_dim

    def forward(recurrence: Callable[..., Tensor], hidden_states: Tensor, **kwargs: Any) -> Any:
        packed = module.act_fn(module.qkv_proj(hidden_states))
        if kwargs["attention_mask"] is not None:
            packed = packed * kwargs["attention_mask"][..., None]
        query, key, value = packed.unflatten(-1, (heads, 3 * size)).split(size, -1)

        def output_of(value: Tensor) -> Tensor:
            """The input of the norm behind the recurrence."""
            seen = list[Tensor]()

            def keep(states: Tensor) -> Tensor:
                seen.append(states)
                return states

            mixed = torch.cat([query, key, value], -1).flatten(2)
            parts = SimpleNamespace(act_fn=lambda _: mixed, norm=keep)
            _with(
                module,
                vars(parts),
                lambda: original(hidden_states, **{**kwargs, "attention_mask": None, "past_key_values": None}),
            )
            return seen[0].unflatten(-1, (heads, size))

        output = recurrence(output_of, value).flatten(2)
        handle = module.norm.register_forward_pre_hook(lambda *_: (output,))
        try:
            return original(hidden_states, **kwargs)
        finally:
            handle.remove()

    return forward


def _with(module: Any, changed: dict[str, Any], run: Callable[[], Any]) -> Any:
    """The result of `run` while attributes of a module are others."""
    before = {name: module._modules.pop(name, None) for name in changed}
    try:
        vars(module).update(changed)
        return run()
    finally:
        for name, part in before.items():
            vars(module).pop(name, None)
            if part is not None:
                module._modules[name] = part


def without_bias(convolution: nn.Conv1d) -> Callable[..., Tensor]:
    """A causal convolution as causal_conv1d_fn takes its arguments; its bias is that of the module, or none."""

    def run(hidden_states: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
        output = nn.Conv1d.forward(convolution, hidden_states)[..., : hidden_states.shape[-1]]
        return output if bias is not None or convolution.bias is None else output - convolution.bias[:, None]

    return run


def token_shift(module: Any, mix: Tensor) -> Callable[[Tensor], Tensor]:
    """RWKV's mixture of each token's features (B, C, N) with those of the token before."""

    def run(hidden_states: Tensor) -> Tensor:
        states = hidden_states.transpose(1, 2)
        return (states * mix + module.time_shift(states) * (1 - mix)).transpose(1, 2)

    return run


def parts_of(model: nn.Module, kind: str) -> Iterator[Any]:
    return (module for module in model.modules() if type(module).__name__ == kind)
