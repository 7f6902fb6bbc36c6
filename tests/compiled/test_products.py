"""csrc/cuda/mma.h by itself (products.cu), emulated as nvcc compiles it for sm_80."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.releases import WITHOUT_PTX

pytest.importorskip("ptx", reason=WITHOUT_PTX)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    from ptx import cuda

    if shutil.which("nvcc") is None:
        pytest.skip("the CUDA C++ kernels are not tested: nvcc is not installed")
    made = tmp_path_factory.mktemp("products") / "libproducts.so"
    command = ["nvcc", "-std=c++17", "-O3", "-shared", "-cudart", "none", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xlinker"]
    command += ["--no-undefined", "-lineinfo", "-I", ROOT / "csrc" / "cuda", "-gencode", "arch=compute_80,code=compute_80"]
    command += ["--no-compress", cuda.RUNTIME, Path(__file__).with_name("products.cu"), "-o", made]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return cuda.connected(ctypes.CDLL(str(made)))


def products(library: ctypes.CDLL, kind: int, x: Tensor, y: Tensor, z: Tensor, scores: Tensor, out: Tensor) -> int:
    """The status of run_products, to which tensors go by address. A finding raises."""
    from ptx import cuda
    from ptx.running.memory import Memory

    rows, columns = x.shape
    with cuda.emulated(80):
        memory = Memory()
        addresses = [
            ctypes.c_void_p(memory.place(one, name))
            for name, one in {"x": x, "y": y, "z": z, "scores": scores, "out": out}.items()
        ]
        with cuda.Device.active.using(memory):
            return library.run_products(kind, 64 if columns <= 64 else 128, *addresses, rows, columns)


@pytest.mark.parametrize("rows, columns", [(32, 64), (17, 50), (64, 128), (40, 97), (1, 1)])
@pytest.mark.parametrize("kind, dtype", [(0, torch.float32), (1, torch.bfloat16), (2, torch.float16)])
def test_products_of_tiles(library: ctypes.CDLL, kind: int, dtype: torch.dtype, rows: int, columns: int) -> None:
    """Small integers: sums are exact in float32, so that nothing but the right numbers at the right places passes."""
    x, y, z = (torch.randint(-2, 3, (n, columns)).to(dtype) for n in (rows, 32, 32))
    scores, out = torch.full((rows, 32), torch.nan), torch.full((rows, columns), torch.nan)
    assert products(library, kind, x, y, z, scores, out) == 0
    exact = (x.float() @ y.float().mT).to(dtype).float()
    assert torch.equal(scores, exact)
    assert torch.equal(out, exact @ z.float())
