"""The libraries of C++ kernels as tests build them (tools/building.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import building

PTX = ("ptx90a", "-DVLATTN_PTX=90a")  # for the emulated GPU


def build(name: str, *options: str) -> Path:
    """The folder build/`name` with the library, built where something changed; skips where a tool is missing."""
    try:
        return building.build(name, *options)
    except building.Missing as error:
        pytest.skip(f"these C++ kernels are not tested: {error}")
