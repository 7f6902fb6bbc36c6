"""The sanitized libraries of the CPU's C++ kernels: by CMake into build/cpu-KIND, as those of CUDA (cuda/building.py)."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.cuda.building import build

KINDS = ("address", "thread")


def sanitized(kind: str, *instruction_sets: str) -> Path:
    """The folder of the library with these instruction sets, or with all; built where something changed."""
    return build(f"cpu-{kind}", "-DVLATTN_CPU=ON", f"-DVLATTN_SANITIZE={kind}", f"-DVLATTN_SETS={';'.join(instruction_sets)}")
