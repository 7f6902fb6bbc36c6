"""The stand-in for CUDA's runtime (ptx/runtime/, ptx/cuda.py) under nvcc's host code, and nvcc's kernels (kernels.cu) over it:
right ones are right, their wrong twins are reported, and launches that CUDA refuses are refused with its errors."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptx import cuda
from ptx.running.launch import Launch
from ptx.running.memory import Memory
from ptx.running.reports import EmulationError, FindingsError, Options

HERE = Path(__file__).resolve().parent
SEEDS = range(1, 4)
INVALID_VALUE, INVALID_CONFIGURATION, NO_FUNCTION, NO_DEVICE, NO_IMAGE = 1, 9, 98, 100, 209  # cudaError_t
OUT_OF_RESOURCES, NOT_SUPPORTED = 701, 801
FLAWS = ("none", "no wait", "wrong group", "no commit", "no barrier", "no barrier after")  # Flaw in kernels.cu
NVCC = ["nvcc", "-std=c++17", "-O3", "-shared", "-cudart", "none", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xlinker"]
NVCC += ["--no-undefined", "-lineinfo", "-I", HERE, cuda.RUNTIME]
PTX_ALONE = ("-gencode", "arch=compute_80,code=compute_80", "--no-compress")
Small = Callable[..., int]


def compiled(source: Path, folder: Path, *options: str) -> Path:
    if shutil.which("nvcc") is None:
        pytest.skip("CUDA C++ kernels are not tested: nvcc is not installed")
    subprocess.run([*NVCC, *options, source, "-o", folder / "libkernels.so"], check=True, capture_output=True, text=True)
    return folder / "libkernels.so"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(HERE / "kernels.cu", tmp_path_factory.mktemp("kernels"), *PTX_ALONE)


def call(library: Path, name: str, *arguments: Tensor | int | bool) -> int:
    """The status of run_`name`, to which tensors go by address."""
    memory, device = Memory(), cuda.Device.active
    addresses = [
        ctypes.c_void_p(memory.place(x, f"argument {n}")) if isinstance(x, Tensor) else ctypes.c_int64(x)
        for n, x in enumerate(arguments)
    ]
    with device.using(memory):
        return getattr(cuda.connected(ctypes.CDLL(str(library))), f"run_{name}")(*addresses)


@pytest.fixture
def launches(library: Path, request: pytest.FixtureRequest) -> Iterator[list[Launch]]:
    with cuda.emulated(80, Options(seed=getattr(request, "param", 0)), namespace="small::") as launches:
        yield launches


@pytest.fixture
def small(library: Path, launches: list[Launch]) -> Small:
    """run(name, arguments...): the status; findings raise."""
    return lambda name, *arguments: call(library, name, *arguments)


@pytest.fixture
def lax(library: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., set[str]]]:
    """run(name, arguments...): the kinds of findings."""
    with cuda.emulated(80, Options(seed=getattr(request, "param", 0)), strict=False) as launches:

        def run(name: str, *arguments: Tensor | int | bool) -> set[str]:
            assert call(library, name, *arguments) == 0
            return {finding.kind for finding in launches[-1].findings}

        yield run


in_orders = pytest.mark.parametrize("launches", SEEDS, indirect=True)


# ---- launches


def test_the_launch_is_the_hosts(small: Small, launches: list[Launch]) -> None:
    """Grids and blocks of three dimensions, and parameters of 3 and of 8 bytes behind a pointer, through kernel<<<...>>>."""
    x = torch.zeros(2 * 3 * 4 * 5 * 6 * 2, dtype=torch.int32)
    assert small("grid", x, 2, 3, 4, 5, 6, 2) == 0
    assert torch.equal(x, torch.arange(len(x), dtype=torch.int32) + 13)
    (launch,) = launches
    assert launch.grid == (2, 3, 4) and launch.name == "number" and launch.executed > 0


def test_launches_that_cannot_be(small: Small) -> None:
    assert small("empty", 0, 32, 0) == small("empty", 1, 32, 99 * 1024) == 0
    for blocks, threads in ((2**31, 32), (1, 0), (1, 2048)):
        assert small("empty", blocks, threads, 0) == INVALID_CONFIGURATION
    assert small("empty", 1, 32, 99 * 1024 + 1) == INVALID_VALUE
    assert small("empty", 1, 33, 0) == 0


@pytest.mark.parametrize("sizes", [(1, 2**16, 1, 1, 1, 1), (1, 1, 2**16, 1, 1, 1), (1, 1, 1, 1, 1, 65), (1, 1, 1, 32, 33, 1)])
def test_each_dimension_has_its_limit(small: Small, launches: list[Launch], sizes: tuple[int, ...]) -> None:
    """kernel<<<...>>> gives no status: nothing runs."""
    small("grid", torch.zeros(1, dtype=torch.int32), *sizes)
    assert launches == []


def test_more_threads_than_a_kernel_is_compiled_for(small: Small) -> None:
    x = torch.zeros(96, dtype=torch.int32)
    assert small("at_most_64", x, 64) == 0
    assert small("at_most_64", x, 96) == OUT_OF_RESOURCES
    assert torch.equal(x[:64], torch.arange(64, dtype=torch.int32)) and (x[64:] == 0).all()


def test_much_shared_memory_must_be_asked_for(small: Small) -> None:
    assert small("unasked", 48 * 1024) == 0
    assert small("unasked", 48 * 1024 + 1) == INVALID_VALUE
    assert small("empty", 1, 32, 48 * 1024 + 1) == 0  # by launch() of device.h, which asks
    assert small("unasked", 48 * 1024 + 1) == 0  # what was asked for stays


@pytest.mark.parametrize("architecture, most", [(80, 99), (90, 227)])
def test_static_shared_memory_counts(library: Path, architecture: int, most: int) -> None:
    x = torch.arange(32, dtype=torch.int32)
    with cuda.emulated(architecture):
        assert call(library, "with_static", x, (most - 4) * 1024 + 1) == INVALID_VALUE
        assert call(library, "with_static", x, (most - 4) * 1024) == 0
        assert call(library, "empty", 1, 32, most * 1024) == 0
    assert torch.equal(x, torch.arange(32, dtype=torch.int32).flip(0))


def test_what_is_no_kernel_and_what_the_stand_in_lacks(small: Small) -> None:
    assert small("no_kernel") == NO_FUNCTION
    assert small("cluster") == NOT_SUPPORTED


def test_without_an_emulator_there_is_no_device(library: Path, tmp_path: Path) -> None:
    alone = ctypes.CDLL(str(shutil.copy(library, tmp_path)))
    assert alone.run_empty(ctypes.c_int64(1), 32, ctypes.c_int64(0)) == NO_DEVICE
    alone.error_text.restype = ctypes.c_char_p
    assert alone.error_text(NO_DEVICE) == b"no CUDA-capable device is detected"


SOURCE = """
#include "device.h"
__global__ void kernel(float* x) {{
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i] += i;  // long enough to be compressed
}}
EXPORT int run() {{ {call} return small::launch(kernel, 1, 32, 0, cudaStream_t(), static_cast<float*>(nullptr)); }}
"""


@pytest.mark.parametrize(
    "code, mode, status", [("compute_80", "none", NO_DEVICE), ("compute_80", "size", NO_IMAGE), ("sm_80", "none", NO_IMAGE)]
)
def test_compressed_code_and_machine_code_are_no_image(code: str, mode: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "one.cu").write_text(SOURCE.format(call=""))
    library = compiled(tmp_path / "one.cu", tmp_path, "-gencode", f"arch=compute_80,code={code}", f"--compress-mode={mode}")
    assert ctypes.CDLL(str(library)).run() == status


def test_what_the_stand_in_lacks_does_not_link(tmp_path: Path) -> None:
    (tmp_path / "one.cu").write_text(SOURCE.format(call="cudaDeviceSynchronize();"))
    with pytest.raises(subprocess.CalledProcessError) as failed:
        compiled(tmp_path / "one.cu", tmp_path, *PTX_ALONE)
    assert "undefined reference to `cudaDeviceSynchronize'" in failed.value.stderr


# ---- right kernels and wrong ones


@in_orders
@pytest.mark.parametrize("threads", (32, 256, 1024))
def test_blocks_with_barriers(small: Small, threads: int) -> None:
    x, sums = torch.randint(0, 9, (3, threads)).float(), torch.full((3,), torch.nan)
    assert small("block_sum", x, sums, 3, threads, True) == 0
    assert torch.equal(sums, x.sum(1))


def test_a_finding_raises_and_names_kernel_and_line(small: Small) -> None:
    x, sums = torch.randint(1, 9, (3, 256)).float(), torch.full((3,), torch.nan)
    with pytest.raises(FindingsError, match=r"block_sum<false>, grid \(3, 1, 1\):\n.*race(.|\n)*kernels\.cu:\d+"):
        small("block_sum", x, sums, 3, 256, False)
    assert small("block_sum", x, sums, 3, 256, True) == 0  # the next launch is none the worse
    assert torch.equal(sums, x.sum(1))


@pytest.mark.parametrize("lax", SEEDS, indirect=True)
def test_missing_barriers_are_races_in_any_order(lax: Callable[..., set[str]]) -> None:
    x, y = torch.rand(1024) + 1.0, torch.zeros(1024)
    assert lax("block_sum", x, y, 3, 256, 1) == set() and "race" in str(lax("block_sum", x, y, 3, 256, 0))
    assert lax("neighbours", x, 1) == set() and "race" in str(lax("neighbours", x, 0))
    assert "race" in str(lax("neighbours_by_shuffle", x))  # a shuffle orders no memory


@in_orders
def test_asynchronous_copies(small: Small) -> None:
    x, y = torch.rand(1024) + 1.0, torch.zeros(1024)
    assert small("through_tiles", x, y, FLAWS.index("none")) == 0
    assert torch.equal(x, y)


@pytest.mark.parametrize("lax", SEEDS, indirect=True)
@pytest.mark.parametrize("flaw", FLAWS[1:])
def test_flaws_around_asynchronous_copies(lax: Callable[..., set[str]], flaw: str) -> None:
    assert lax("through_tiles", torch.rand(1024) + 1.0, torch.zeros(1024), FLAWS.index(flaw)) != set()


@pytest.mark.parametrize("numbers", range(5))
def test_asynchronous_copies_end_with_zeros(small: Small, numbers: int) -> None:
    x, y = torch.rand(32, 4) + 1.0, torch.full((32, 4), torch.nan)
    assert small("copy_some", x, y, 4 * numbers) == 0
    x[:, numbers:] = 0.0
    assert torch.equal(x, y)


def test_asynchronous_copies_of_places_that_are_not_aligned(small: Small) -> None:
    x, y = torch.rand(33 * 4), torch.zeros(32 * 4)
    with pytest.raises((EmulationError, FindingsError), match="align"):
        small("copy_some", x[1:], y, 16)


def test_waiting_for_what_cannot_come(small: Small) -> None:
    assert small("barrier_for_some", 64) == 0
    with pytest.raises((EmulationError, FindingsError), match="bar"):
        small("barrier_for_some", 33)
    with pytest.raises((EmulationError, FindingsError), match="shfl"):
        small("shuffle_for_some", torch.zeros(64, dtype=torch.int32))
    assert small("barrier_for_some", 0) == 0


@pytest.mark.parametrize(
    "name, arguments, words",
    [
        ("write_shared", (32,), "shared"),
        ("write_shared", (-1 - 1024,), "shared"),
        ("write_global", (torch.zeros(10), 10), "argument 0"),
        ("write_global", (torch.zeros(10), -1), "argument 0"),
    ],
)
def test_accesses_outside(small: Small, name: str, arguments: tuple[Tensor | int, ...], words: str) -> None:
    with pytest.raises(EmulationError, match=words):
        small(name, *arguments)


def test_accesses_at_the_edge(small: Small) -> None:
    x = torch.zeros(12)
    assert small("write_shared", 31) == small("write_global", x[1:11], 9) == 0
    assert x.tolist() == [0.0] * 10 + [1.0, 0.0]


def test_shared_memory_is_not_initialised(lax: Callable[..., set[str]]) -> None:
    x = torch.zeros(64)
    assert lax("uninitialised", x) != set()
    assert x.isnan().all()


def test_blocks_come_in_an_order_that_depends_on_the_seed_alone(library: Path) -> None:
    def order(seed: int) -> tuple[int, ...]:
        x = torch.full((20,), -1, dtype=torch.int32)
        with cuda.emulated(80, Options(seed=seed), strict=False):
            assert call(library, "note_order", x, torch.zeros(1, dtype=torch.int32), 20) == 0
        return tuple(x.tolist())

    assert order(1) == order(1) and sorted(order(1)) == list(range(20))
    assert len({order(seed) for seed in SEEDS}) == len(SEEDS)


def test_results_of_the_special_function_unit(library: Path) -> None:
    """As they are, or as far off as documented, equal ones alike; subnormal ones are 0."""
    x = torch.linspace(1.0, 100.0, 256).repeat(2)
    x[-2:] = torch.tensor([-126.5, 1.5 * 2.0**126])

    def results(noise: bool) -> tuple[Tensor, Tensor]:
        powers, reciprocals = torch.zeros(512), torch.zeros(512)
        with cuda.emulated(80, Options(noise=noise)):
            assert call(library, "approximate", x, powers, reciprocals, 512) == 0
        return powers, reciprocals

    exact = x.double().exp2(), x.double().reciprocal()
    plain, noisy = results(False), results(True)
    assert plain[0][-2] == plain[1][-1] == noisy[0][-2] == noisy[1][-1] == 0.0
    for right, wrong, true in zip(plain, noisy, exact, strict=True):
        torch.testing.assert_close(right[:-2].double(), true[:-2], rtol=2.0**-22, atol=0.0)
        torch.testing.assert_close(wrong[:-2].double(), true[:-2], rtol=2.0**-21, atol=0.0)
        assert (right != wrong).float().mean() > 0.3
        assert torch.equal(wrong[:254], wrong[256:-2])


def test_shuffles(small: Small) -> None:
    x, lanes = torch.zeros(32, dtype=torch.int32), torch.arange(32)
    assert small("shuffles", x) == 0
    assert torch.equal(x.long(), (lanes ^ 5) + 100 * ((lanes * 7 + 3) % 32))
