"""Where a number was measured: the device, and the versions of packages."""

from __future__ import annotations

import functools
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn


@functools.cache
def device_name(device: torch.device) -> str:
    """The GPU's name, or "CPU: " and that of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)", info.read_text(), re.M) if info.exists() else None
    return f"CPU: {model.group(1).strip() if model else platform.machine()}"


def version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # with the build, such as +cu130, which the metadata may leave out
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions(*packages: str) -> dict[str, str | None]:
    """The versions of Python and of packages; None for a package that is not installed."""
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def place_of(model: nn.Module) -> dict[str, Any]:
    """The "dtype" and the "device" of a model's first parameter, None without one, and "versions" of what runs it."""
    parameter = next(model.parameters(), None)
    metadata: dict[str, Any] = {"dtype": None, "device": None}
    if parameter is not None:
        metadata = {"dtype": str(parameter.dtype).removeprefix("torch."), "device": device_name(parameter.device)}
    return {**metadata, "versions": versions("vlattn_fast", "torch", "transformers")}
