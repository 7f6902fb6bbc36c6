"""The arguments of a call of attention, the metadata of a call that backends' limits use, and the runner of GPU kernels on CPU
tensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class OnCpu(NamedTuple):
    """What runs GPU kernels on CPU tensors: Triton's interpreter, or an emulator of a GPU of this capability. `command` comes
    before the arguments of `vlattn` in a command that repeats a call. `reseed()` makes launches be drawn like the first ones of a
    process."""

    capability: tuple[int, int] | None = None
    command: str = "TRITON_INTERPRET=1 vlattn"
    reseed: Callable[[], None] = lambda: None


# Triton has this variable for its interpreter, and reads it once; an emulator says so through the function below
on_cpu: OnCpu | None = OnCpu() if os.environ.get("TRITON_INTERPRET") == "1" else None


def run_gpu_kernels_on_cpu(runner: OnCpu | None) -> OnCpu | None:
    """Makes calls with backend="triton" and "cuda" accept CPU tensors, which `runner` runs; None ends that. Returns the previous
    runner."""
    global on_cpu
    before, on_cpu = on_cpu, runner
    return before


class AttentionArguments(NamedTuple):
    """The arguments that the public calls of attention share, as `score_attention` documents them. A call makes one of its own,
    and hands it on with the rest of its arguments."""

    query: Tensor
    key: Tensor
    attn_mask: Tensor | None = None
    key_mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    softcap: float | None = None
    sink: Tensor | None = None
    query_groups: Tensor | None = None
    key_groups: Tensor | None = None
    group_bias: Tensor | None = None
    backend: str = "auto"


class CallShape(NamedTuple):
    """The metadata of a call that backends' limits use.

    It holds no tensor, so a laptop can ask what a backend supports on a GPU.
    """

    operator: str
    dtype: torch.dtype
    device_type: str
    sizes: dict[str, int]
    flags: dict[str, Any]
    capability: tuple[int, int] | None = None  # of the CUDA device; None for other or unknown devices, and AMD's

    def __str__(self) -> str:
        architecture = "" if self.capability is None else " (sm_{}{})".format(*self.capability)
        metadata = {"dtype": self.dtype, "device": self.device_type + architecture, **self.sizes, **self.flags}
        return f"{self.operator}({', '.join(f'{name}={value}' for name, value in metadata.items())})"


def call_shape(operator: str, first: Tensor, sizes: dict[str, int], flags: dict[str, Any]) -> CallShape:
    """Returns the call of `operator` with dtype and device of its first tensor, `first`."""
    device = first.device
    return CallShape(operator, first.dtype, device.type, sizes, flags, capability(device))


def capability(device: torch.device) -> tuple[int, int] | None:
    """Returns the compute capability of a CUDA device, and of the CPU if it emulates one. None for other devices and absent ones,
    and for AMD's, whose numbers mean something else."""
    if device.type == "cpu" and on_cpu:
        return on_cpu.capability
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    if not torch.compiler.is_compiling():  # in traced code the capability is a constant, the cache needs guards
        if device.index not in _CAPABILITIES:
            _CAPABILITIES[device.index] = _capability(device)
        return _CAPABILITIES[device.index]
    return _capability(device)


_CAPABILITIES: dict[int | None, tuple[int, int] | None] = {}


def _capability(device: torch.device) -> tuple[int, int] | None:
    if not torch.cuda.is_available():  # tensors without memory may name an absent device
        return None
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor
