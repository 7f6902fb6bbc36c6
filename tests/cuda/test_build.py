"""The library for GPUs, built without one: targets, registers as stored, and schemas like those of the Python operators."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import vlattn_fast  # noqa: F401  registers torch.ops.vlattn
from tests.cuda import compile_table
from tests.cuda.compile_table import complaints, cuobjdump, nvcc_version, read, rows_of

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
BINDING = (CSRC / "binding.cpp").read_text()
BACKWARD = r"backward|grad"  # in the name of every kernel that is not a forward pass's
ROW = {"registers": 100, "shared": 1024, "stack": 0}
TINY = """
namespace vlattn {
namespace {
template <class T, int SIZE>
__global__ void reverse_kernel(T* x) {
    __shared__ T kept[SIZE];
    kept[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = kept[SIZE - 1 - threadIdx.x];
}
}  // namespace
__global__ void __launch_bounds__(1024, 2) spill_kernel(const float* x, float* y, int n) {
    float kept[80];
#pragma unroll
    for (int i = 0; i < 80; ++i) kept[i] = x[i * n + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 80; ++i) y[i * n + threadIdx.x] = kept[79 - i] * kept[i * 7 % 80];
}
void use() {
    reverse_kernel<double, 64><<<1, 64>>>(nullptr);
    reverse_kernel<float, 128><<<1, 128>>>(nullptr);
}
}  // namespace vlattn
"""


@pytest.fixture(autouse=True)
def _on_device() -> None:
    """No kernel runs here: the library for the CPU, which other tests in this folder start with, is not needed."""


@pytest.fixture(scope="module")
def nvcc() -> str:
    for tool in ("nvcc", "c++filt"):
        if shutil.which(tool) is None:
            pytest.skip(f"the CUDA C++ kernels are not compiled: {tool} is not installed")
    pytest.importorskip("triton", reason="cuobjdump comes with it")
    return nvcc_version()


@pytest.fixture(scope="module")
def built(nvcc: str) -> Path:
    return compile_table.built()


def test_it_has_its_targets(built: Path) -> None:
    kernels = len(list(CSRC.glob("*.cu")))
    machine_code = re.findall(r"\.(sm_\w+)\.cubin$", cuobjdump("--list-elf", built), re.M)
    assert sorted(machine_code) == sorted(["sm_80", "sm_90a", "sm_100"] * kernels)
    assert re.findall(r"\.(sm_\w+)\.ptx$", cuobjdump("--list-ptx", built), re.M) == ["sm_100"] * kernels


def test_kernels_compile_as_stored(built: Path, nvcc: str) -> None:
    table = read()
    if table and nvcc not in table:
        pytest.skip(f"the table has no nvcc {nvcc}, only {', '.join(table)}: python tests/cuda/compile_table.py --write adds it")
    assert complaints(rows_of(built), table.get(nvcc, {})) == []


def test_forward_kernels_have_no_stack_on_sm_90() -> None:
    stored = [(key, row) for rows in read().values() for key, row in rows.items() if key.endswith("sm_90a")]
    forward = [(key, row) for key, row in stored if not re.search(BACKWARD, key)]
    assert forward
    assert [key for key, row in forward if row["stack"] > 0] == []


@pytest.fixture(scope="module")
def tiny(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.cu").write_text(TINY)
    command = ["nvcc", "-arch=sm_90a", "-shared", "-Xcompiler", "-fPIC", folder / "tiny.cu", "-o", folder / "tiny.so"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "tiny.so"


def test_the_table_says_what_was_compiled(tiny: Path) -> None:
    rows = rows_of(tiny)
    assert list(sorted(rows)) == ["reverse_kernel<double, 64> sm_90a", "reverse_kernel<float, 128> sm_90a", "spill_kernel sm_90a"]
    spilled = rows.pop("spill_kernel sm_90a")
    assert spilled["registers"] == 32 and spilled["stack"] > 300  # 65536 registers for 2048 threads; 80 floats live in each
    for row in rows.values():
        assert row["shared"] == 512 + 1024 and row["stack"] == 0 and 0 < row["registers"] < 32


def test_the_table_is_written_and_read(tiny: Path, nvcc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(compile_table, "TABLE", tmp_path / "table.json")
    compile_table.write({"1.0": {"old sm_80": ROW}})

    def run(*options: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["compile_table.py", "--library", str(tiny), *options])
        with pytest.raises(SystemExit) as end:
            compile_table.main()
        return end.value.code, capsys.readouterr().out

    code, said = run()
    assert code == 1 and "spill_kernel sm_90a: not in the table" in said
    code, said = run("--write")
    assert code == 0 and f"nvcc {nvcc}: 3 kernels, 0 not as stored" in said
    assert run()[0] == 0
    assert read() == {"1.0": {"old sm_80": ROW}, nvcc: rows_of(tiny)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stack": 8}, ["k: stack 0 -> 8"]),
        ({"registers": 101}, ["k: registers 100 -> 101"]),
        ({"shared": 200_000}, ["k: 200000 bytes of shared memory, more than 101376", "k: shared 1024 -> 200000"]),
    ],
)
def test_the_table_sees_changes(change: dict[str, int], words: list[str]) -> None:
    assert complaints({"k": ROW}, {"k": ROW}) == []
    assert complaints({"k": {**ROW, **change}}, {"k": ROW}) == words


def test_the_table_sees_missing_rows() -> None:
    assert complaints({"new": ROW}, {"old": ROW}) == ["new: not in the table", "old: in the table, but not in the library"]


def schemas() -> dict[str, str]:
    """Of csrc/binding.cpp, by name."""
    texts = ["".join(re.findall(r'"([^"]*)"', text)) for text in re.findall(r'm\.def\(((?:\s*"[^"]*")+)\);', BINDING)]
    return {text.split("(", 1)[0]: text for text in texts}


@pytest.mark.parametrize("name", schemas())
def test_an_operator_has_the_schema_of_its_python_operator(name: str) -> None:
    ours = torch._C.parse_schema(f"vlattn_cuda::{schemas()[name]}")
    python = getattr(torch.ops.vlattn, name).default._schema
    *arguments, backend = [(x.name, str(x.type)) for x in python.arguments]
    assert backend == ("backend", "str")
    assert [(x.name, str(x.type)) for x in ours.arguments] == arguments
    assert [(x.name, str(x.type)) for x in ours.returns] == [(x.name, str(x.type)) for x in python.returns]


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
