"""cp.async.bulk.tensor on sm_90: which elements a box has, where they lie in shared memory, and what must be reported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ptx.running.reports import EmulationError, Options
from ptx.running.tensor_maps import TensorMap
from tests.helpers.programs import kinds, run, words
from tests.test_wgmma import Layout

BYTES = 4096  # of shared memory for a box; an mbarrier lies behind it
SHARED = BYTES + 1024
READ_IN_FLIGHT = "read of shared memory that a copy in flight will write"
WRITE_IN_FLIGHT = "write to shared memory that a copy in flight will write"
WRITE_UNDER_STORE = "write to shared memory that a bulk copy in flight reads"
NOT_WAITED = "copies in flight at the end, which no instruction waits for"
UNFENCED, UNFENCED_GLOBAL = (
    f"asynchronous access to {space} memory after a write without fence.proxy.async" for space in ("shared", "global")
)
READ_AFTER_WRITE, WRITE_AFTER_READ, WRITE_AFTER_WRITE = (
    f"race in shared memory: {kind}" for kind in ("read after write", "write after read", "write after write")
)
READ_NOTHING = "read of shared memory that was never written"
GLOBAL_RACES = {f"race in global memory: {kind}" for kind in ("read after write", "write after read")}

INIT = f"@%p0 mbarrier.init.shared::cta.b64 [%r4+{BYTES}], 1; bar.sync 0;"
WAIT = f"again: mbarrier.try_wait.parity.shared::cta.b64 %p9, [%r4+{BYTES}], 0; @!%p9 bra again;"
FENCE, BARRIER = "fence.proxy.async.shared::cta;", "bar.sync 0;"
COMMIT, ENDED, READ_ENDED = "cp.async.bulk.commit_group;", "cp.async.bulk.wait_group 0;", "cp.async.bulk.wait_group.read 0;"
HERE = "$"  # a place in a body
READ_ALL = "ld.shared.b32 %r10, [%r5];"


def coordinates(start: tuple[int, ...]) -> str:
    """Of a box, in PTX's order: the innermost first."""
    return "{" + ", ".join(str(n) for n in start[::-1]) + "}"


def load(tensor: TensorMap, start: tuple[int, ...], number: int = 0, space: str = "cta") -> str:
    """Thread 0 has a box brought to `memory`."""
    expected = f"@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4+{BYTES}], {tensor.bytes};"
    opcode = f"cp.async.bulk.tensor.{len(start)}d.shared::{space}.global.mbarrier::complete_tx::bytes"
    return expected + f"@%p0 {opcode} [%r4], [%rd{number}, {coordinates(start)}], [%r4+{BYTES}];"


def store(start: tuple[int, ...], number: int = 0) -> str:
    """Thread 0 has `memory` stored, in two dimensions by cp.async.bulk.tensor.2d.global.shared::cta.bulk_group."""
    opcode = f"cp.async.bulk.tensor.{len(start)}d.global.shared::cta.bulk_group"
    return f"@%p0 {opcode} [%rd{number}, {coordinates(start)}], [%r4];"


def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.arange(1, 1 + int(np.prod(shape))).reshape(shape).to(dtype)


def described(tensor: Tensor, *box: int, **more: Any) -> TensorMap:
    return TensorMap(tensor, tensor.shape, tensor.stride(), box, **more)


def brought(tensor: TensorMap, start: tuple[int, ...], space: str = "cta") -> Tensor:
    """The box's bytes as they lie in shared memory, as 32-bit words."""
    out = words(BYTES // 4)
    body = INIT + load(tensor, start, 1, space) + WAIT
    body += "".join(f"ld.shared.b32 %r10, [%r5+{at}]; st.global.b32 [%rd100+{at}], %r10;" for at in range(0, tensor.bytes, 128))
    assert run(body, out, tensor, shared=SHARED).findings == []
    return out[: tensor.bytes // 4]


def inside(tensor: Tensor, start: tuple[int, ...], box: tuple[int, ...], outside: float = 0) -> Tensor:
    """The box of a tensor, in torch."""
    padded = torch.full([n + 600 for n in tensor.shape] if tensor.ndim < 3 else [n + 20 for n in tensor.shape], outside)
    padded = padded.to(tensor.dtype)
    margin = 300 if tensor.ndim < 3 else 10
    padded[tuple(slice(margin, margin + n) for n in tensor.shape)] = tensor
    return padded[tuple(slice(margin + n, margin + n + size) for n, size in zip(start, box, strict=True))]


BOXES = [
    ((50,), (0,), (32,)),
    ((50,), (40,), (32,)),
    ((50,), (-5,), (32,)),
    ((50,), (90,), (32,)),
    ((10, 12), (0, 0), (8, 8)),
    ((10, 12), (5, 8), (8, 8)),
    ((10, 12), (-3, -1), (16, 32)),
    ((10, 12), (10, 0), (8, 8)),
    ((3, 5, 8), (1, 3, 4), (2, 4, 8)),
    ((2, 3, 5, 8), (1, -1, 3, 0), (1, 2, 4, 8)),
    ((2, 2, 3, 2, 8), (0, 1, 1, 0, 4), (2, 2, 2, 4, 8)),
]


@pytest.mark.parametrize("space", ["cta", "cluster"])
@pytest.mark.parametrize(("shape", "start", "box"), BOXES)
def test_a_load_brings_a_box_and_zeros_outside(shape, start, box, space):
    x = numbers(*shape)
    assert torch.equal(brought(described(x, *box), start, space).reshape(box), inside(x, start, box))


@pytest.mark.parametrize(("shape", "start", "box"), BOXES)
def test_a_store_writes_what_lies_within_the_tensor(shape, start, box):
    x, tensor = torch.full(shape, -1, dtype=torch.int32), described(torch.full(shape, -1, dtype=torch.int32), *box)
    values = numbers(*box)
    body = "".join(f"ld.global.b32 %r10, [%rd101+{at}]; st.shared.b32 [%r5+{at}], %r10;" for at in range(0, tensor.bytes, 128))
    body += FENCE + BARRIER + store(start) + COMMIT + ENDED
    assert run(body, tensor, torch.cat([values.flatten(), words(32)]), shared=SHARED).findings == []
    for at in np.ndindex(*box):
        place = tuple(np.add(start, at))
        if all(0 <= n < size for n, size in zip(place, shape, strict=True)):
            x[place] = values[at]
    assert torch.equal(tensor.base, x)


def test_nan_stands_outside_where_the_map_says_so():
    x = numbers(10, 16, dtype=torch.float16)
    got = brought(described(x, 8, 16, nan=True), (6, 8)).view(torch.float16).reshape(8, 16)
    assert torch.equal(got.isnan(), inside(x, (6, 8), (8, 16)) == 0) and torch.equal(got[:4, :8], x[6:, 8:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_a_swizzled_box_lies_as_products_read_it(swizzle: int, dtype: torch.dtype):
    columns = swizzle // dtype.itemsize
    x = numbers(20, columns, dtype=dtype)
    got = brought(described(x, 16, columns, swizzle=swizzle), (3, 0)).view(dtype)
    layout = Layout(swizzle=swizzle, stride=8 * swizzle)
    for row, column in np.ndindex(16, columns):
        assert got[layout.place(row, column, dtype.itemsize) // dtype.itemsize] == x[3 + row, column]


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_what_a_load_brings_a_store_takes_back(swizzle: int):
    x, out = numbers(20, (swizzle or 64) // 4), torch.zeros(20, (swizzle or 64) // 4, dtype=torch.int32)
    maps = [described(one, 16, x.shape[1], swizzle=swizzle) for one in (x, out)]
    body = INIT + load(maps[0], (0, 0)) + WAIT + BARRIER + store((0, 0), 1) + COMMIT + READ_ENDED
    assert run(body, *maps, shared=SHARED).findings == []
    assert torch.equal(out[:16], x[:16]) and not out[16:].any()


# ---- waits and fences


def tensor(threads: int = 32) -> TensorMap:
    return described(numbers(8, threads), 4, threads)


def test_a_load_has_landed_after_the_wait():
    body = INIT + load(tensor(), (0, 0)) + HERE + READ_ALL + WAIT.replace("again", "at_last")
    assert kinds(body.replace(HERE, WAIT), tensor(), shared=SHARED) == set()
    missing = kinds(body.replace(HERE, ""), tensor(), shared=SHARED)
    assert missing and missing <= {READ_IN_FLIGHT, READ_AFTER_WRITE}
    other_phase = kinds(body.replace(HERE, WAIT.replace(", 0;", ", 1;")), tensor(), shared=SHARED)
    assert other_phase and other_phase <= {READ_IN_FLIGHT, READ_AFTER_WRITE}


def test_another_warp_waits_for_itself_or_at_a_barrier():
    first = "@%p1 bra loads; bra others; loads:" + WAIT + "others:"
    body = INIT + load(tensor(64), (0, 0)) + first + HERE + READ_ALL
    run_with = {"shared": SHARED, "threads": 64}
    assert kinds(body.replace(HERE, BARRIER), tensor(64), **run_with) == set()
    assert READ_IN_FLIGHT in kinds(body.replace(HERE, ""), tensor(64), **run_with)


def test_what_a_load_overwrites_must_have_been_read():
    before = INIT + "st.shared.b32 [%r5], 1; fence.proxy.async.shared::cta; bar.sync 0;"
    before += "xor.b32 %r11, %r0, 32; mad.lo.u32 %r11, %r11, 4, %r4; ld.shared.b32 %r10, [%r11];"
    body = before + HERE + load(tensor(64), (0, 0)) + WAIT
    run_with = {"shared": SHARED, "threads": 64}
    assert kinds(body.replace(HERE, BARRIER), tensor(64), **run_with) == set()
    missing = kinds(body.replace(HERE, ""), tensor(64), **run_with)
    assert missing and missing <= {WRITE_AFTER_READ, READ_IN_FLIGHT, READ_AFTER_WRITE}


def test_a_load_over_what_threads_wrote_needs_a_fence():
    body = INIT + f"st.shared.b32 [%r5], 1; {HERE}" + BARRIER + load(tensor(), (0, 0)) + WAIT
    assert kinds(body.replace(HERE, FENCE), tensor(), shared=SHARED) == set()
    assert kinds(body.replace(HERE, ""), tensor(), shared=SHARED) == {UNFENCED}


def test_threads_may_not_write_under_a_load():
    body = INIT + load(tensor(), (0, 0)) + f"{HERE} st.shared.b32 [%r5], 1;" + WAIT.replace("again", "at_last")
    assert kinds(body.replace(HERE, WAIT + BARRIER), tensor(), shared=SHARED) == set()
    missing = kinds(body.replace(HERE, ""), tensor(), shared=SHARED)
    assert missing and missing <= {WRITE_IN_FLIGHT, WRITE_AFTER_WRITE}


def test_nobody_waits_for_a_load():
    body = INIT + load(tensor(), (0, 0)) + HERE
    assert kinds(body.replace(HERE, WAIT), tensor(), shared=SHARED) == set()
    assert kinds(body.replace(HERE, ""), tensor(), shared=SHARED) == {NOT_WAITED}
    ends = f"bar.sync 0; @%p0 mbarrier.inval.shared::cta.b64 [%r4+{BYTES}];"
    assert kinds(body.replace(HERE, WAIT + ends), tensor(), shared=SHARED) == set()


WRITE = "st.shared.b32 [%r5], 5;"


@pytest.mark.parametrize(
    ("missing", "expected"), [("", set()), (FENCE, {UNFENCED}), (COMMIT, {NOT_WAITED}), (ENDED, {NOT_WAITED})]
)
def test_a_store_follows_a_fence_and_is_waited_for(missing: str, expected: set[str]):
    x = described(words(64).reshape(1, 64), 1, 64)
    body = (WRITE + FENCE + BARRIER + store((0, 0)) + COMMIT + ENDED).replace(missing, "", 1 if missing else 0)
    assert kinds(body, x, shared=SHARED, threads=64) == expected


def test_a_store_of_what_other_warps_write_follows_a_barrier():
    x = described(words(64).reshape(1, 64), 1, 64)
    body = WRITE + FENCE + store((0, 0)) + COMMIT + ENDED
    missing = kinds(body, x, shared=SHARED, threads=64)
    assert missing and missing <= {READ_AFTER_WRITE, UNFENCED, READ_NOTHING, WRITE_AFTER_READ, WRITE_UNDER_STORE}


def test_shared_memory_is_free_after_the_wait_for_reads():
    body = WRITE + FENCE + BARRIER + store((0, 0)) + COMMIT + HERE + BARRIER + "st.shared.b32 [%r5], 6;" + ENDED
    for wait in (READ_ENDED, ENDED):
        x = described(words(32).reshape(1, 32), 1, 32)
        assert kinds(body.replace(HERE, wait), x, shared=SHARED) == set()
        run(body.replace(HERE, wait), x, shared=SHARED)
        assert (x.base == 5).all()
    missing = kinds(body.replace(HERE, ""), x, shared=SHARED)
    assert missing and missing <= {WRITE_UNDER_STORE, WRITE_AFTER_READ}
    earlier = kinds(body.replace(HERE, "cp.async.bulk.wait_group.read 1;"), x, shared=SHARED)
    assert earlier and earlier <= {WRITE_UNDER_STORE, WRITE_AFTER_READ}


def test_what_a_store_writes_may_be_read_after_the_wait_for_its_end():
    body = WRITE + FENCE + BARRIER + store((0, 0)) + COMMIT + HERE + BARRIER + "ld.global.b32 %r10, [%rd101];" + ENDED
    for wait, expected in ((ENDED, set()), (READ_ENDED, GLOBAL_RACES), ("", GLOBAL_RACES)):
        for seed in range(4):
            out = words(32)
            maps = described(out.reshape(1, 32), 1, 32), out
            found = run(body.replace(HERE, wait), *maps, shared=SHARED, options=Options(seed=seed)).findings
            assert {finding.kind for finding in found} <= expected and bool(found) == bool(expected)


def test_a_load_of_what_threads_wrote_needs_a_fence():
    out = words(32)
    maps = described(out.reshape(1, 32), 1, 32), out
    body = INIT + f"st.global.b32 [%rd101], 7; {HERE}" + BARRIER + load(maps[0], (0, 0)) + WAIT
    assert run(body.replace(HERE, "fence.proxy.async;"), *maps, shared=SHARED).findings == []
    assert {finding.kind for finding in run(body.replace(HERE, ""), *maps, shared=SHARED).findings} == {UNFENCED_GLOBAL}


def test_blocks_that_store_to_the_same_place_race():
    write = "add.u32 %r10, %r2, 5; st.shared.b32 [%r5], %r10;"
    body = write + FENCE + BARRIER + store((0, 0)) + COMMIT + ENDED
    x = described(words(32).reshape(1, 32), 1, 32)
    found = {finding.kind for finding in run(body, x, shared=SHARED, grid=2).findings}
    assert found == {"race in global memory: write after write"}


# ---- refusals


def test_errors_name_the_copy():
    x = described(numbers(8, 32), 4, 32)
    body = INIT + load(x, (0, 0)) + WAIT
    for before, after, message in (
        ("[%r4], [%rd0", "[%r4+16], [%rd0", "must lie at a multiple of 128 in shared memory"),
        ("{0, 0}", "{0, 0, 0}", "a copy in 3 dimensions of a tensor that has 2"),
        (f"[%r4+{BYTES}];" + WAIT, "[%r4+8];" + WAIT, "no mbarrier was made at shared address"),
        ("[%rd0,", "[%rd0+64,", "parameters"),
    ):
        assert before in body
        with pytest.raises(EmulationError, match=message):
            run(body.replace(before, after), x, shared=SHARED)
    with pytest.raises(EmulationError, match="no tensor map lies at address"):
        run(body, torch.zeros(64), shared=SHARED)
    beyond = TensorMap(x.base, (9, 32), (32, 1), (4, 32))
    with pytest.raises(EmulationError, match=r"tensor 0 has 1024 bytes(.|\n)*cp\.async\.bulk\.tensor"):
        run(INIT + load(beyond, (8, 0)) + WAIT, beyond, shared=SHARED)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"box": (4,)}, "one to five dimensions"),
        ({"shape": (0, 32)}, "shape is positive"),
        ({"box": (4, 512)}, "1 to 256 elements"),
        ({"base": numbers(300)[1:]}, "base address is a multiple of 16"),
        ({"strides": (32, 2)}, "last stride is 1"),
        ({"strides": (33, 1)}, "multiples of 16 bytes"),
        ({"box": (4, 6)}, "multiple of 16 bytes"),
        ({"swizzle": 16}, "swizzle is one of"),
        ({"swizzle": 64}, "as many bytes as the swizzle"),
    ],
)
def test_maps_follow_the_rules_of_the_driver(changes: dict[str, Any], rule: str):
    arguments: dict[str, Any] = {"base": numbers(8, 32), "shape": (8, 32), "strides": (32, 1), "box": (4, 32)}
    TensorMap(**arguments)
    with pytest.raises(ValueError, match=rule):
        TensorMap(**arguments | changes)
