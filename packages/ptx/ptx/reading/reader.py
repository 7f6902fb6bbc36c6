"""What a PTX text holds: kernels and functions, still unread, variables and source files; and what a kernel is once it is read.

`Module(text)` splits a text, and `translate.read_kernel` reads one of its kernels.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from ptx.reading.opcodes import SIZES, Opcode

SHARED_BASE = 1024  # a block's shared memory starts here, so that address 0 is invalid
SPECIALS = {f"%{name}.{axis}": 4 for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"}
SPECIALS |= {f"%cluster_{name}.{axis}": 4 for name in ("ctaid", "nctaid") for axis in "xyz"}
SPECIALS |= {f"%{name}.{axis}": 4 for name in ("clusterid", "nclusterid") for axis in "xyz"} | {"%is_explicit_cluster": 0}
SPECIALS |= {f"%lanemask_{which}": 4 for which in ("eq", "le", "lt", "ge", "gt")} | {"%globaltimer": 8, "%gridid": 8}
SPECIALS |= dict.fromkeys("%laneid %warpid %nwarpid %smid %nsmid %cluster_ctarank %cluster_nctarank".split(), 4)
SPECIALS |= dict.fromkeys("%dynamic_smem_size %total_smem_size".split(), 4)
CLOCKS = {"%clock": "b32", "%clock64": "b64", "%globaltimer": "b64"}  # read by an instruction, because their values change
CARRY = "%carry"  # the condition code, which no operand names


class PtxError(Exception):
    """PTX that this reader does not know; the text names the line and the place in the source."""


@dataclass(frozen=True)
class Constant:
    bits: int
    size: int  # in bytes; 0: a predicate


@dataclass(frozen=True)
class Symbol:
    """The address of a variable of the module, known when the program is loaded."""

    name: str
    offset: int
    size: int


Base = str | Constant | Symbol  # a string is a register


@dataclass(frozen=True)
class Address:
    base: Base
    size: int
    offset: int


@dataclass(frozen=True)
class Label:
    names: tuple[str, ...]


Value = str | Constant | Symbol | Address | Label | int | list[object] | None


@dataclass
class Instruction:
    opcode: Opcode
    values: list[Value]  # one for each operand of the row; None: absent
    predicate: str = ""
    negated: bool = False
    line: int = 0
    place: str = ""  # in the source

    def __post_init__(self) -> None:
        """Sorts the registers by what happens to them. The predicate comes later, so it is added where they are asked for."""
        read: list[str] = []
        written: list[str] = []
        killed: list[str] = []
        for operand, value in zip(self.opcode.row.operands, self.values, strict=True):
            if isinstance(value, Address):
                value = value.base
            for one in value if isinstance(value, list) else (value,):
                if isinstance(one, str):
                    if operand.access != "written":
                        read.append(one)
                    if operand.access != "read":
                        written.append(one)
                        if operand.access == "written":
                            killed.append(one)
        self._read, self._written, self._killed = read, written, killed

    @property
    def read(self) -> set[str]:
        return {*self._read, self.predicate} if self.predicate else set(self._read)

    @property
    def written(self) -> set[str]:
        return set(self._written)

    @property
    def killed(self) -> set[str]:
        """Registers whose value from before is gone: a predicated instruction may leave it."""
        return set() if self.predicate else set(self._killed)


@dataclass
class Parameter:
    size: int
    offset: int
    alignment: int


@dataclass
class Variable:
    space: str
    size: int
    alignment: int
    data: bytes
    extern: bool


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter] = field(default_factory=list)
    threads: int | None = None  # of a block, where .reqntid says so
    max_threads: int | None = None
    cluster: tuple[int, ...] = ()  # its blocks, where .reqnctapercluster says so
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)  # bytes of each that occurs
    shared: int = 0  # bytes of static shared memory
    extern_shared: bool = False
    local: int = 0  # bytes of a thread
    variables: dict[str, Variable] = field(default_factory=dict)  # in global memory, by name


@dataclass
class Routine:
    """A kernel or a function, unread."""

    name: str
    header: str
    body: str
    line: int
    results: list[tuple[str, int, int]] = field(default_factory=list)  # name, bytes, alignment
    parameters: list[tuple[str, int, int]] = field(default_factory=list)


VARIABLE = re.compile(
    r"((?:\.(?:visible|extern|weak|common)\s+)*)\.(shared|global|const|local|param)\s+(?:\.attribute\([^)]*\)\s*)?"
    r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)((?:\s*\[\w*\])*)\s*(?:=\s*(.*))?",
    re.S,
)
INLINE = re.compile(r"// begin inline asm\b.*?// end inline asm\b", re.S)
STATEMENT = re.compile(r"\s*(?:([{}])|([$%\w]+)\s*:(?!:)|(\.(?:loc|file)\b[^\n]*)|([^;]+);)")
INTEGER = re.compile(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?")
FLOAT32, FLOAT64 = re.compile(r"0[fF]([0-9a-fA-F]{8})"), re.compile(r"0[dD]([0-9a-fA-F]{16})")
DECIMAL = re.compile(r"-?\d+\.\d*(?:[eE][+-]?\d+)?")
ROUTINE = re.compile(r"((?:\.(?:visible|weak|extern)\s+)*)\.(entry|func)\b")


def integer(text: str) -> int | None:
    """An integer literal of PTX, or None."""
    match = INTEGER.fullmatch(text)
    if not match:
        return None
    digits = match[2]
    base = {"x": 16, "b": 2}.get(digits[1:2].lower(), 8 if len(digits) > 1 and digits[0] == "0" else 10)
    return (-1 if match[1] else 1) * int(digits[2:] if base in (2, 16) else digits, base)


def literal(text: str, kind: str) -> int | None:
    """The bits of a literal as a value of this type, or None."""
    bits = 8 * SIZES[kind]
    if match := FLOAT32.fullmatch(text):
        return int(match[1], 16) if bits == 32 else None
    if match := FLOAT64.fullmatch(text):
        return int(match[1], 16) if bits == 64 else None
    if kind in ("f32", "f64") and DECIMAL.fullmatch(text):
        packed = struct.pack("<f" if bits == 32 else "<d", float(text))
        return int.from_bytes(packed, "little")
    value = integer(text)
    if kind == "pred":
        return {"true": 1, "false": 0}.get(text, None if value is None else int(value != 0))
    return None if value is None or kind in ("f32", "f64") else value & ((1 << bits) - 1)


def split(text: str) -> list[str]:
    """At commas outside of brackets."""
    if "{" not in text and "[" not in text and "(" not in text:
        return [part.strip() for part in text.split(",")] if text else []
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        if letter in "{[(":
            depth += 1
        elif letter in "}])":
            depth -= 1
        elif letter == "," and not depth:
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()]


def variable(text: str) -> tuple[str, Variable] | None:
    match = VARIABLE.fullmatch(text.strip())
    if not match:
        return None
    linkage, space, alignment, kind, name, dimensions, value = match.groups()
    if kind not in SIZES:
        raise PtxError(f"type .{kind} of variable {name}")
    size = SIZES[kind]
    for dimension in re.findall(r"\[(\w*)\]", dimensions):
        size *= integer(dimension) or 0
    data = b""
    for one in re.findall(r"[^\s{},]+", value or ""):
        bits = literal(one, kind)
        if bits is None:
            raise PtxError(f"initial value {one} of variable {name}")
        data += bits.to_bytes(SIZES[kind], "little")
    return name, Variable(space, size, int(alignment or SIZES[kind]), data.ljust(size, b"\0"), ".extern" in linkage)


class Module:
    """The routines and variables of a text."""

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        # LLVM counts the lines of an inline assembly's text as lines of the source
        text = INLINE.sub(lambda match: re.sub(r"(?m)^[ \t]*\.loc\b.*", "", match[0]), text)
        text = re.sub(r"//[^\n]*", "", text)
        text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), text, flags=re.S)
        self.files = {number: name.rsplit("/", 1)[-1] for number, name in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text)}
        self.routines: dict[str, Routine] = {}
        self.entries: list[str] = []
        self.variables: dict[str, Variable] = {}
        place = 0
        for match in ROUTINE.finditer(text):
            if match.start() < place:
                continue
            self._declare(text[place : match.start()])
            place = self._routine(text, match)
        self._declare(re.split(r"(?m)^\s*\.section\b", text[place:])[0])

    def _declare(self, text: str) -> None:
        for statement in text.split(";"):
            if match := re.search(r"(\.(visible|extern|weak|common)\s+)*\.(shared|global|const)\b.*", statement, re.S):
                declared = variable(match[0])
                if declared is None:
                    raise PtxError(f"variable {match[0].strip()[:200]}")
                self.variables[declared[0]] = declared[1]

    def _routine(self, text: str, match: re.Match[str]) -> int:
        """Keeps a routine and returns the place after it."""
        stop = re.compile(r"[{;]").search(text, match.end())
        assert stop, "a routine without a body"
        header = text[match.end() : stop.start()]
        if stop[0] == ";":
            return stop.end()  # a declaration
        depth, place = 1, stop.end()
        braces = re.compile(r"[{}]")
        while depth:
            brace = braces.search(text, place)
            assert brace, "a brace without its end"
            depth += 1 if brace[0] == "{" else -1
            place = brace.end()
        signature = re.fullmatch(r"\s*(?:\(([^)]*)\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?(.*)", header, re.S)
        assert signature, f"header {header[:200]}"
        routine = Routine(signature[2], signature[4], text[stop.end() : place - 1], text.count("\n", 0, stop.end()) + 1)
        for to, inside in ((routine.results, signature[1]), (routine.parameters, signature[3])):
            for one in split((inside or "").strip()):
                declared = variable(one)
                if declared is None:
                    raise PtxError(f"parameter {one} of {routine.name}")
                to.append((declared[0], declared[1].size, declared[1].alignment))
        self.routines[routine.name] = routine
        if match[2] == "entry":
            self.entries.append(routine.name)
        return place
