"""Calls of the functions and modules by which models of transformers hand on what tokens hold, with random inputs."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn

from vlattn_fast.attach.recurrences.reading import FunctionCall


def _file(name: str) -> Any:
    return import_module(f"transformers.models.{name}.modeling_{name}")


def selective_scan(model: str = "mamba", gated: bool = True, state: bool = False) -> FunctionCall:
    """Three channels with a state of four."""
    batch, channels, tokens, size = 2, 3, 7, 4
    states, steps, gate = torch.randn(3, batch, channels, tokens)
    options = {"D": torch.randn(channels), "z": gate if gated else None, "delta_bias": torch.randn(channels) if gated else None}
    args = (states, steps, -torch.rand(channels, size), torch.randn(batch, size, tokens), torch.randn(batch, size, tokens))
    function = _file(model).mamba_selective_scan
    return FunctionCall(function, args, options | {"delta_softplus": True, "return_last_state": state}, nn.Module())


def chunk_scan(model: str = "mamba2", chunk: int = 4, state: bool = False) -> FunctionCall:
    """Four heads in two groups, over more tokens than a chunk has."""
    batch, tokens, heads, size, groups, key = 2, 10, 4, 3, 2, 5
    args = (
        torch.randn(batch, tokens, heads, size),
        torch.randn(batch, tokens, heads),
        -torch.rand(heads),
        torch.randn(batch, tokens, groups, key),
        torch.randn(batch, tokens, groups, key),
    )
    options: dict[str, Any] = {"chunk_size": chunk, "D": torch.randn(heads), "dt_bias": torch.randn(heads), "dt_softplus": True}
    options |= {"dt_limit": (0.3, 2.0), "return_final_states": state}
    return FunctionCall(_file(model).mamba2_chunk_scan, args, options, nn.Module())


def mlstm(tokens: int = 9, chunk: int = 4, mode: str = "inference") -> FunctionCall:
    import transformers

    last = mode == "inference"
    config = transformers.xLSTMConfig(hidden_size=64, num_heads=2, chunk_size=chunk, mode=mode, return_last_states=last)
    backend = _file("xlstm").xLSTMBackend(config)
    query, key, value = torch.randn(3, 2, 2, tokens, 4)
    gates = {"igate": 3 * torch.randn(2, 2, tokens), "fgate": 2 * torch.randn(2, 2, tokens)}
    return FunctionCall(backend.forward, (), {"query": query, "key": 2 * key, "value": value, **gates}, backend)


def rg_lru() -> FunctionCall:
    """Two sequences one behind the other."""
    import transformers

    config = transformers.RecurrentGemmaConfig(hidden_size=8, lru_width=8, num_attention_heads=2, num_hidden_layers=1)
    module = _file("recurrent_gemma").RecurrentGemmaRglru(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]])
    return FunctionCall(module, (torch.randn(2, 6, 8), positions), {}, module)


def lightning() -> FunctionCall:
    from vlattn_fast.attach.recurrences.lightning import lightning_attention

    return FunctionCall(lightning_attention, (*torch.randn(3, 2, 2, 9, 4), torch.rand(2)), {}, nn.Module())


def wkv(spread: float = 1.0) -> FunctionCall:
    decay, first, (key, value) = spread * torch.randn(5), torch.randn(5), torch.randn(2, 2, 7, 5)
    return FunctionCall(_file("rwkv").rwkv_linear_attention, (decay, first, 4 * key, value), {}, nn.Module())


CALLS: dict[str, Callable[[], FunctionCall]] = {
    "Mamba": selective_scan,
    "Mamba without a gate": lambda: selective_scan(gated=False),
    "FalconMamba, with its last state": lambda: selective_scan("falcon_mamba", state=True),
    "Jamba": lambda: selective_scan("jamba"),
    "Zamba": lambda: selective_scan("zamba"),
    "Mamba-2": chunk_scan,
    "Bamba in one chunk, with its last state": lambda: chunk_scan("bamba", 16, state=True),
    **{name: lambda name=name: chunk_scan(name) for name in ("falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2")},
    "xLSTM": mlstm,
    "xLSTM in whole chunks": lambda: mlstm(8),
    "xLSTM with padding": lambda: mlstm(9, mode="train_with_padding"),
    "RecurrentGemma": rg_lru,
    "RWKV": wkv,
    "RWKV, which forgets at once": lambda: wkv(4.0),
    "MiniMax": lightning,
}
