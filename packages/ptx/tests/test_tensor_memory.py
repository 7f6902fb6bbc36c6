"""tcgen05 on sm_100: products into tensor memory, what loads and stores reach, and what must be reported."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx.running.reports import EmulationError, Options
from tests.helpers.lanes import kinds, registers, run_lanes
from tests.test_matrices import bits_of
from tests.test_wgmma import BARRIER, FENCE_PROXY, IMAGE, THREADS, Layout, fill

COLUMNS = 16
MODES = {0: 0, 128: 2, 64: 4, 32: 6}  # bytes of a swizzled row: the descriptor's mode
TYPES = {torch.float16: (0, "f16", 16), torch.bfloat16: (1, "f16", 16), torch.float32: (2, "tf32", 8)}
ROW_OF_THREAD = {128: np.arange(THREADS), 64: np.arange(THREADS) // 32 * 16 + np.arange(THREADS) % 16}

# tensor memory's address comes to %r901, an mbarrier lies at %r902; %p9: the first warp, %p8: its first lane
PREPARE = f"""
    add.u32 %r900, %r990, {2 * IMAGE};
    add.u32 %r902, %r900, 8;
    setp.lt.u32 %p9, %r999, 32;
    setp.eq.u32 %p8, %r999, 0;
    @%p8 mbarrier.init.shared::cta.b64 [%r902], 1;
    @%p9 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r900], 64;
    bar.sync 0;
    ld.shared.b32 %r901, [%r900];
    and.b32 %r903, %r999, 96;
    shl.b32 %r903, %r903, 16;
    add.u32 %r903, %r903, %r901;
"""
COMMIT = "@%p8 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r902];\n"
WAIT = "again: mbarrier.try_wait.parity.shared::cta.b64 %p7, [%r902], 0;\n@!%p7 bra again;\n"
LOAD = f"tcgen05.ld.sync.aligned.32x32b.x{COLUMNS}.b32 {registers(500, COLUMNS)}, [%r903];\ntcgen05.wait::ld.sync.aligned;\n"
FREE = "bar.sync 0;\n@%p9 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r901, 64;\n"


def kind_of(rows: int, dtype: torch.dtype, columns: int = COLUMNS, transposed_b: bool = False) -> int:
    """The instruction descriptor."""
    code = TYPES[dtype][0]
    return 1 << 4 | code << 7 | code << 10 | int(transposed_b) << 16 | columns // 8 << 17 | rows // 16 << 24


def descriptor(layout: Layout, base: int) -> int:
    return layout.descriptor(base) & ~(7 << 61) | MODES[layout.swizzle] << 61 | 1 << 46


def product(
    rows: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    d: str = "%r901",
    a: str = "%rd11",
    adds: bool = False,
    kind: int | None = None,
) -> str:
    bits = kind_of(rows, dtype) if kind is None else kind
    step = f"mov.b32 %r904, {bits};\nsetp.eq.u32 %p6, 0, {int(not adds)};\n"
    return f"{step}@%p8 tcgen05.mma.cta_group::1.kind::{TYPES[dtype][1]} [{d}], {a}, %rd12, %r904, %p6;\n"


def draw(rows: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    random, depth = np.random.default_rng(rows), TYPES[dtype][2]
    return random.integers(-8, 9, (rows, depth)).astype(float), random.integers(-8, 9, (COLUMNS, depth)).astype(float)


def before(a: np.ndarray, b: np.ndarray, dtype: torch.dtype, left: Layout, right: Layout) -> tuple[str, np.ndarray]:
    images = [left.image(a, dtype), right.image(b, dtype)]
    body, rows = fill(images, [descriptor(left, 0), descriptor(right, IMAGE)])
    return body + PREPARE, rows


def run(body: str, rows: np.ndarray, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    result, launch = run_lanes(
        body, rows, COLUMNS, threads=THREADS, shared=2 * IMAGE + 16, options=Options(seed=seed), target="sm_100a"
    )
    return result.view(np.float32).T, kinds(launch)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("swizzle", [32, 128])
def test_products(rows: int, dtype: torch.dtype, swizzle: int) -> None:
    """Row r of 128 comes to lane r; row r of 64 to lane r % 16 of each 32."""
    a, b = draw(rows, dtype)
    layout = Layout(swizzle=swizzle, stride=8 * swizzle)
    body, inputs = before(a, b, dtype, layout, layout)
    body += FENCE_PROXY + BARRIER + product(rows, dtype) + product(rows, dtype, adds=True) + COMMIT + WAIT
    result, reported = run(body + LOAD + FREE, inputs)
    lanes = np.arange(THREADS) if rows == 128 else np.flatnonzero(np.arange(THREADS) % 32 < 16)
    np.testing.assert_array_equal(result[lanes], 2 * (a @ b.T)[ROW_OF_THREAD[rows][lanes]])
    assert reported == []


@pytest.mark.parametrize("rows", [64, 128])
def test_a_from_tensor_memory(rows: int) -> None:
    """Two halves lie in a column of A, which stands in columns 32 to 39."""
    a, b = draw(rows, torch.bfloat16)
    body, inputs = before(a, b, torch.bfloat16, Layout(), Layout())
    bits = bits_of(a, torch.bfloat16)[ROW_OF_THREAD[rows]]
    inputs = np.concatenate([inputs, (bits[:, ::2] | bits[:, 1::2] << 16).T])
    store = f"tcgen05.st.sync.aligned.32x32b.x8.b32 [%r903+32], {registers(len(inputs) - 8, 8)};\n"
    wait = "tcgen05.wait::st.sync.aligned;\n"
    after = FENCE_PROXY + BARRIER + product(rows, a="[%r901+32]") + COMMIT + WAIT + LOAD + FREE
    result, reported = run(body + store + wait + after, inputs)
    lanes = np.arange(THREADS) if rows == 128 else np.flatnonzero(np.arange(THREADS) % 32 < 16)
    np.testing.assert_array_equal(result[lanes], (a @ b.T)[ROW_OF_THREAD[rows][lanes]])
    assert reported == []
    assert "tensor memory used before tcgen05.wait::st" in run(body + store + after, inputs)[1]


def test_the_second_half_of_a_warp_reaches_further_right() -> None:
    """A store of 16x32bx2 and a load of 32x32b: lanes 16 to 31 store to the lanes of 0 to 15, `distance` columns on."""
    a, b = draw(64, torch.bfloat16)
    body, inputs = before(a, b, torch.bfloat16, Layout(), Layout())
    values = np.arange(8 * THREADS, dtype=np.uint32).reshape(8, THREADS)
    store = f"tcgen05.st.sync.aligned.16x32bx2.x8.b32 [%r903], 8, {registers(len(inputs), 8)};\ntcgen05.wait::st.sync.aligned;\n"
    result, reported = run(body + store + LOAD + FREE, np.concatenate([inputs, values]))
    there = result.view(np.uint32).reshape(4, 32, 16)[:, :16]
    by_warp = values.T.reshape(4, 32, 8)
    np.testing.assert_array_equal(there, np.concatenate([by_warp[:, :16], by_warp[:, 16:]], axis=2))
    assert reported == []


# ---- what is reported

A, B = draw(128, torch.bfloat16)
BODY, ROWS = before(A, B, torch.bfloat16, Layout(), Layout())
STEP = FENCE_PROXY + BARRIER + product(128) + COMMIT


def test_a_correct_kernel_has_no_findings() -> None:
    for seed in range(4):
        assert run(BODY + STEP + WAIT + LOAD + FREE, ROWS, seed)[1] == []


@pytest.mark.parametrize("seed", range(4))
def test_a_load_that_does_not_wait_for_the_mbarrier_is_reported(seed: int) -> None:
    reported = run(BODY + STEP + LOAD + WAIT + FREE, ROWS, seed)[1]
    assert reported and all("tensor memory" in kind for kind in reported)


def test_a_commit_waits_for_its_own_threads_products_alone() -> None:
    """The other lanes' 31 arrivals leave the mbarrier in the phase that one would."""
    others = "not.pred %p5, %p8;\nand.pred %p5, %p5, %p9;\n" + COMMIT.replace("%p8", "%p5")
    reported = [run(BODY + STEP.replace(COMMIT, others) + WAIT + LOAD + FREE, ROWS, seed)[1] for seed in range(4)]
    assert all(any("tensor memory" in kind for kind in one) for one in reported)


def test_shared_memory_written_before_the_mbarrier_is_reported() -> None:
    write = "st.shared.b32 [%r991], 0;\n"
    assert run(BODY + STEP + WAIT + write + LOAD + FREE, ROWS)[1] == []
    for seed in range(4):
        reported = run(BODY + STEP + write + WAIT + LOAD + FREE, ROWS, seed)[1]
        assert any("matrix product in flight" in kind or "race" in kind for kind in reported)


def test_a_generic_write_without_a_proxy_fence_is_reported() -> None:
    assert any("fence.proxy.async" in kind for kind in run(BODY + STEP.replace(FENCE_PROXY, "") + WAIT + LOAD + FREE, ROWS)[1])


def test_tensor_memory_must_be_given_back() -> None:
    assert run(BODY + STEP + WAIT + LOAD, ROWS)[1] == ["tensor memory not given back at the end"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (STEP + WAIT + LOAD.replace("[%r903]", "[%r901]") + FREE, "its 32 lanes"),
        (STEP + WAIT + LOAD.replace("[%r903]", "[%r903+60]") + FREE, "not allocated"),
        (STEP.replace("@%p8 tcgen05.mma", "@%p9 tcgen05.mma") + WAIT + LOAD + FREE, "several lanes"),
        (STEP + WAIT + LOAD + FREE.replace("64", "32"), "not allocated so"),
        (FENCE_PROXY + BARRIER + product(128, kind=kind_of(128, torch.bfloat16) & ~(3 << 4)), "kind that is not emulated"),
    ],
    ids=["lanes", "columns", "lanes that issue", "dealloc", "kind"],
)
def test_what_cannot_go_on(body: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        run(BODY + body, ROWS)
