"""The libraries of C++ kernels as tests build them (tools/building.py), whole or with a change in a source."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tools import building
from tools.building import ROOT, Missing, tools

PTX = ("ptx80", "-DVLATTN_PTX=80")  # for the emulated GPU
SOME = {"congruence_loss": "__half"}  # of these kernels and all 16-bit types; of the others __nv_bfloat16 (csrc/cuda/device.h)


def build(name: str, *options: str) -> Path:
    """The folder build/`name` with the library, built where something changed; skips where a tool is missing."""
    try:
        return building.build(name, *options)
    except Missing as error:
        pytest.skip(f"these C++ kernels are not tested: {error}")


def changed(operator: str, file: str, old: str, new: str, folder: Path) -> Path:
    """The library for the emulated GPU with some kernels of one operator compiled from a copy, whose `file` has `new` in the
    place of `old`."""
    text = (ROOT / "csrc" / "cuda" / file).read_text()
    assert text.count(old) == 1, f"{text.count(old)} times in {file}: {old}"
    made, copy = build(*PTX), folder / "csrc" / "cuda"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (copy / file).write_text(text.replace(old, new))
    listed = subprocess.run(["ninja", "-t", "commands"], cwd=made, env=tools(), capture_output=True, text=True, check=True).stdout
    library, kernel = folder / "libvlattn_ptx.so", f"CMakeFiles/vlattn_ptx.dir/csrc/cuda/{operator}.cu.o"
    for command in listed.splitlines():
        if kernel in command:
            command = command.replace(kernel, str(folder / "kernel.o"))
            command = command.replace(str(ROOT / "csrc" / "cuda" / f"{operator}.cu"), str(copy / f"{operator}.cu"))
            command = command.replace("-o libvlattn_ptx.so", f"-o {shlex.quote(str(library))}")
            command = command.replace(" -x cu ", f" -x cu -DVLATTN_SOME={SOME.get(operator, '__nv_bfloat16')} ")
            done = subprocess.run(command, shell=True, cwd=made, env=tools(), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    return library
