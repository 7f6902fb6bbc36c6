"""The CUDA C++ kernels compile with the registers, shared memory, stack and instructions of the stored table."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.cuda import building
from tests.helpers.releases import OLDER_TRITON, WITHOUT_FENCES
from tools.compiled import cuda
from tools.compiled.cuda import nvcc_version, rows_of
from tools.compiled.table import Row, differences, read, write

ROOT = Path(__file__).parents[2]
BACKWARD = r"backward|grad|congruence"  # in the name of every kernel that is more than a forward pass's
ROW = {"registers": 100, "shared": 1024, "stack": 0, "mma": 16, "loop": 200}
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


SOME = re.compile(r"<float, 128\b|congruence.*<__half, 64\b|<__nv_bfloat16, 64\b|_kernel<\w+>|kernel$")


@pytest.fixture(scope="module")
def nvcc() -> str:
    for tool in ("nvcc", "c++filt"):
        if shutil.which(tool) is None:
            pytest.skip(f"the CUDA C++ kernels are not compiled: {tool} is not installed")
    pytest.importorskip("triton", reason="cuobjdump comes with it")
    if OLDER_TRITON:
        pytest.skip(WITHOUT_FENCES)
    return nvcc_version()


def name(key: str) -> str:
    """Of the kernel, with the arguments that are neither its type nor its size."""
    return re.sub(r"\b(float|__half|__nv_bfloat16|64|128)\b", "", key)


def test_kernels_compile_as_stored(nvcc: str) -> None:
    """Each kernel, but not each with all types and sizes, which `make table` compiles."""
    table = read(cuda.TABLE)
    if table and nvcc not in table:
        pytest.skip(f"the table has no nvcc {nvcc}, only {', '.join(table)}: python -m tools.compiled.cuda --write adds it")
    stored = {key: row for key, row in table.get(nvcc, {}).items() if key.endswith(" sm_90a")}
    library = building.build(*building.PTX) / "libvlattn_cuda.so"
    files = cuda.assembled(library, SOME.search, ROOT / "build" / "assembled")
    rows = {key: row for file in files for key, row in rows_of(file).items()}
    assert differences(rows, {key: row for key, row in stored.items() if key in rows}) == []
    assert {name(key) for key in rows} == {name(key) for key in stored}
    for size, kinds in (("64", {"__half", "__nv_bfloat16"}), ("128", {"float"})):
        assert {key.split("<")[1].split(",")[0] for key in rows if re.search(rf", {size}\W", key)} == kinds


def test_16_bit_types_are_multiplied_by_the_tensor_cores() -> None:
    """And float32, which they would round, by no kernel. The pass that adds sums has no product."""
    sums_alone = re.compile(r"additive_backward_query_kernel")
    rows = [(key, row) for stored in read(cuda.TABLE).values() for key, row in stored.items() if "<" in key]
    assert len(rows) > 30
    for key, row in rows:
        assert (row["mma"] == 0) == ("<float" in key or sums_alone.match(key) is not None), key


# of the additive scores of 32 rows a warp, which take every register that three blocks leave
MOST_STACK = {"additive_forward_kernel<__nv_bfloat16, 64> sm_90a": 24, "additive_forward_kernel<__half, 64> sm_90a": 24}


def test_forward_kernels_have_next_to_no_stack_on_sm_90() -> None:
    stored = [(key, row) for rows in read(cuda.TABLE).values() for key, row in rows.items() if key.endswith("sm_90a")]
    forward = [(key, row) for key, row in stored if not re.search(BACKWARD, key)]
    assert forward
    assert [key for key, row in forward if row["stack"] > MOST_STACK.get(key, 0)] == []


@pytest.fixture(scope="module")
def tiny_rows(tiny: Path) -> dict[str, Row]:
    return rows_of(tiny)


@pytest.fixture(scope="module")
def tiny(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.cu").write_text(TINY)
    command = ["nvcc", "-arch=sm_90a", "-shared", "-Xcompiler", "-fPIC", folder / "tiny.cu", "-o", folder / "tiny.so"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "tiny.so"


def test_the_table_says_what_was_compiled(tiny_rows: dict[str, Row]) -> None:
    rows = dict(tiny_rows)
    assert list(sorted(rows)) == ["reverse_kernel<double, 64> sm_90a", "reverse_kernel<float, 128> sm_90a", "spill_kernel sm_90a"]
    spilled = rows.pop("spill_kernel sm_90a")
    assert spilled["registers"] == 32 and spilled["stack"] > 300  # 65536 registers for 2048 threads; 80 floats live in each
    for row in rows.values():
        assert row["shared"] == 512 + 1024 and row["stack"] == 0 and 0 < row["registers"] < 32


def test_the_command_compares_and_writes(tiny, tiny_rows, nvcc: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cuda, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(cuda, "rows_of", {tiny: tiny_rows}.__getitem__)
    write(cuda.TABLE, {"1.0": {"old sm_80": ROW}})

    def run(*options: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["cuda.py", "--library", str(tiny), *options])
        with pytest.raises(SystemExit) as end:
            cuda.main()
        return end.value.code, capsys.readouterr().out

    code, printed = run()
    assert code == 1 and "spill_kernel sm_90a: not in the table" in printed
    code, printed = run("--write")
    assert code == 0 and f"nvcc {nvcc}: 3 kernels, 0 not as stored" in printed
    assert run()[0] == 0
    assert read(cuda.TABLE) == {"1.0": {"old sm_80": ROW}, nvcc: tiny_rows}
