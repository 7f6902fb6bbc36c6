"""Builds conda/recipe.yaml, installs the package into an environment of its own and runs the recipe's tests there.

usage: python -m tools.conda [--channel conda-forge]

Without --channel nothing is downloaded: packages that stand in for those of a channel hold links to this Python, its packages and
the machine's compiler. So the recipe is tried, and what it makes is for this machine alone. `rattler_build` comes from pip
(py-rattler-build). The result lies in build/conda/.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "conda" / "recipe.yaml"
OUT = ROOT / "build" / "conda"
PROGRAMS = "cmake", "ninja"
PACKAGES = "torch", "numpy", "pip", "setuptools"  # Python's, with all that lies beside them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channel", action="append", help="a channel with the recipe's dependencies")
    channels = parser.parse_args().channel
    from rattler_build import Stage0Recipe, ToolConfiguration

    recipe = Stage0Recipe.from_file(RECIPE)
    if channels is None:
        channels = [(OUT / "stand-ins").as_uri()]
        stand_in(recipe)
    tool = ToolConfiguration(test_strategy="native")
    for result in recipe.run_build(output_dir=OUT, channels=channels, tool_config=tool):
        print(f"{result.name} {result.version}: {', '.join(str(path) for path in result.packages)}")


def stand_in(recipe: Any) -> None:
    """Packages of the names that the recipe depends on, in a channel of their own."""
    from rattler_build import Stage0Recipe, ToolConfiguration, VariantConfig

    shutil.rmtree(OUT / "stand-ins", ignore_errors=True)
    (rendered,) = recipe.render(VariantConfig())
    needs = rendered.recipe.to_dict()["requirements"]
    names = sorted({need.split()[0] for part in ("build", "host", "run") for need in needs[part]})
    for name in names:
        text = f"package: {{name: {name}, version: {version(name)}}}\nbuild: {{script: '{script(name)}'}}\n"
        made = Stage0Recipe.from_yaml(text)
        made.run_build(output_dir=OUT / "stand-ins", channels=[], tool_config=ToolConfiguration())


def version(name: str) -> str:
    return ".".join(map(str, sys.version_info[:3])) if name == "python" else "999"


def script(name: str) -> str:
    """The lines of bash that make the files of a package in $PREFIX."""
    if name == "python":
        folders = sorted({str(Path(origin(package)).parents[1]) for package in PACKAGES})
        site = f"$PREFIX/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        links = [f"echo {folder} >> {site}/packages.pth" for folder in folders]
        return " && ".join([f"{sys.executable} -m venv --without-pip $PREFIX", *links])
    program = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return f"mkdir -p $PREFIX/bin && ln -s {program} $PREFIX/bin/{name}" if name in PROGRAMS else "true"


def origin(package: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} must be installed beside this Python; install it, or name a channel")
    return spec.origin


if __name__ == "__main__":
    main()
