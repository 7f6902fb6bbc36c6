"""The parts of the build that pyproject.toml cannot express: the folders of packages, and two libraries in C++.

The libraries do not need torch. The CPU library needs a C++ compiler, without which the install goes on. The CUDA library also
needs nvcc, and is built on request alone. VLATTN_BUILD_CPU=1 (_CUDA) builds a library or fails, =0 leaves it out.
VLATTN_BUILD_ISA=all compiles the CPU library for every processor, =native for this one only; the default is all for a wheel and
native for an editable install. CMakeLists.txt says how libraries are built. A record beside the library names the build, or says
why there is none; `vlattn info` reads it (vlattn_fast/backends/native.py).
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).parent
RECORD = "build.json"
TOOLS = {"nvcc": "of the CUDA toolkit, on PATH or in $CUDA_HOME/bin", "cmake": "pip install cmake", "ninja": "pip install ninja"}

# sysconfig knows the scripts beside this Python, which PATH may lack.
PATHS = [os.environ.get("PATH", ""), sysconfig.get_path("scripts"), f"{os.environ.get('CUDA_HOME') or '/usr/local/cuda'}/bin"]
ENVIRONMENT = {**os.environ, "PATH": os.pathsep.join(PATHS)}


@dataclass(frozen=True)
class Kernels:
    """One library: <folder>/libvlattn_<name>.so, asked for by VLATTN_BUILD_<NAME>."""

    name: str
    title: str
    folder: str  # where it is installed
    obstacle: Callable[[str], str | None]  # the request ("", "0" or "1") -> why the library is not built, or None
    options: Callable[[bool], list[str]]  # of CMakeLists.txt; whether the install is editable
    facts: Callable[[Path], dict[str, object]]  # a build folder -> the facts in the record of the build
    keeps: Path | None = None  # build folder of editable installs, so that the next one compiles only changes

    @property
    def library(self) -> str:
        return f"libvlattn_{self.name}.so"

    @property
    def variable(self) -> str:
        return f"VLATTN_BUILD_{self.name.upper()}"

    @property
    def asked(self) -> str:
        asked = os.environ.get(self.variable, "")
        if asked not in ("", "0", "1"):
            raise SystemExit(f"{self.variable} must be 0, 1 or unset; got {asked!r}")
        return asked

    @functools.cache  # noqa: B019  there are two
    def reason(self) -> str | None:
        """Why the library is not built; None where it is."""
        return f"{self.variable}=0 left it out" if self.asked == "0" else self.obstacle(self.asked)

    def build_into(self, target: Path, editable: bool) -> None:
        """The library and its record, or the record of why there is none."""
        target.mkdir(parents=True, exist_ok=True)
        start, reason = time.monotonic(), self.reason()
        record = None if reason else self._compile(target, editable)
        reason = reason or f"the build failed (an install with {self.variable}=1 shows how)"
        if record is None:
            (target / self.library).unlink(missing_ok=True)  # from an earlier build
        if record is None and self.asked == "1":
            raise SystemExit(
                f"{self.variable}=1: the {self.title} library cannot be built: {reason}. {self.variable}=0 installs without it."
            )
        if record is None:
            print(f"the {self.title} library is not built: {reason}", flush=True)
        record = {"reason": reason} if record is None else {**record, "seconds": round(time.monotonic() - start)}
        (target / RECORD).write_text(json.dumps(record) + "\n")

    def _compile(self, target: Path, editable: bool) -> dict[str, object] | None:
        """The record of the build; None where the build failed."""
        kept = self.keeps if editable else None
        folder: AbstractContextManager[str | Path] = tempfile.TemporaryDirectory() if kept is None else nullcontext(kept)
        with folder as made:
            chosen = {"CXX": compiler()} if compiler() else {}
            if kept is not None and outdated(kept):
                shutil.rmtree(kept)
            options = [f"-DCMAKE_MAKE_PROGRAM={which('ninja')}", *self.options(editable)]
            for command in (
                ["cmake", "-G", "Ninja", "-S", ROOT, "-B", made, *options],
                ["cmake", "--build", made, "--parallel", str(jobs())],
            ):
                if subprocess.run(command, env={**ENVIRONMENT, **chosen}).returncode != 0:
                    return None
            (target / self.library).unlink(missing_ok=True)  # a process that has it loaded keeps the old file
            shutil.copy(Path(made, self.library), target)
            return self.facts(Path(made))


def which(tool: str) -> str | None:
    return shutil.which(tool, path=ENVIRONMENT["PATH"])


def missing(*tools: str) -> str | None:
    return next((f"{tool} was not found ({TOOLS[tool]})" for tool in tools if which(tool) is None), None)


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first that CMake would take."""
    named = os.environ.get("CXX", "")
    if named:
        return named if which(shlex.split(named)[0]) else None
    return next(filter(None, map(which, ("c++", "g++", "clang++"))), None)


def outdated(folder: Path) -> bool:
    """Whether a kept build has another tree, which CMake refuses, or another compiler, which CMake overlooks."""
    if not (folder / "CMakeCache.txt").exists():
        return False
    expected = str(ROOT.absolute()), which(shlex.split(compiler())[0])
    return expected != (cached(folder, "CMAKE_HOME_DIRECTORY"), cached(folder, "CMAKE_CXX_COMPILER"))


def cached(folder: Path, name: str) -> str:
    """A variable of a configured build."""
    entry = re.search(rf"^{name}:\w+=(.*)$", (folder / "CMakeCache.txt").read_text(), re.M)
    return entry[1] if entry else ""


def cpu_obstacle(asked: str) -> str | None:
    if sys.platform not in ("linux", "darwin") and asked != "1":
        return "it is built on Linux and macOS; VLATTN_BUILD_CPU=1 builds anyway"
    if compiler() is None:
        named = os.environ.get("CXX")
        return f"the C++ compiler of $CXX, {named}, was not found" if named else "no C++ compiler was found (g++ or clang++)"
    return missing("cmake", "ninja")


def cpu_facts(folder: Path) -> dict[str, object]:
    return {"sets": cached(folder, "VLATTN_BUILT_SETS").split(";"), "compiler": cached(folder, "VLATTN_COMPILER")}


def nvcc_version() -> str:
    said = subprocess.run(["nvcc", "--version"], env=ENVIRONMENT, capture_output=True, text=True).stdout
    return version[1] if (version := re.search(r"release ([\d.]+)", said)) else "of unknown version"


def jobs() -> int:
    """How many compilers run at once."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked and not (asked.isdecimal() and int(asked) > 0):
        raise SystemExit(f"MAX_JOBS must be a positive integer or unset; got {asked!r}")
    return int(asked) if asked else os.cpu_count() or 1


def cuda_targets() -> str:
    """The targets of VLATTN_CUDA_TARGETS, as CMake writes them; empty where it is unset, for those of CMakeLists.txt."""
    asked = os.environ.get("VLATTN_CUDA_TARGETS", "")
    target = r"\d+[af]?-(real|virtual)"
    if asked and not re.fullmatch(f"{target}(;{target})*", asked):
        raise SystemExit(f"VLATTN_CUDA_TARGETS must be like 80-real;90a-real;100-virtual or unset; got {asked!r}")
    return asked


def older(version: str, than: tuple[int, int]) -> bool:
    return tuple(map(int, re.findall(r"\d+", version)[:2])) < than


def cuda_obstacle(asked: str) -> str | None:
    if asked != "1":
        return "VLATTN_BUILD_CUDA=1 builds it"
    if sys.platform != "linux":
        return "it is built on Linux only"
    if reason := missing("nvcc", "cmake", "ninja"):
        return reason
    newest = max(map(int, re.findall(r"(\d+)[af]?-", cuda_targets() or "100-real")))
    if older(nvcc_version(), (12, 8)) and newest >= 100:
        return f"nvcc {nvcc_version()} was found, and sm_100 needs 12.8 or newer"
    return None


def cpu_isa(editable: bool) -> str:
    """A wheel may go to other processors; an editable install stays on this machine, and compiles for its processor only."""
    asked = os.environ.get("VLATTN_BUILD_ISA", "")
    if asked not in ("", "all", "native"):
        raise SystemExit(f"VLATTN_BUILD_ISA must be all, native or unset; got {asked!r}")
    return asked or ("native" if editable else "all")


def cpu_options(editable: bool) -> list[str]:
    return ["-DVLATTN_CPU=ON", f"-DVLATTN_ISA={cpu_isa(editable)}"]


def cuda_options(editable: bool) -> list[str]:
    return [f"-DVLATTN_TARGETS={cuda_targets()}"] if cuda_targets() else []


def cuda_facts(folder: Path) -> dict[str, object]:
    return {"targets": cached(folder, "VLATTN_TARGETS").split(";"), "nvcc": nvcc_version()}


BACKENDS = "vlattn_fast/backends"
CPU = Kernels("cpu", "CPU C++", f"{BACKENDS}/cpu", cpu_obstacle, cpu_options, cpu_facts, ROOT / "build" / "install")
CUDA = Kernels("cuda", "CUDA C++", f"{BACKENDS}/cuda", cuda_obstacle, cuda_options, cuda_facts)
LIBRARIES = (CPU, CUDA)


class BuildKernels(Command):
    """A step of `build`: into the wheel, or into the source tree for an editable install (by hand with --inplace)."""

    kernels: Kernels
    user_options = [("inplace", "i", "into the source tree")]
    boolean_options = ["inplace"]
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = None
        self.inplace = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        editable = bool(self.editable_mode or self.inplace)
        self.kernels.build_into(Path(ROOT if editable else self.build_lib, self.kernels.folder), editable)

    def get_source_files(self) -> list[str]:
        return ["CMakeLists.txt", *(str(file.relative_to(ROOT)) for file in sorted((ROOT / "csrc").rglob("*.*")))]

    def get_output_mapping(self) -> dict[str, str]:
        made = [f"{self.kernels.folder}/{name}" for name in (self.kernels.library, RECORD)]
        return {f"{self.build_lib}/{file}": file for file in made if self.editable_mode and Path(ROOT, file).exists()}

    def get_outputs(self) -> list[str]:
        return list(self.get_output_mapping())


STEPS = {f"build_{kernels.name}": type(f"build_{kernels.name}", (BuildKernels,), {"kernels": kernels}) for kernels in LIBRARIES}


class Build(build):
    sub_commands = [*build.sub_commands, *((step, None) for step in STEPS)]


class WithLibraries(Distribution):
    def has_ext_modules(self) -> bool:  # makes the wheel one for this platform
        return any(kernels.reason() is None for kernels in LIBRARIES)


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # the libraries depend on neither Python nor torch's version


if __name__ == "__main__":
    for kernels in LIBRARIES:
        kernels.reason()  # a wrong value ends here
    cpu_isa(editable=True)
    # folders of data count as packages, too: setuptools warns that it will leave out folders that are not listed
    inside = ["vlattn_fast", *(f"vlattn_fast.{name}" for name in find_packages("vlattn_fast"))]
    setup(
        packages=[
            *inside,
            "vlattn_fast.interpret.dataset.templates",
            "vlattn_fast.interpret.result.figures.templates",
            "vlattn_fast.interpret.probing.templates",
            "vlattn_fast.kernels",
            "vlattn_fast.benchmarks",
        ],
        package_dir={"vlattn_fast": "vlattn_fast", "vlattn_fast.kernels": "kernels", "vlattn_fast.benchmarks": "benchmarks"},
        cmdclass={"build": Build, "bdist_wheel": Wheel, **STEPS},
        distclass=WithLibraries,
    )
