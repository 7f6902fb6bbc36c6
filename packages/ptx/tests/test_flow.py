"""Blocks, where lanes meet again, and which registers may share a place."""

from __future__ import annotations

import random

import pytest
import torch

from ptx.reading.flow import Flow
from ptx.reading.reader import Module
from ptx.reading.translate import read_kernel
from ptx.running.launch import launch
from ptx.running.memory import Memory
from ptx.running.program import Program
from ptx.running.reports import Options

HEAD = ".version 8.7\n.target sm_80\n.address_size 64\n"


def flow(body: str) -> Flow:
    registers = ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .b64 %rd<9>; .reg .b128 %w<9>;"
    return Flow(read_kernel(Module(f"{HEAD}.visible .entry k()\n{{\n{registers}\n{body}\n}}\n")))


def place(kernel_flow: Flow, label: str) -> int:
    return kernel_flow.kernel.labels[label]


DIAMOND = """
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra left;
    mov.u32 %r2, 1;
    bra.uni join;
left:
    mov.u32 %r2, 2;
join:
    add.u32 %r3, %r2, 1;
    ret;
"""


def test_blocks_end_at_branches_and_start_at_labels():
    f = flow(DIAMOND)
    assert [(block.start, block.end) for block in f.blocks] == [(0, 2), (2, 4), (4, 5), (5, 7), (7, 8)]
    assert [block.successors for block in f.blocks] == [[1, 2], [3], [3], [5], [5]]
    assert f.blocks[3].predecessors == [1, 2]


def test_both_sides_of_a_branch_meet_behind_it():
    f = flow(DIAMOND)
    assert f.reconverge()[1] == place(f, "join")


def test_a_loop_meets_behind_its_end():
    f = flow("mov.u32 %r1, 0; loop: add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 9; @%p1 bra loop; mov.u32 %r2, %r1; ret;")
    assert f.reconverge()[3] == 4


def test_lanes_that_leave_the_kernel_on_one_side_meet_at_its_end():
    f = flow("setp.eq.u32 %p1, %r1, 0; @%p1 bra done; mov.u32 %r2, 1; ret; done: mov.u32 %r3, 1; ret;")
    assert f.reconverge()[1] == -1


def test_a_predicated_exit_is_no_end_of_its_block():
    f = flow("setp.eq.u32 %p1, %r1, 0; @%p1 exit; mov.u32 %r2, 1; ret;")
    assert f.blocks[0].successors == [1, f.exit]


def test_a_loop_without_an_end_meets_nowhere():
    f = flow("loop: add.u32 %r1, %r1, 1; setp.eq.u32 %p1, %r1, 0; @%p1 bra loop; bra.uni loop;")
    assert f.reconverge()[2] == -1


def by_paths(f: Flow, block: int) -> int:
    """The immediate post-dominator by its definition: the nearest block on all paths to the end."""

    def reaches_end_without(start: int, avoided: int) -> bool:
        seen, waiting = set(), [start]
        while waiting:
            one = waiting.pop()
            if one == f.exit:
                return True
            if one not in seen and one != avoided:
                seen.add(one)
                waiting += f.blocks[one].successors
        return False

    if not reaches_end_without(block, -1):
        return -1
    after = [one for one in range(f.exit) if one != block and not reaches_end_without(block, one)]
    nearest = [one for one in after if all(one == two or not reaches_end_without(one, two) for two in after)]
    return nearest[0] if nearest else f.exit


@pytest.mark.parametrize("seed", range(30))
def test_post_dominators_of_random_graphs(seed: int):
    draws = random.Random(seed)
    count = draws.randrange(3, 14)
    text = ""
    for n in range(count):
        text += f"l{n}: setp.eq.u32 %p1, %r{n}, 0;\n"
        kind = draws.random()
        target = draws.randrange(count)
        if kind < 0.6:
            text += f"@%p1 bra l{target};\n"
        elif kind < 0.75:
            text += f"bra l{target};\n"
        elif kind < 0.9:
            text += "@%p1 exit;\n"
    f = flow(text + "ret;")
    assert f.post_dominators == [by_paths(f, block) for block in range(f.exit)]


def shared(f: Flow, one: str, two: str) -> bool:
    places, _ = f.slots()
    return places[one] == places[two]


def test_registers_that_do_not_live_at_once_share_a_place():
    f = flow("mov.u32 %r1, 1; add.u32 %r2, %r1, 1; add.u32 %r3, %r2, 1; add.u32 %r4, %r3, 1; ret;")
    assert shared(f, "%r1", "%r3")
    assert not shared(f, "%r1", "%r2")


def test_a_register_lives_around_the_loop_that_reads_it():
    f = flow(
        "mov.u32 %r1, 1; mov.u32 %r2, 0; "
        "loop: add.u32 %r2, %r2, %r1; mov.u32 %r3, %r2; setp.lt.u32 %p1, %r3, 9; @%p1 bra loop; ret;"
    )
    assert not shared(f, "%r1", "%r3")
    assert not shared(f, "%r2", "%r3")


def test_a_predicated_write_keeps_the_value_from_before():
    f = flow(
        "mov.u32 %r1, 1; setp.eq.u32 %p1, %r9, 0; "
        "loop: @%p1 mov.u32 %r1, 2; add.u32 %r2, %r1, 1; mov.u32 %r3, %r2; @%p1 bra loop; ret;"
    )
    assert f.intervals({})["%r1"] == (0, 5)
    assert not shared(f, "%r1", "%r3")


def test_a_value_that_other_lanes_wait_with_keeps_its_place():
    """%r1 is read at the end alone: neither side of the branch may take its place, while the other side's lanes wait."""
    f = flow(
        DIAMOND.replace("setp.eq", "mov.u32 %r1, 5; mov.u32 %r7, 7; setp.eq").replace(
            "add.u32 %r3, %r2, 1", "add.u32 %r3, %r7, %r2"
        )
    )
    assert not shared(f, "%r7", "%r2")


def test_held_registers_live_on():
    body = "mov.u32 %r1, 1; mov.u32 %r2, %r1; mov.u32 %r3, 3; mov.u32 %r4, %r3; ret;"
    assert flow(body).intervals({})["%r1"] == (0, 1)
    assert flow(body).intervals({3: ["%r1"]})["%r1"] == (0, 3)


def test_places_are_aligned_and_as_wide_as_the_register():
    f = flow(
        "mov.u64 %rd1, 1; mov.b128 %w1, {%rd1, %rd1}; setp.eq.u64 %p1, %rd1, 1; "
        "cvt.u16.u64 %h1, %rd1; mov.b128 {%rd2, %rd3}, %w1; @%p1 mov.b16 %h2, %h1; ret;"
    )
    places, size = f.slots()
    widths = {"%rd": 256, "%w": 512, "%p": 4, "%h": 128}
    intervals = f.intervals({})
    taken = {name: range(at, at + widths[name.rstrip("0123456789")]) for name, at in places.items()}
    for one, where in taken.items():
        assert where.start % min(len(where), 128) == 0 and where.stop <= size
        for two, there in taken.items():
            together = intervals[one][0] <= intervals[two][1] and intervals[two][0] <= intervals[one][1]
            if one != two and together:
                assert where.stop <= there.start or there.stop <= where.start, (one, two)


@pytest.mark.parametrize("seed", range(8))
def test_random_programs_give_what_python_gives(seed: int):
    """Branches by lane over few registers that are written and read at random: a place that is shared too early shows."""
    draws = random.Random(seed)
    lines, model = [], []
    for n in range(40):
        bit, target, a, b = 1 << draws.randrange(5), draws.randrange(12), draws.randrange(12), draws.randrange(12)
        predicated, jumps = draws.random() < 0.3, draws.random() < 0.3
        lines.append(f"and.b32 %r20, %r0, {bit}; setp.ne.u32 %p1, %r20, 0;")
        if jumps:
            lines.append(f"@%p1 bra after{n};")
        lines.append(f"{'@!%p1 ' if predicated else ''}mad.lo.u32 %v{target}, %v{a}, 3, %v{b};")
        if jumps:
            lines.append(f"after{n}:")
        model.append((bit, jumps or predicated, target, a, b))
    registers = "".join(f"add.u32 %v{k}, %r0, {k};" for k in range(12))
    stores = "".join(f"st.global.u32 [%rd2+{4 * k}], %v{k};" for k in range(12))
    text = f"""{HEAD}.visible .entry k(.param .u64 out)
{{
.reg .pred %p<3>; .reg .b32 %r<30>; .reg .b32 %v<12>; .reg .b64 %rd<4>;
mov.u32 %r0, %tid.x; {registers}
{chr(10).join(lines)}
ld.param.u64 %rd1, [out]; mad.wide.u32 %rd2, %r0, 48, %rd1; {stores} ret;
}}"""
    out = torch.zeros(32, 12, dtype=torch.int32)
    memory = Memory()
    launch(Program(text), [memory.place(out, "out")], (1,), (32,), 0, memory, Options(seed=seed))
    memory.back()
    for lane, row in enumerate(out.tolist()):
        values = [lane + k for k in range(12)]
        for bit, skips, target, a, b in model:
            if not (skips and lane & bit):
                values[target] = (3 * values[a] + values[b]) % (1 << 32)
        assert [value % (1 << 32) for value in row] == values
