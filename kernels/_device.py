"""The guards round a Triton launch: its device, the ptxas that compiles it, and the hook for kernels that were compiled ahead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

import torch

from vlattn_fast.kernels import _ptxas as _ptxas  # compiles each kernel that is launched from here on

Launcher = TypeVar("Launcher", bound=Callable[..., Any])


@functools.cache
def _hook() -> Callable[[Any, torch.device], Any] | None:
    """The one place where another package registers itself: vlattn-native, whose function gives a launcher of this device that
    takes kernels out of archives. A copy of this file under another name, as on the kernel hub, finds nothing."""
    return next((found.load() for found in entry_points(group=__package__)), None)


def on_device(launcher: Launcher) -> Launcher:
    """`launcher`, a function of an operator's inputs, run with the device of its tensors as the current device.

    Triton launches on the current device, whatever device the tensors are on. They differ if the layers of a model lie on
    several devices (device_map="auto").
    """

    @functools.wraps(launcher)
    def guarded(inputs: Any) -> Any:
        for first in inputs:
            if first is not None:
                break
        device = (first[0] if isinstance(first, (list, tuple)) else first).device
        hook = _hook()
        run = launcher if hook is None else hook(launcher, device)  # by what the inputs tell
        if device.index is None or device.index == torch.cuda.current_device():  # without an index: the CPU
            return run(inputs)
        with torch.cuda.device(device):
            return run(inputs)

    return guarded  # type: ignore[return-value]
