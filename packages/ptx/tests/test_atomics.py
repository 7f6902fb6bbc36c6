"""atom and red: every operation and type, against numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from ptx.reading.opcodes import matching
from tests.helpers.programs import kinds, run, words

INTEGERS = {
    "add": lambda a, b: a + b,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda a, b: b,
    "inc": lambda a, b: np.where(a >= b, 0, a + 1).astype(a.dtype),
    "dec": lambda a, b: np.where((a == 0) | (a > b), b, a - 1).astype(a.dtype),
}
TYPES = {"u32": np.uint32, "s32": np.int32, "b32": np.uint32, "u64": np.uint64, "s64": np.int64, "b64": np.uint64}
ROWS = [
    *((operation, kind) for operation in ("add", "min", "max") for kind in ("u32", "s32", "u64", "s64")),
    *((operation, kind) for operation in ("and", "or", "xor", "exch") for kind in ("b32", "b64")),
    ("inc", "u32"),
    ("dec", "u32"),
]


@pytest.mark.parametrize(("operation", "kind"), ROWS)
def test_integers(operation: str, kind: str):
    rng = np.random.default_rng(0)
    dtype = np.dtype(TYPES[kind])
    before, operand = (np.frombuffer(rng.bytes(32 * dtype.itemsize), dtype).copy() for _ in range(2))
    if operation in ("inc", "dec"):
        before[:8], operand[:8] = [0, 1, 5, 6, 7, 9, 0, 3], [5, 5, 5, 5, 5, 5, 0, 2**32 - 1]
    memory, out = (torch.from_numpy(a.copy().view(np.int8)) for a in (before, np.zeros_like(before)))
    register = "%rd" if dtype.itemsize == 8 else "%r"
    bits = 8 * dtype.itemsize
    body = f"""
        mul.wide.u32 %rd50, %r0, {dtype.itemsize}; add.u64 %rd51, %rd0, %rd50;
        add.u64 %rd52, %rd1, %rd50; add.u64 %rd53, %rd2, %rd50;
        ld.global.b{bits} {register}60, [%rd52];
        atom.global.{operation}.{kind} {register}61, [%rd51], {register}60;
        st.global.b{bits} [%rd53], {register}61;
    """
    assert run(body, memory, torch.from_numpy(operand.view(np.int8)), out).findings == []
    assert out.numpy().view(dtype).tolist() == before.tolist()
    assert memory.numpy().view(dtype).tolist() == INTEGERS[operation](before, operand).tolist()


@pytest.mark.parametrize("name", ["atom.acquire.gpu.global.exch.b32", "atom.global.acquire.gpu.exch.b32"])
def test_the_space_may_stand_before_the_order(name: str):
    out = words(32)
    assert run(f"mov.b32 %r10, 5; {name} %r11, [%rd100], %r10;", out).findings == []
    assert out.tolist() == [5] * 32


@pytest.mark.parametrize("space", ["global", "shared", ""])
def test_all_lanes_add_to_one_place(space: str):
    out = words(33)
    dot = f".{space}" if space else ""
    place = "%r4" if space == "shared" else "%rd0"
    start = "@%p0 st.shared.b32 [%r4], 0; bar.sync 0;" if space == "shared" else ""
    end = "bar.sync 0; @%p0 ld.shared.b32 %r11, [%r4]; @%p0 st.global.b32 [%rd0], %r11;" if space == "shared" else ""
    body = f"{start} add.u32 %r10, %r0, 1; red{dot}.add.u32 [{place}], %r10; atom{dot}.add.u32 %r12, [{place}], 1; {end}"
    assert run(body, out, threads=64).findings == []
    assert out[0] == 64 * 65 // 2 + 64


def test_every_lane_gets_a_ticket_of_its_own():
    out = words(96)
    assert run("atom.global.add.u32 %r10, [%rd1], 1; st.global.b32 [%rd100], %r10;", out, words(1), threads=96).findings == []
    assert sorted(out.tolist()) == list(range(96))
    assert out.tolist() != list(range(96))


@pytest.mark.parametrize(("bits", "register"), [(32, "%r"), (64, "%rd"), (16, "%h")])
def test_compare_and_swap(bits: int, register: str):
    memory = torch.tensor([5, 6], dtype={16: torch.int16, 32: torch.int32, 64: torch.int64}[bits])
    out = torch.zeros_like(memory)
    body = f"""
        setp.gt.u32 %p2, %r0, 1; @%p2 exit;
        mul.wide.u32 %rd50, %r0, {bits // 8}; add.u64 %rd51, %rd0, %rd50; add.u64 %rd52, %rd1, %rd50;
        mov.b{bits} {register}60, 5; mov.b{bits} {register}61, 9;
        atom.global.cas.b{bits} {register}62, [%rd51], {register}60, {register}61;
        st.global.b{bits} [%rd52], {register}62;
    """
    run(body, memory, out)
    assert memory.tolist() == [9, 6]
    assert out.tolist() == [5, 6]


def test_wide_exchange_and_compare_and_swap():
    memory = torch.tensor([1, 2, 3, 4], dtype=torch.int64)
    body = """
        setp.ne.u32 %p2, %r0, 0; @%p2 exit;
        .reg .b128 %q<4>;
        mov.u64 %rd50, 1; mov.u64 %rd51, 2; mov.u64 %rd52, 30; mov.u64 %rd53, 40;
        mov.b128 %q0, {%rd50, %rd51}; mov.b128 %q1, {%rd52, %rd53};
        atom.global.cas.b128 %q2, [%rd0], %q0, %q1;
        atom.global.exch.b128 %q3, [%rd0+16], %q2;
    """
    run(body, memory)
    assert memory.tolist() == [30, 40, 1, 2]


FLOATS = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
def test_floats(kind: str):
    dtype = FLOATS[kind]
    generator = torch.Generator().manual_seed(0)
    memory, operand = (torch.randn(32, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    expected = memory + operand
    size = dtype.itemsize
    register = {2: "%h", 4: "%r", 8: "%rd"}[size]
    noftz = ".noftz" if size == 2 else ""
    body = f"""
        mul.wide.u32 %rd50, %r0, {size}; add.u64 %rd51, %rd0, %rd50; add.u64 %rd52, %rd1, %rd50;
        ld.global.b{8 * size} {register}60, [%rd52];
        red.global.add{noftz}.{kind} [%rd51], {register}60;
    """
    assert run(body, memory, operand).findings == []
    assert torch.equal(memory, expected)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_pairs(kind: str):
    memory, operand = (torch.arange(n, n + 64).to(FLOATS[kind]) / 7 for n in (0, 5))
    expected = memory + operand
    body = f"ld.global.b32 %r60, [%rd101]; atom.global.add.noftz.{kind}x2 %r61, [%rd100], %r60; st.global.b32 [%rd102], %r61;"
    before = torch.zeros(64, dtype=FLOATS[kind])
    first = memory.clone()
    assert run(body, memory, operand, before).findings == []
    assert torch.equal(memory, expected)
    assert torch.equal(before, first)


@pytest.mark.parametrize(
    ("operation", "change"), [("add", torch.add), ("min.noftz", torch.minimum), ("max.noftz", torch.maximum)]
)
def test_vectors(operation: str, change: Callable):
    generator = torch.Generator().manual_seed(1)
    memory, operand = (torch.randn(128, generator=generator).half() for _ in range(2))
    expected = change(memory, operand)
    if operation == "add":
        operation = "add.noftz"
    body = f"""
        mul.wide.u32 %rd50, %r0, 8; add.u64 %rd51, %rd0, %rd50; add.u64 %rd52, %rd1, %rd50;
        ld.global.v2.b32 {{%r60, %r61}}, [%rd52];
        red.global.{operation}.v2.f16x2 [%rd51], {{%r60, %r61}};
    """
    assert run(body, memory, operand).findings == []
    assert torch.equal(memory, expected)


def test_a_vector_of_floats_returns_what_was_there():
    memory, out = torch.arange(4.0), torch.zeros(4)
    body = """
        setp.ne.u32 %p2, %r0, 0; @%p2 exit;
        mov.b32 %f1, 0f3F800000;
        atom.global.add.v4.f32 {%f2, %f3, %f4, %f5}, [%rd0], {%f1, %f1, %f1, %f1};
        st.global.v4.f32 [%rd1], {%f2, %f3, %f4, %f5};
    """
    run(body, memory, out)
    assert (memory.tolist(), out.tolist()) == ([1, 2, 3, 4], [0, 1, 2, 3])


def test_order_in_the_opcode():
    """Also as Triton spells it, with the space first."""
    for order in ("relaxed", "acquire", "release", "acq_rel"):
        assert kinds(f"atom.{order}.gpu.global.add.u32 %r10, [%rd0], 1;", words(1)) == set()
        assert kinds(f"atom.global.gpu.{order}.add.u32 %r10, [%rd0], 1;", words(1)) == set()
        assert matching(f"red.global.cta.{order}.add.f32") == matching(f"red.{order}.cta.global.add.f32") != ()
