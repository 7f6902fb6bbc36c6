"""What every Triton launch asks of its device: the guard round it, and tile sizes that were measured there."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
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
        if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
            return launcher(*args, **kwargs)
        with torch.cuda.device(device):
            return launcher(*args, **kwargs)

    return guarded  # type: ignore[return-value]


def _device_of(args: Iterable[Any]) -> torch.device | None:
    """The device of the first tensor among the arguments, or in a list or tuple among them."""
    for x in args:
        if isinstance(x, Tensor):
            return x.device
        if isinstance(x, (list, tuple)) and (device := _device_of(x)) is not None:
            return device
    return None


Config = dict[str, int]
# of each architecture, as "sm_90"
MEASURED: dict[str, dict[str, Config]] = json.loads(Path(__file__).with_name("configurations.json").read_text())
OVERRIDES: dict[str, Config] = {}  # what `make gpu PARTS=sweep` tries


def configured(config: Config, *facts: Any) -> Config:
    """The tile sizes of a launch with these facts: those measured on this kind of device, or `config`, which rules have chosen.

    A number among the facts stands for all up to the next power of two.
    """
    if not (OVERRIDES or MEASURED):
        return config
    key = " ".join(str(1 << max(x - 1, 0).bit_length() if type(x) is int else x) for x in facts)
    measured = MEASURED.get(_architecture(torch.cuda.current_device()), {}) if torch.cuda.is_initialized() else {}
    return OVERRIDES.get(key, measured.get(key, config))


@functools.cache
def _architecture(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
