"""A kernel as the machine takes it: a line for each instruction, places of registers, constants for all lanes."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.flow import LANES, Flow
from ptx.library import library
from ptx.opcodes import CONTROLS, SIZES
from ptx.reader import SHARED_BASE, SPECIALS, Address, Constant, Instruction, Label, Module, Parameter, Symbol, Value
from ptx.translate import read_kernel, round_up, storage

if TYPE_CHECKING:
    from ptx.memory import Memory
    from ptx.reports import Launch, Options

DYNAMIC_ALIGNMENT = 1024  # of shared memory whose size the launch says: the widest that a tensor copy asks for


_module = lru_cache(8)(Module)  # a text of nvcc's has many kernels


class Program:
    """A kernel of a PTX text, loaded."""

    def __init__(self, text: str, name: str = "") -> None:
        module = _module(text)
        self.kernel, self.lines = read_kernel(module, name), module.lines
        self.buffers: list[tuple[int, int, str]] = []  # address, bytes and name of the module's variables
        self._arrays: list[np.ndarray] = []
        self.addresses = {variable: self._place(variable) for variable in self.kernel.variables}
        self.constants: dict[tuple[int, int], int] = {}
        self.constant_bytes = 0
        self.flow = Flow(self.kernel)
        self.specials = [register for register in self.kernel.registers if register in SPECIALS]
        self.slots, self.register_bytes = self.flow.slots(self.specials, self._held())
        meet = self.flow.reconverge()
        self.code = [self._line(one, meet.get(number, -1)) for number, one in enumerate(self.kernel.instructions)]
        self.handle = self._load()

    def _held(self) -> dict[int, set[str]]:
        """Registers of products that are under way, which nothing else may use until their wait."""
        from ptx.products import Products

        products = Products(self.flow)
        self.findings = products.misuses
        return products.held

    @property
    def name(self) -> str:
        return self.kernel.name

    @property
    def parameters(self) -> list[Parameter]:
        return self.kernel.parameters

    def _place(self, name: str) -> int:
        variable = self.kernel.variables[name]
        array = np.zeros(variable.size + 2 * variable.alignment, np.uint8)
        address = round_up(array.ctypes.data, variable.alignment)
        start = address - array.ctypes.data
        array[start : start + variable.size] = np.frombuffer(variable.data, np.uint8)
        self._arrays.append(array)
        self.buffers.append((address, variable.size, name))
        return address

    def dynamic_shared(self) -> int:
        """The shared address behind the static variables, where memory of the launch's size starts."""
        return round_up(SHARED_BASE + self.kernel.shared, DYNAMIC_ALIGNMENT)

    def shared_bytes(self, dynamic: int) -> int:
        """Bytes of a block's shared memory from address 0 on."""
        return self.dynamic_shared() + dynamic if dynamic or self.kernel.extern_shared else SHARED_BASE + self.kernel.shared

    def at(self, number: int) -> str:
        """The PTX line of an instruction, with its place in the source."""
        one = self.kernel.instructions[number]
        return f"PTX line {one.line}, {one.place or 'no source line'}: {self.lines[one.line - 1].strip()}"

    def hits(self) -> list[int]:
        """How often each instruction has run."""
        return library().ptx_hits(self.handle)[: len(self.code)]

    def launch(self, values: list[Any], grid: tuple, block: tuple, shared: int, memory: Memory, options: Options) -> Launch:
        """Runs the kernel. `values`: a number, or bytes, for each parameter; `shared`: bytes of dynamic shared memory."""
        from ptx.launch import launch

        return launch(self, values, grid, block, shared, memory, options)

    # ---- text for the machine

    def _load(self) -> ctypes.c_void_p:
        constants = np.zeros(max(self.constant_bytes, 16), np.uint8)
        for (bits, width), offset in self.constants.items():
            lanes = np.frombuffer(bits.to_bytes(width, "little") * LANES, np.uint8)
            constants[offset : offset + len(lanes)] = lanes
        specials = "\n".join(f"{name} {self.slots[name]} {storage(SPECIALS[name])}" for name in self.specials)
        text = "\n".join(self.code)
        handle = ctypes.c_void_p(
            library().ptx_load(text.encode(), self.register_bytes, constants.ctypes.data, len(constants), specials.encode())
        )
        if error := library().ptx_error(handle).decode():
            missing = {word for word in error.split() if not word.startswith("(")}
            places = [self.at(n) for n, one in enumerate(self.kernel.instructions) if one.opcode.name in missing]
            raise NotImplementedError(
                f"{self.name}: the machine has no handler for {error}" + "".join(f"\n    {p}" for p in places[:5])
            )
        return handle

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            library().ptx_free(self.handle)

    def _line(self, one: Instruction, meet: int) -> str:
        row = one.opcode.row
        operands = self._load_store(one) if row.layout else self._ordered(one)
        predicate = self.slots[one.predicate] if one.predicate else -1
        fields = [one.opcode.name, row.kind, CONTROLS.index(row.control), int(row.converged), predicate, int(one.negated), meet]
        return " ".join(map(str, [*fields, len(operands), *operands]))

    def _ordered(self, one: Instruction) -> list[int]:
        order = one.opcode.row.order
        if not order:
            present = (n for n, value in enumerate(one.values) if not self._skipped(one, str(n)))
            return [*one.opcode.numbers, *(number for n in present for number in self._numbers(one.values[n]))]
        operands: list[int] = []
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

    def _numbers(self, value: Value) -> list[int]:
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
        if isinstance(value, Symbol):
            address = self.addresses.get(value.name, self.dynamic_shared()) + value.offset
            value = Constant(address, value.size)
        bits, width = value.bits, storage(value.size)
        if value.size == 0:  # a predicate: a bit for each lane
            bits, width = 0xFFFFFFFF if bits else 0, 4
        if (bits, width) not in self.constants:
            self.constants[bits, width] = self.constant_bytes
            self.constant_bytes += LANES * width
        return ~self.constants[bits, width]

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
