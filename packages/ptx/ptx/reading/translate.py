"""The statements of one kernel -> instructions, whose operands are registers, constants and addresses as the table says.

A call of a `.func` is replaced by the function's body with registers of its own, and what lies in .param space between the two
becomes local memory. A name that is declared in a nested scope (inline assembly) is told apart from the same name outside.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from ptx.reading.opcodes import SIZES, Opcode, Operand, matching
from ptx.reading.reader import (
    CARRY,
    CLOCKS,
    SHARED_BASE,
    SPECIALS,
    STATEMENT,
    Address,
    Constant,
    Instruction,
    Kernel,
    Label,
    Module,
    Parameter,
    PtxError,
    Routine,
    Symbol,
    Value,
    integer,
    literal,
    split,
    variable,
)

OPCODE = re.compile(r"(?:@(!?)\s*([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)|(-\s*\d+))?\s*\]")
BOX = re.compile(r"\[\s*([^,{}]+?)\s*,\s*(\{[^{}]*\})\s*\]")
LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:.*\binlined_at\s+(\d+)\s+(\d+))?")


@dataclass
class Local:
    """A variable in a thread's local memory."""

    offset: int
    size: int


@dataclass
class Scope:
    registers: dict[str, tuple[str, int]] = field(default_factory=dict)  # the name within the kernel, bytes
    arrays: dict[str, int] = field(default_factory=dict)  # `%r<8>`: bytes by prefix
    locals: dict[str, Local] = field(default_factory=dict)
    suffix: str = ""


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def storage(size: int) -> int:
    """Bytes that a lane of a register takes: what is narrower than 32 bits takes 4."""
    return max(size, 4) if size else 0


def read_kernel(module: Module, name: str = "") -> Kernel:
    """The kernel of this name; without one, the only one."""
    if (name or len(module.entries) != 1) and name not in module.entries:
        raise PtxError(f"name must be one of {', '.join(module.entries)}; got {name or 'none'}")
    return Translation(module, module.routines[name or module.entries[0]]).kernel


class Translation:
    """`kernel` is the result."""

    def __init__(self, module: Module, routine: Routine) -> None:
        self.module, self.variables = module, dict(module.variables)
        self.scopes: list[Scope] = []
        self.temporaries = 0
        self.frames: list[str] = []  # functions that are being read, against recursion
        self.branch_targets: dict[str, Label] = {}
        self.shared: dict[str, int] = {}  # offsets of static variables
        self.local_top, self.line, self.place = 0, routine.line, ""
        self.kernel = kernel = Kernel(routine.name)
        offset = 0
        self.parameters: dict[str, Parameter] = {}
        for name, size, alignment in routine.parameters:
            offset = round_up(offset, alignment)
            self.parameters[name] = Parameter(size, offset, alignment)
            offset += size
        kernel.parameters = list(self.parameters.values())
        kernel.threads, kernel.max_threads = (_threads(routine.header, word) for word in (".reqntid", ".maxntid"))
        kernel.cluster = _sizes(routine.header, ".reqnctapercluster")
        self._body(routine, Scope())
        self._emit("exit", [])  # behind the end of a body
        self._check_labels()

    def _check_labels(self) -> None:
        for one in self.kernel.instructions:
            for label in (value for value in one.values if isinstance(value, Label)):
                if missing := set(label.names) - self.kernel.labels.keys():
                    self.line, self.place = one.line, one.place
                    raise self._error(f"label {', '.join(sorted(missing))}")

    # ---- statements

    def _body(self, routine: Routine, scope: Scope) -> None:
        """All statements of a routine, in a scope of its own."""
        if routine.name in self.frames:
            raise self._error(f"recursion of {routine.name}")
        self.frames.append(routine.name)
        self.scopes, outer = [scope], self.scopes
        line_of_caller, place_of_caller = self.line, self.place
        at, counted, line = 0, 0, routine.line
        body = routine.body
        tops = [self.local_top]
        while match := STATEMENT.match(body, at):
            at, group = match.end(), match.lastindex or 0
            line += body.count("\n", counted, match.start(group))
            counted = match.start(group)
            self.line, text = line, match[group]
            if group == 1 and text == "{":
                self.temporaries += 1
                self.scopes.append(Scope(suffix=f"{scope.suffix}@{self.temporaries}"))
                tops.append(self.local_top)
            elif group == 1:
                self.scopes.pop()
                self.local_top = tops.pop()
            elif group == 2:
                self._label(text, body, at)
            elif group == 3:
                self._location(text)
            else:
                self._statement(text.strip())
        if body[at:].strip():
            raise self._error(f"statement {body[at:].strip()[:80]}")
        self.scopes = outer
        self.frames.pop()
        self.line, self.place = line_of_caller, place_of_caller

    def _label(self, name: str, body: str, at: int) -> None:
        if match := re.compile(r"\s*\.branchtargets\s+([^;]*);").match(body, at):
            self.branch_targets[self._labelled(name)] = Label(tuple(self._labelled(one) for one in split(match[1])))
        self.kernel.labels[self._labelled(name)] = len(self.kernel.instructions)

    def _labelled(self, name: str) -> str:
        """A label's name within the kernel. Labels of inline assembly are visible in its scope alone."""
        return name + self.scopes[0].suffix if len(self.scopes) == 1 or name.startswith("$L") else name + self.scopes[-1].suffix

    def _location(self, text: str) -> None:
        if match := LOCATION.match(text):
            files = self.module.files
            self.place = f"{files.get(match[1], match[1])}:{match[2]}"
            self.place += f" in {files.get(match[3], match[3])}:{match[4]}" if match[3] else ""

    def _statement(self, text: str) -> None:
        if text[0] == ".":
            return self._directive(text)
        match = OPCODE.match(text)
        if not match:
            raise self._error("statement")
        negated, predicate, opcode, rest = match.groups()
        if opcode.split(".")[0] == "call":
            if predicate:
                raise self._error("a call under a predicate")
            return self._call(rest)
        before = len(self.kernel.instructions)
        self._instruction(opcode, split(rest))
        for one in self.kernel.instructions[before:] if predicate else []:
            one.predicate, one.negated = self._register(predicate), bool(negated)

    def _directive(self, text: str) -> None:
        scope = self.scopes[-1]
        if match := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S):
            size = SIZES[match[1]]
            for name in split(match[2]):
                if array := re.fullmatch(r"([%\w$]+)<(\d+)>", name):
                    scope.arrays[array[1]] = size
                else:
                    scope.registers[name] = (name + scope.suffix, size)
        elif re.match(r"\.(local|param)\b", text):
            declared = variable(text)
            if declared is None:
                raise self._error("declaration")
            scope.locals[declared[0]] = self._place_local(declared[1].size, declared[1].alignment)
        elif re.match(r"\.(shared|global|const)\b", text):
            declared = variable(text)
            if declared is None:
                raise self._error("declaration")
            self.variables[declared[0]] = declared[1]
        elif not text.startswith((".pragma", ".branchtargets", ".callprototype")):
            raise self._error("directive")

    def _place_local(self, size: int, alignment: int) -> Local:
        offset = round_up(self.local_top, alignment)
        self.local_top = offset + size
        self.kernel.local = max(self.kernel.local, self.local_top)
        return Local(offset, size)

    def _call(self, text: str) -> None:
        """The function's body in place of the call; `ret` in it becomes a branch behind it."""
        parts = split(re.sub(r"\s+", " ", text))
        results = split(parts.pop(0)[1:-1]) if parts[0].startswith("(") else []
        name = parts[0]
        if name == "__assertfail":
            return self._instruction("trap", [])
        arguments = split(parts[1][1:-1].strip()) if len(parts) > 1 and parts[1].startswith("(") else []
        routine = self.module.routines.get(name)
        if routine is None:
            raise self._error(f"call of {name}, whose body is not there")
        self.temporaries += 1
        scope = Scope(suffix=f"@{self.temporaries}")
        for declared, argument in zip([*routine.results, *routine.parameters], [*results, *arguments], strict=True):
            local = self._local(argument)
            if local is None:
                raise self._error(f"argument {argument} of a call")
            scope.locals[declared[0]] = local
        top = self.local_top
        self._body(routine, scope)
        self.local_top = top
        self.kernel.labels["return" + scope.suffix] = len(self.kernel.instructions)

    # ---- names

    def _error(self, text: str) -> PtxError:
        source = self.module.lines[self.line - 1].strip() if self.line <= len(self.module.lines) else ""
        return PtxError(f"{self.kernel.name}: {text}: PTX line {self.line}, {self.place or 'no source line'}: {source}")

    def _known(self, name: str) -> tuple[str, int] | None:
        """A register's name within the kernel, and its bytes."""
        for scope in reversed(self.scopes):
            if name in scope.registers:
                return scope.registers[name]
            for prefix in (name.rstrip("0123456789"),) if scope.arrays else ():
                if prefix in scope.arrays and prefix != name:
                    scope.registers[name] = (name + scope.suffix, scope.arrays[prefix])
                    return scope.registers[name]
        return None

    def _register(self, name: str) -> str:
        known = self._known(name)
        if known is None:
            raise self._error(f"register {name}")
        self.kernel.registers[known[0]] = known[1]
        return known[0]

    def _temporary(self, size: int) -> str:
        self.temporaries += 1
        name = f"%temporary{self.temporaries}"
        self.kernel.registers[name] = size
        return name

    def _local(self, name: str) -> Local | None:
        return next((scope.locals[name] for scope in reversed(self.scopes) if name in scope.locals), None)

    def _symbol(self, name: str, offset: int, size: int) -> Constant | Symbol | None:
        """The address of a variable or a parameter."""
        if local := self._local(name):
            return Constant(local.offset + offset, size)
        if name in self.parameters and len(self.frames) == 1:
            return Constant(self.parameters[name].offset + offset, size)
        declared = self.variables.get(name)
        if declared is None:
            return None
        if declared.space != "shared":
            self.kernel.variables[name] = declared
            return Symbol(name, offset, size)
        if declared.extern:
            self.kernel.extern_shared = True
            return Symbol(name, offset, size)
        if name not in self.shared:
            self.shared[name] = round_up(self.kernel.shared, declared.alignment)
            self.kernel.shared = self.shared[name] + declared.size
        return Constant(SHARED_BASE + self.shared[name] + offset, size)

    # ---- instructions

    def _emit(self, opcode: str, values: list[Value]) -> None:
        """An instruction that the reader adds; its opcode fits one row."""
        self.kernel.instructions.append(Instruction(matching(opcode)[0], values, line=self.line, place=self.place))

    def _instruction(self, opcode: str, tokens: list[str]) -> None:
        head = opcode.split(".")[0]
        if head == "ret" and len(self.frames) > 1:
            return self._emit("bra", [Label(("return" + self.scopes[0].suffix,))])
        if head == "mov" and tokens[-1] in CLOCKS:
            opcode, tokens = f"clock.{CLOCKS[tokens[-1]]}", tokens[:1]
        if head in ("ld", "st") and ".param" in opcode and self._in_local(tokens):
            opcode = opcode.replace(".param", ".local")
        tokens = [part for token in tokens for part in _box(token)]
        choices = matching(opcode)
        if not choices:
            raise self._error(f"opcode {opcode} is not in the table")
        fitting = ((choice, aligned) for choice in choices if (aligned := _aligned(choice, tokens)) is not None)
        choice, aligned = next(fitting, (None, []))
        if choice is None:
            raise self._error(f"operands of {opcode}")
        behind: list[Instruction] = []
        values = [
            self._value(choice, operand, token, behind) for operand, token in zip(choice.row.operands, aligned, strict=True)
        ]
        self.kernel.instructions.append(Instruction(choice, values, line=self.line, place=self.place))
        self.kernel.instructions += behind

    def _in_local(self, tokens: list[str]) -> bool:
        """Whether a .param access means the area of a call: in a function, or at a name that a call's scope declares."""
        name = next(re.match(r"\[\s*([%\w$]+)", token) for token in tokens if token.startswith("["))
        return len(self.frames) > 1 or (name is not None and self._local(name[1]) is not None)

    def _value(self, opcode: Opcode, operand: Operand, token: str | None, behind: list[Instruction]) -> Value:
        if operand.type == "carry":
            self.kernel.registers[CARRY] = 0
            return CARRY
        if token is None:
            if operand.default is None:
                return None
            size = SIZES[opcode.type_of(operand)]
            return Constant(operand.default & ((1 << 8 * size) - 1), size)
        if operand.type == "@":
            return self._address(token)
        if operand.type == "#":
            number = integer(token)
            if number is None:
                raise self._error(f"immediate {token}")
            return number
        if operand.type == "label":
            name = self._labelled(token)
            return self.branch_targets.get(name, Label((name,)))
        if operand.vector:
            names = split(token[1:-1]) if token.startswith("{") else [token]
            kind = opcode.type_of(operand, len(names))
            if kind not in SIZES:
                raise self._error(f"operand {token}")
            return [self._scalar(opcode, operand, kind, name, behind) for name in names]
        return self._scalar(opcode, operand, opcode.type_of(operand), token, behind)

    def _scalar(self, opcode: Opcode, operand: Operand, kind: str, token: str, behind: list[Instruction]) -> Value:
        size = SIZES[kind]
        if token == "_":
            return None if operand.second else self._temporary(size)
        negated, token = token.startswith("!"), token.lstrip("!")
        if known := self._known(token):
            self.kernel.registers[known[0]] = known[1]
            if operand.negatable:
                return [known[0], int(negated)]
            if negated:
                raise self._error(f"negated operand {token}")
            return self._fitted(opcode, operand, kind, known[0], known[1], behind)
        if token in SPECIALS and operand.access == "read":
            self.kernel.registers[token] = SPECIALS[token]
            return self._fitted(opcode, operand, kind, token, SPECIALS[token], behind)
        if operand.access == "read":
            bits = 32 if token == "WARP_SZ" else literal(token, kind)
            if bits is not None:
                constant = Constant(bits, size)
                return [constant, int(negated)] if operand.negatable else constant
            match = re.fullmatch(r"([\w$.]+?)\s*(?:\+\s*(\d+))?", token)
            symbol = self._symbol(match[1], int(match[2] or 0), size) if match else None
            if symbol is not None:
                return symbol
        raise self._error(f"operand {token}")

    def _fitted(self, opcode: Opcode, operand: Operand, kind: str, name: str, size: int, behind: list[Instruction]) -> str:
        """The register, or one of the type's width where cvt's may be wider."""
        width = SIZES[kind]
        if size == width or opcode.row.layout and size >= width:
            return name
        if opcode.row.kind != "convert" or size < width:
            raise self._error(f"{name} has {size} bytes, not {width}")
        if operand.access == "read":
            if storage(size) == storage(width):
                return name  # handlers look at the low bits
            cut = self._temporary(4)
            self._emit("cvt.u32.u64", [cut, name])
            return cut
        if storage(size) == storage(width) and kind[0] != "s":
            return name  # narrow values lie zero-extended
        narrow = self._temporary(width)
        extend = matching(
            f"cvt.{kind[0] if kind[0] in 'su' else 'u'}{8 * size}.{kind if kind[0] in 'su' else 'u' + str(8 * width)}"
        )[0]
        behind.append(Instruction(extend, [name, narrow], line=self.line, place=self.place))
        return narrow

    def _address(self, token: str) -> Address:
        inside = ADDRESS.fullmatch(token)
        if not inside:
            raise self._error(f"address {token}")
        offset = integer((inside[2] or inside[3] or "0").replace(" ", ""))
        if offset is None:
            raise self._error(f"offset of {token}")
        if known := self._known(inside[1]):
            if known[1] not in (4, 8):
                raise self._error(f"{inside[1]} has {known[1]} bytes and holds no address")
            return Address(self._register(inside[1]), known[1], offset)
        absolute = integer(inside[1])
        base = Constant(absolute & (1 << 64) - 1, 8) if absolute is not None else self._symbol(inside[1], 0, 8)
        if base is None:
            raise self._error(f"address {token}")
        return Address(base, 8, offset)


def _threads(header: str, word: str) -> int | None:
    sizes = _sizes(header, word)
    return math.prod(sizes) if sizes else None


def _sizes(header: str, word: str) -> tuple[int, ...]:
    """Sizes in one to three dimensions that a kernel's header has after a word; () without it."""
    match = re.search(re.escape(word) + r"\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", header)
    return tuple(int(size) for size in match.groups() if size) if match else ()


def _aligned(opcode: Opcode, tokens: list[str]) -> list[str | None] | None:
    """A token for each operand of the row, None for those that are absent; None where the tokens do not fit the row."""
    operands, named = opcode.row.operands, opcode.row.named
    if absent := len(named) - len(tokens):
        optional = [n for n in named if operands[n].optional]
        if not 0 < absent <= len(optional):
            return None
        missing = optional[len(optional) - absent :]
        named = [n for n in named if n not in missing]
    result: list[str | None] = [None] * len(operands)
    for n, token in zip(named, tokens, strict=True):
        if n + 1 < len(operands) and operands[n + 1].second and "|" in token:
            token, result[n + 1] = (part.strip() for part in token.split("|"))
        if not _suits(operands[n], token, bool(opcode.row.layout)):
            return None
        result[n] = token
    return result


def _box(token: str) -> tuple[str, ...]:
    """`[map, {x, y}]`, a box of a tensor, as two operands: the map's address, and the coordinates."""
    inside = BOX.fullmatch(token) if token.endswith("}]") else None
    return (f"[{inside[1]}]", inside[2]) if inside else (token,)


def _suits(operand: Operand, token: str, may_be_single: bool) -> bool:
    """Whether the brackets around a token are those of the operand."""
    if token.startswith("{"):
        return operand.vector and operand.count in (None, token.count(",") + 1)
    return token.startswith("[") == (operand.type == "@") and (may_be_single or not operand.vector)
