"""Registers of asynchronous matrix products (wgmma): which are in flight where, and which instructions touch them too early.

The check follows the paths of a kernel before it runs, so it costs nothing at run time and sees paths that no launch takes.
PTX says of the registers that a wgmma.mma_async names:
- until the wgmma.wait_group that covers the product nothing may read or write its sums, and nothing may write its registers of A;
- a wgmma.fence stands between an access by another instruction and the product, and before the first product; only a product that
  adds to the sums of another one needs none. A copy between registers is no access: LLVM writes the copies into a product's
  registers behind Triton's fence, and ptxas makes both one register, or copies before the fence.
"""

from __future__ import annotations

from typing import NamedTuple

from ptx.reading.flow import Flow
from ptx.reading.reader import Instruction

AGES = 8  # groups that are told apart; the last stands for all before it
UNFENCED = 1  # the bit of "no wgmma.fence yet"; registers have the bits above


class Misuse(NamedTuple):
    kind: str
    instruction: int
    registers: tuple[str, ...]


class State(NamedTuple):
    """What may be the case at a place: sets of registers as bits of a number. Paths join by `|`."""

    touched: int = 0  # by other instructions since the last wgmma.fence
    sums: tuple[int, ...] = (0,) * AGES  # in flight, by age: not committed, of the last group, of the one before, ...
    left: tuple[int, ...] = (0,) * AGES  # the same of A's registers

    def joined(self, second: State) -> State:
        return State(self.touched | second.touched, _both(self.sums, second.sums), _both(self.left, second.left))


def _both(one: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a | b for a, b in zip(one, second, strict=True))


def _older(ages: tuple[int, ...]) -> tuple[int, ...]:
    """By age after one more commit."""
    return 0, *ages[: AGES - 2], ages[-2] | ages[-1]


def _union(ages: tuple[int, ...]) -> int:
    together = 0
    for bits in ages:
        together |= bits
    return together


class Products:
    """`misuses`, and `held`: by instruction, the registers in flight that must keep their places in the register file."""

    def __init__(self, flow: Flow) -> None:
        self.flow, self.numbers = flow, dict[str, int]()
        self.misuses: list[Misuse] = []
        self.held: dict[int, set[str]] = {}
        products = [one for one in flow.instructions if one.opcode.name.startswith("wgmma.mma_async")]
        if not products:
            return
        for one in products:
            self._bits({*_registers(one, 0), *_registers(one, 1)})
        before = self._states()
        for number, block in enumerate(flow.blocks):
            if number in before:
                self._walk(block.start, block.end, before[number], final=True)

    def _bits(self, names: set[str]) -> int:
        bits = 0
        for name in names:
            bits |= 2 << self.numbers.setdefault(name, len(self.numbers))
        return bits

    def _named(self, bits: int) -> set[str]:
        return {name for name, number in self.numbers.items() if bits >> number & 2}

    def _states(self) -> dict[int, State]:
        """The state before each block that is reached."""
        before, waiting = {0: State(touched=UNFENCED)}, [0]
        while waiting:
            number = waiting.pop()
            block = self.flow.blocks[number]
            after = self._walk(block.start, block.end, before[number])
            for successor in block.successors:
                if successor < len(self.flow.blocks):
                    joined = before[successor].joined(after) if successor in before else after
                    if joined != before.get(successor):
                        before[successor] = joined
                        waiting.append(successor)
        return before

    def _walk(self, start: int, end: int, state: State, final: bool = False) -> State:
        for place in range(start, end):
            one = self.flow.instructions[place]
            if final:
                self._check(place, one, state)
            state = self._after(one, state)
            if final and (in_flight := _union(state.sums) | _union(state.left)):
                self.held[place] = self._named(in_flight)
        return state

    def _after(self, one: Instruction, state: State) -> State:
        touched, sums, left = state
        name = one.opcode.name
        if name.startswith("wgmma.mma_async"):
            sums = (sums[0] | self._bits(_registers(one, 0)), *sums[1:])
            left = (left[0] | self._bits(_registers(one, 1)), *left[1:])
        elif name == "wgmma.fence" and not one.predicate:
            touched = 0
        elif name == "wgmma.commit_group":
            sums, left = _older(sums), _older(left)
        elif name == "wgmma.wait_group" and not one.predicate:
            kept = int(str(one.values[0])) + 1
            sums, left = ((*ages[:kept], *[0] * (AGES - len(ages[:kept]))) for ages in (sums, left))
        elif not _copies(one):
            touched |= self._known(one.read | one.written)
        return State(touched, sums, left)

    def _known(self, names: set[str]) -> int:
        return self._bits(names & self.numbers.keys())

    def _check(self, place: int, one: Instruction, state: State) -> None:
        sums, left = _union(state.sums), _union(state.left)
        if one.opcode.name.startswith("wgmma.mma_async"):
            operands = UNFENCED | self._bits(_registers(one, 0) | _registers(one, 1))
            self._tell("wgmma without wgmma.fence", place, state.touched & operands)
            self._tell("register read before wgmma.wait_group", place, sums & self._bits(_registers(one, 1)))
            self._tell("register written before wgmma.wait_group", place, left & self._bits(_registers(one, 0)))
        else:
            self._tell("register read before wgmma.wait_group", place, sums & self._known(one.read))
            self._tell("register written before wgmma.wait_group", place, (sums | left) & self._known(one.written))

    def _tell(self, kind: str, place: int, bits: int) -> None:
        if bits:
            self.misuses.append(Misuse(kind, place, tuple(sorted(self._named(bits)))))


def _registers(product: Instruction, operand: int) -> set[str]:
    """Those of D (operand 0) or of A (1), which may also be a descriptor: it is read at the issue."""
    value = product.values[operand]
    return {one for one in value if isinstance(one, str)} if isinstance(value, list) else set()


def _copies(one: Instruction) -> bool:
    """mov from a register to a register."""
    return one.opcode.name.startswith("mov.") and len(one.read) == 1 == len(one.written) and not one.predicate
