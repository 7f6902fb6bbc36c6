"""The libraries of C++ kernels as tests build them: by CMake into build/NAME, kept there, built again where something changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOST, SANITIZED = ("-DVLATTN_HOST=ON",), ("-DVLATTN_HOST=ON", "-DVLATTN_SANITIZE=ON")
CUDA = ("cuda_sm90", "-DVLATTN_TARGETS=90a-real")  # what tests compile: all targets take four minutes of a core
TARGETS = ("cuda", "-UVLATTN_TARGETS")  # `make table`: the targets of CMakeLists.txt, not those of the last build


def build(name: str, *options: str, target: str = "all") -> Path:
    """The folder build/`name` with the library, built where something changed; skips where a tool is missing.

    One process or thread builds a folder at a time: pytest-xdist's workers share it.
    """
    for tool in ("cmake", "ninja", "c++"):
        if shutil.which(tool, path=tools()["PATH"]) is None:
            pytest.skip(f"these C++ kernels are not tested: {tool} is not installed")
    with _locked(name):
        return _build(name, options, target)


def tools() -> dict[str, str]:
    """The environment with ninja, which the tests' own brings along, on the path."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def sanitizing(kind: str = "address") -> dict[str, str]:
    """The environment in which Python loads a sanitized library."""
    names = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}[kind]
    libraries = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    ]
    return {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


@contextmanager
def _locked(name: str) -> Iterator[None]:
    import fcntl  # not on Windows, where the tests of CUDA C++ skip before

    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / f".{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


def _build(name: str, options: tuple[str, ...], target: str) -> Path:
    folder = ROOT / "build" / name
    configured = _run("cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *options)
    if configured.returncode != 0 and "CUDAToolkit" in configured.stdout:
        pytest.skip("the CUDA C++ kernels are not tested: the CUDA toolkit, whose headers they need, is not installed")
    assert configured.returncode == 0, configured.stdout
    built = _run("cmake", "--build", folder, "--target", target)
    assert built.returncode == 0, built.stdout
    return folder


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=tools(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
