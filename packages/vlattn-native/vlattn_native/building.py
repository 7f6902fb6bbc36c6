"""The libraries of csrc/, built by CMake into build/NAME, kept there, and built again if something changed.

It needs nothing but Python: setup.py runs it, too.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
CPP = "cmake", "ninja", "c++"


class Missing(Exception):
    """Something that a build needs is not installed."""


@functools.cache  # CMake takes a third of a second to find that nothing changed
def build(name: str, *options: str, source: Path = ROOT) -> Path:
    """Returns the folder build/`name` with the library, built if something changed. `options` are those of CMakeLists.txt in
    `source`. One process or thread builds at a time."""
    import fcntl  # not on Windows

    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if missing := [tool for tool in CPP if shutil.which(tool, path=environment["PATH"]) is None]:
        raise Missing(f"{' and '.join(missing)} must be installed to build a library")
    if not (source / "CMakeLists.txt").is_file():
        raise Missing(f"{source} must be a clone of the repository to build a library; it has no CMakeLists.txt")
    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        for words in (["-G", "Ninja", "-S", str(source), "-B", str(folder), *options], ["--build", str(folder)]):
            command = ["cmake", *words]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{folder} could not be built:\n{done.stdout}")
    return folder


def operators(name: str = "torch", *options: str) -> Path:
    """Returns the library of the CPU's operators by torch's stable ABI."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise Missing("torch must be installed to build libvlattn_torch.so")
    return build(name, f"-DVLATTN_TORCH={Path(torch.origin).parent}", *options) / "libvlattn_torch.so"


def launcher() -> Path:
    """Returns the launcher of kernels that were compiled ahead, a module of Python."""
    return build("launch", f"-DVLATTN_LAUNCH={sysconfig.get_path('include')}") / "libvlattn_launch.so"
