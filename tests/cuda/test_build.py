"""The library for GPUs, built without one: its target, and schemas like those of the Python operators."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

import vlattn_fast  # noqa: F401  registers torch.ops.vlattn
from tests.compiled.cuda import built as build_library
from tests.compiled.table import cuobjdump

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc" / "cuda"
BINDING = (CSRC / "binding.cpp").read_text()


@pytest.fixture(autouse=True)
def _on_device() -> None:
    """No kernel runs here: the library for the CPU, which other tests in this folder start with, is not needed."""


def test_it_has_its_target() -> None:
    """`make table` builds all of them."""
    if shutil.which("nvcc") is None:
        pytest.skip("the CUDA C++ kernels are not compiled: nvcc is not installed")
    pytest.importorskip("triton", reason="cuobjdump comes with it")
    built = build_library()
    kernels = len(list(CSRC.glob("*.cu")))
    machine_code = re.findall(r"\.(sm_\w+)\.cubin$", cuobjdump("--list-elf", built), re.M)
    assert sorted(machine_code) == ["sm_90a"] * kernels


def test_its_errors_are_those_of_cuda() -> None:
    """The binding is compiled by the C++ compiler, as the emulation is: it must not have the texts of the emulation."""
    if shutil.which("nvcc") is None:
        pytest.skip("the CUDA C++ kernels are not compiled: nvcc is not installed")
    text = re.search(r'\? "([^"]+)" : "invalid configuration"', (CSRC / "host" / "emulation.h").read_text())[1]
    assert text.encode() not in build_library().read_bytes()


def schemas() -> dict[str, str]:
    """Of csrc/cuda/binding.cpp, by name."""
    texts = ["".join(re.findall(r'"([^"]*)"', text)) for text in re.findall(r'm\.def\(((?:\s*"[^"]*")+)\);', BINDING)]
    return {text.split("(", 1)[0]: text for text in texts}


@pytest.mark.parametrize("name", schemas())
def test_an_operator_has_the_schema_of_its_python_operator(name: str) -> None:
    ours = torch._C.parse_schema(f"vlattn_cuda::{schemas()[name]}")
    python = getattr(torch.ops.vlattn, name).default._schema
    *arguments, backend = [(x.name, str(x.type)) for x in python.arguments if x.name != "maps"]  # of the CPU's kernels alone
    assert backend == ("backend", "str")
    assert [(x.name, str(x.type)) for x in ours.arguments] == arguments
    types = [str(x.type) for x in python.returns if x.name != "maps"]
    assert [str(x.type) for x in ours.returns] == types


def test_every_operator_is_defined_and_implemented_once() -> None:
    defined = re.findall(r'm\.def\(\s*"(\w+)\(', BINDING)
    implemented = re.findall(r'm\.impl\("(\w+)", TORCH_BOX\(&ops::(\w+)\)\)', BINDING)
    assert len(defined) == BINDING.count("m.def(") > 0 and len(implemented) == BINDING.count("m.impl(")
    assert defined == list(schemas())
    assert sorted(implemented) == sorted((name, name) for name in defined)


def test_only_the_binding_knows_torch() -> None:
    files = [path for path in CSRC.rglob("*") if path.is_file()]
    torchs = r"#\s*include\s*[<\"](torch|ATen|c10)/|\b(at|c10|torch)::"
    assert [path.name for path in files if re.search(torchs, path.read_text())] == ["binding.cpp"]
