"""The part of the build that pyproject.toml cannot express: libraries in C++ and compiled kernels in a wheel.

A wheel has the libraries of csrc/, compiled for this system, and the archives of kernels that lie in vlattn_native/compiled/. A
build without them fails. An editable install compiles nothing: vlattn_native/building.py does so when a library is needed.
"""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).parent
COMPILED = "vlattn_native/compiled"
MOST_MB = 60  # of compiled kernels in a wheel
building: dict[str, Any] = runpy.run_path(str(ROOT / "vlattn_native" / "building.py"))


class Libraries(Command):
    user_options: list[Any] = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = ""

    def finalize_options(self) -> None:
        self.build_lib = self.build_lib or self.get_finalized_command("build").build_lib

    def run(self) -> None:
        if self.editable_mode:
            return
        target = Path(self.build_lib, COMPILED)
        target.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copy(building["operators"](), target)
            if sys.platform == "linux":  # where there is a driver to call
                shutil.copy(building["launcher"](), target)
        except (building["Missing"], RuntimeError) as error:
            raise SystemExit(str(error)) from error

    def get_source_files(self) -> list[str]:
        return ["CMakeLists.txt", *(str(file.relative_to(ROOT)) for file in sorted((ROOT / "csrc").rglob("*.*")))]

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands = [*build.sub_commands, ("libraries", None)]


class ForThisSystem(Distribution):
    def has_ext_modules(self) -> bool:
        return True


class Wheel(bdist_wheel):
    def run(self) -> None:
        archives = sorted((ROOT / COMPILED).glob("*.zip"))
        if (size := sum(path.stat().st_size for path in archives) / 1e6) > MOST_MB:
            raise SystemExit(
                f"{COMPILED}/ must have at most {MOST_MB} MB of compiled kernels for a wheel; got {size:.0f} MB in "
                f"{', '.join(path.name for path in archives)}: remove one of them, or compile fewer operators"
            )
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # the libraries depend on neither Python nor torch's version


if __name__ == "__main__":
    packages = ["vlattn_native", "vlattn_native.hub"]
    setup(
        packages=[*packages, *(["vlattn_native.compiled"] if (ROOT / COMPILED).is_dir() else [])],
        cmdclass={"build": Build, "bdist_wheel": Wheel, "libraries": Libraries},
        distclass=ForThisSystem,
    )
