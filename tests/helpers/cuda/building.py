"""The libraries of C++ kernels as tests build them (tools/building.py)."""

import os
from pathlib import Path

import pytest

from tools import building

# for the emulated GPU; `make test` asks for less optimised kernels, which compile in a third of the time
QUICK = os.environ.get("VLATTN_QUICK", "OFF")
PTX = ("ptx90a" if QUICK == "OFF" else "ptx90a-quick", "-DVLATTN_PTX=90a", f"-DVLATTN_QUICK={QUICK}")


def build(name: str, *options: str) -> Path:
    """The folder build/`name` with the library, built where something changed; skips where a tool is missing."""
    try:
        return building.build(name, *options)
    except building.Missing as error:
        pytest.skip(f"these C++ kernels are not tested: {error}")
