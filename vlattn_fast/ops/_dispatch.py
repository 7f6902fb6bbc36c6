"""Which backend runs a call, and why the others do not: one table per operator, asked without a tensor or a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ._checks import check_choice

BACKEND_NAMES = ("auto", "reference", "streaming", "triton", "cuda")


@dataclass(frozen=True)
class Call:
    """The facts of one call that limits are asked about: no tensor, so a laptop can ask what a GPU would refuse."""

    operator: str
    dtype: torch.dtype
    device_type: str
    sizes: dict[str, int]
    flags: dict[str, Any]

    def __str__(self) -> str:
        facts = {"dtype": self.dtype, "device": self.device_type, **self.sizes, **self.flags}
        return f"{self.operator}({', '.join(f'{name}={value}' for name, value in facts.items())})"


class Backend(NamedTuple):
    """`refusals(call)` lists every reason why not, in constant words (a printed size would cost torch.compile a graph per
    size); `module` holds `forward` and `backward`, imported when first used."""

    refusals: Callable[[Call], list[str]]
    module: str


Table = dict[str, Backend]


def accept(call: Call) -> list[str]:
    """A backend without limits."""
    return []


def no_triton_kernel(call: Call) -> list[str]:
    return ["this version has no Triton kernel for this operator"]


def no_cuda_kernel(call: Call) -> list[str]:
    return ["this version has no CUDA C++ kernel for this operator"]


def table(stem: str) -> Table:
    """The backends of the operator `stem`, best first. 'reference' is only used where a caller names it."""
    return {
        "cuda": Backend(no_cuda_kernel, ""),
        "triton": Backend(no_triton_kernel, f"vlattn_fast.kernels.{stem}"),
        "streaming": Backend(accept, f"vlattn_fast.streaming.{stem}"),
        "reference": Backend(accept, f"vlattn_fast.reference.{stem}"),
    }


def select(backends: Table, call: Call, backend: Any) -> str:
    """The name of the backend that runs `call`: the one asked for, or the first without refusals for "auto".

    Raises ValueError with all reasons where the backend asked for cannot run the call.
    """
    check_choice("backend", backend, BACKEND_NAMES)
    if backend == "auto":
        for name, candidate in backends.items():
            if not candidate.refusals(call):
                return name
    reasons = backends[backend].refusals(call)
    if reasons:
        raise ValueError(f"backend={backend!r} cannot run {call}: {'; '.join(reasons)}")
    return str(backend)


def load(backends: Table, name: str) -> ModuleType:
    """The backend's module."""
    return importlib.import_module(backends[name].module)
