"""Kernels broken on purpose: the tests of this folder must catch every one of them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cuda.building import HOST, ROOT, build, tools


class Break(NamedTuple):
    operator: str
    what: str
    file: str
    old: str
    new: str
    tests: str  # pytest's -k


BARRIER = "__syncthreads();"
BREAKS = [
    Break(
        "score_attention",
        "the last of an odd number of units left out",
        "additive_scores.h",
        "pairs = (A + 1) / 2;",
        "pairs = A / 2;",
        "feature_sizes",
    ),
    Break(
        "relevancy_attention",
        "no barrier after staging",
        "relevancy_attention.cu",
        f"carried, num_rows);\n                {BARRIER}",
        "carried, num_rows);",
        "number_of_carried_rows",
    ),
    Break(
        "congruence_loss",
        "no barrier before the divergence",
        "congruence_loss.cu",
        f"{BARRIER}\n        const float loss = divergence(",
        "const float loss = divergence(",
        "kinds_and_directions",
    ),
]


def broken_library(change: Break, folder: Path) -> Path:
    """build/host's library with one kernel compiled from a changed copy, by the commands that CMake made."""
    host, file = build("host", *HOST), f"{change.operator}.cu"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    source = (folder / "csrc" / "cuda" / change.file).read_text()
    assert source.count(change.old) == 1, f"{source.count(change.old)} times in {change.file}: {change.old}"
    (folder / "csrc" / "cuda" / change.file).write_text(source.replace(change.old, change.new))
    listed = subprocess.run(["ninja", "-t", "commands"], cwd=host, env=tools(), capture_output=True, text=True, check=True).stdout
    library, made = folder / "libvlattn_host.so", f"CMakeFiles/vlattn_host.dir/csrc/cuda/{file}.o"
    for command in listed.splitlines():
        if made in command:
            command = command.replace(made, str(folder / "kernel.o"))
            command = command.replace(str(ROOT / "csrc" / "cuda" / file), str(folder / "csrc" / "cuda" / file))
            command = command.replace("-o libvlattn_host.so", f"-o {shlex.quote(str(library))}")
            done = subprocess.run(command, shell=True, cwd=host, env=tools(), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    return library


@pytest.mark.parametrize("change", BREAKS, ids=lambda change: f"{change.operator}: {change.what}")
def test_a_broken_kernel_is_caught(change: Break, tmp_path: Path) -> None:
    library = broken_library(change, tmp_path)
    files = [f"tests/{folder}/test_{change.operator}.py" for folder in ("cuda", "ops")]
    tests = ["-q", "-x", "-p", "no:cacheprovider", *files, "-k", f"cuda and ({change.tests})"]
    environment = {**os.environ, "VLATTN_CUDA_LIBRARY": str(library)}
    done = subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and " failed" in done.stdout, done.stdout
