"""shfl, vote, match, redux, elect, activemask: against the formulas of the PTX ISA, lane by lane."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.lanes import kinds, run_lanes

LANES = np.arange(32)
RNG = np.random.default_rng(0)
VALUES = RNG.integers(0, 2**32, 32, dtype=np.uint32)
FLOATS = RNG.standard_normal(32).astype(np.float32)


def result(body: str, *inputs: np.ndarray, outputs: int = 1) -> np.ndarray:
    rows = np.stack([np.asarray(row).astype(np.uint32) if row.dtype != np.float32 else row.view(np.uint32) for row in inputs])
    out, launch = run_lanes(body, rows, outputs)
    assert kinds(launch) == []
    return out if outputs > 1 else out[0]


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """Source lane and predicate, as the PTX ISA's pseudocode has them."""
    b, c_low, segment = b & 31, c & 31, c >> 8 & 31
    most, least = (lane & segment) | (c_low & ~segment), lane & segment
    if mode == "up":
        j, inside = lane - b, lane - b >= most
    elif mode == "down":
        j, inside = lane + b, lane + b <= most
    elif mode == "bfly":
        j, inside = lane ^ b, lane ^ b <= most
        inside = (lane ^ b) <= most
    else:
        j = least | (b & ~segment)
        inside = j <= most
    return (j if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8, 4])
@pytest.mark.parametrize("b", [0, 1, 3, 9, 31])
def test_shuffles(mode: str, width: int, b: int):
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    body = f"shfl.sync.{mode}.b32 %r500|%p1, %r0, {b}, {c}, -1; selp.u32 %r501, 1, 0, %p1;"
    values, inside = result(body, VALUES, outputs=2)
    expected = [shuffled(mode, lane, b, c) for lane in range(32)]
    assert values.tolist() == [VALUES[j] for j, _ in expected]
    assert inside.tolist() == [int(p) for _, p in expected]


def test_a_shuffle_with_an_index_of_each_lane():
    index = RNG.integers(0, 32, 32)
    assert result("shfl.sync.idx.b32 %r500, %r0, %r1, 31, -1;", VALUES, index).tolist() == VALUES[index].tolist()


def test_a_shuffle_in_place():
    assert result("shfl.sync.bfly.b32 %r0, %r0, 1, 31, -1; mov.u32 %r500, %r0;", VALUES).tolist() == VALUES[LANES ^ 1].tolist()


def test_a_shuffle_from_a_lane_that_does_not_take_part():
    body = "mov.u32 %r500, 0; setp.lt.u32 %p1, %r999, 16; @%p1 shfl.sync.idx.b32 %r500, %r0, {}, 31, 0xffff;"
    _, launch = run_lanes(body.format(20), VALUES[None], 1)
    assert kinds(launch) == ["shuffle from a lane that does not take part"]
    assert run_lanes(body.format(15), VALUES[None], 1)[1].findings == []


@pytest.mark.parametrize("threshold", [0, 7, 32])
def test_votes(threshold: int):
    body = f"""
        setp.lt.u32 %p1, %r999, {threshold};
        vote.sync.ballot.b32 %r500, %p1, -1;
        vote.sync.ballot.b32 %r501, !%p1, -1;
        vote.sync.all.pred %p2, %p1, -1; selp.u32 %r502, 1, 0, %p2;
        vote.sync.any.pred %p3, %p1, -1; selp.u32 %r503, 1, 0, %p3;
        vote.sync.uni.pred %p4, %p1, -1; selp.u32 %r504, 1, 0, %p4;
    """
    rows = result(body, LANES, outputs=5)
    ballot = (1 << threshold) - 1
    assert rows[:, 9].tolist() == [
        ballot,
        ballot ^ 0xFFFFFFFF,
        int(threshold == 32),
        int(threshold > 0),
        int(threshold in (0, 32)),
    ]
    assert (rows == rows[:, :1]).all()


def test_a_vote_of_some_lanes():
    body = """
        mov.u32 %r500, 7; setp.ge.u32 %p1, %r999, 8; setp.ne.u32 %p2, %r999, 9;
        @%p1 vote.sync.ballot.b32 %r500, %p2, 0xffffff00;
    """
    assert result(body, LANES).tolist() == [7] * 8 + [0xFFFFFD00] * 24


def test_match():
    keys = np.array([n % 3 for n in range(32)])
    masks = [sum(1 << k for k in range(32) if k % 3 == n % 3) for n in range(32)]
    assert result("match.any.sync.b32 %r500, %r0, -1;", keys).tolist() == masks
    wide = "mov.b64 %rd50, {%r1, %r0}; match.any.sync.b64 %r500, %rd50, -1;"
    assert result(wide, keys, np.full(32, 5)).tolist() == masks
    every = "match.all.sync.b32 %r500|%p1, %r0, -1; selp.u32 %r501, 1, 0, %p1;"
    assert result(every, np.full(32, 4), outputs=2).tolist() == [[0xFFFFFFFF] * 32, [1] * 32]
    assert result(every, keys, outputs=2).tolist() == [[0] * 32, [0] * 32]


@pytest.mark.parametrize(
    ("name", "reduce"),
    [
        ("add.u32", lambda v: int(v.astype(np.uint64).sum()) & 0xFFFFFFFF),
        ("add.s32", lambda v: int(v.astype(np.uint64).sum()) & 0xFFFFFFFF),
        ("min.u32", lambda v: int(v.min())),
        ("max.u32", lambda v: int(v.max())),
        ("min.s32", lambda v: int(v.view(np.int32).min()) & 0xFFFFFFFF),
        ("max.s32", lambda v: int(v.view(np.int32).max()) & 0xFFFFFFFF),
        ("and.b32", lambda v: int(np.bitwise_and.reduce(v))),
        ("or.b32", lambda v: int(np.bitwise_or.reduce(v))),
        ("xor.b32", lambda v: int(np.bitwise_xor.reduce(v))),
    ],
)
def test_redux(name: str, reduce):
    assert result(f"redux.sync.{name} %r500, %r0, -1;", VALUES).tolist() == [reduce(VALUES)] * 32
    some = f"mov.u32 %r500, 0; setp.lt.u32 %p1, %r999, 5; @%p1 redux.sync.{name} %r500, %r0, 31;"
    assert result(some, VALUES).tolist() == [reduce(VALUES[:5])] * 5 + [0] * 27


@pytest.mark.parametrize(("name", "reduce"), [("min", np.nanmin), ("max", np.nanmax)])
def test_redux_of_floats(name: str, reduce):
    values = FLOATS.copy()
    values[3] = np.nan
    body = "mov.b32 %f1, %r0; redux.sync.{}.f32 %f2, %f1, -1; mov.b32 %r500, %f2;"
    assert (result(body.format(name), values).view(np.float32) == reduce(values)).all()
    assert (result(body.format(f"{name}.abs"), values).view(np.float32) == reduce(abs(values))).all()
    assert np.isnan(result(body.format(f"{name}.NaN"), values).view(np.float32)).all()
    assert (result(body.format(f"{name}.abs.NaN"), FLOATS).view(np.float32) == reduce(abs(FLOATS))).all()


def test_elect_and_active_lanes():
    body = """
        mov.u32 %r500, 0; mov.u32 %r501, 0; mov.u32 %r502, 0;
        setp.ge.u32 %p1, %r999, 6;
        @!%p1 bra $end;
        elect.sync %r500|%p2, 0xffffffc0; selp.u32 %r501, 1, 0, %p2;
        activemask.b32 %r502;
    $end:
    """
    leader, elected, active = result(body, LANES, outputs=3)
    assert leader.tolist() == [0] * 6 + [6] * 26
    assert elected.tolist() == [0] * 6 + [1] + [0] * 25
    assert active.tolist() == [0] * 6 + [0xFFFFFFC0] * 26
