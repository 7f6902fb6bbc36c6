"""The library for GPUs, built without one: its target, and what it needs and holds."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.compiled.cuda import built as build_library
from tools.compiled.table import cuobjdump

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc" / "cuda"


@pytest.fixture(autouse=True)
def _on_device() -> None:
    """No kernel runs here: the library for the CPU, which other tests in this folder start with, is not needed."""


@pytest.fixture(scope="module")
def library() -> Path:
    """`make table` builds all targets."""
    if shutil.which("nvcc") is None:
        pytest.skip("the CUDA C++ kernels are not compiled: nvcc is not installed")
    return build_library()


def said(*command: str | Path) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_it_has_its_target(library: Path) -> None:
    pytest.importorskip("triton", reason="cuobjdump comes with it")
    kernels = len(list(CSRC.glob("*.cu")))
    machine_code = re.findall(r"\.(sm_\w+)\.cubin$", cuobjdump("--list-elf", library), re.M)
    assert [name.removesuffix("a") for name in machine_code] == ["sm_90"] * kernels  # Triton 3.6's cuobjdump leaves out the a


def symbols(library: Path) -> dict[str, list[str]]:
    """Those of each object, demangled, with nm's letter: "T f" is defined there, "U f" elsewhere."""
    objects = sorted((library.parent / "CMakeFiles" / "vlattn_cuda.dir" / "csrc" / "cuda").glob("*.o"))
    assert [file.name.removesuffix(".o") for file in objects] == sorted(file.name for file in CSRC.glob("*.cu"))
    return {file.name: [line[17:] for line in said("nm", "-C", file).splitlines()] for file in objects}


def test_nothing_of_the_emulation_is_in_it(library: Path) -> None:
    every = symbols(library)
    assert [line for lines in every.values() for line in lines if "emulation" in line] == []
    text = re.search(r'\? "([^"]+)" : "invalid configuration"', (CSRC / "host" / "emulation.h").read_text())[1]
    assert text.encode() not in library.read_bytes()


def test_errors_have_the_texts_of_cuda_and_one_definition(library: Path) -> None:
    """It is used by each operator, and defined in none of their headers."""
    name = "vlattn::error_string(cudaError)"
    letters = {file: [line[0] for line in lines if line[2:] == name] for file, lines in symbols(library).items()}
    assert letters.pop("library.cu.o") == ["T"]
    assert len(letters) == 3 and set(map(tuple, letters.values())) == {("U",)}
    assert any(line[2:].startswith("cudaGetErrorString") for line in symbols(library)["library.cu.o"])


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
