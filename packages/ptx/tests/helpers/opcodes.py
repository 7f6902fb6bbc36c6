"""Single opcodes on many values: each is one instruction of a kernel, and its results come back as bits."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ptx.reading.opcodes import SIZES, Opcode, matching, rows, spelled
from ptx.running.launch import Launch, launch
from ptx.running.memory import Memory
from ptx.running.program import Program
from ptx.running.reports import Options

LANES = 128  # values that each opcode sees


@dataclass
class Case:
    """An opcode with the bits of its operands, a list of up to LANES numbers each; a text is an operand as it stands."""

    opcode: str
    sources: list[list[int] | str]
    results: list[list[int]] | None = None  # of each destination, after `run`

    @functools.cached_property
    def fitting(self) -> Opcode:
        """The row with as many operands."""
        count = len(self.sources)
        choices = matching(self.opcode)
        assert choices, self.opcode
        read = lambda choice: [o for o in choice.row.operands if o.access == "read" and o.type != "carry"]  # noqa: E731
        return next(choice for choice in choices if sum(not o.optional for o in read(choice)) <= count <= len(read(choice)))

    def types(self, access: tuple[str, ...]) -> list[str]:
        return [
            self.fitting.type_of(o)
            for o in self.fitting.row.operands
            if o.access in access and not o.second and o.type != "carry"
        ]


def _register(kind: str, name: str) -> str:
    letter = "pred" if kind == "pred" else f"b{8 * SIZES[kind]}"
    return f".reg .{letter} {name};\n"


def _size(kind: str) -> int:
    return SIZES[kind] or 4


def run(cases: list[Case], options: Options | None = None) -> Launch:
    """Runs all in one kernel and keeps each case's results."""
    body, data, out = "", b"", 0
    places: list[list[tuple[str, int]]] = []
    for number, case in enumerate(cases):
        operands = []
        for n, (kind, source) in enumerate(zip(case.types(("read",)), case.sources, strict=False)):
            if isinstance(source, str):
                operands.append(source)
                continue
            name, size = f"%a{number}_{n}", _size(kind)
            values = list(itertools.islice(itertools.cycle(source), LANES))
            body += _register(kind, name) + f"mad.lo.u64 %address, %lane, {size}, %input;\n"
            if kind == "pred":
                body += f"ld.global.u32 %word, [%address+{len(data)}]; setp.ne.u32 {name}, %word, 0;\n"
            else:
                body += f"ld.global.b{8 * size} {name}, [%address+{len(data)}];\n"
            data += b"".join((value & ((1 << 8 * size) - 1)).to_bytes(size, "little") for value in values)
            operands.append(name)
        results = []
        for n, kind in enumerate(case.types(("written",))):
            results.append((f"%d{number}_{n}", kind))
            body += _register(kind, f"%d{number}_{n}")
        bar = (
            [o for o in case.fitting.row.operands if o.second] and case.fitting.row.head == "" and case.opcode.startswith("setp")
        )
        first = results[0][0]
        if bar:
            results.append((f"%q{number}", "pred"))
            body += _register("pred", f"%q{number}")
            first += f"|%q{number}"
        body += f"{case.opcode} {', '.join([first, *operands])};\n"
        places.append([])
        for name, kind in results:
            size = _size(kind)
            body += f"mad.lo.u64 %address, %lane, {size}, %output;\n"
            if kind == "pred":
                body += f"selp.u32 %word, 1, 0, {name}; st.global.u32 [%address+{out}], %word;\n"
            else:
                body += f"st.global.b{8 * size} [%address+{out}], {name};\n"
            places[-1].append((kind, out))
            out += size * LANES
    raw, done = _launch(body, data, out, options or Options())
    for case, where in zip(cases, places, strict=True):
        case.results = []
        for kind, place in where:
            words = raw[place : place + _size(kind) * LANES].view(
                {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[_size(kind)]
            )
            case.results.append([int(word) for word in words])
    return done


def _launch(body: str, data: bytes, out: int, options: Options) -> tuple[np.ndarray, Launch]:
    text = f"""
.version 8.7
.target sm_100a
.address_size 64
.visible .entry tested(.param .u64 input, .param .u64 output)
{{
.reg .b64 %input, %output, %lane, %address;
.reg .b32 %word;
ld.param.u64 %input, [input];
ld.param.u64 %output, [output];
mov.u32 %word, %tid.x;
cvt.u64.u32 %lane, %word;
{body}ret;
}}
"""
    memory = Memory()
    source = torch.from_numpy(np.frombuffer(data or b"\0" * 8, np.uint8).copy())
    result = torch.zeros(out, dtype=torch.uint8)
    values: list[Any] = [memory.place(source, "input"), memory.place(result, "output")]
    done = launch(Program(text, "tested"), values, (1,), (LANES,), 0, memory, options)
    memory.back()
    return result.numpy(), done


def names(*heads: str) -> list[str]:
    """Opcodes of the table whose first word is one of `heads`: one for each handler and each plain number."""
    spellings = dict.fromkeys(opcode for row in rows() for opcode in spelled(row))
    return [opcode for opcode in spellings if opcode.split(".")[0] in heads]
