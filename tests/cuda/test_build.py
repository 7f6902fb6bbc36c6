"""The library for GPUs, linked without one: its target, and what it needs and holds."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.cuda.building import PTX, build
from tools.compiled.table import cuobjdump

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc" / "cuda"


@pytest.fixture(autouse=True)
def _on_device() -> None:
    """No kernel runs here: the library for the CPU, which other tests in this folder start with, is not needed."""


@pytest.fixture(scope="module")
def library() -> Path:
    """As the emulated one it holds PTX of one architecture; `python -m tools.compiled.cuda` builds all targets."""
    return build(*PTX) / "libvlattn_cuda.so"


def said(*command: str | Path) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_it_has_its_target(library: Path) -> None:
    pytest.importorskip("triton", reason="cuobjdump comes with it")
    kernels = len(list(CSRC.glob("*.cu")))
    code = re.findall(r"\.(sm_\w+)\.ptx$", cuobjdump("--list-ptx", library), re.M)
    assert [name.removesuffix("a") for name in code] == ["sm_90"] * kernels  # Triton 3.6's cuobjdump leaves out the a


def test_no_torch_in_it(library: Path) -> None:
    """It serves every version of torch, and is built without one."""
    needed = {line.split("[")[1].split(".so")[0] for line in said("readelf", "-d", library).splitlines() if "(NEEDED)" in line}
    assert needed <= {"libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64", "libpthread", "librt", "libdl"}
    assert "libc" in needed


def test_no_path_of_the_builder_in_it(library: Path) -> None:
    assert not re.search(r"\((RPATH|RUNPATH)\)", said("readelf", "-d", library))


def test_it_gives_out_its_operators_and_nothing_else(library: Path) -> None:
    given = {line.split()[-1] for line in said("nm", "-D", "--defined-only", library).splitlines()}
    operators = {name for file in CSRC.glob("*.cu") for name in re.findall(r"^OPERATOR\((\w+),", file.read_text(), re.M)}
    assert len(operators) == 7
    functions = {*operators, *(f"{name}_fields" for name in operators), "versions"}
    assert {name for name in given if "vlattn" in name} == {f"vlattn_cuda_{name}" for name in functions}
