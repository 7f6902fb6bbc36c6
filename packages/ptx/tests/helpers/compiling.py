"""The process in which Triton compiles kernels, so that what tests change in their own process does not reach it."""

from __future__ import annotations

import functools
import gc
import importlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def compiling(function: str, *arguments: Any) -> Any:
    """What `function`, "tests.….name", returns there."""
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
