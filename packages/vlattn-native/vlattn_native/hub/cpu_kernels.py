"""The kernels behind the operators on CPUs: libvlattn_torch.so has registered the operators themselves, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BACKEND = "cpu"
KERNELS: dict[str, Callable[[Any], Any]] = {}
LSE = torch.float64
STATISTICS_OF_ROWS: tuple[str, ...] = ()


def check_device(query: Tensor) -> None:
    if query.device.type != "cpu":
        raise ValueError(f"query must be on the CPU, for whose kernels this was built; got {query.device}")
