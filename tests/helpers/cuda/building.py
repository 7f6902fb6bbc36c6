"""The libraries of C++ kernels as tests build them: by CMake into build/NAME, kept there, built again where something changed."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HOST = ("-DVLATTN_HOST=ON",)
SOME = "-DVLATTN_SOME=ON"  # every branch of the kernels, but not every type with every size: all of them take three times as long
SANITIZED, THREADS = (*HOST, "-DVLATTN_SANITIZE=ON", SOME), (*HOST, "-DVLATTN_SANITIZE=thread", SOME)
EVERY_THREADS = ("tsan_every", *THREADS[:-1])
CUDA = ("cuda_sm90", "-DVLATTN_TARGETS=90a-real", SOME)  # what tests compile: all kernels and targets take four minutes of a core
TARGETS = ("cuda", "-UVLATTN_TARGETS")  # `make table`: the targets of CMakeLists.txt, not those of the last build


@functools.cache  # CMake takes a third of a second to find that nothing changed
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
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66"}
    return {**os.environ, **options, "LD_PRELOAD": " ".join(libraries)}


def changed(source: str, file: str, old: str, new: str, folder: Path, name: str = "host", *options: str) -> Path:
    """The library of build/`name` with one source compiled from a copy, whose `file` has `new` in the place of `old`."""
    text = (ROOT / "csrc" / "cuda" / file).read_text()
    assert text.count(old) == 1, f"{text.count(old)} times in {file}: {old}"
    return rewritten(source, file, text.replace(old, new), folder, name, *options)


def rewritten(source: str, file: str, text: str, folder: Path, name: str = "host", *options: str) -> Path:
    """The library of build/`name` with one source compiled from a copy, whose `file` is `text`, as CMake does it."""
    made, copy = build(name, *(options or HOST)), folder / "csrc" / "cuda"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (copy / file).write_text(text)
    listed = subprocess.run(["ninja", "-t", "commands"], cwd=made, env=tools(), capture_output=True, text=True, check=True).stdout
    library, kernel = folder / "libvlattn_host.so", f"CMakeFiles/vlattn_host.dir/csrc/cuda/{source}.o"
    for command in listed.splitlines():
        if kernel in command:
            command = command.replace(kernel, str(folder / "kernel.o"))
            command = command.replace(str(ROOT / "csrc" / "cuda" / source), str(copy / source))
            command = command.replace("-o libvlattn_host.so", f"-o {shlex.quote(str(library))}")
            command += " -O0" if name == "host" else ""  # it runs a few calls
            done = subprocess.run(command, shell=True, cwd=made, env=tools(), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    return library


def run_tests(chosen: dict[str, str], environment: dict[str, str], *plugins: str) -> tuple[int, str]:
    """The exit status and the output of the chosen tests (pytest's -k) of each operator on the CUDA C++ kernels, all in one other
    process: to load torch with a sanitizer takes longer than the tests of an operator."""
    files = [f"tests/{folder}/test_{operator}.py" for operator in chosen for folder in ("cuda", "ops")]
    words = " or ".join(f"test_{operator}.py and ({words})" for operator, words in chosen.items())
    # what a sanitizer writes is not pytest's to keep
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--capture=sys"]
    command += [word for plugin in plugins for word in ("-p", plugin)] + files
    done = subprocess.run([*command, "-k", f"cuda and ({words})"], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


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
