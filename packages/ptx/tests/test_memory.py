"""Memory: bounds, alignment, what was never written, spaces, tensors between guards, counts of sectors and wavefronts."""

from __future__ import annotations

from types import FunctionType

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ptx.running.memory import LARGE, Memory, marked, uninitialised
from ptx.running.reports import EmulationError, Options
from tests.helpers.programs import kinds, run, words

NEVER_GLOBAL, NEVER_SHARED, NEVER_LOCAL = (
    f"read of {space} memory that was never written" for space in ("global", "shared", "local")
)


def test_loads_and_stores_of_all_widths():
    source = torch.arange(1, 65, dtype=torch.uint8)
    out = torch.zeros(64, dtype=torch.uint8)
    body = """
        setp.ne.u32 %p2, %r0, 0;
        @%p2 exit;
        ld.global.u8 %r10, [%rd0]; st.global.u8 [%rd1], %r10;
        ld.global.u8 %h1, [%rd0+1]; st.global.b8 [%rd1+1], %h1;
        ld.global.b16 %h2, [%rd0+2]; st.global.b16 [%rd1+2], %h2;
        ld.global.b32 %r11, [%rd0+4]; st.global.b32 [%rd1+4], %r11;
        ld.global.b64 %rd50, [%rd0+8]; st.global.b64 [%rd1+8], %rd50;
        ld.global.v4.b32 {%r12, %r13, %r14, %r15}, [%rd0+16]; st.global.v4.b32 [%rd1+16], {%r12, %r13, %r14, %r15};
        ld.global.v2.b64 {%rd51, %rd52}, [%rd0+32]; st.global.v2.b64 [%rd1+32], {%rd51, %rd52};
        ld.global.v4.b16 {%h1, %h2, %h3, %h4}, [%rd0+48]; st.global.v4.b16 [%rd1+48], {%h1, %h2, %h3, %h4};
    """
    assert run(body, source, out).findings == []
    assert out.tolist() == [*range(1, 57), *[0] * 8]


def test_signed_bytes_are_extended():
    source, out = torch.tensor([-3], dtype=torch.int8), words(3)
    body = """
        ld.global.s8 %r10, [%rd0]; ld.global.u8 %r11, [%rd0];
        ld.global.s8 %rd50, [%rd0]; shr.s64 %rd50, %rd50, 40; cvt.u32.u64 %r12, %rd50;
        @%p0 st.global.b32 [%rd1], %r10; @%p0 st.global.b32 [%rd1+4], %r11; @%p0 st.global.b32 [%rd1+8], %r12;
    """
    run(body, source, out)
    assert out.tolist() == [-3, 253, -1]


def test_bounds_name_the_argument_lane_and_bytes():
    with pytest.raises(EmulationError) as error:
        run("st.global.b32 [%rd100], %r0;", words(30))
    text = str(error.value)
    assert "write of 4 bytes, lane 30, address 0x" in text
    assert "lies outside of all arguments; tensor 0 has 120 bytes, and the access ends 4 bytes behind them" in text
    with pytest.raises(EmulationError, match="read of 8 bytes, lane 0.*tensor 0 begins 16 bytes after this address"):
        run("ld.global.b64 %rd50, [%rd0-16];", words(32))
    run("st.global.b32 [%rd100], %r0;", words(32))


def test_a_view_is_a_range_of_its_own():
    whole = words(64)
    with pytest.raises(EmulationError, match="tensor 0 has 64 bytes"):
        run("st.global.b32 [%rd100], %r0;", whole[16:32])
    run("st.global.b32 [%rd100], %r0; st.global.b32 [%rd101], %r0;", whole[:32], whole[32:])
    assert whole.tolist() == [*range(32)] * 2


def test_an_argument_may_be_read_only():
    memory = Memory()
    address = memory.place(words(4), "constant", writable=False)
    assert memory.ranges[0].begin == address
    assert not memory.ranges[0].writable


def test_misaligned_access():
    with pytest.raises(EmulationError, match="misaligned access of 8 bytes, lane 0"):
        run("ld.global.b64 %rd50, [%rd0+4];", words(8))
    with pytest.raises(EmulationError, match="misaligned access of 16 bytes"):
        run("ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd0+8];", words(8))
    with pytest.raises(EmulationError, match="misaligned access of 4 bytes"):
        run("ld.shared.b32 %r10, [%r4+2];")
    run("ld.global.b64 %rd50, [%rd0+8];", words(8))


@pytest.mark.parametrize("address", ["%r4+4096", "%r4-8", "0"])
def test_shared_bounds(address: str):
    with pytest.raises(EmulationError, match="outside of shared memory"):
        run(f"st.shared.b8 [{address}], %r0;", threads=1)
    run("st.shared.b8 [%r4+3000], %r0;", threads=1)


def test_local_memory_is_of_each_lane():
    out = words(32)
    body = """
        mov.u32 %r10, stack; st.local.b32 [%r10+4], %r0; ld.local.b32 %r11, [%r10+4]; st.global.b32 [%rd100], %r11;
        cvt.u64.u32 %rd50, %r10; cvta.local.u64 %rd51, %rd50; ld.b32 %r12, [%rd51+4]; setp.ne.u32 %p2, %r12, %r0; @%p2 trap;
    """
    assert run(body, out).findings == []
    assert out.tolist() == list(range(32))
    with pytest.raises(EmulationError, match="outside of local memory"):
        run("mov.u32 %r10, stack; st.local.b32 [%r10+64], %r0;")


def test_generic_addresses():
    out = words(32)
    body = """
        cvt.u64.u32 %rd50, %r5; cvta.shared.u64 %rd51, %rd50; st.b32 [%rd51], %r0;
        ld.shared.b32 %r10, [%r5]; st.b32 [%rd100], %r10;
        isspacep.shared %p2, %rd51; @!%p2 trap; isspacep.global %p3, %rd51; @%p3 trap; isspacep.global %p4, %rd100; @!%p4 trap;
        cvta.to.shared.u64 %rd52, %rd51; setp.ne.u64 %p5, %rd52, %rd50; @%p5 trap;
    """
    assert run(body, out).findings == []
    assert out.tolist() == list(range(32))


# ---- what was never written


def test_shared_memory_that_was_never_written():
    assert kinds("ld.shared.b32 %r10, [%r5];") == {NEVER_SHARED}
    assert kinds("st.shared.b32 [%r5], %r0; ld.shared.b32 %r10, [%r5];") == set()
    assert kinds("st.shared.b16 [%r5], %h0; ld.shared.b32 %r10, [%r5];") == {NEVER_SHARED}
    assert kinds("st.shared.b16 [%r5], %h0; st.shared.b16 [%r5+2], %h0; ld.shared.b32 %r10, [%r5];") == set()


def test_shared_memory_of_the_block_before():
    """What one block wrote is nothing to the next one."""
    body = """
        setp.eq.u32 %p2, %r2, {}; @%p2 st.shared.b32 [%r5], %r0; @%p2 ld.shared.b32 %r10, [%r5];
        @!%p2 ld.shared.b32 %r10, [%r5];
    """
    assert kinds(body.format(0), grid=2) == {NEVER_SHARED}
    assert kinds("st.shared.b32 [%r5], %r0; ld.shared.b32 %r10, [%r5];", grid=2) == set()


def test_local_memory_that_was_never_written():
    assert kinds("mov.u32 %r10, stack; ld.local.b32 %r11, [%r10];") == {NEVER_LOCAL}
    assert kinds("mov.u32 %r10, stack; st.local.b32 [%r10], %r0; ld.local.b32 %r11, [%r10];") == set()


READ_ALL = "ld.global.b32 %r10, [%rd100]; st.global.b32 [%rd101], %r10;"


def test_global_memory_that_was_never_written():
    empty = uninitialised(torch.empty(32))
    assert empty.isnan().all()
    assert [f.kind for f in run(READ_ALL, empty, words(32)).findings] == [NEVER_GLOBAL]
    assert run(READ_ALL, torch.empty(32).fill_(1), words(32)).findings == []


def test_what_a_kernel_wrote_is_initialised_in_the_next_launch():
    empty = uninitialised(torch.empty(32))
    assert run("setp.ne.u32 %p2, %r0, 7; @%p2 st.global.b32 [%rd100], %r0;", empty).findings == []
    (finding,) = run(READ_ALL, empty, words(32)).findings
    assert (finding.kind, finding.count) == (NEVER_GLOBAL, 1)
    assert "lane 7, byte 28 of tensor 0" in finding.text
    run("st.global.b32 [%rd100], %r0;", empty)
    assert run(READ_ALL, empty, words(32)).findings == []


def test_what_torch_wrote_is_initialised():
    empty = uninitialised(torch.empty(64))
    empty[:16] = 3
    (finding,) = run(READ_ALL, empty[:32], words(32)).findings
    assert finding.count == 16
    empty.zero_()
    assert run(READ_ALL, empty[:32], words(32)).findings == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_uninitialised_numbers_are_nan(dtype: torch.dtype):
    assert uninitialised(torch.empty(33, 3, dtype=dtype)).isnan().all()


def test_what_the_package_allocates_is_marked():
    """Code of this package alone: its modules have the name in `__name__`."""
    allocate = torch.Tensor.new_empty_strided
    empty_like = FunctionType((lambda x: x.new_empty_strided(x.shape, x.stride())).__code__, {"__name__": "library.memory"})
    with marked("library"):
        empty = empty_like(torch.zeros(1, 1, 4, 8))
        assert [f.kind for f in run(READ_ALL, empty, words(32)).findings] == [NEVER_GLOBAL]
        mine = torch.empty(32)
    with marked():
        assert [f.kind for f in run(READ_ALL, torch.empty(32), words(32)).findings] == [NEVER_GLOBAL]
    assert run(READ_ALL, mine, words(32)).findings == [] and torch.Tensor.new_empty_strided is allocate


def test_fake_tensors_have_no_memory_to_fill():
    with FakeTensorMode():
        fake = torch.empty(3)
    assert uninitialised(fake) is fake


def test_a_new_tensor_at_an_old_address_is_initialised():
    for _ in range(4):
        uninitialised(torch.empty(1000))
        assert run(READ_ALL, torch.zeros(1000), words(32)).findings == []


# ---- tensors


def test_views_share_a_copy_and_come_back():
    whole = torch.arange(64, dtype=torch.int32)
    memory = Memory()
    first, second = memory.place(whole[:32], "first"), memory.place(whole.view(2, 32)[:, ::2], "second")
    assert (first, memory.ranges[1].end - second) == (second, 4 * 63)
    assert first % 16 == whole.data_ptr() % 16


def test_empty_tensors():
    memory = Memory()
    address = memory.place(torch.empty(0, 4), "nothing")
    assert address
    assert address % 16 == 0
    assert memory.ranges == []
    copy = "cp.async.ca.shared.global [%r5], [%rd0], 4, %r10; cp.async.wait_all; ld.shared.b32 %r11, [%r5];"
    assert run("mov.u32 %r10, 0;" + copy, torch.empty(0)).findings == []
    with pytest.raises(EmulationError, match="outside of all arguments"):
        run("mov.u32 %r10, 4;" + copy, torch.empty(0))


def test_a_huge_storage_is_used_in_place():
    huge = torch.empty(LARGE // 4 + 8, dtype=torch.int32)
    memory = Memory()
    assert memory.place(huge[-8:], "end") == huge[-8:].data_ptr()
    assert run("@%p0 st.global.b32 [%rd0], 5; @%p0 st.global.b32 [%rd1], 6;", huge, huge[-8:]).findings == []
    assert (huge[0], huge[-8]) == (5, 6)


def test_a_variable_of_the_module():
    out = words(4)
    text = """
        setp.lt.u32 %p2, %r0, 4; @%p2 mul.wide.u32 %rd50, %r0, 4; mov.u64 %rd51, table; @%p2 add.u64 %rd51, %rd51, %rd50;
        @%p2 ld.global.b32 %r10, [%rd51]; @%p2 st.global.b32 [%rd100], %r10;
    """
    run(".global .align 4 .b32 table[4] = {7, 8, 9, 10};" + text, out)
    assert out.tolist() == [7, 8, 9, 10]


# ---- counts


def accesses(body: str, *tensors: torch.Tensor) -> tuple[int, int, int, int]:
    return tuple(run(body, *tensors, options=Options(counts=True, races=False)).accesses)


def test_sectors():
    x = words(2048)
    stride = "mul.lo.u32 %r10, %r0, {}; cvt.u64.u32 %rd50, %r10; add.u64 %rd51, %rd0, %rd50; ld.global.b32 %r11, [%rd51];"
    assert accesses(stride.format(4), x) == (0, 0, 4, 4)
    assert accesses(stride.format(64), x) == (0, 0, 32, 4)
    assert accesses(stride.format(0), x) == (0, 0, 1, 1)
    vector = stride.format(16).replace("ld.global.b32 %r11", "ld.global.v4.b32 {%r11, %r12, %r13, %r14}")
    assert accesses(vector, x) == (0, 0, 16, 16)


def test_sectors_that_a_block_has_once():
    """Each block reads words 0, 2, ... and then the words between them."""
    body = "mad.lo.u32 %r10, %r0, 8, 0; cvt.u64.u32 %rd50, %r10; add.u64 %rd51, %rd0, %rd50; ld.global.b32 %r11, [%rd51];"
    launch = run(f"{body} ld.global.b32 %r12, [%rd51+4];", words(64), grid=3, options=Options(counts=True, races=False))
    assert launch.accesses == (0, 0, 3 * 16, 3 * 8) and launch.once == (3 * 8, 3 * 8)
    launch = run(body, words(64), grid=3, options=Options(counts=True, races=False))
    assert launch.accesses == (0, 0, 3 * 8, 3 * 4) and launch.once == (3 * 8, 3 * 4)


def test_wavefronts():
    stride = "mad.lo.u32 %r10, %r0, {}, %r4; st.shared.b32 [%r10], %r0;"
    assert accesses(stride.format(4)) == (1, 1, 0, 0)
    assert accesses(stride.format(8)) == (2, 1, 0, 0)
    assert accesses(stride.format(128)) == (32, 1, 0, 0)
    assert accesses(stride.format(0)) == (1, 1, 0, 0)
    vector = "mad.lo.u32 %r10, %r0, {}, %r4; st.shared.v4.b32 [%r10], {{%r0, %r0, %r0, %r0}};"
    assert accesses(vector.format(16)) == (4, 4, 0, 0)
    assert accesses(vector.format(64)) == (16, 4, 0, 0)


def test_counts_by_instruction():
    launch = run("st.shared.b32 [%r5], %r0; ld.global.b32 %r10, [%rd0];", words(4), options=Options(counts=True))
    assert sorted(launch.by_instruction.values()) == [(0, 0, 1, 1), (1, 1, 0, 0)]
