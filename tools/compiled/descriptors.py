"""Whether the descriptors of wgmma in machine code come from shared memory's address, as they do in PTX.

A descriptor says where in shared memory an operand lies. It is made of the address of shared memory, of constants and of loop
counters. ptxas of CUDA 12.8, which Triton 3.6 brings along, can drop the instruction that copies a descriptor to a uniform
register: the product then reads whatever the register held before, such as a stride. On an H100
`paged_attention_statistics` ended so in an illegal access; ptxas of CUDA 12.9 compiles the same PTX right. Triton counts stages
from 0. A kernel whose first stage is computed from a parameter would be found here, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

FIRST_PARAMETER = 0x210  # of constant bank 0 on sm_90; below lie the launch's sizes and the stack
REGISTER = re.compile(r"(?<!\w)(UR|R)(\d+)\b")
WITHOUT_RESULT = re.compile(
    r"ST|U?BRA|EXIT|RET|BSSY|BSYNC|BAR|WARP|NOP|U?[FIDH]SETP|U?PLOP3|DEPBAR|MEMBAR|FENCE|SYNCS|UTMA|LDGSTS"
)
KNOWN = re.compile(r"S2U?R|CS2R|LDS|LDL|SHFL|HGMMA")  # special registers, and numbers that a kernel has stored itself


class Instruction(NamedTuple):
    """target: the label that a branch names. guarded: under a predicate, so that it may do nothing."""

    opcode: str
    operands: str
    guarded: bool
    target: str | None

    @property
    def writes(self) -> list[str]:
        if WITHOUT_RESULT.match(self.opcode):
            return []
        first = next((one for one in self.operands.split(", ") if not re.match(r"U?P[\dT]", one)), "")
        if (result := REGISTER.fullmatch(first)) is None:
            return []
        name, number = result[1], int(result[2])
        return [f"{name}{number + i}" for i in range(self._registers)]

    @property
    def reads(self) -> list[str]:
        _, _, sources = self.operands.partition(", ")
        wide = self.opcode.startswith("UIADD3.64")
        return [f"{name}{int(number) + i}" for name, number in REGISTER.findall(sources) for i in range(1 + wide)]

    @property
    def _registers(self) -> int:
        if product := re.match(r"HGMMA\.\d+x(\d+)", self.opcode):
            return int(product[1]) // 2
        if self.opcode.startswith("CS2R"):
            return 1 if self.opcode.endswith(".32") else 2
        if self.opcode.startswith(("SHF", "USHF")):
            return 1  # .U64 names the operands
        return 4 if ".128" in self.opcode else 2 if re.search(r"\.64\b|\.WIDE\b", self.opcode) else 1


class Kernel:
    """The instructions of nvdisasm's text, and which of them may come before each."""

    def __init__(self, sass: str) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in sass.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                self.labels[label[1]] = len(self.instructions)
            elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([\w.]+)\s*(.*?)\s*;", line):
                guarded = code[1] is not None or re.match(r"!?U?P\d", code[3]) is not None and code[2].startswith("BRA")
                target = re.search(r"`\((\.L_x_\d+)\)", code[3]) if code[2].startswith("BRA") else None
                self.instructions.append(Instruction(code[2], code[3], guarded, target and target[1]))

    @cached_property
    def _before(self) -> list[list[int]]:
        before: list[list[int]] = [[] for _ in self.instructions]
        for i, one in enumerate(self.instructions):
            after = [self.labels[one.target]] if one.target in self.labels else []
            if one.guarded or not re.match(r"BRA(?!\.DIV)|EXIT|RET", one.opcode):
                after.append(i + 1)
            for j in after:
                if j < len(before):
                    before[j].append(i)
        return before

    @cached_property
    def _writes(self) -> list[list[str]]:
        return [one.writes for one in self.instructions]

    def _definitions(self, register: str, place: int) -> Iterator[int]:
        """The instructions whose results a register may hold at a place."""
        ahead, seen = list(self._before[place]), set()
        while ahead:
            i = ahead.pop()
            if i in seen:
                continue
            seen.add(i)
            written = register in self._writes[i]
            if written:
                yield i
            if not written or self.instructions[i].guarded:
                ahead += self._before[i]

    def sources(self, place: int, registers: list[str]) -> set[str]:
        """The instructions that read a kernel's parameter or global memory, of those that these registers are computed from."""
        loads: set[str] = set()
        ahead, seen = [(register, place) for register in registers], set()
        while ahead:
            register, at = ahead.pop()
            for i in self._definitions(register, at):
                if (register, i) in seen:
                    continue
                seen.add((register, i))
                one = self.instructions[i]
                banks = re.findall(r"c\[0x0\]\[(0x[0-9a-f]+)\]", one.operands)
                if one.opcode.startswith("LDG") or any(int(address, 16) >= FIRST_PARAMETER for address in banks):
                    loads.add(f"{one.opcode} {one.operands}")
                elif not KNOWN.match(one.opcode):
                    ahead += [(name, i) for name in one.reads]
        return loads


def stale_descriptors(sass: str) -> list[str]:
    """The products whose descriptors are computed from parameters or global memory, with the instructions that read these."""
    kernel, stale = Kernel(sass), []
    for place, one in enumerate(kernel.instructions):
        descriptors = re.search(r"gdesc\[UR(\d+)\]", one.operands) if one.opcode.startswith("HGMMA") else None
        if descriptors is None:
            continue
        first = 2 if re.match(r"R\d+, R\d+, gdesc", one.operands) else 0  # the left operand may lie in registers
        registers = [f"UR{int(descriptors[1]) + i}" for i in range(first, 4)]
        if sources := kernel.sources(place, registers):
            stale.append(f"{one.opcode} {one.operands}: {'; '.join(sorted(sources))}")
    return stale
