"""A kernel's text -> what the machine takes: a line for each instruction, places of registers, constants for all lanes."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from ptx.reading.flow import LANES, Flow
from ptx.reading.opcodes import CONTROLS, SIZES
from ptx.reading.products import Misuse, Products
from ptx.reading.reader import (
    SHARED_BASE,
    SPECIALS,
    Address,
    Constant,
    Instruction,
    Kernel,
    Label,
    Module,
    Parameter,
    Symbol,
    Variable,
)
from ptx.reading.translate import read_kernel, round_up, storage

DYNAMIC_ALIGNMENT = 1024  # of shared memory whose size the launch says: the widest that a tensor copy asks for


class Place(NamedTuple):
    """Where an instruction stands."""

    line: int  # of the PTX text
    source: str


@dataclass
class Encoded:
    """A kernel as the machine takes it. Only the addresses of variables in global memory are open until it is loaded."""

    name: str
    parameters: list[Parameter]
    max_threads: int | None
    cluster: tuple[int, ...]  # blocks of a cluster, () if the text does not say
    shared: int  # bytes of static shared memory
    extern_shared: bool
    local: int  # bytes of a thread
    variables: dict[str, Variable]  # in global memory, by name
    code: str
    instructions: list[Place]
    constants: dict[tuple[str, int, int], int]  # offset by (variable whose address it adds or "", bits, bytes of a lane)
    constant_bytes: int
    register_bytes: int
    specials: str  # special registers with their slots and bytes
    misuses: list[Misuse]  # of registers of products that are under way

    @property
    def dynamic_shared(self) -> int:
        """The shared address behind the static variables, where memory of the launch's size starts."""
        return dynamic_shared(self.shared)


def dynamic_shared(static: int) -> int:
    return round_up(SHARED_BASE + static, DYNAMIC_ALIGNMENT)


_module = lru_cache(8)(Module)  # a text of nvcc's has many kernels


def encode(text: str, name: str = "") -> Encoded:
    """The kernel of this name; without one, the only one."""
    collects = gc.isenabled()
    gc.disable()  # nothing here makes cycles, and looking for them takes a sixth of the time
    try:
        return Encoder(read_kernel(_module(text), name)).result()
    finally:
        if collects:
            gc.enable()


class Encoder:
    """Gives registers and constants their places."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.flow = kernel, Flow(kernel)
        self.constants: dict[tuple[str, int, int], int] = {}
        self.constant_bytes = 0
        self.specials = [register for register in kernel.registers if register in SPECIALS]
        self.products = Products(self.flow)
        self.slots, self.register_bytes = self.flow.slots(self.specials, self.products.held)

    def result(self) -> Encoded:
        kernel, meet = self.kernel, self.flow.reconverge()
        code = "\n".join(self._line(one, meet.get(number, -1)) for number, one in enumerate(kernel.instructions))
        return Encoded(
            kernel.name,
            kernel.parameters,
            kernel.max_threads,
            kernel.cluster,
            kernel.shared,
            kernel.extern_shared,
            kernel.local,
            kernel.variables,
            code,
            [Place(one.line, one.place) for one in kernel.instructions],
            self.constants,
            self.constant_bytes,
            self.register_bytes,
            "\n".join(f"{name} {self.slots[name]} {storage(SPECIALS[name])}" for name in self.specials),
            self.products.misuses,
        )

    def _line(self, one: Instruction, meet: int) -> str:
        row = one.opcode.row
        operands = self._load_store(one) if row.layout else self._ordered(one)
        predicate = self.slots[one.predicate] if one.predicate else -1
        fields = [one.opcode.name, row.kind, CONTROLS.index(row.control), int(row.converged), predicate, int(one.negated), meet]
        return " ".join(map(str, [*fields, len(operands), *operands]))

    def _ordered(self, one: Instruction) -> list[int]:
        order = one.opcode.row.order
        operands: list[int] = []
        if not order:
            operands += one.opcode.numbers
            for value, operand in zip(one.values, one.opcode.row.operands, strict=True):
                if value is not None or operand.second:
                    operands += self._numbers(value)
        for word in order:
            if word[0] == "n":
                operands.append(one.opcode.numbers[int(word[1:])])
            elif word[0] == ":":
                operands.append(int(word[1:]))
            elif word[0] == "#":
                value = one.values[int(word[1:])]
                operands.append(len(value) if isinstance(value, list) else 1)
            else:
                operands += [] if self._skipped(one, word) else self._numbers(one.values[int(word.rstrip("?"))])
        return operands

    @staticmethod
    def _skipped(one: Instruction, word: str) -> bool:
        """Whether an operand is absent and leaves nothing: an absent second result is -1 unless the order says otherwise."""
        number = int(word.rstrip("?"))
        return one.values[number] is None and (word.endswith("?") or not one.opcode.row.operands[number].second)

    def _numbers(self, value: Any) -> list[int]:
        if value is None:
            return [-1]
        if isinstance(value, list):
            return [number for part in value for number in self._numbers(part)]
        if isinstance(value, Address):
            return [*self._numbers(value.base), storage(value.size), value.offset]
        if isinstance(value, Label):
            return [self.kernel.labels[name] for name in value.names]
        return [value if isinstance(value, int) else self._slot(value)]

    def _slot(self, value: str | Constant | Symbol) -> int:
        if isinstance(value, str):
            return self.slots[value]
        name, width = "", storage(value.size)
        if isinstance(value, Symbol):
            in_global = value.name in self.kernel.variables
            name, bits = (value.name, value.offset) if in_global else ("", dynamic_shared(self.kernel.shared) + value.offset)
        elif value.size == 0:  # a predicate: a bit for each lane
            bits, width = 0xFFFFFFFF if value.bits else 0, 4
        else:
            bits = value.bits
        if (name, bits, width) not in self.constants:
            self.constants[name, bits, width] = self.constant_bytes
            self.constant_bytes += LANES * width
        return ~self.constants[name, bits, width]

    def _load_store(self, one: Instruction) -> list[int]:
        """Bytes of an element, for loads whether it has a sign, the number of elements, the address, then each element's register
        with its bytes."""
        loads = one.opcode.row.layout == "load"
        values, address = one.values[:2] if loads else one.values[1::-1]
        assert isinstance(values, list)
        kind = one.opcode.types[-1]
        operands = [SIZES[kind], *([int(kind[0] == "s")] if loads else []), len(values), *self._numbers(address)]
        for value in values:
            size = self.kernel.registers[value] if isinstance(value, str) else SIZES[kind]
            operands += [*self._numbers(value), size if loads else storage(size)]
        return operands
