"""The paths of a kernel through an instruction that orders others: whether another one orders the same.

Each function holds for all paths, also those that no launch takes. "" says that it found no reason.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from ptx.reading.flow import Flow
from ptx.reading.products import Products
from ptx.reading.reader import Instruction, Module
from ptx.reading.translate import read_kernel
from ptx.running.program import Program

MANY = 99  # groups under way; more are not told apart
BARRIERS = ("bar.sync", "barrier.sync")
ASYNCHRONOUS = ("wgmma.mma_async", "tcgen05.mma")  # read shared memory through the async proxy
WRITES_SHARED = ("st.shared", "stmatrix", "cp.async", "mbarrier", "atom", "red", "st.generic")
READS_SHARED = ("ld.shared", "ldmatrix", "ld.generic", *ASYNCHRONOUS)
COPIES, PRODUCTS = "cp.async", "wgmma"

Ends = Callable[[Instruction], bool]


class Paths:
    def __init__(self, program: Program) -> None:
        self.kernel = read_kernel(Module(program.text), program.name)
        self.flow, self.instructions = Flow(self.kernel), self.kernel.instructions
        count = len(self.instructions)
        self.after: list[list[int]] = [[n + 1] if n + 1 < count else [] for n in range(count)]
        for block in self.flow.blocks:
            self.after[block.end - 1] = [self.flow.blocks[one].start for one in block.successors if one < self.flow.exit]
        self.before: list[list[int]] = [[] for _ in range(count)]
        for n, successors in enumerate(self.after):
            for one in successors:
                self.before[one].append(n)

    def at(self, line: int) -> list[int]:
        """The instructions of a line: several where a function is called several times."""
        return [n for n, one in enumerate(self.instructions) if one.line == line]

    def crossed(self, start: int, ends: Ends, backward: bool = False) -> tuple[list[Instruction], list[int]]:
        """The instructions on the paths from an instruction to those that end them, and the ends."""
        edges = self.before if backward else self.after
        inside, stops = set[int](), set[int]()
        waiting = list(edges[start])
        while waiting:
            n = waiting.pop()
            if ends(self.instructions[n]) and n != start:
                stops.add(n)
            elif n not in inside:
                inside.add(n)
                waiting += edges[n]
        return [self.instructions[n] for n in inside if n != start], sorted(stops)

    # ---- reasons

    def barrier(self, start: int) -> str:
        """No two accesses, one on each side of it up to the next barriers, conflict."""
        earlier, _ = self.crossed(start, _is_barrier, backward=True)
        later, _ = self.crossed(start, _is_barrier)
        for space in ("shared", "global", "tensor"):
            sides = [{effect for one in side for effect in _effects(one, space)} for side in (earlier, later)]
            if "writes" in sides[0] and sides[1] or "writes" in sides[1] and sides[0]:
                return ""
        return "other barriers order all that it could order"

    def wait(self, start: int, kind: str) -> str:
        """A wait for groups that finds no more under way than it leaves, or that another one as strict follows."""
        left = self._left(self.instructions[start])
        if self._most_under_way(kind)[start] <= left:
            return "no group that it waits for is under way"
        later, stops = self.crossed(start, lambda one: self._is_wait(one, kind))
        if not stops or any(self._left(self.instructions[n]) > left for n in stops):
            return ""
        if kind == PRODUCTS:  # others may write what it reads once they have passed the next barrier
            later += [one for n in stops for one in self.crossed(n, _is_barrier)[0]]
            touched = bool(self._writes_shared(later) or without(self, start).misuses)
        else:
            touched = any(_is_barrier(one) or any(_effects(one, "shared")) for one in later)
        return "" if touched else "a wait as strict follows before anything touches what is under way"

    def commit(self, start: int, kind: str) -> str:
        """The group joins the next one, and the next wait on each path waits for that one too, or could be left out itself."""
        commits, reached = {start: 0}, False
        waiting = deque([start])
        while waiting:  # fewest commits first
            n = waiting.popleft()
            for one in self.after[n]:
                more = _is_commit(self.instructions[one], kind) and one != start
                count = commits[n] + more
                if count >= commits.get(one, MANY):
                    continue
                commits[one] = count
                if self._is_wait(self.instructions[one], kind):
                    reached = True
                    if count > self._left(self.instructions[one]):
                        continue
                    if not self.wait(one, kind):
                        return ""
                waiting.append(one) if more else waiting.appendleft(one)
        return "its group joins the next one, for which a wait in time waits too" if reached else ""

    @staticmethod
    def _writes_shared(these: Iterable[Instruction]) -> bool:
        return any("writes" in _effects(one, "shared") for one in these)

    def proxy_fence(self, start: int) -> str:
        """Nothing to fence since the last one, or another one comes before the async proxy can read."""
        earlier, _ = self.crossed(start, _is_proxy_fence, backward=True)
        if not any(one.opcode.name.startswith(WRITES_SHARED) for one in earlier):
            return "nothing is written to shared memory between the fence before and it"
        later, stops = self.crossed(start, _is_proxy_fence)
        if any(one.opcode.name.startswith(ASYNCHRONOUS) for one in later):
            return ""
        if not any(_is_barrier(one) for one in later) or all(self._barrier_before_products(n) for n in stops):
            return "another fence follows, and no product reads shared memory before that"
        return ""

    def _barrier_before_products(self, start: int) -> bool:
        later, _ = self.crossed(start, _is_barrier)
        return not any(one.opcode.name.startswith(ASYNCHRONOUS) for one in later)

    def product_fence(self, start: int) -> str:
        """Products, as ptx/reading/products.py follows them, miss no fence without this one."""
        return "" if without(self, start).misuses else "only products touch the next ones' registers since the fence before it"

    def store_wait(self, start: int) -> str:
        """tcgen05.wait::st: no store since the one before, or another one before anything depends on it."""
        wait = self.instructions[start].opcode.name
        earlier, _ = self.crossed(start, lambda one: one.opcode.name == wait, backward=True)
        if not any(one.opcode.name.startswith("tcgen05.st") for one in earlier):
            return "no store to tensor memory lies between the wait before and it"
        later, stops = self.crossed(start, lambda one: one.opcode.name == wait)
        if stops and not any(_is_barrier(one) or any(_effects(one, "tensor")) for one in later):
            return "another wait follows before anything depends on it"
        return ""

    # ---- groups of copies and of products

    @staticmethod
    def _is_wait(one: Instruction, kind: str) -> bool:
        return one.opcode.name in (f"{kind}.wait_group", f"{kind}.wait_all") and not one.predicate

    @staticmethod
    def _left(wait: Instruction) -> int:
        return int(str(wait.values[0])) if wait.opcode.name.endswith("wait_group") else 0

    def _most_under_way(self, kind: str) -> list[int]:
        """Before each instruction, the most groups that are under way on any path."""
        most = [-1] * len(self.instructions)
        most[0] = 0
        waiting = [0]
        while waiting:
            n = waiting.pop()
            one, count = self.instructions[n], most[n]
            if _is_commit(one, kind):
                count = min(count + 1, MANY)
            elif self._is_wait(one, kind):
                count = min(count, self._left(one))
            for successor in self.after[n]:
                if count > most[successor]:
                    most[successor] = count
                    waiting.append(successor)
        return most


def without(paths: Paths, number: int) -> Products:
    """The kernel's products without one instruction."""
    kernel = paths.kernel
    whole, labels = kernel.instructions, kernel.labels
    kernel.instructions = [*whole[:number], *whole[number + 1 :]]
    kernel.labels = {name: place - (place > number) for name, place in labels.items()}
    try:
        return Products(Flow(kernel))
    finally:
        kernel.instructions, kernel.labels = whole, labels


def _is_barrier(one: Instruction) -> bool:
    return one.opcode.name in BARRIERS and not one.predicate


def _is_proxy_fence(one: Instruction) -> bool:
    return one.opcode.name == "fence.proxy.async" and not one.predicate


def _is_commit(one: Instruction, kind: str) -> bool:
    return one.opcode.name == f"{kind}.commit_group"


def _effects(one: Instruction, space: str) -> Iterable[str]:
    """The effects of an instruction on a kind of memory, as far as a barrier may order them. Waits let the accesses of
    others take effect."""
    name = one.opcode.name
    if space == "tensor":
        if name.startswith("tcgen05") and name != "tcgen05.wait.st":
            yield "reads" if name.startswith("tcgen05.ld") else "writes"
    elif space == "shared":
        if name.startswith(WRITES_SHARED) and not name.endswith("commit_group"):
            yield "writes"
        if name.startswith(READS_SHARED) or name.startswith(("wgmma.wait", "tcgen05.commit")):
            yield "reads"
    elif name.startswith(("st.global", "st.generic", "atom", "red")):
        yield "writes"
    elif name.startswith(("ld.global", "ld.generic")) or name == "cp.async":
        yield "reads"
