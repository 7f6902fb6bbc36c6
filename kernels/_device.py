"""The guards round a Triton launch: its device, the ptxas that compiles it, and kernels that were compiled ahead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from vlattn_fast.kernels import _archive
from vlattn_fast.kernels import _ptxas as _ptxas  # compiles each kernel that is launched from here on

Launcher = TypeVar("Launcher", bound=Callable[..., Any])


def on_device(launcher: Launcher) -> Launcher:
    """`launcher`, a function of an operator's inputs, run with the device of its tensors as the current device.

    Triton launches on the current device, whatever device the tensors are on. They differ if the layers of a model lie on
    several devices (device_map="auto").
    """
    is_taken = False  # whether kernels that were compiled ahead are launched

    @functools.wraps(launcher)
    def guarded(inputs: Any) -> Any:
        for first in inputs:
            if first is not None:
                break
        device = (first[0] if isinstance(first, list) else first).device
        if device.index is None:  # the CPU
            return launcher(inputs)
        nonlocal is_taken
        if not is_taken:
            if (compiled := _archive.launching()) is not None:
                compiled.take()  # all that this launcher needs is imported
            is_taken = True
        if device.index == torch.cuda.current_device():
            return launcher(inputs)
        with torch.cuda.device(device):
            return launcher(inputs)

    return guarded  # type: ignore[return-value]
