"""Warps and lanes: where lanes part and meet, barriers, waits for lanes, deadlocks, special registers."""

from __future__ import annotations

import pytest

from ptx.running.reports import EmulationError, Options
from tests.helpers.programs import run, words

STORE = "st.global.b32 [%rd100], %r10;"
SEEDS = range(6)


def results(body: str, *, seed: int = 0, threads: int = 32, **options: bool) -> list[int]:
    out = words(threads)
    launch = run(body + STORE, out, threads=threads, options=Options(seed=seed, **options))
    assert launch.findings == []
    return out.tolist()


def test_both_sides_of_a_branch_meet_again():
    body = """
        setp.lt.u32 %p2, %r1, 10;
        @%p2 bra $less;
        mov.u32 %r10, 200;
        bra.uni $end;
    $less:
        mov.u32 %r10, 100;
    $end:
        activemask.b32 %r11;
        xor.b32 %r11, %r11, -1;
        add.u32 %r10, %r10, %r11;
    """
    for seed in SEEDS:
        assert results(body, seed=seed) == [100] * 10 + [200] * 22


def test_loops_of_different_lengths_meet_behind_the_loop():
    body = """
        mov.u32 %r10, 0;
    $loop:
        add.u32 %r10, %r10, 1;
        setp.lt.u32 %p2, %r10, %r1;
        @%p2 bra $loop;
        activemask.b32 %r11;
        setp.ne.u32 %p3, %r11, -1;
        @%p3 mov.u32 %r10, 99;
    """
    for seed in SEEDS:
        assert results(body, seed=seed) == [max(lane, 1) for lane in range(32)]


def test_nested_branches_meet_inside_first():
    body = """
        and.b32 %r12, %r1, 1;
        setp.eq.u32 %p2, %r12, 0;
        mov.u32 %r10, 0;
        @%p2 bra $outside;
        and.b32 %r13, %r1, 2;
        setp.eq.u32 %p3, %r13, 0;
        @%p3 bra $inside;
        add.u32 %r10, %r10, 1;
    $inside:
        activemask.b32 %r10;
    $outside:
        activemask.b32 %r11;
        setp.ne.u32 %p4, %r11, -1;
        @%p4 trap;
    """
    for seed in SEEDS:
        assert results(body, seed=seed) == [0 if lane % 2 == 0 else 0xAAAAAAAA - 2**32 for lane in range(32)]


def test_indirect_branch():
    body = """
        and.b32 %r11, %r1, 3;
        $targets: .branchtargets $a, $b, $c;
        min.u32 %r11, %r11, 2;
        brx.idx %r11, $targets;
    $a: mov.u32 %r10, 7; bra.uni $end;
    $b: mov.u32 %r10, 8; bra.uni $end;
    $c: mov.u32 %r10, 9;
    $end:
    """
    for seed in SEEDS:
        assert results(body, seed=seed) == [7, 8, 9, 9] * 8


def test_some_lanes_end_and_the_rest_go_on():
    out = words(32)
    body = """
        setp.lt.u32 %p2, %r1, 4;
        @%p2 exit;
        activemask.b32 %r10;
        st.global.b32 [%rd100], %r10;
    """
    run(body, out)
    assert out.tolist() == [0] * 4 + [0xFFFFFFF0 - 2**32] * 28


def test_an_end_within_a_branch_frees_the_lanes_that_wait_behind_it():
    body = """
        setp.lt.u32 %p2, %r1, 4;
        @!%p2 bra $end;
        exit;
    $end:
        activemask.b32 %r10;
        st.global.b32 [%rd100], %r10;
    """
    for seed in SEEDS:
        out = words(32)
        run(body, out, options=Options(seed=seed))
        assert out.tolist() == [0] * 4 + [0xFFFFFFF0 - 2**32] * 28


def test_a_shuffle_waits_for_the_lanes_of_its_mask():
    """Two branches, each with lanes of its mask: the lanes of one side are gathered, the others left alone."""
    body = """
        and.b32 %r12, %r1, 1;
        setp.eq.u32 %p2, %r12, 0;
        @%p2 bra $even;
        shfl.sync.bfly.b32 %r10, %r1, 2, 31, 0xaaaaaaaa;
        bra.uni $end;
    $even:
        shfl.sync.bfly.b32 %r10, %r1, 4, 31, 0x55555555;
    $end:
    """
    for seed in SEEDS:
        assert results(body, seed=seed) == [lane ^ 2 if lane % 2 else lane ^ 4 for lane in range(32)]


def test_a_missing_lane_is_a_deadlock():
    body = """
        setp.lt.u32 %p2, %r1, 16;
        @!%p2 bra $end;
        shfl.sync.idx.b32 %r10, %r1, 0, 31, -1;
    $end:
    """
    with pytest.raises(
        EmulationError, match=r"deadlock: warp 0 lanes 0xffff waits for lanes of its warp at \[PTX line \d+.*shfl\.sync"
    ):
        results(body)


def test_a_predicate_may_not_exclude_lanes_of_the_mask():
    body = "setp.lt.u32 %p2, %r1, 16; @%p2 shfl.sync.idx.b32 %r10, %r1, 0, 31, -1;"
    with pytest.raises(EmulationError, match="lanes 0xffff0000 must execute this instruction, too"):
        results(body)
    assert results("mov.u32 %r10, 1; " + body.replace("-1;", "0xffff;"))[:17] == [0] * 16 + [1]


def test_a_lane_outside_of_its_mask():
    with pytest.raises(EmulationError, match="lane 0 is not in its member mask 0xfffffffe"):
        results("shfl.sync.idx.b32 %r10, %r1, 0, 31, 0xfffffffe;")


def test_lanes_meet_at_different_warp_barriers():
    body = """
        setp.lt.u32 %p2, %r1, 16;
        @%p2 bra $low;
        bar.warp.sync -1;
        mov.u32 %r10, 2;
        bra.uni $end;
    $low:
        bar.warp.sync -1;
        mov.u32 %r10, 1;
    $end:
    """
    for seed in SEEDS:
        assert results(body, seed=seed) == [1] * 16 + [2] * 16


def test_lanes_that_end_count_no_more():
    out = words(32)
    body = "setp.lt.u32 %p2, %r1, 16; @%p2 exit; bar.warp.sync -1; shfl.sync.idx.b32 %r10, %r1, 20, 31, -1;" + STORE
    assert run(body, out).findings == []
    assert out.tolist() == [0] * 16 + [20] * 16


# ---- barriers

HAND_ON = """
    st.shared.b32 [%r5], %r0;
    {barrier}
    xor.b32 %r11, %r0, 96;
    mad.lo.u32 %r12, %r11, 4, %r4;
    ld.shared.b32 %r10, [%r12];
"""


@pytest.mark.parametrize(
    "barrier", ["bar.sync 0;", "barrier.sync 3;", "barrier.sync.aligned 1, 128;", "mov.u32 %r20, 5; bar.sync %r20, 128;"]
)
def test_barriers(barrier: str):
    for seed in SEEDS:
        assert results(HAND_ON.format(barrier=barrier), threads=128, seed=seed) == [n ^ 96 for n in range(128)]


def test_a_barrier_for_some_warps():
    """Warps 0 and 1 meet at barrier 1, warps 2 and 3 at barrier 2."""
    body = HAND_ON.format(barrier="shr.u32 %r20, %r3, 1; add.u32 %r20, %r20, 1; bar.sync %r20, 64;").replace("96", "32")
    for seed in SEEDS:
        assert results(body, threads=128, seed=seed) == [n ^ 32 for n in range(128)]


def test_arrive_does_not_wait():
    """Warp 1 writes and goes on; warp 0 waits for it, and reads."""
    body = """
        mov.u32 %r10, 5;
        @%p1 bra $reader;
        st.shared.b32 [%r5], %r0;
        bar.arrive 1, 64;
        bra.uni $end;
    $reader:
        bar.sync 1, 64;
        ld.shared.b32 %r10, [%r5+128];
    $end:
    """
    for seed in SEEDS:
        assert results(body, threads=64, seed=seed) == [*range(32, 64), *[5] * 32]


def test_barrier_with_a_reduction():
    body = """
        setp.lt.u32 %p2, %r0, 40;
        bar.red.popc.u32 %r10, 0, %p2;
        bar.red.and.pred %p3, 0, %p2;
        bar.red.or.pred %p4, 0, !%p2;
        @%p3 add.u32 %r10, %r10, 1000;
        @%p4 add.u32 %r10, %r10, 2000;
    """
    for seed in SEEDS:
        assert results(body, threads=64, seed=seed) == [2040] * 64


def test_a_warp_that_ends_counts_no_more_at_a_barrier():
    out = words(64)
    run("@!%p1 exit; bar.sync 0; mov.u32 %r10, 3;" + STORE, out, threads=64)
    assert out.tolist() == [3] * 32 + [0] * 32


def test_a_missing_warp_is_a_deadlock():
    with pytest.raises(EmulationError, match=r"deadlock: warp 0 waits for barrier 1 at \[PTX line \d+.*bar\.sync 1, 64;\]"):
        results("@%p1 bar.sync 1, 64; mov.u32 %r10, 0;", threads=64)


def test_warps_at_two_barriers_wait_for_each_other():
    body = "mov.u32 %r10, 0; @%p1 bra $a; bar.sync 1; bra.uni $b; $a: bar.sync 2; $b:"
    with pytest.raises(EmulationError) as error:
        results(body, threads=64)
    assert "warp 0 waits for barrier 2" in str(error.value) and "warp 1 waits for barrier 1" in str(error.value)


@pytest.mark.parametrize(
    ("barrier", "message"),
    [
        ("bar.sync 16;", "barrier 16: there are 16"),
        ("bar.sync 1, 48;", "barrier for 48 threads: not a multiple of 32"),
        ("@%p1 bar.sync 1, 64; @!%p1 bar.sync 1, 96;", "barrier 1 for (64|96) threads, where others came for (64|96)"),
        ("bar.sync %r0;", "the number of a barrier differs between lanes"),
        ("setp.lt.u32 %p2, %r1, 3; @%p2 bar.sync 0;", "must execute this instruction, too"),
    ],
)
def test_wrong_barriers(barrier: str, message: str):
    with pytest.raises(EmulationError, match=message):
        results(barrier + "mov.u32 %r10, 0;", threads=64)


def test_lanes_that_parted_meet_at_an_unaligned_barrier():
    body = """
        setp.lt.u32 %p2, %r1, 7;
        @%p2 bra $low;
        barrier.sync 0;
        mov.u32 %r10, 2;
        bra.uni $end;
    $low:
        barrier.sync 0;
        mov.u32 %r10, 1;
    $end:
    """
    for seed in SEEDS:
        assert results(body, seed=seed, threads=64) == ([1] * 7 + [2] * 25) * 2


# ---- the whole launch


def test_trap_and_limit():
    with pytest.raises(EmulationError, match=r"block 0,0,0 warp 0: trap\n    PTX line \d+.*trap;"):
        run("trap;")
    with pytest.raises(EmulationError, match="the limit of 1000 instructions"):
        run("$again: bra.uni $again;", options=Options(limit=1000))


@pytest.mark.parametrize("options", [Options(), Options(interleave=True), Options(interleave=7, seed=3), Options(in_order=True)])
def test_every_block_runs_once(options: Options):
    out = words(20)
    body = "mad.wide.u32 %rd50, %r2, 4, %rd0; @%p0 red.global.add.u32 [%rd50], 1;"
    launch = run(body, out, grid=20, threads=64, options=options)
    assert out.tolist() == [1] * 20
    assert launch.findings == []


def test_sample():
    out = words(50)
    run("mad.wide.u32 %rd50, %r2, 4, %rd0; @%p0 st.global.b32 [%rd50], 1;", out, grid=50, options=Options(sample=8))
    assert out.sum() == 8


def test_order_of_blocks_and_warps_changes_with_the_seed():
    """Each warp takes a ticket: in order 0, 1, 2, …; else an order of its own for each seed."""
    body = """
        mad.lo.u32 %r20, %r2, 4, %r3; mad.wide.u32 %rd50, %r20, 4, %rd1; setp.eq.u32 %p2, %r1, 0;
        @%p2 atom.global.add.u32 %r10, [%rd0], 1; @%p2 st.global.b32 [%rd50], %r10;
    """

    def tickets(**options: int) -> tuple[int, ...]:
        out = words(32)
        run(body, words(1), out, grid=8, threads=128, options=Options(**options))
        assert sorted(out.tolist()) == list(range(32))
        return tuple(out.tolist())

    assert tickets(in_order=True) == tuple(range(32))
    assert len({tickets(seed=seed) for seed in range(5)}) == 5
    assert tickets(seed=3) == tickets(seed=3)


def test_special_registers():
    names = [
        "tid.x",
        "tid.y",
        "tid.z",
        "ntid.x",
        "ntid.z",
        "ctaid.y",
        "nctaid.x",
        "laneid",
        "warpid",
        "nwarpid",
        "lanemask_lt",
        "lanemask_ge",
        "lanemask_eq",
    ]
    body = "".join(f"mov.u32 %r10, %{name}; st.global.b32 [%rd100+{256 * k}], %r10;" for k, name in enumerate(names))
    out = words(64 * len(names))
    run(body, out, threads=64)
    rows = dict(zip(names, out.view(len(names), 64).tolist(), strict=True))
    assert rows["tid.x"] == list(range(64))
    assert rows["laneid"] == list(range(32)) * 2
    assert rows["warpid"] == [0] * 32 + [1] * 32
    assert [rows[name][5] for name in ("tid.y", "tid.z", "ntid.x", "ntid.z", "ctaid.y", "nctaid.x", "nwarpid")] == [
        0,
        0,
        64,
        1,
        0,
        1,
        2,
    ]
    assert [rows[name][37] for name in ("lanemask_lt", "lanemask_ge", "lanemask_eq")] == [31, -32, 32]


def test_a_clock_goes_on():
    assert all(n > 0 for n in results("mov.u32 %r11, %clock; mov.u32 %r12, %clock; sub.u32 %r10, %r12, %r11;"))


def test_a_block_that_no_multiple_of_32_fills():
    body = "bar.sync 0; activemask.b32 %r10;"
    assert results(body, threads=40) == [-1] * 32 + [255] * 8


def test_counts():
    launch = run("bar.sync 0; @%p0 st.global.b32 [%rd0], 1;", words(1), threads=64, options=Options(counts=True))
    assert (launch.counts["barrier"], launch.lanes["barrier"]) == (2, 64)
    assert (launch.counts["st.global"], launch.lanes["st.global"]) == (2, 1)
    assert launch.executed == sum(launch.counts.values())
