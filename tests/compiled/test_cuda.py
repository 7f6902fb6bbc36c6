"""The CUDA C++ kernels compile with tensor cores, and with next to no stack."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.cuda import building
from tests.helpers.releases import OLDER_TRITON, WITHOUT_FENCES
from tools.compiled import cuda
from tools.compiled.cuda import rows_of
from tools.compiled.table import differences, read

ROOT = Path(__file__).parents[2]
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


SOME = re.compile(r"<float, 128\b|congruence.*<__half, 64\b|congruence_divergence|<__nv_bfloat16, 64\b|_kernel<\w+>|kernel$")


@pytest.fixture(scope="module")
def nvcc() -> None:
    for tool in ("nvcc", "c++filt"):
        if shutil.which(tool) is None:
            pytest.skip(f"the CUDA C++ kernels are not compiled: {tool} is not installed")
    pytest.importorskip("triton", reason="cuobjdump comes with it")
    if OLDER_TRITON:
        pytest.skip(WITHOUT_FENCES)


# bytes of a thread; hidden units of 32 rows a warp take every register that three blocks leave, long sequences every one
MOST_STACK = {"units_forward_kernel": 24, "units_step_kernel": 16, "units_rows_kernel": 128, "units_backward_kernel": 8}
MOST_STACK |= {"congruence_gradient_kernel": 128, "relevancy_long_kernel": 24}

WITHOUT_PRODUCTS = ("units_query_kernel", "relevancy_rows_kernel")


@pytest.mark.slow  # a build by nvcc
def test_kernels_compile_within_their_thresholds(nvcc: None) -> None:
    """Each kernel, but not each with all types and sizes. Tensor cores multiply 16-bit types, and never heads of float32, which
    they would round; passes that add sums have no product."""
    library = building.build(*building.PTX) / "libvlattn_cuda.so"
    files = cuda.assembled(library, SOME.search, ROOT / "build" / "assembled")
    rows = {key: row for file in files for key, row in rows_of(file).items()}
    assert differences(rows, rows) == []
    for size, kinds in (("64", {"__half", "__nv_bfloat16"}), ("128", {"float"})):
        assert {key.split("<")[1].split(",")[0] for key in rows if re.search(rf", {size}\W", key)} == kinds
    for key, row in rows.items():
        assert row["stack"] <= MOST_STACK.get(key.split("<")[0], 0), key
        if "<" in key:
            assert (row["mma"] == 0) == ("<float" in key or key.startswith(WITHOUT_PRODUCTS)), key


@pytest.mark.slow
def test_the_table_says_what_was_compiled(nvcc: None, tmp_path: Path) -> None:
    (tmp_path / "tiny.cu").write_text(TINY)
    command = ["nvcc", "-arch=sm_90a", "-shared", "-Xcompiler", "-fPIC", tmp_path / "tiny.cu", "-o", tmp_path / "tiny.so"]
    subprocess.run(command, check=True, capture_output=True)
    rows = rows_of(tmp_path / "tiny.so")
    assert list(sorted(rows)) == ["reverse_kernel<double, 64> sm_90a", "reverse_kernel<float, 128> sm_90a", "spill_kernel sm_90a"]
    spilled = rows.pop("spill_kernel sm_90a")
    assert spilled["registers"] == 32 and spilled["stack"] > 300  # 65536 registers for 2048 threads; 80 floats live in each
    for row in rows.values():
        assert row["shared"] == 512 + 1024 and row["stack"] == 0 and 0 < row["registers"] < 32


def test_the_command_writes_and_shows_changes(tmp_path: Path, monkeypatch, capsys) -> None:
    library, rows = tmp_path / "library.so", {"spill_kernel sm_90a": {"registers": 32, "stack": 320, "shared": 0, "mma": 0}}
    monkeypatch.setattr(cuda, "TABLE", tmp_path / "compiled" / "table.json")
    monkeypatch.setattr(cuda, "nvcc_version", lambda: "13.0")
    monkeypatch.setattr(cuda, "rows_of", {library: rows}.__getitem__)
    monkeypatch.setattr("sys.argv", ["cuda.py", "--library", str(library)])
    cuda.main()
    printed = capsys.readouterr().out
    assert "spill_kernel sm_90a: not in the table" in printed and "nvcc 13.0: 1 kernels, 1 changed" in printed
    cuda.main()
    assert "nvcc 13.0: 1 kernels, 0 changed" in capsys.readouterr().out
    assert read(cuda.TABLE) == {"13.0": rows}
