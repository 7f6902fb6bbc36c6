"""The functions of a backend, imported at first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from vlattn_fast._ground.tensors import as_outputs, mask_padding
from vlattn_fast.dispatch.table import Table


def load(backends: Table, name: str) -> ModuleType:
    """The backend's module, from sys.modules where possible: torch.compile cannot trace an import."""
    module = sys.modules.get(backends[name].module)
    return importlib.import_module(backends[name].module) if module is None else module


def launcher(backends: Table, name: str) -> Callable[..., Any]:
    """The function `name` ("forward", ...) of the backend that the inputs name."""
    return lambda inputs: getattr(load(backends, inputs.backend), name)(inputs)


def gradients(backends: Table, name: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """As `launcher`, of "streaming" where the backend has no such function. The inputs have key, value and key_mask. Gradients
    come as `as_outputs` lays them out."""

    def run(inputs: Any) -> tuple[Tensor | None, ...]:
        chosen = inputs.backend if hasattr(load(backends, inputs.backend), name) else "streaming"
        if not backends[chosen].masks_padding:
            key, value = mask_padding(inputs.key_mask, inputs.key, inputs.value)
            inputs = inputs._replace(key=key, value=value)
        return as_outputs(getattr(load(backends, chosen), name)(inputs))

    return run
