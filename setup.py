"""What pyproject.toml cannot express: where packages lie, and the library of CUDA C++ kernels, built where it can be.

VLATTN_CUDA=1 builds it or fails, VLATTN_CUDA=0 leaves it out. Without the variable it is built where nvcc, cmake, ninja and a
torch for CUDA are found; elsewhere the install goes on without it. CMakeLists.txt alone says how it is built. What was built, or
why nothing was, is written beside it: `vlattn info` reads that (vlattn_fast/cuda/_shared_library.py).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).parent
FOLDER, LIBRARY, RECORD = "vlattn_fast/cuda", "libvlattn_cuda.so", "build.json"
TOOLS = {"nvcc": "of the CUDA toolkit, on PATH or in $CUDA_HOME/bin", "cmake": "pip install cmake", "ninja": "pip install ninja"}

# Under pip's build isolation torch cannot be imported and the environment's scripts are not on PATH; sysconfig knows both places.
# Through PYTHONPATH pip hides packages from what is started, too, and a cmake from PyPI is one.
SITE = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
PATHS = [os.environ.get("PATH", ""), sysconfig.get_path("scripts"), f"{os.environ.get('CUDA_HOME') or '/usr/local/cuda'}/bin"]
ENVIRONMENT = {**os.environ, "PATH": os.pathsep.join(PATHS)}
ENVIRONMENT.pop("PYTHONPATH", None)


def nvcc_version() -> str:
    said = subprocess.run(["nvcc", "--version"], env=ENVIRONMENT, capture_output=True, text=True).stdout
    return found[1] if (found := re.search(r"release ([\d.]+)", said)) else "of unknown version"


def torch_folder() -> Path | None:
    folders = (Path(place).absolute() / "torch" for place in [*sys.path, *SITE])
    return next((folder for folder in folders if (folder / "version.py").is_file()), None)


def torch_version(folder: Path) -> tuple[str, bool]:
    """The version, and whether it is built for CUDA."""
    text = (folder / "version.py").read_text()
    found = re.search(r"^__version__ = ['\"](.+)['\"]", text, re.M)
    return found[1] if found else "of unknown version", re.search(r"^cuda\b.*= ['\"]", text, re.M) is not None


def older(version: str, than: tuple[int, int]) -> bool:
    return tuple(map(int, re.findall(r"\d+", version)[:2])) < than


def obstacle(asked: str) -> str | None:
    """Why nothing is built, if nothing is."""
    if asked == "0":
        return "VLATTN_CUDA=0 left it out"
    if sys.platform != "linux":
        return "it is built on Linux only"
    for tool, where in TOOLS.items():
        if shutil.which(tool, path=ENVIRONMENT["PATH"]) is None:
            return f"{tool} was not found ({where})"
    if older(nvcc_version(), (12, 8)):
        return f"nvcc {nvcc_version()} was found, and sm_100 needs 12.8 or newer"
    if (folder := torch_folder()) is None:
        return "torch was not found (install it first, then vlattn_fast again)"
    version, for_cuda = torch_version(folder)
    if older(version, (2, 11)):
        return f"torch {version} was found, and 2.11 or newer is needed"
    return None if for_cuda or asked == "1" else "this torch is not built for CUDA; VLATTN_CUDA=1 builds anyway"


def compile_into(target: Path) -> dict[str, object] | None:
    """What was built; None where that failed."""
    start, torch = time.monotonic(), torch_folder()
    with tempfile.TemporaryDirectory() as made:
        for command in (
            ["cmake", "-G", "Ninja", "-S", ROOT, "-B", made, f"-DVLATTN_TORCH={torch}"],
            ["cmake", "--build", made, "--parallel", str(os.cpu_count())],
        ):
            if subprocess.run(command, env=ENVIRONMENT).returncode != 0:
                return None
        shutil.copy(Path(made, LIBRARY), target)
        targets = re.search(r"^VLATTN_TARGETS:\w+=(.*)$", Path(made, "CMakeCache.txt").read_text(), re.M)[1]
    seconds = round(time.monotonic() - start)
    return {"targets": targets.split(";"), "nvcc": nvcc_version(), "torch": torch_version(torch)[0], "seconds": seconds}


class BuildCuda(Command):
    """A step of `build`: into the wheel, or into the source tree for an editable install."""

    user_options = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        target = Path(ROOT if self.editable_mode else self.build_lib, FOLDER)
        target.mkdir(parents=True, exist_ok=True)
        (target / LIBRARY).unlink(missing_ok=True)  # of an earlier build
        record = None if OBSTACLE else compile_into(target)
        reason = OBSTACLE or "the build failed (an install with VLATTN_CUDA=1 shows how)"
        if record is None and ASKED == "1":
            raise SystemExit(f"VLATTN_CUDA=1: the CUDA C++ library cannot be built: {reason}. VLATTN_CUDA=0 installs without it.")
        if record is None:
            print(f"the CUDA C++ library is not built: {reason}", flush=True)
        (target / RECORD).write_text(json.dumps(record or {"reason": reason}) + "\n")

    def get_source_files(self) -> list[str]:
        return ["CMakeLists.txt", *(str(file.relative_to(ROOT)) for file in sorted((ROOT / "csrc").rglob("*.*")))]

    def get_output_mapping(self) -> dict[str, str]:
        files = [f"{FOLDER}/{name}" for name in (LIBRARY, RECORD) if self.editable_mode and (ROOT / FOLDER / name).exists()]
        return {f"{self.build_lib}/{file}": file for file in files}

    def get_outputs(self) -> list[str]:
        return list(self.get_output_mapping())


class Build(build):
    sub_commands = [*build.sub_commands, ("build_cuda", None)]


class WithLibrary(Distribution):
    def has_ext_modules(self) -> bool:  # makes the wheel one for this platform
        return OBSTACLE is None


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # the library knows neither Python nor the version of torch


if __name__ == "__main__":
    ASKED = os.environ.get("VLATTN_CUDA", "")
    if ASKED not in ("", "0", "1"):
        raise SystemExit(f"VLATTN_CUDA must be 0, 1 or unset; got {ASKED!r}")
    OBSTACLE = obstacle(ASKED)
    inside = ["vlattn_fast", *(f"vlattn_fast.{name}" for name in find_packages("vlattn_fast"))]
    setup(
        packages=[*inside, "vlattn_fast.kernels", "vlattn_fast.benchmarks"],
        package_dir={"vlattn_fast": "vlattn_fast", "vlattn_fast.kernels": "kernels", "vlattn_fast.benchmarks": "benchmarks"},
        cmdclass={"build": Build, "build_cuda": BuildCuda, "bdist_wheel": Wheel},
        distclass=WithLibrary,
    )
