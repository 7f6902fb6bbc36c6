"""Blocks of a kernel, where the lanes of a branch meet again, and a place in the register file for each register."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ptx.reading.reader import Instruction, Kernel, Label

LANES = 32
ENDS = ("EXIT", "TRAP")


@dataclass
class Block:
    start: int
    end: int  # after its last instruction
    successors: list[int] = field(default_factory=list)  # numbers of blocks; EXIT is the number of blocks
    predecessors: list[int] = field(default_factory=list)


class Flow:
    """`blocks`, `reconverge` and, from `slots`, the places of registers."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.instructions = kernel, kernel.instructions
        self.blocks = self._split()
        self.exit = len(self.blocks)

    def targets(self, instruction: Instruction) -> list[int]:
        labels = next((value for value in instruction.values if isinstance(value, Label)), None)
        return [self.kernel.labels[name] for name in labels.names] if labels else []

    def _split(self) -> list[Block]:
        count = len(self.instructions)
        starts = {0}
        for number, one in enumerate(self.instructions):
            if one.opcode.row.control in ("BRANCH", "INDIRECT", *ENDS):
                starts |= {number + 1, *self.targets(one)}
        ordered = sorted(start for start in starts if start < count)
        blocks = [Block(start, end) for start, end in zip(ordered, [*ordered[1:], count], strict=True)]
        number_at = {block.start: number for number, block in enumerate(blocks)}
        for number, block in enumerate(blocks):
            last = self.instructions[block.end - 1]
            control = last.opcode.row.control
            after = {number_at.get(target, len(blocks)) for target in self.targets(last)}
            if control in ENDS:
                after.add(len(blocks))
            if control not in ("BRANCH", "INDIRECT", *ENDS) or last.predicate:
                after.add(number + 1)
            block.successors = sorted(after)
            for successor in after:
                if successor < len(blocks):
                    blocks[successor].predecessors.append(number)
        return blocks

    # ---- where lanes meet again

    @cached_property
    def post_dominators(self) -> list[int]:
        """The immediate post-dominator of each block: the exit's number where there is none before it, -1 where none is reached.

        The method is that of Cooper, Harvey and Kennedy on the reversed graph.
        """
        backward = self._backward_order()
        rank = {block: place for place, block in enumerate(backward)}
        nearest = {self.exit: self.exit}
        changed = True
        while changed:
            changed = False
            for block in backward[1:]:
                common = -1
                for successor in self.blocks[block].successors:
                    if successor in nearest:
                        common = successor if common < 0 else _common(nearest, rank, common, successor)
                if nearest.get(block) != common:
                    nearest[block], changed = common, True
        return [nearest.get(block, -1) for block in range(self.exit)]

    def _backward_order(self) -> list[int]:
        """The exit and all blocks from which it is reached, each after a successor (reverse postorder of the reversed graph)."""
        into: dict[int, list[int]] = {self.exit: [n for n, block in enumerate(self.blocks) if self.exit in block.successors]}
        into |= {number: block.predecessors for number, block in enumerate(self.blocks)}
        order, visited, stack = [], {self.exit}, [(self.exit, iter(into[self.exit]))]
        while stack:
            block, rest = stack[-1]
            for before in rest:
                if before not in visited:
                    visited.add(before)
                    stack.append((before, iter(into[before])))
                    break
            else:
                order.append(block)
                stack.pop()
        return order[::-1]

    def reconverge(self) -> dict[int, int]:
        """Of each branch that lanes may leave both ways, the instruction where they meet again; -1: at the end of the kernel."""
        meet = {}
        for block, after in zip(self.blocks, self.post_dominators, strict=True):
            if self.instructions[block.end - 1].opcode.row.control in ("BRANCH", "INDIRECT"):
                meet[block.end - 1] = self.blocks[after].start if 0 <= after < self.exit else -1
        return meet

    # ---- where registers live

    @cached_property
    def living(self) -> tuple[list[str], list[int], list[int]]:
        """Registers that live from one block to another, and those at the start and at the end of each block, as bits."""
        exposed, killed = zip(*(self._exposed(block) for block in self.blocks), strict=True)
        names = list(dict.fromkeys(name for names in exposed for name in names))
        bit = {name: 1 << number for number, name in enumerate(names)}
        used = [sum(bit[name] for name in names) for names in exposed]
        gone = [sum(bit[name] for name in names & bit.keys()) for names in killed]
        into, out = [0] * self.exit, [0] * self.exit
        waiting = list(range(self.exit))
        while waiting:
            block = waiting.pop()
            after = 0
            for successor in self.blocks[block].successors:
                after |= into[successor] if successor < self.exit else 0
            out[block] = after
            before = used[block] | after & ~gone[block]
            if before != into[block]:
                into[block] = before
                waiting += self.blocks[block].predecessors
        return names, into, out

    def _exposed(self, block: Block) -> tuple[dict[str, None], set[str]]:
        """Registers whose value from before the block is needed in it, and those that are written in it for certain."""
        exposed: dict[str, None] = {}
        killed: set[str] = set()
        for one in self.instructions[block.start : block.end]:
            for name in (*one.read, *one.written) if one.predicate else one.read:
                if name not in killed:
                    exposed[name] = None
            killed.update(one.killed)
        return exposed, killed

    def intervals(self, held: Mapping[int, Iterable[str]]) -> dict[str, tuple[int, int]]:
        """The first and last instruction of each register's life. `held`: registers in use at an instruction that does not name
        them. A register is kept throughout its interval, also in branches that do not need it.
        """
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for at, one in enumerate(self.instructions):
            for name in (*one.read, *one.written, *held.get(at, ())):
                first.setdefault(name, at)
                last[name] = at
        names, into, out = self.living
        for block, name in _first_seen(self.blocks, into, names):
            first[name] = min(first[name], block.start)
        for block, name in _first_seen(self.blocks[::-1], out[::-1], names):
            last[name] = max(last[name], block.end - 1)
        return {name: (first[name], last[name]) for name in first}

    def slots(self, fixed: Iterable[str] = (), held: Mapping[int, Iterable[str]] | None = None) -> tuple[dict[str, int], int]:
        """An offset in the register file for each register, and the bytes of the file.

        Registers that do not live at the same time share a place, so that the file stays in the processor's cache. `fixed` have
        places of their own: special registers, which hold their values from the start.
        """
        intervals = self.intervals(held or {})
        intervals |= {name: (-1, len(self.instructions)) for name in fixed}
        file = File()
        ends: list[tuple[int, str]] = []
        for name in sorted(intervals, key=lambda name: intervals[name]):
            while ends and ends[0][0] < intervals[name][0]:
                file.free(heapq.heappop(ends)[1])
            file.place(name, self.kernel.registers[name])
            heapq.heappush(ends, (intervals[name][1], name))
        return file.places, file.bytes


class File:
    """Places in a register file: 32 lanes of 4, 8 or 16 bytes, a word for a predicate."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self.bytes = 0
        self.widths: dict[str, int] = {}
        self.unused: dict[int, list[int]] = {}

    def place(self, name: str, size: int) -> None:
        width = 4 if size == 0 else LANES * max(size, 4)
        unused = self.unused.setdefault(width, [])
        if not unused:
            step = max(width, 4 * LANES)  # predicates come 32 at a time, so that all else stays aligned
            unused.extend(range(self.bytes, self.bytes + step, width)[::-1])
            self.bytes += step
        self.places[name], self.widths[name] = unused.pop(), width

    def free(self, name: str) -> None:
        self.unused[self.widths[name]].append(self.places[name])


def _common(nearest: dict[int, int], rank: dict[int, int], one: int, two: int) -> int:
    while one != two:
        while rank[one] > rank[two]:
            one = nearest[one]
        while rank[two] > rank[one]:
            two = nearest[two]
    return one


def _first_seen(blocks: list[Block], sets: list[int], names: list[str]) -> Iterator[tuple[Block, str]]:
    """Each register with the first block whose set has it."""
    seen = 0
    for block, bits in zip(blocks, sets, strict=True):
        fresh = bits & ~seen
        seen |= bits
        while fresh:
            low = fresh & -fresh
            yield block, names[low.bit_length() - 1]
            fresh ^= low
