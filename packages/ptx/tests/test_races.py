"""Races: each kind is seen whatever the order of warps and blocks, and a near twin without it is not reported."""

from __future__ import annotations

import pytest

from ptx.running.reports import FindingsError, Options
from tests.helpers.programs import kinds, run, words

SHARED, GLOBAL = "race in shared memory: ", "race in global memory: "
READ_AFTER_WRITE, WRITE_AFTER_READ, WRITE_AFTER_WRITE = "read after write", "write after read", "write after write"
NEVER = "read of shared memory that was never written"

# warp 0 writes its part of `memory`, warp 1 reads it; a value was there
WRITE_THEN_READ = """
    @%p1 st.shared.b32 [%r5], 1000;
    bar.sync 0;
    @%p1 st.shared.b32 [%r5], %r0;
    {between}
    @!%p1 ld.shared.b32 %r10, [%r5-128];
"""


def shared(names: set[str]) -> set[str]:
    return {name.removeprefix(SHARED) for name in names}


def test_read_and_write_of_two_warps():
    assert shared(kinds(WRITE_THEN_READ.format(between=""), threads=64)) == {READ_AFTER_WRITE, WRITE_AFTER_READ}
    assert kinds(WRITE_THEN_READ.format(between="bar.sync 0;"), threads=64) == set()


def test_two_warps_write_different_values():
    body = "and.b32 %r10, %r0, 31; mad.lo.u32 %r11, %r10, 4, %r4; st.shared.b32 [%r11], {};"
    assert kinds(body.format("%r0"), threads=64) == {SHARED + WRITE_AFTER_WRITE}
    assert kinds(body.format("%r10"), threads=64) == set()  # the same values: Triton's replicated layouts
    assert kinds(body.format("%r10") + "ld.shared.b32 %r12, [%r11];", threads=64) == set()


def test_a_write_after_reads_of_several_warps():
    body = "@%p1 st.shared.b32 [%r5], 7; bar.sync 0; ld.shared.b32 %r10, [%r4]; {} @%p0 st.shared.b32 [%r4], {};"
    assert shared(kinds(body.format("", 8), threads=128)) == {WRITE_AFTER_READ, READ_AFTER_WRITE}
    assert kinds(body.format("bar.sync 0;", 8), threads=128) == set()
    assert kinds(body.format("", 7), threads=128) == set()


def test_neighbouring_bytes_are_no_race():
    body = """
        mad.lo.u32 %r10, %r1, 4, %r4; mad.lo.u32 %r10, %r3, 2, %r10; cvt.u16.u32 %h1, %r0; st.shared.b16 [%r10], %h1;
        ld.shared.b16 %h2, [%r10];
    """
    assert kinds(body, threads=64) == set()
    assert kinds(body.replace("%r3, 2", "%r3, 0"), threads=64) != set()
    # the neighbour's bytes, after a barrier, and without one
    both = "st.shared.b32 [%r5], -1; bar.sync 0;" + body + "{} xor.b32 %r11, %r10, 2; ld.shared.b16 %h3, [%r11];"
    assert kinds(both.format("bar.sync 0;"), threads=64) == set()
    assert shared(kinds(both.format(""), threads=64)) == {READ_AFTER_WRITE, WRITE_AFTER_READ}


def test_the_wrong_barrier_orders_nothing():
    two = "@%p1 bar.sync 1, 32; @!%p1 bar.sync 2, 32;"
    assert shared(kinds(WRITE_THEN_READ.format(between=two), threads=64)) == {READ_AFTER_WRITE, WRITE_AFTER_READ}
    assert kinds(WRITE_THEN_READ.format(between="bar.sync 1, 64;"), threads=64) == set()


def test_arrive_orders_one_way():
    """Who arrives is known to who waits, and not the other way round."""
    arrive, wait = "@{} bar.arrive 1, 64;", "@{} bar.sync 1, 64;"
    assert kinds(WRITE_THEN_READ.format(between=arrive.format("%p1") + wait.format("!%p1")), threads=64) == set()
    assert kinds(WRITE_THEN_READ.format(between=arrive.format("!%p1") + wait.format("%p1")), threads=64) != set()


# ---- lanes of one warp


def test_lanes_of_a_warp_need_a_warp_barrier():
    body = "st.shared.b32 [%r5], %r0; {} xor.b32 %r10, %r5, 4; ld.shared.b32 %r11, [%r10];"
    assert kinds(body.format("")) == {SHARED + READ_AFTER_WRITE}
    assert kinds(body.format("shfl.sync.bfly.b32 %r12, %r1, 1, 31, -1;")) == {SHARED + READ_AFTER_WRITE}
    assert kinds(body.format("bar.warp.sync -1;")) == set()
    assert kinds(body.format("bar.sync 0;")) == set()
    back = body.format("bar.warp.sync -1;") + "{} st.shared.b32 [%r5], %r1; st.shared.b32 [%r5], 5;"
    assert kinds(back.format("")) == {SHARED + WRITE_AFTER_READ}
    assert kinds(back.format("bar.warp.sync -1;")) == set()


def test_a_warp_barrier_of_some_lanes():
    halves = """
        st.shared.b32 [%r5], %r0;
        setp.lt.u32 %p2, %r1, 16;
        @%p2 bra $low;
        bar.warp.sync 0xffff0000;
        bra.uni $end;
    $low:
        bar.warp.sync 0x0000ffff;
    $end:
        xor.b32 %r10, %r5, {};
        ld.shared.b32 %r11, [%r10];
    """
    assert kinds(halves.format(4)) == set()
    assert kinds(halves.format(64)) == {SHARED + READ_AFTER_WRITE}


def test_lanes_of_one_store_write_one_place():
    assert kinds("st.shared.b32 [%r4], %r0;") == {SHARED + WRITE_AFTER_WRITE}
    assert kinds("st.shared.b32 [%r4], 3;") == set()


# ---- through global memory


def races_of(body: str, *, count: int = 64, **arguments: int) -> set[str]:
    return {name.removeprefix(GLOBAL) for name in kinds(body, words(count), words(count), **{"grid": 2, **arguments})}


def test_blocks_that_write_the_same_place():
    assert races_of("@%p0 st.global.b32 [%rd0], %r2;") == {WRITE_AFTER_WRITE}
    assert races_of("@%p0 st.global.b32 [%rd0], 1;") == set()
    assert races_of("mad.wide.u32 %rd50, %r2, 4, %rd0; @%p0 st.global.b32 [%rd50], %r2;") == set()
    assert races_of("mad.wide.u32 %rd50, %r2, 2, %rd0; cvt.u16.u32 %h1, %r2; @%p0 st.global.b16 [%rd50], %h1;") == set()


def test_one_block_reads_what_another_one_writes():
    body = "setp.eq.u32 %p2, %r2, 0; @%p2 ld.global.b32 %r10, [%rd100]; @!%p2 st.global.b32 [%rd100], {};"
    assert races_of(body.format("%r1")) == {READ_AFTER_WRITE, WRITE_AFTER_READ}
    assert races_of(body.format("0")) == set()  # the value that is there
    assert races_of(body.format("%r1"), grid=1) == set()


def test_warps_of_a_block_through_global_memory():
    body = "@%p1 st.global.b32 [%rd100], 9; {} @!%p1 ld.global.b32 %r10, [%rd100-128];"
    assert races_of(body.format(""), grid=1, threads=64) == {READ_AFTER_WRITE, WRITE_AFTER_READ}
    assert races_of(body.format("bar.sync 0;"), grid=1, threads=64) == set()


@pytest.mark.parametrize("interleave", [0, 2])
def test_every_order_of_two_blocks_shows_the_race(interleave: int):
    for seed in range(6):
        launch = run(
            "ld.global.b32 %r10, [%rd0]; @%p0 st.global.b32 [%rd0], 5;",
            words(1),
            grid=2,
            options=Options(seed=seed, interleave=interleave),
        )
        assert {f.kind for f in launch.findings} <= {GLOBAL + kind for kind in (READ_AFTER_WRITE, WRITE_AFTER_READ)}
        assert launch.findings


def test_atomics_are_no_race_among_themselves():
    assert races_of("red.global.add.u32 [%rd0], 1;") == set()
    assert races_of("red.global.add.u32 [%rd0], 1; ld.relaxed.gpu.global.u32 %r10, [%rd0];") == set()
    assert races_of("red.global.add.u32 [%rd0], 1; @%p0 ld.global.u32 %r10, [%rd0];") != set()
    assert races_of("setp.eq.u32 %p2, %r2, 0; @%p2 red.global.add.u32 [%rd0], 1; @!%p2 st.global.b32 [%rd0], 7;") == {
        WRITE_AFTER_WRITE
    }
    assert races_of("red.shared.add.u32 [%r4], 1;", threads=64) == {NEVER}
    assert races_of("@%p0 st.shared.b32 [%r4], 0; bar.sync 0; red.shared.add.u32 [%r4], 1;", threads=64) == set()
    assert {SHARED + READ_AFTER_WRITE} <= races_of(
        "@%p0 st.shared.b32 [%r4], 0; bar.sync 0; red.shared.add.u32 [%r4], 1; ld.shared.u32 %r10, [%r4];", threads=64
    )


# Each block writes its word; the last one to take a ticket reads them all.
LAST_BLOCK = """
    mad.wide.u32 %rd50, %r2, 4, %rd0;
    @%p0 st.global.b32 [%rd50], 5;
    {before}
    @%p0 {atomic} %r10, [%rd1], 1;
    {after}
    setp.ne.u32 %p2, %r10, 7;
    setp.ne.u32 %p3, %r0, 0;
    or.pred %p4, %p2, %p3;
    @%p4 exit;
    ld.global.v4.b32 {{%r11, %r12, %r13, %r14}}, [%rd0];
    ld.global.v4.b32 {{%r15, %r16, %r17, %r18}}, [%rd0+16];
"""


@pytest.mark.parametrize(
    ("before", "atomic", "after", "races"),
    [
        ("", "atom.acq_rel.gpu.global.add.u32", "", False),
        ("membar.gl;", "atom.global.add.u32", "membar.gl;", False),
        ("fence.acq_rel.gpu;", "atom.relaxed.gpu.global.add.u32", "fence.acq_rel.gpu;", False),
        ("membar.gl;", "atom.global.add.u32", "", True),
        ("", "atom.global.add.u32", "membar.gl;", True),
        ("", "atom.release.gpu.global.add.u32", "", True),
        ("membar.cta;", "atom.global.add.u32", "membar.cta;", True),
        ("", "atom.global.add.u32", "", True),
    ],
)
def test_the_last_block_reads_what_all_wrote(before: str, atomic: str, after: str, races: bool):
    body = LAST_BLOCK.format(before=before, atomic=atomic, after=after)
    assert races_of(body, grid=8) == ({READ_AFTER_WRITE} if races else set())


def test_a_release_covers_other_warps_only_after_a_barrier():
    """Warp 1 writes, thread 0 takes the ticket."""
    body = LAST_BLOCK.replace("@%p0 st.global.b32 [%rd50], 5;", "@!%p1 st.global.b32 [%rd50], 5; {barrier}")
    parts = {"before": "", "atomic": "atom.acq_rel.gpu.global.add.u32", "after": ""}
    assert races_of(body.format(barrier="bar.sync 0;", **parts), grid=8, threads=64) == set()
    assert READ_AFTER_WRITE in races_of(body.format(barrier="", **parts), grid=8, threads=64)


@pytest.mark.parametrize(
    ("store", "load", "races"), [("st.release.gpu", "ld.acquire.gpu", False), ("st.relaxed.gpu", "ld.relaxed.gpu", True)]
)
def test_a_flag_between_blocks(store: str, load: str, races: bool):
    body = f"""
        setp.ne.u32 %p2, %r2, 0;
        @%p2 bra $reader;
        @%p0 st.global.b32 [%rd0], 5;
        @%p0 {store}.global.u32 [%rd1], 1;
        bra.uni $end;
    $reader:
        {load}.global.u32 %r10, [%rd1];
        setp.eq.u32 %p3, %r10, 0;
        @%p3 bra $reader;
        ld.global.b32 %r11, [%rd0];
    $end:
    """
    for seed in range(3):
        launch = run(body, words(1), words(1), grid=2, options=Options(seed=seed, interleave=2))
        assert [f.kind for f in launch.findings] == ([GLOBAL + READ_AFTER_WRITE] if races else [])


def test_a_flag_in_shared_memory():
    body = """
        @%p0 st.shared.b32 [%r4+2048], 0;
        bar.sync 0;
        @!%p1 bra $reader;
        st.shared.b32 [%r5], %r0;
        {before}
        @%p0 st.{store}.shared.u32 [%r4+2048], 1;
        bra.uni $end;
    $reader:
        ld.{load}.shared.u32 %r10, [%r4+2048];
        setp.eq.u32 %p3, %r10, 0;
        @%p3 bra $reader;
        {after}
        ld.shared.b32 %r11, [%r5-128];
    $end:
    """
    assert kinds(body.format(before="", after="", store="release.cta", load="acquire.cta"), threads=64) == set()
    assert kinds(body.format(before="membar.cta;", after="membar.cta;", store="volatile", load="volatile"), threads=64) == set()
    assert kinds(body.format(before="", after="", store="volatile", load="volatile"), threads=64) == {SHARED + READ_AFTER_WRITE}


def test_findings_are_counted_once_for_an_instruction():
    (finding,) = run("st.shared.b32 [%r5], %r0; xor.b32 %r10, %r5, 4; ld.shared.b32 %r11, [%r10];", grid=3).findings
    assert finding.count == 96
    assert "lane 0, shared address 1028, the earlier access is by lane 1 of the same warp, without bar.warp.sync" in finding.text
    assert "ld.shared.b32 %r11, [%r10]" in finding.place


def test_a_launch_with_findings_fails_its_check():
    with pytest.raises(
        FindingsError, match=r"(?s)tested, grid \(1,\):\nrace in shared memory: write after write \(31 times\): block 0,0,0"
    ):
        run("st.shared.b32 [%r4], %r0;").check()
    run("st.shared.b32 [%r5], %r0;").check()
