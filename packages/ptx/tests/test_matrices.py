"""mma.sync, ldmatrix, stmatrix and movmatrix: values against float64, places in registers as the PTX ISA lists them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx.running.reports import EmulationError, Options
from tests.helpers.lanes import kinds, registers, run_lanes

LANE = np.arange(32)
GROUP, MEMBER = LANE >> 2, LANE % 4  # "groupID" and "threadID_in_group" of the PTX ISA

# (row, column) of each element that a lane holds, as the PTX ISA writes it for each shape
HALVES_A = {
    8: [(GROUP + 8 * (i >= 2), MEMBER * 2 + (i & 1)) for i in range(4)],
    16: [(GROUP + 8 * (i in (2, 3, 6, 7)), MEMBER * 2 + (i & 1) + 8 * (i >= 4)) for i in range(8)],
}
HALVES_B = {8: [(MEMBER * 2 + i, GROUP) for i in range(2)], 16: [(MEMBER * 2 + (i & 1) + 8 * (i >= 2), GROUP) for i in range(4)]}
TF32_A = {
    4: [(GROUP, MEMBER), (GROUP + 8, MEMBER)],
    8: [(GROUP, MEMBER), (GROUP + 8, MEMBER), (GROUP, MEMBER + 4), (GROUP + 8, MEMBER + 4)],
}
TF32_B = {4: [(MEMBER, GROUP)], 8: [(MEMBER, GROUP), (MEMBER + 4, GROUP)]}
SUMS = [(GROUP + 8 * (i >= 2), MEMBER * 2 + (i & 1)) for i in range(4)]


def bits_of(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Values rounded to this type, as bits; tf32 is float32 whose lowest bits are junk, which no product may read."""
    tensor = torch.from_numpy(values).to(dtype)
    return tensor.view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy().astype(np.uint32) & (
        2 ** (8 * dtype.itemsize) - 1
    )


def packed(elements: list[np.ndarray], per_register: int) -> list[np.ndarray]:
    if per_register == 1:
        return elements
    return [low | high << 16 for low, high in zip(elements[::2], elements[1::2], strict=True)]


def run_product(name: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, dtype: torch.dtype, sums: torch.dtype) -> np.ndarray:
    """D of one mma.sync. Matrices hold values that their types can."""
    depth = a.shape[1]
    places_a, places_b = (TF32_A, TF32_B) if dtype == torch.float32 else (HALVES_A, HALVES_B)
    per_register = 1 if dtype == torch.float32 else 2
    rows = packed([bits_of(a, dtype)[place] for place in places_a[depth]], per_register)
    rows += packed([bits_of(b, dtype)[place] for place in places_b[depth]], per_register)
    first_of_b, first_of_c = len(places_a[depth]) // per_register, len(rows)
    rows += packed([bits_of(c, sums)[place] for place in SUMS], 1 if sums == torch.float32 else 2)
    count = len(rows) - first_of_c
    operands = (
        registers(500, count),
        registers(0, first_of_b),
        registers(first_of_b, first_of_c - first_of_b),
        registers(first_of_c, count),
    )
    body = f"mma.sync.aligned.{name} {', '.join(operands)};"
    result, launch = run_lanes(body, np.stack(rows), count, options=Options(counts=True))
    assert kinds(launch) == [] and launch.flop == 2 * a.size * b.shape[1]
    halves = [row >> shift & 0xFFFF for row in result for shift in (0, 16)]
    values = result.view(np.float32) if sums == torch.float32 else np.stack(halves).astype(np.uint16).view(np.float16)
    d = np.full((16, 8), np.nan)
    for place, lanes in zip(SUMS, values, strict=True):
        d[place] = lanes
    return d


KINDS = [
    ("m16n8k16.row.col.f32.bf16.bf16.f32", 16, torch.bfloat16, torch.float32),
    ("m16n8k8.row.col.f32.bf16.bf16.f32", 8, torch.bfloat16, torch.float32),
    ("m16n8k16.row.col.f32.f16.f16.f32", 16, torch.float16, torch.float32),
    ("m16n8k8.row.col.f32.f16.f16.f32", 8, torch.float16, torch.float32),
    ("m16n8k16.row.col.f16.f16.f16.f16", 16, torch.float16, torch.float16),
    ("m16n8k8.row.col.f16.f16.f16.f16", 8, torch.float16, torch.float16),
    ("m16n8k8.row.col.f32.tf32.tf32.f32", 8, torch.float32, torch.float32),
    ("m16n8k4.row.col.f32.tf32.tf32.f32", 4, torch.float32, torch.float32),
]


@pytest.mark.parametrize(("name", "depth", "dtype", "sums"), KINDS, ids=[kind[0] for kind in KINDS])
def test_products_of_small_integers_are_exact(name: str, depth: int, dtype: torch.dtype, sums: torch.dtype) -> None:
    """Each element of A, B and C is its own number, so that an exchange of two shows."""
    random = np.random.default_rng(0)
    a, b, c = (random.integers(-8, 9, shape).astype(np.float64) for shape in ((16, depth), (depth, 8), (16, 8)))
    np.testing.assert_array_equal(run_product(name, a, b, c, dtype, sums), a @ b + c)


@pytest.mark.parametrize(("name", "depth", "dtype", "sums"), KINDS, ids=[kind[0] for kind in KINDS])
def test_sums_are_rounded_as_little_as_their_type_allows(name: str, depth: int, dtype: torch.dtype, sums: torch.dtype) -> None:
    random = np.random.default_rng(1)
    operand = torch.bfloat16 if dtype == torch.float32 else dtype  # bfloat16 fits into tf32
    draw = [torch.from_numpy(random.standard_normal(shape)).to(kind).double().numpy()
            for shape, kind in (((16, depth), operand), ((depth, 8), operand), ((16, 8), sums))]  # fmt: skip
    a, b, c = draw
    error = np.abs(run_product(name, a, b, c, dtype, sums) - (a @ b + c))
    ulp = torch.finfo(sums).eps * (np.abs(a) @ np.abs(b) + np.abs(c))
    assert (error <= ulp * (1 if sums == torch.float16 else depth / 2)).all()


BYTES_A = [(GROUP + 8 * (i // 4 % 2), MEMBER * 4 + i % 4 + 16 * (i >= 8)) for i in range(16)]
BYTES_B = [(MEMBER * 4 + i % 4 + 16 * (i >= 4), GROUP) for i in range(8)]


@pytest.mark.parametrize("right", [np.uint8, np.int8], ids=["u8", "s8"])
@pytest.mark.parametrize("left", [np.uint8, np.int8], ids=["u8", "s8"])
def test_products_of_bytes_are_exact_and_wrap_around(left: type, right: type) -> None:
    random = np.random.default_rng(0)
    a = random.integers(0, 256, (16, 32), dtype=np.uint8).view(left)
    b = random.integers(0, 256, (32, 8), dtype=np.uint8).view(right)
    c = np.where(np.arange(16)[:, None] % 2, 2**31 - 1, -(2**31)) + np.zeros((1, 8), np.int64)
    quarters = [x.view(np.uint8)[place].astype(np.uint32) for x, places in ((a, BYTES_A), (b, BYTES_B)) for place in places]
    rows = [sum(quarters[i + k] << 8 * k for k in range(4)) for i in range(0, len(quarters), 4)]
    rows += [c[place].astype(np.uint32) for place in SUMS]
    kind = ".".join("u8" if each is np.uint8 else "s8" for each in (left, right))
    operands = f"{registers(500, 4)}, {registers(0, 4)}, {registers(4, 2)}, {registers(6, 4)}"
    body = f"mma.sync.aligned.m16n8k32.row.col.s32.{kind}.s32 {operands};"
    result, launch = run_lanes(body, np.stack(rows), 4, options=Options(counts=True))
    exact = (a.astype(np.int64) @ b.astype(np.int64) + c).astype(np.uint32)
    assert kinds(launch) == [] and launch.flop == 2 * 16 * 32 * 8
    assert all((lanes == exact[place]).all() for place, lanes in zip(SUMS, result, strict=True))
    assert (a.astype(np.int64) @ b.astype(np.int64) + c != exact.view(np.int32)).any()  # some sums do wrap around


def test_tf32_does_not_read_the_lowest_13_bits() -> None:
    ones = np.full((4, 32), 0x3F801FFF, dtype=np.uint32)  # 1 in tf32, more in float32
    body = "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%r500,%r501,%r502,%r503}, {%r0,%r1}, {%r2}, {%r4,%r5,%r6,%r7};"
    result, _ = run_lanes(body, np.concatenate([ones, np.zeros((4, 32), np.uint32)]), 4)
    assert (result.view(np.float32) == 4).all()


def test_a_product_needs_all_lanes() -> None:
    body = "setp.lt.u32 %p1, %r999, 31;\n@%p1 mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 " + ", ".join(
        [registers(500, 4), registers(0, 2), registers(2, 1), registers(3, 4)]
    )
    with pytest.raises(EmulationError, match="whole warp"):
        run_lanes(body + ";", np.zeros((7, 32), np.uint32), 4)


# ---- matrices in shared memory: the element in row r, column c of tile t is the number 100 t + 10 r + c

ELEMENTS = 100 * np.arange(4)[:, None, None] + 10 * np.arange(8)[:, None] + np.arange(8)
ROWS = (ELEMENTS[..., ::2] | ELEMENTS[..., 1::2] << 16).reshape(32, 4).T.astype(np.uint32)  # lane 8 t + r has row r of tile t


def held(tiles: int, transposed: bool) -> np.ndarray:
    """What the registers of a lane hold of these tiles: (tiles, 32)."""
    low, high = (GROUP, MEMBER * 2), (GROUP, MEMBER * 2 + 1)
    if transposed:
        low, high = low[::-1], high[::-1]
    return np.stack([tile[low] | tile[high] << 16 for tile in ELEMENTS[:tiles]]).astype(np.uint32)


STORE_ROWS = """
    mov.u32 %r100, memory;
    mad.lo.u32 %r101, %r999, 16, %r100;
    st.shared.v4.b32 [%r101], {%r0, %r1, %r2, %r3};
    bar.warp.sync -1;
"""


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_ldmatrix_brings_rows_to_lanes(tiles: int, transposed: bool) -> None:
    trans = ".trans" if transposed else ""
    body = f"{STORE_ROWS} ldmatrix.sync.aligned.m8n8.x{tiles}{trans}.shared.b16 {registers(500, tiles)}, [%r101];"
    result, launch = run_lanes(body, ROWS, tiles)
    np.testing.assert_array_equal(result, held(tiles, transposed))
    assert kinds(launch) == []


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_stmatrix_brings_lanes_to_rows(tiles: int, transposed: bool) -> None:
    trans = ".trans" if transposed else ""
    body = f"""
    mov.u32 %r100, memory;
    mad.lo.u32 %r101, %r999, 16, %r100;
    mov.b32 %r500, 7; mov.b32 %r501, 7; mov.b32 %r502, 7; mov.b32 %r503, 7;
    stmatrix.sync.aligned.m8n8.x{tiles}{trans}.shared.b16 [%r101], {registers(0, tiles)};
    bar.warp.sync -1;
    setp.lt.u32 %p1, %r999, {8 * tiles};
    @%p1 ld.shared.v4.b32 {{%r500, %r501, %r502, %r503}}, [%r101];
    """
    result, launch = run_lanes(body, held(tiles, transposed), 4)
    np.testing.assert_array_equal(result[:, : 8 * tiles], ROWS[:, : 8 * tiles])
    assert (result[:, 8 * tiles :] == 7).all() and kinds(launch) == []


def test_movmatrix_transposes() -> None:
    result, _ = run_lanes("movmatrix.sync.aligned.m8n8.trans.b16 %r500, %r0;", held(1, False), 1)
    np.testing.assert_array_equal(result, held(1, True))


def test_rows_of_ldmatrix_must_be_aligned() -> None:
    body = STORE_ROWS + "add.u32 %r101, %r101, 2;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r500}, [%r101];"
    with pytest.raises(EmulationError, match="aligned"):
        run_lanes(body, ROWS, 1)


def test_ldmatrix_of_another_lane_s_row_needs_a_barrier_of_the_warp() -> None:
    load = """
    xor.b32 %r102, %r999, 1;
    mad.lo.u32 %r101, %r102, 16, %r100;
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r500}, [%r101];
    """
    assert kinds(run_lanes(STORE_ROWS + load, ROWS, 1)[1]) == []
    _, launch = run_lanes(STORE_ROWS.replace("bar.warp.sync -1;", "") + load, ROWS, 1)
    assert any("race" in kind for kind in kinds(launch))


def test_ldmatrix_of_what_was_never_written_is_reported() -> None:
    body = STORE_ROWS + "add.u32 %r101, %r101, 512;\nldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r500,%r501,%r502,%r503}, [%r101];"
    _, launch = run_lanes(body, ROWS, 4)
    assert any("never written" in kind for kind in kinds(launch))
