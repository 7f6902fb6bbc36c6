"""Libraries of C++ kernels, built by CMake into build/NAME, kept there, and built again where something changed."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
GLIBC = "2.28"  # the oldest with which kernels for other machines run


class Missing(Exception):
    """A tool that a build needs is not installed."""


@functools.cache  # CMake takes a third of a second to find that nothing changed
def build(name: str, *options: str) -> Path:
    """The folder build/`name` with the library, built where something changed. `options` are those of CMakeLists.txt.

    One process or thread builds a folder at a time: pytest-xdist's workers share it.
    """
    if any(option.startswith("-DVLATTN_PTX=") for option in options):
        options = *options, f"-DVLATTN_PTX_RUNTIME={_runtime()}"
    for tool in ("cmake", "ninja", "c++", *([] if "".join(options).startswith("-DVLATTN_CPU") else ["nvcc"])):
        if shutil.which(tool, path=tools()["PATH"]) is None:
            raise Missing(f"{tool} is not installed")
    folder = ROOT / "build" / name
    with _locked(name):
        configured = _run("cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *options)
        if configured.returncode == 0:
            configured = _run("cmake", "--build", folder)
    if configured.returncode != 0:
        raise RuntimeError(f"build/{name} could not be built:\n{configured.stdout}")
    return folder


@functools.cache
def instruction_sets() -> list[str]:
    """The instruction sets that this processor runs, the fastest first, but `amx`, which a library has to be built with: an
    editable install has only the fastest (VLATTN_BUILD_ISA)."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "libsets.so")
        made = _run("c++", "-std=c++17", "-shared", "-fPIC", "-o", library, ROOT / "csrc" / "cpu" / "library.cpp")
        if made.returncode != 0:
            raise RuntimeError(f"library.cpp could not be built:\n{made.stdout}")
        ask = ctypes.CDLL(str(library)).vlattn_instruction_sets
        ask.restype = ctypes.c_char_p
        return ask().decode().split()


def all_sets() -> Path:
    """The CPU library with every instruction set, which takes minutes to compile."""
    return build("cpu-all", "-DVLATTN_CPU=ON") / "libvlattn_cpu.so"


def _runtime() -> Path:
    """The stand-in for CUDA's runtime that the package ptx brings along."""
    try:
        from ptx.cuda import RUNTIME
    except ModuleNotFoundError as missing:
        if missing.name != "ptx":
            raise
        raise Missing("ptx, which emulates them, is not installed") from missing
    return RUNTIME


def tools() -> dict[str, str]:
    """The environment with ninja, which the tests' own brings along, on the path."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@contextmanager
def _locked(name: str) -> Iterator[None]:
    import fcntl  # not on Windows, where Missing is raised before

    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / f".{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=tools(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
