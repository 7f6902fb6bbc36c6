"""The sanitized libraries of the CPU's C++ kernels, by CMake into build/cpu-KIND."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.helpers.cuda.building import build

KINDS = ("address", "thread")


def sanitized(kind: str, *instruction_sets: str) -> Path:
    """The folder of the library with these instruction sets, `amx` last, or with all; built where something changed."""
    return build(f"cpu-{kind}", "-DVLATTN_CPU=ON", f"-DVLATTN_SANITIZE={kind}", f"-DVLATTN_SETS={';'.join(instruction_sets)}")


def sanitizing(kind: str) -> dict[str, str]:
    """The environment in which Python loads a sanitized library."""
    names = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}[kind]
    libraries = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    ]
    return {**os.environ, "TSAN_OPTIONS": "exitcode=66", "LD_PRELOAD": " ".join(libraries)}
