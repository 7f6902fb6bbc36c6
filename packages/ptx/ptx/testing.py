"""For tests of compiled kernels: a process in which Triton compiles them, and marks for what older releases of Triton lack.

What tests change in their own process, such as Triton's interpreter, does not reach that process.
"""

from __future__ import annotations

import functools
import gc
import importlib
import re
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from typing import Any

import pytest


def _is_before(major: int, minor: int) -> bool:
    """Whether an older Triton is installed."""
    try:
        numbers = re.findall(r"\d+", version("triton"))
    except PackageNotFoundError:
        return False
    return (int(numbers[0]), int(numbers[1])) < (major, minor)


# the tools of CUDA 12, which it brings, are older, too
needs_fences = pytest.mark.skipif(_is_before(3, 8), reason="Triton before 3.8 leaves out fences on sm_90 and has races on sm_100")
needs_sanitizers = pytest.mark.skipif(_is_before(3, 9), reason="Triton before 3.9 has no FpSan, or other numbers in it")


def compiling(function: str, *arguments: Any) -> Any:
    """What `function`, "module.name", returns there."""
    return _process("compiling").submit(_call, function, arguments).result()


def sanitizing(function: str, *arguments: Any) -> Any:
    """The same in a process for Triton's sanitizers: they change functions of Triton, whose texts remain in the keys by which
    Triton finds what it has compiled before."""
    return _process("sanitizing").submit(_call, function, arguments).result()


@functools.cache  # until the end: to import torch and Triton takes two seconds
def _process(purpose: str) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=gc.disable)


def _call(function: str, arguments: tuple[Any, ...]) -> Any:
    module, _, name = function.rpartition(".")
    return getattr(importlib.import_module(module), name)(*arguments)
