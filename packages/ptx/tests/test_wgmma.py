"""wgmma: layouts of matrices in shared memory as the PTX ISA draws them, types, groups, and what must be reported."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ptx.running.reports import Options
from tests.helpers.lanes import kinds, registers, run_lanes
from tests.test_matrices import HALVES_A, TF32_A, bits_of, packed

THREADS = 128
IMAGE = 1 << 14  # bytes of shared memory for each of A and B
SWIZZLES = {0: 0, 128: 1, 64: 2, 32: 3}  # bytes of a swizzled row: the descriptor's mode


@dataclass
class Layout:
    """A matrix of M or N rows and K columns in shared memory. All offsets are in bytes."""

    swizzle: int = 128
    along_rows: bool = False  # neighbours in M or N lie side by side, else neighbours in K
    leading: int = 0
    stride: int = 1024
    start: int = 0

    def place(self, row: int, k: int, size: int) -> int:
        """The canonical layouts of the PTX ISA: pieces of 16 bytes, in groups of 8 rows."""
        per_piece = 16 // size
        line, neighbour = (k, row) if self.along_rows else (row, k)
        piece, within = neighbour // per_piece, neighbour % per_piece * size
        group, line = divmod(line, 8)
        if not self.swizzle:
            per_group, per_next_piece = (self.leading, self.stride) if self.along_rows else (self.stride, self.leading)
            return self.start + group * per_group + line * 16 + piece * per_next_piece + within
        wide, piece = divmod(piece + self.start % self.swizzle // 16, self.swizzle // 16)
        turned = piece ^ {128: line, 64: line // 2, 32: line // 4}[self.swizzle]
        first = self.start - self.start % self.swizzle
        return first + group * self.stride + wide * self.leading + line * self.swizzle + turned * 16 + within

    def descriptor(self, base: int) -> int:
        """Without the matrix's address; `base` is the offset of this image in `memory`."""
        fields = (base + self.start) >> 4, self.leading >> 4, self.stride >> 4
        return fields[0] | fields[1] << 16 | fields[2] << 32 | SWIZZLES[self.swizzle] << 62

    def image(self, matrix: np.ndarray, dtype: torch.dtype, size: int = IMAGE) -> np.ndarray:
        """The bytes of shared memory; NaN where no element lies."""
        elements = np.full(size // dtype.itemsize, 0x7FFF if dtype.itemsize == 2 else 0x7FFFFFFF, np.uint32)
        bits = bits_of(matrix, dtype)
        for row, k in np.ndindex(*matrix.shape):
            elements[self.place(row, k, dtype.itemsize) // dtype.itemsize] = bits[row, k]
        return elements.astype(np.uint16 if dtype.itemsize == 2 else np.uint32).view(np.uint8)


PREPARE = """
    mov.u32 %r990, memory;
    mad.lo.u32 %r991, %r999, 4, %r990;
    shr.u32 %r992, %r990, 4;
    cvt.u64.u32 %rd10, %r992;
"""
FENCE_PROXY, BARRIER, FENCE = "fence.proxy.async.shared::cta;\n", "bar.sync 0;\n", "wgmma.fence.sync.aligned;\n"
COMMIT, WAIT = "wgmma.commit_group.sync.aligned;\n", "wgmma.wait_group.sync.aligned 0;\n"
WORDS = {torch.bfloat16: ("bf16", 16), torch.float16: ("f16", 16), torch.float32: ("tf32", 8)}  # and columns in K


def product(
    columns: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    into: int = 500,
    a: str = "%rd11",
    b: str = "%rd12",
    scale: str = "0",
    signs: str = "1, 1",
    transposed: str = "0, 0",
) -> str:
    word, depth = WORDS[dtype]
    operands = [registers(into, columns // 2), a, b, scale, signs, *([transposed] if depth == 16 else [])]
    return f"wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{word}.{word} {', '.join(operands)};\n"


def fill(images: list[np.ndarray], descriptors: list[int]) -> tuple[str, np.ndarray]:
    """Instructions that write images one after the other into `memory` from %r0 on and set %rd11, ...; these registers."""
    rows = np.concatenate(images).view(np.uint32).reshape(-1, THREADS)
    stores = "".join(f"st.shared.b32 [%r991+{4 * THREADS * n}], %r{n};\n" for n in range(len(rows)))
    return PREPARE + stores + "".join(f"add.s64 %rd{11 + n}, %rd10, {bits};\n" for n, bits in enumerate(descriptors)), rows


def sums_of(result: np.ndarray) -> np.ndarray:
    """(64, N) of the registers (N / 2, 128): D's layout in the PTX ISA."""
    thread, register = np.arange(THREADS), np.arange(len(result))[:, None]
    d = np.full((64, 2 * len(result)), np.nan)
    rows = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register // 2 % 2)
    d[rows, 8 * (register // 4) + thread % 4 * 2 + register % 2] = result.view(np.float32)
    return d


def draw(columns: int, depth: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """A (64, K) and B (N, K) of small integers, which all types hold exactly."""
    random = np.random.default_rng(columns + depth)
    return random.integers(-8, 9, (64, depth)).astype(float), random.integers(-8, 9, (columns, depth)).astype(float)


def run(a: np.ndarray, b: np.ndarray, left: Layout, right: Layout, dtype: torch.dtype = torch.bfloat16, **how: str) -> np.ndarray:
    images = [left.image(a, dtype), right.image(b, dtype)]
    before, rows = fill(images, [left.descriptor(0), right.descriptor(IMAGE)])
    predicate = "setp.ne.b32 %p1, %r999, 0; "  # on the product's line, as in inline assembly
    body = before + FENCE_PROXY + BARRIER + FENCE + predicate + product(len(b), dtype, **how) + COMMIT + WAIT
    result, launch = run_lanes(body, rows, len(b) // 2, threads=THREADS, shared=2 * IMAGE, options=Options(counts=True))
    assert kinds(launch) == [] and launch.flop == 2 * a.size * len(b)
    return sums_of(result)


ALONG_K = {
    "none": Layout(swizzle=0, leading=128, stride=256),
    "none, pieces far apart": Layout(swizzle=0, leading=2048, stride=128),
    "32": Layout(swizzle=32, stride=256),
    "64": Layout(swizzle=64, stride=512),
    "64, second step": Layout(swizzle=64, stride=512, start=32),
    "128": Layout(swizzle=128, stride=1024),
    "128, third step": Layout(swizzle=128, stride=1024, start=64),
}
ALONG_ROWS = {
    "none": Layout(swizzle=0, along_rows=True, leading=128, stride=256),
    "32": Layout(swizzle=32, along_rows=True, leading=512, stride=256),
    "64": Layout(swizzle=64, along_rows=True, leading=1024, stride=512),
    "128": Layout(swizzle=128, along_rows=True, leading=2048, stride=1024),
}


@pytest.mark.parametrize("columns", [8, 24, 128])
@pytest.mark.parametrize("name", ALONG_K)
def test_neighbours_in_k(name: str, columns: int) -> None:
    a, b = draw(columns)
    np.testing.assert_array_equal(run(a, b, ALONG_K[name], ALONG_K[name]), a @ b.T)


@pytest.mark.parametrize("name", ALONG_ROWS)
def test_neighbours_in_rows_and_columns(name: str) -> None:
    a, b = draw(128)
    layout = ALONG_ROWS[name]
    np.testing.assert_array_equal(run(a, b, layout, layout, transposed="1, 1"), a @ b.T)
    np.testing.assert_array_equal(run(a, b, layout, Layout(), transposed="1, 0"), a @ b.T)
    np.testing.assert_array_equal(run(a, b, Layout(), layout, transposed="0, 1"), a @ b.T)


@pytest.mark.parametrize("dtype", WORDS, ids=str)
@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_types(dtype: torch.dtype, swizzle: int) -> None:
    a, b = draw(16, WORDS[dtype][1])
    layout = Layout(swizzle=swizzle, stride=8 * swizzle)
    np.testing.assert_array_equal(run(a, b, layout, layout, dtype), a @ b.T)


def test_a_layout_is_drawn_as_in_the_isa() -> None:
    """Pieces 1, 0, 3, 2, ... stand in row 1 of 128-byte swizzling, in row 2 of 64-byte, in row 4 of 32-byte."""
    for swizzle, row in ((128, 1), (64, 2), (32, 4)):
        layout = Layout(swizzle=swizzle)
        order = [(layout.place(row, 8 * piece, 2) - row * swizzle) // 16 for piece in range(swizzle // 16)]
        assert order == [piece ^ 1 for piece in range(swizzle // 16)]


@pytest.mark.parametrize(("signs", "factor"), [("1, 1", 1), ("-1, 1", -1), ("1, -1", -1), ("-1, -1", 1)])
def test_signs(signs: str, factor: int) -> None:
    a, b = draw(8)
    np.testing.assert_array_equal(run(a, b, Layout(), Layout(), signs=signs), factor * (a @ b.T))


def run_registers(dtype: torch.dtype, scale: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """D where A comes from registers and D holds 1 to begin with; A, B."""
    depth = WORDS[dtype][1]
    a, b = draw(8, depth)
    places = HALVES_A[16] if depth == 16 else TF32_A[8]
    before, rows = fill([Layout().image(b, dtype)], [Layout().descriptor(0)])
    elements = [np.concatenate([bits_of(a[16 * w : 16 * w + 16], dtype)[place] for w in range(4)]) for place in places]
    first = len(rows)
    rows = np.concatenate(
        [rows, np.stack(packed(elements, 2 if depth == 16 else 1)), np.full((4, THREADS), 0x3F800000, np.uint32)]
    )
    start = "".join(f"mov.b32 %r{500 + n}, %r{first + 4 + n};\n" for n in range(4))
    start += f"setp.eq.u32 %p1, 0, {int(scale == 'false')};\n"
    step = product(8, dtype, a=registers(first, 4), b="%rd11", scale="%p1", transposed="0")
    result, launch = run_lanes(
        before + start + FENCE_PROXY + BARRIER + FENCE + step + COMMIT + WAIT, rows, 4, threads=THREADS, shared=IMAGE
    )
    assert kinds(launch) == []
    return sums_of(result), a, b


@pytest.mark.parametrize("dtype", WORDS, ids=str)
def test_a_from_registers_is_added_to_the_sums(dtype: torch.dtype) -> None:
    d, a, b = run_registers(dtype, "true")
    np.testing.assert_array_equal(d, a @ b.T + 1)


def test_scale_d_of_0_forgets_the_sums() -> None:
    d, a, b = run_registers(torch.bfloat16, "false")
    np.testing.assert_array_equal(d, a @ b.T)


# ---- what is reported, each beside a twin that is correct

A, B = draw(8)
IMAGES = [Layout().image(A, torch.bfloat16, 8192), Layout().image(B, torch.bfloat16, 1024)]
BEFORE, ROWS = fill(IMAGES, [Layout().descriptor(0), Layout().descriptor(8192)])
FIRST, SECOND = product(8), product(8, into=504)
CHAINED = product(8, scale="1")


def findings(body: str, rows: np.ndarray = ROWS, seed: int = 0, fences: bool = True) -> list[str]:
    _, launch = run_lanes(body, rows, 4, threads=THREADS, shared=8192 + 1024, options=Options(seed=seed, fences=fences))
    return kinds(launch)


def words_of(kinds_of_findings: list[str], *words: str) -> bool:
    return all(any(word in kind for kind in kinds_of_findings) for word in words)


def test_one_product_and_one_wait_are_correct() -> None:
    assert findings(BEFORE + FENCE_PROXY + BARRIER + FENCE + FIRST + COMMIT + WAIT) == []


def test_a_generic_write_without_a_proxy_fence_is_reported() -> None:
    body = BEFORE + BARRIER + FENCE + FIRST + COMMIT + WAIT
    assert words_of(findings(body), "fence.proxy.async")
    assert findings(body, fences=False) == []


def test_a_missing_barrier_is_reported() -> None:
    assert words_of(findings(BEFORE + FENCE_PROXY + FENCE + FIRST + COMMIT + WAIT), "race")


def test_a_missing_fence_is_reported() -> None:
    body = BEFORE + FENCE_PROXY + BARRIER + FIRST + COMMIT + WAIT
    assert findings(body) == ["wgmma without wgmma.fence"]
    assert findings(body, fences=False) == []


def test_registers_written_after_the_fence_are_reported() -> None:
    write = "mov.b32 %r500, 0;\n"
    assert findings(BEFORE + FENCE_PROXY + BARRIER + write + FENCE + FIRST + COMMIT + WAIT) == []
    assert findings(BEFORE + FENCE_PROXY + BARRIER + FENCE + write + FIRST + COMMIT + WAIT) == ["wgmma without wgmma.fence"]


def test_registers_copied_after_the_fence_are_not() -> None:
    """As LLVM does where a product adds to constants."""
    copy = "mov.b32 %r500, %r490;\n"
    assert findings(BEFORE + FENCE_PROXY + BARRIER + "mov.b32 %r490, 0;\n" + FENCE + copy + FIRST + COMMIT + WAIT) == []


def test_sums_may_be_chained_without_a_fence() -> None:
    assert findings(BEFORE + FENCE_PROXY + BARRIER + FENCE + FIRST + CHAINED + COMMIT + WAIT) == []


@pytest.mark.parametrize(("use", "kind"), [("add.u32 %r600, %r501, 1;", "read"), ("mov.b32 %r501, 0;", "written")])
def test_sums_used_before_the_wait_are_reported(use: str, kind: str) -> None:
    before = BEFORE + FENCE_PROXY + BARRIER + FENCE + FIRST
    for body in (f"{before}{use}\n{COMMIT}{WAIT}", f"{before}{COMMIT}{use}\n{WAIT}"):
        assert findings(body) == [f"register {kind} before wgmma.wait_group"]
    assert findings(f"{before}{COMMIT}{WAIT}{use}\n") == []


def test_a_s_registers_may_be_read_but_not_written_before_the_wait() -> None:
    step = product(8, a="{%r600, %r601, %r602, %r603}", b="%rd12", transposed="0")
    start = "".join(f"mov.b32 %r{600 + n}, 0;\n" for n in range(4))
    before = BEFORE + start + FENCE_PROXY + BARRIER + FENCE + step + COMMIT
    assert findings(before + "add.u32 %r610, %r600, 1;\n" + WAIT) == []
    assert findings(before + WAIT + "mov.b32 %r600, 1;\n") == []
    assert findings(before + "mov.b32 %r600, 1;\n" + WAIT) == ["register written before wgmma.wait_group"]


def test_a_wait_for_all_but_one_group_leaves_the_last_in_flight() -> None:
    two = BEFORE + FENCE_PROXY + BARRIER + FENCE + FIRST + COMMIT + SECOND + COMMIT + WAIT.replace("0", "1")
    assert findings(two + "add.u32 %r600, %r500, 1;\n" + WAIT) == []
    assert findings(two + "add.u32 %r600, %r504, 1;\n" + WAIT) == ["register read before wgmma.wait_group"]


def test_a_product_that_no_group_has_is_not_waited_for() -> None:
    assert words_of(findings(BEFORE + FENCE_PROXY + BARRIER + FENCE + FIRST + WAIT), "before wgmma.wait_group", "not waited for")


def test_the_wait_must_come_before_the_end() -> None:
    assert words_of(findings(BEFORE + FENCE_PROXY + BARRIER + FENCE + SECOND + COMMIT), "not waited for")


@pytest.mark.parametrize("seed", range(3))
def test_shared_memory_may_not_be_written_until_the_wait(seed: int) -> None:
    before = BEFORE + FENCE_PROXY + BARRIER + FENCE + FIRST + COMMIT
    write = "st.shared.b32 [%r991], 0;\n"
    assert words_of(findings(before + write + WAIT, seed=seed), "reads")
    assert findings(before + WAIT + BARRIER + write, seed=seed) == []
    assert words_of(findings(before + WAIT + write, seed=seed), "race")  # other warps have not waited yet


def test_results_land_at_the_wait() -> None:
    body = BEFORE + "mov.b32 %r500, 7;\n" + FENCE_PROXY + BARRIER + FENCE + FIRST + COMMIT + "mov.b32 %r600, %r500;\n" + WAIT
    result, _ = run_lanes(body + "mov.b32 %r501, %r600;", ROWS, 2, threads=THREADS, shared=8192 + 1024)
    assert (result[1] == 7).all() and (result[0].view(np.float32) == (A @ B.T)[rows_of_first(), columns_of_first()]).all()


def rows_of_first() -> np.ndarray:
    thread = np.arange(THREADS)
    return 16 * (thread // 32) + thread % 32 // 4


def columns_of_first() -> np.ndarray:
    return np.arange(THREADS) % 4 * 2
