"""Builds what a release uploads, into dist/: a source distribution, and of it a wheel for each of Linux's processors.

    python -m tools.wheel [PROCESSOR ...]    x86_64, aarch64; default: both

One wheel serves every Python and every torch. auditwheel names it for the oldest glibc that its libraries run with, or says which
symbol needs a newer one than 2.28. In an environment with this wheel, torch and nothing else the command of
[tool.cibuildwheel] must pass. For another processor than this machine's the library is cross-compiled by Debian's
g++-aarch64-linux-gnu, and qemu-user runs tests of it.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

from tools import aarch64, building
from tools.environments import ROOT, TORCH, pip

PROCESSORS = "x86_64", "aarch64"
MOST_MB = 20
LIBRARY = "vlattn_fast/backends/cpu/libvlattn_cpu.so"
# the tests of CPU kernels that qemu runs
TESTS = "tests/ops/test_score_attention.py", "-k", "cpu and (low_precision or grouped_heads)"
TOOLCHAIN = "set(CMAKE_SYSTEM_NAME Linux)\nset(CMAKE_SYSTEM_PROCESSOR {0})\nset(CMAKE_CXX_COMPILER {0}-linux-gnu-g++)\n"


def source(folder: Path, out: Path) -> Path:
    """The source distribution of the package in `folder`, in `out`."""
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(out)!r}))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    return out / done.stdout.split()[-1]


def build(sources: Path, processor: str) -> Path:
    """The wheel, beside its sources."""
    variables, options = {"VLATTN_BUILD_CPU": "1", "VLATTN_BUILD_ISA": "all"}, list[str]()
    with tempfile.TemporaryDirectory() as folder:
        if processor != platform.machine():
            compiler = f"{processor}-linux-gnu-g++"
            if shutil.which(compiler) is None:
                raise building.Missing(f"{compiler} is not installed (Debian's g++-{processor.replace('_', '-')}-linux-gnu)")
            toolchain = Path(folder, "toolchain.cmake")
            toolchain.write_text(TOOLCHAIN.format(processor), encoding="utf-8")
            variables["CMAKE_TOOLCHAIN_FILE"] = str(toolchain)
            options = [f"--config-settings=--build-option=--plat-name=linux_{processor}"]
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *options, "--wheel-dir", folder, str(sources)]
        subprocess.run(command, env={**os.environ, **variables}, check=True)
        (made,) = Path(folder).glob("*.whl")
        # Nothing is copied into the wheel: a library that is not on every system is an error, since no patcher is there.
        audit = ["-m", "auditwheel", "repair", "--patcher", "none", "--wheel-dir", str(sources.parent), str(made)]
        subprocess.run([sys.executable, *audit], check=True)
    (wheel,) = sources.parent.glob(f"*{processor}.whl")
    return wheel


def oldest(wheel: Path) -> str:
    """The lowest version of glibc in a wheel's name."""
    versions = [tuple(map(int, version)) for version in re.findall(r"manylinux_(\d+)_(\d+)_", wheel.name)]
    most = tuple(map(int, building.GLIBC.split(".")))
    if not versions or min(versions) > most:
        raise SystemExit(
            f"{wheel.name} must run with glibc {building.GLIBC}; `auditwheel show {wheel}` names what needs a newer one"
        )
    return ".".join(map(str, min(versions)))


def try_here(wheel: Path) -> str:
    """Runs the command of [tool.cibuildwheel] in an environment that has the wheel, torch and what they need."""
    tested = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cibuildwheel"]
    without = {name: value for name, value in os.environ.items() if not name.startswith(("VLATTN_", "PYTHONPATH"))}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        programs = Path(folder, "bin")
        pip(str(programs / "python"), TORCH, f"{wheel}[{','.join(tested['test-extras'])}]")
        name, *arguments = shlex.split(tested["test-command"])
        done = subprocess.run([programs / name, *arguments], cwd=folder, env=without, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{tested['test-command']} failed with {wheel.name} and {TORCH} alone:\n{done.stdout}")
    return f"{tested['test-command']} passes in an environment with it and {TORCH} alone"


def try_emulated(wheel: Path) -> str:
    """Runs tests with the library of a wheel for aarch64, in each of its instruction sets."""
    if shutil.which("qemu-aarch64") is None:
        return "not tried: qemu-aarch64 is not installed (Debian's qemu-user)"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(wheel) as archive:
            (folder / Path(LIBRARY).name).write_bytes(archive.read(LIBRARY))
        runner = [aarch64.COMPILER, "-std=c++17", "-O1", ROOT / "tests" / "cpu" / "runner.cpp", "-o", folder / "runner", "-ldl"]
        subprocess.run(runner, check=True)
        for instruction_set in aarch64.SETS:
            done = aarch64.run(folder, instruction_set, *TESTS)
            if done.returncode != 0:
                raise RuntimeError(f"tests failed with the library of {wheel.name}, emulated:\n{done.stdout}")
    return f"tests pass with its library in {' and '.join(aarch64.SETS)}, emulated: {done.stdout.strip().splitlines()[-1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("processors", nargs="*", metavar="PROCESSOR", help=f"{', '.join(PROCESSORS)}; default: all")
    processors = parser.parse_args().processors or PROCESSORS
    if unknown := {*processors} - {*PROCESSORS}:
        parser.error(f"PROCESSOR must be one of {', '.join(PROCESSORS)}; got {', '.join(sorted(unknown))}")
    out = ROOT / "dist"
    shutil.rmtree(out, ignore_errors=True)
    sources = source(ROOT, out)
    print(f"dist/{sources.name}: {sources.stat().st_size / 1e6:.1f} MB", flush=True)
    for processor in processors:
        wheel = build(sources, processor)
        size = wheel.stat().st_size / 1e6
        print(f"dist/{wheel.name}: {size:.1f} MB, for glibc {oldest(wheel)} or newer", flush=True)
        if size > MOST_MB:
            raise SystemExit(f"a wheel must have at most {MOST_MB} MB; got {size:.1f} MB")
        tried = try_here(wheel) if processor == platform.machine() else try_emulated(wheel)
        print(f"  {tried}", flush=True)


if __name__ == "__main__":
    main()
