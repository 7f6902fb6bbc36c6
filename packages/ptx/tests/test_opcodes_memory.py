"""Opcodes of memory and barriers that the tests of the machine's parts do not write out: each alone, on one block."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.programs import run, words

REDUCTIONS = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "inc.u32": lambda a, b: 0 if a >= b else a + 1,
    "dec.u32": lambda a, b: b if a == 0 or a > b else a - 1,
    "min.s32": min,
    "max.u32": max,
}


@pytest.mark.parametrize("operation", REDUCTIONS)
@pytest.mark.parametrize("space", ["global", "shared"])
def test_reductions(operation: str, space: str):
    out = words(32)
    place = "%rd100" if space == "global" else "%r5"
    run(
        f"""
        mul.lo.u32 %r10, %r0, 5; and.b32 %r10, %r10, 31;
        st.{space}.u32 [{place}], %r10;
        red.{space}.{operation} [{place}], %r0;
        ld.{space}.u32 %r11, [{place}];
        st.global.u32 [%rd100], %r11;
        """,
        out,
    )
    assert out.tolist() == [REDUCTIONS[operation](5 * n % 32, n) for n in range(32)]


@pytest.mark.parametrize(("kind", "dtype"), [("f32", torch.float32), ("f16x2", torch.float16), ("bf16x2", torch.bfloat16)])
def test_reductions_of_floats(kind: str, dtype: torch.dtype):
    """All lanes add to one place; small whole numbers have no roundings."""
    numbers, total = (
        torch.arange(32).to(dtype).repeat_interleave(4 // dtype.itemsize),
        torch.zeros(4 // dtype.itemsize, dtype=dtype),
    )
    run(f"ld.global.b32 %r10, [%rd100]; red.global.add.{'' if kind == 'f32' else 'noftz.'}{kind} [%rd1], %r10;", numbers, total)
    assert total.tolist() == numbers.view(32, -1).double().sum(0).tolist() or dtype == torch.bfloat16
    if dtype == torch.bfloat16:  # 496 = 31 * 16 has five bits, sums on the way have nine
        assert (total.double() - 496).abs().max() <= 4


ORDERED = [
    ("st.relaxed.cta.shared.u32", "ld.relaxed.cta.shared.u32", "%r5"),
    ("st.release.cta.shared.u32", "ld.acquire.cta.shared.u32", "%r5"),
    ("st.volatile.shared.u32", "ld.volatile.shared.u32", "%r5"),
    ("st.relaxed.gpu.global.u32", "ld.relaxed.gpu.global.u32", "%rd100"),
    ("st.release.gpu.global.u32", "ld.acquire.gpu.global.u32", "%rd100"),
    ("st.volatile.global.u32", "ld.volatile.global.u32", "%rd100"),
]


@pytest.mark.parametrize(("store", "load", "place"), ORDERED)
def test_ordered_loads_and_stores(store: str, load: str, place: str):
    out = words(32)
    run(f"{store} [{place}], %r0; {load} %r10, [{place}]; add.u32 %r10, %r10, 1; st.global.u32 [%rd100], %r10;", out)
    assert out.tolist() == list(range(1, 33))


def test_lanes_that_drop_out_of_an_mbarrier_are_no_more_waited_for():
    """Phase 0 has 32 arrivals, of which 31 drop out; so one arrival ends phase 1."""
    out = words(32)
    launch = run(
        """
        @%p0 mbarrier.init.shared.b64 [%r4], 32;
        bar.sync 0;
        @%p0 mbarrier.arrive.shared.b64 %rd50, [%r4];
        @!%p0 mbarrier.arrive_drop.shared.b64 %rd50, [%r4];
    $first: mbarrier.try_wait.shared.b64 %p2, [%r4], %rd50;
        @!%p2 bra $first;
        @%p0 mbarrier.arrive.shared.b64 %rd51, [%r4];
    $second: mbarrier.try_wait.parity.shared.b64 %p2, [%r4], 1;
        @!%p2 bra $second;
        st.global.u32 [%rd100], 1;
        """,
        out,
    )
    assert launch.findings == []
    assert out.tolist() == [1] * 32


@pytest.mark.parametrize("opcodes", [("barrier.arrive.aligned", "barrier.sync.aligned"), ("barrier.arrive", "barrier.sync")])
def test_arrivals_that_do_not_wait(opcodes: tuple[str, str]):
    out = words(64)
    launch = run(
        f"""
        mov.u32 %r10, 5;
        @%p1 st.shared.u32 [%r5+128], %r0;
        @%p1 {opcodes[0]} 1, 64;
        @!%p1 {opcodes[1]} 1, 64;
        @!%p1 ld.shared.u32 %r10, [%r5];
        st.global.u32 [%rd100], %r10;
        """,
        out,
        threads=64,
    )
    assert launch.findings == []
    assert out.tolist() == [5] * 32 + list(range(32))
