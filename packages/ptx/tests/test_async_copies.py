"""cp.async, its groups and waits, mbarriers, and the fence between the two ways to shared memory."""

from __future__ import annotations

import pytest
import torch

from ptx.running.reports import EmulationError, Options
from tests.helpers.programs import kinds, run, words

READ_IN_FLIGHT = "read of shared memory that a copy in flight will write"
WRITE_IN_FLIGHT = "write to shared memory that a copy in flight will write"
NOT_WAITED = "copies in flight at the end, which no instruction waits for"
READ_AFTER_WRITE, WRITE_AFTER_READ, WRITE_AFTER_WRITE = (
    f"race in shared memory: {kind}" for kind in ("read after write", "write after read", "write after write")
)

COPY = "cp.async.ca.shared.global [%r5], [%rd100], 4;"
ROUND = COPY + "cp.async.commit_group; {} ld.shared.b32 %r10, [%r5]; st.global.b32 [%rd101], %r10; cp.async.wait_all;"


def source() -> torch.Tensor:
    return torch.arange(1000, 1064, dtype=torch.int32)


@pytest.mark.parametrize("wait", ["cp.async.wait_group 0;", "cp.async.wait_all;"])
def test_a_copy_has_landed_after_its_wait(wait: str):
    out = words(64)
    assert run(ROUND.format(wait), source(), out, threads=64).findings == []
    assert torch.equal(out, source())


def test_a_copy_is_in_flight_until_its_wait():
    assert kinds(ROUND.format(""), source(), words(64), threads=64) == {READ_IN_FLIGHT}
    assert kinds(ROUND.format("cp.async.wait_group 1;"), source(), words(64), threads=64) == {READ_IN_FLIGHT}
    assert kinds(COPY + "st.shared.b32 [%r5], 3; cp.async.wait_all;", source()) == {WRITE_IN_FLIGHT}
    assert kinds(COPY + "cp.async.wait_all; st.shared.b32 [%r5], 3;", source()) == set()
    out = words(64)
    run(ROUND.format(""), source(), out, threads=64)
    assert not torch.equal(out, source())


def test_the_bytes_next_to_a_copy_are_free():
    assert kinds(COPY + "st.shared.b32 [%r5+2048], 3; ld.shared.b32 %r10, [%r5+2048]; cp.async.wait_all;", source()) == set()


def test_copies_that_nothing_waits_for():
    assert kinds(COPY, source()) == {NOT_WAITED}
    assert kinds(COPY + "cp.async.commit_group;", source()) == {NOT_WAITED}
    assert kinds(COPY + "cp.async.commit_group; cp.async.wait_group 0;", source()) == set()
    assert kinds("cp.async.commit_group;" + COPY + "cp.async.wait_group 0;", source()) == {NOT_WAITED}


def test_groups_are_waited_for_in_their_order():
    first, second = COPY, COPY.replace("%r5", "%r5+2048").replace("%rd100", "%rd100+128")
    body = (
        first
        + "cp.async.commit_group;"
        + second
        + "cp.async.commit_group; cp.async.wait_group 1; ld.shared.b32 %r10, [{}]; cp.async.wait_all;"
    )
    assert kinds(body.format("%r5"), source()) == set()
    assert kinds(body.format("%r5+2048"), source()) == {READ_IN_FLIGHT}


def test_groups_belong_to_lanes():
    """Lanes 0 to 15 commit two groups, the others one: with one group left, the first half's first copy has landed."""
    body = (
        COPY + "cp.async.commit_group; setp.lt.u32 %p2, %r1, 16; @%p2 cp.async.commit_group; cp.async.wait_group 1;"
        "setp.{}.u32 %p3, %r1, 16; @%p3 ld.shared.b32 %r10, [%r5]; cp.async.wait_all;"
    )
    assert kinds(body.format("lt"), source()) == set()
    assert kinds(body.format("ge"), source()) == {READ_IN_FLIGHT}


def test_a_wait_is_of_the_thread_alone():
    """After its wait, the others need a barrier."""
    body = (
        COPY
        + "cp.async.wait_all; {} ld.shared.b32 %r10, [%r4];"
        + "xor.b32 %r11, %r0, 32; mad.lo.u32 %r11, %r11, 4, %r4; ld.shared.b32 %r10, [%r11];"
    )
    assert READ_AFTER_WRITE in kinds(body.format(""), source(), threads=64)
    assert kinds(body.format("bar.sync 0;"), source(), threads=64) == set()


def test_a_copy_over_what_another_warp_reads():
    body = """
        st.shared.b32 [%r5], %r0; bar.sync 0; ld.shared.b32 %r10, [%r4];
        {} @%p0 cp.async.ca.shared.global [%r4], [%rd0], 4; cp.async.wait_all;
    """
    assert WRITE_AFTER_READ in kinds(body.format(""), source(), threads=64)
    assert kinds(body.format("bar.sync 0;"), source(), threads=64) == set()


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("count", [0, 4, None])
def test_sizes_and_zeros_behind_what_is_read(size: int, count: int | None):
    out = torch.full((4,), -1, dtype=torch.int32)
    kind = "cg" if size == 16 else "ca"
    rest = "" if count is None else ", %r20"
    body = f"mov.u32 %r20, {count or 0}; @%p0 cp.async.{kind}.shared.global [%r4], [%rd0], {size}{rest}; cp.async.wait_all;"
    body += "".join(f"@%p0 ld.shared.b32 %r10, [%r4+{at}]; @%p0 st.global.b32 [%rd1+{at}], %r10;" for at in range(0, size, 4))
    assert run(body, source(), out).findings == []
    real = size if count is None else count
    assert out.tolist() == [1000 + n if 4 * n < real else 0 if 4 * n < size else -1 for n in range(4)]


def test_a_copy_of_no_bytes_touches_no_source():
    body = "mov.u32 %r20, {}; @%p0 cp.async.ca.shared.global [%r4], [%rd0+4096], 4, %r20; cp.async.wait_all;"
    assert run(body.format(0), source()).findings == []
    with pytest.raises(EmulationError, match="outside of all arguments"):
        run(body.format(4), source())


@pytest.mark.parametrize(
    ("copy", "message"),
    [
        ("cp.async.cg.shared.global [%r4+8], [%rd0], 16;", "misaligned cp.async of 16 bytes, lane 0"),
        ("cp.async.ca.shared.global [%r4], [%rd0+4], 8;", "misaligned cp.async of 8 bytes, lane 0"),
        ("mov.u32 %r20, 9; cp.async.ca.shared.global [%r4], [%rd0], 8, %r20;", "cp.async reads 9 bytes of 8"),
        ("cp.async.ca.shared.global [%r4+4096], [%rd0], 8;", "outside of shared memory"),
    ],
)
def test_wrong_copies(copy: str, message: str):
    with pytest.raises(EmulationError, match=message):
        run(copy, source())


def test_copies_land_in_random_order():
    """Two copies to one place are reported, and either may win."""
    body = """
        @%p0 cp.async.ca.shared.global [%r4], [%rd0], 4; @%p0 cp.async.ca.shared.global [%r4], [%rd0+4], 4;
        cp.async.wait_all; @%p0 ld.shared.b32 %r10, [%r4]; @%p0 st.global.b32 [%rd1], %r10;
    """
    winners = set()
    for seed in range(12):
        out = words(1)
        launch = run(body, source(), out, options=Options(seed=seed))
        assert [f.kind for f in launch.findings] == [WRITE_IN_FLIGHT]
        winners.add(int(out[0]))
    assert winners == {1000, 1001}


# ---- mbarriers

INIT = "@%p0 mbarrier.init.shared.b64 [%r4], {}; bar.sync 0;"
WAIT = "$wait: mbarrier.try_wait.parity.shared.b64 %p2, [%r4], {}; @!%p2 bra $wait;"
# warp 0 writes 1,024 bytes behind `memory` on, warp 1 waits for the mbarrier, and reads
HAND_ON = """
    {init}
    @!%p1 bra $reader;
    st.shared.b32 [%r5+1024], %r0;
    {arrive}
    bra.uni $end;
$reader:
    {wait}
    ld.shared.b32 %r10, [%r5+896];
    st.global.b32 [%rd100-128], %r10;
$end:
"""
ARRIVE = "mbarrier.arrive.shared.b64 %rd50, [%r4];"


@pytest.mark.parametrize("seed", range(4))
def test_arrivals_are_counted(seed: int):
    out = words(64)
    body = HAND_ON.format(init=INIT.format(32), arrive=ARRIVE, wait=WAIT.format(0))
    assert run(body, out, threads=64, options=Options(seed=seed)).findings == []
    assert out.tolist() == [*range(32), *[0] * 32]


def test_without_a_wait_it_is_a_race():
    init = "st.shared.b32 [%r5+1024], 1000;" + INIT.format(32)
    assert kinds(HAND_ON.format(init=init, arrive=ARRIVE, wait=""), words(64), threads=64) == {READ_AFTER_WRITE, WRITE_AFTER_READ}
    assert kinds(HAND_ON.format(init=init, arrive=ARRIVE, wait=WAIT.format(0)), words(64), threads=64) == set()


def test_a_write_after_the_arrival_is_a_race():
    body = HAND_ON.format(init=INIT.format(32), arrive=ARRIVE + "st.shared.b32 [%r5+1024], 77;", wait=WAIT.format(0))
    assert READ_AFTER_WRITE in kinds(body, words(64), threads=64)


def test_one_arrival_of_several():
    body = HAND_ON.format(
        init=INIT.format(8), arrive="bar.warp.sync -1; @%p0 mbarrier.arrive.shared.b64 %rd50, [%r4], 8;", wait=WAIT.format(0)
    )
    assert kinds(body, words(64), threads=64) == set()


def test_a_phase_that_never_ends_is_a_deadlock():
    body = HAND_ON.format(init=INIT.format(33), arrive=ARRIVE, wait=WAIT.format(0))
    with pytest.raises(EmulationError, match=r"deadlock: warp 1 waits at \[PTX line \d+.*mbarrier\.try_wait"):
        run(body, words(64), threads=64)


def test_phases_follow_each_other():
    """Warp 0 arrives three times; warp 1 waits for each phase and tells so at a second mbarrier."""
    body = """
        @%p0 mbarrier.init.shared.b64 [%r4], 32; @%p0 mbarrier.init.shared.b64 [%r4+8], 32; bar.sync 0;
        mov.u32 %r20, 0;
    $loop:
        and.b32 %r21, %r20, 1;
        @!%p1 bra $reader;
        add.u32 %r22, %r20, %r0; st.shared.b32 [%r5+1024], %r22;
        mbarrier.arrive.shared.b64 %rd50, [%r4];
    $wait0: mbarrier.try_wait.parity.shared.b64 %p2, [%r4+8], %r21; @!%p2 bra $wait0;
        bra.uni $next;
    $reader:
    $wait1: mbarrier.try_wait.parity.shared.b64 %p2, [%r4], %r21; @!%p2 bra $wait1;
        ld.shared.b32 %r10, [%r5+896];
        mbarrier.arrive.shared.b64 %rd50, [%r4+8];
    $next:
        add.u32 %r20, %r20, 1;
        setp.lt.u32 %p3, %r20, 3;
        @%p3 bra $loop;
        @!%p1 st.global.b32 [%rd100], %r10;
    """
    for seed in range(4):
        out = words(64)
        assert run(body, out, threads=64, options=Options(seed=seed)).findings == []
        assert out.tolist() == [0] * 32 + [lane + 2 for lane in range(32)]
    without = body.replace("$wait0: mbarrier.try_wait.parity.shared.b64 %p2, [%r4+8], %r21; @!%p2 bra $wait0;", "")
    assert kinds_or_errors(without)


def kinds_or_errors(body: str) -> set[str]:
    seen: set[str] = set()
    for seed in range(4):
        try:
            seen |= {f.kind for f in run(body, words(64), threads=64, options=Options(seed=seed)).findings}
        except EmulationError as error:
            seen.add(str(error))
    return seen


def test_tokens_and_tests():
    out = words(4)
    body = """
        @%p0 mbarrier.init.shared.b64 [%r4], 2;
        setp.ne.u32 %p9, %r0, 0; @%p9 exit;
        mbarrier.arrive.shared.b64 %rd50, [%r4];
        mbarrier.test_wait.shared.b64 %p2, [%r4], %rd50;
        selp.u32 %r10, 1, 0, %p2; st.global.b32 [%rd0], %r10;
        mbarrier.pending_count.b64 %r10, %rd50; st.global.b32 [%rd0+4], %r10;
        mbarrier.arrive.shared.b64 %rd51, [%r4];
        mbarrier.test_wait.shared.b64 %p2, [%r4], %rd50;
        selp.u32 %r10, 1, 0, %p2; st.global.b32 [%rd0+8], %r10;
        mbarrier.test_wait.parity.shared.b64 %p2, [%r4], 1;
        selp.u32 %r10, 1, 0, %p2; st.global.b32 [%rd0+12], %r10;
        mbarrier.inval.shared.b64 [%r4];
    """
    assert run(body, out).findings == []
    assert out.tolist() == [0, 2, 1, 0]


def test_bytes_of_a_transaction():
    body = """
        @%p0 mbarrier.init.shared.b64 [%r4], 1; bar.sync 0;
        @%p0 mbarrier.arrive.expect_tx.shared.b64 %rd50, [%r4], 64;
        @%p0 mbarrier.complete_tx.shared.b64 [%r4], {};
    """ + WAIT.format(0)
    assert run(body.format(64)).findings == []
    with pytest.raises(EmulationError, match="deadlock"):
        run(body.format(60))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mbarrier.arrive.shared.b64 %rd50, [%r4+64];", "no mbarrier was made at shared address 1088"),
        (INIT.format(1) + "@%p0 mbarrier.arrive.shared.b64 %rd50, [%r4], 2;", "2 arrivals at an mbarrier that expects 1 more"),
        ("@%p0 mbarrier.init.shared.b64 [%r4], 0;", "an mbarrier for 0 arrivals"),
        ("@%p0 mbarrier.init.shared.b64 [%r4+4], 1;", "misaligned access of 8 bytes"),
    ],
)
def test_wrong_mbarriers(body: str, message: str):
    with pytest.raises(EmulationError, match=message):
        run(body)


def test_an_mbarrier_made_twice():
    twice = "@%p0 mbarrier.init.shared.b64 [%r4], 1; {} @%p0 mbarrier.init.shared.b64 [%r4], 1;"
    assert kinds(twice.format("")) == {"mbarrier made over one that is in use"}
    assert kinds(twice.format("@%p0 mbarrier.inval.shared.b64 [%r4];")) == set()


def test_an_mbarrier_needs_a_barrier_behind_its_making():
    body = "@%p0 mbarrier.init.shared.b64 [%r4], 64; {} mbarrier.arrive.shared.b64 %rd50, [%r4];"
    assert kinds(body.format("bar.sync 0;"), threads=64) == set()
    assert kinds(body.format(""), threads=32) == {WRITE_AFTER_WRITE}
    assert kinds(body.format("bar.warp.sync -1;"), threads=32) == set()


@pytest.mark.parametrize("kind", ["", ".noinc"])
@pytest.mark.parametrize("seed", range(3))
def test_an_mbarrier_that_counts_copies(kind: str, seed: int):
    """With .noinc the copies' arrivals are among the expected ones, else they are added."""
    body = f"""
        {INIT.format(32)}
        @!%p1 bra $reader;
        cp.async.ca.shared.global [%r5+1024], [%rd100], 4;
        cp.async.mbarrier.arrive{kind}.shared.b64 [%r4];
        {"" if kind else ARRIVE}
        bra.uni $end;
    $reader:
        {WAIT.format(0)}
        ld.shared.b32 %r10, [%r5+896];
        st.global.b32 [%rd101-128], %r10;
    $end:
    """
    out = words(64)
    assert run(body, source(), out, threads=64, options=Options(seed=seed)).findings == []
    assert out[:32].tolist() == source()[:32].tolist()
    without = body.replace(WAIT.format(0), "")
    assert run(without, source(), words(64), threads=64, options=Options(seed=seed)).findings
