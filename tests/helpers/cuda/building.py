"""The libraries of C++ kernels as tests build them (ptx/building.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

PTX = ("ptx90a", "-DVLATTN_PTX=90a")  # for the emulated GPU


def build(name: str, *options: str) -> Path:
    """The folder build/`name` with the library, built where something changed; skips where a tool is missing."""
    from ptx import building  # not with `make gpu`, whose tree has no emulator

    try:
        return building.build(name, *options)
    except building.Missing as error:
        pytest.skip(f"these C++ kernels are not tested: {error}")
