"""The guard round a Triton launch: its device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

Launcher = TypeVar("Launcher", bound=Callable[..., Any])


def on_device(launcher: Launcher) -> Launcher:
    """`launcher`, run with the device of its tensors as the current device.

    Triton launches on the current device, whatever device the tensors are on. They differ where the layers of a model lie on
    several devices (device_map="auto").
    """

    @functools.wraps(launcher)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        device = _device_of(args) or _device_of(kwargs.values())
        if device is None or device.index is None or device.index == torch.cuda.current_device():  # without an index: the CPU
            return launcher(*args, **kwargs)
        with torch.cuda.device(device):
            return launcher(*args, **kwargs)

    return guarded  # type: ignore[return-value]


def _device_of(args: Iterable[Any]) -> torch.device | None:
    """The device of the first tensor among the arguments, or in a list or tuple among them."""
    for x in args:
        if isinstance(x, (list, tuple)):
            if (device := _device_of(x)) is not None:
                return device
        elif isinstance(x, Tensor):
            return x.device
    return None
