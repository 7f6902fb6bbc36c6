"""The table of opcodes: its language, and that each of its rows has handlers and tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ptx.reading.opcodes import KINDS, SIZES, TABLE, matching, rows, spelled
from ptx.running.library import handlers

CALLS = ("PLAIN", "WAITS", "RETRIES")  # controls whose instructions call a handler
FROM_TABLE = ("integer", "float", "special", "convert", "predicate", "move")  # kinds that test_opcodes_*.py take from the table


def test_every_handler_has_a_row_and_every_row_its_handlers():
    named = {name for row in rows() if row.control in CALLS for name in row.names()}
    assert named == handlers()


def opcodes_in(text: str) -> tuple[set[str], set[str]]:
    """Opcodes that a test writes out, and expressions of those that have a part in braces (f-strings)."""
    words = set(re.findall(r"(?<![\w.%])[a-z]\w*(?:\.(?:[\w:]|\{[^{}\n]*\})+)*", text))
    parts = {word for word in words if "{" in word}
    return words - parts, {re.sub(r"\\\{.*?\\\}", r"[\\w.:]+", re.escape(word)) for word in parts}


def test_every_row_is_tested():
    """A row counts as tested where a test takes its opcodes from the table, or writes one of them."""
    text = "\n".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
    words, expressions = opcodes_in(text)
    written = {choice.row for word in words for choice in matching(word)}
    quoted = set(re.findall(r"\"(\w+)[\".]", text))
    untested = []
    for row in rows():
        opcodes = [*spelled(row), *spelled(row, whole=True)]
        taken = row.kind in FROM_TABLE and {opcode.split(".")[0] for opcode in opcodes} & quoted
        if not taken and row not in written:
            heads = {opcode.split(".")[0] for opcode in opcodes}
            near = [expression for expression in expressions if expression.split("\\.")[0] in heads]
            if not any(re.fullmatch(expression, opcode) for expression in near for opcode in opcodes):
                untested.append(row.pattern)
    assert untested == []


def test_rows_name_kinds_and_types_that_there_are():
    for row in rows():
        assert row.kind in KINDS
        for operand in row.operands:
            assert operand.type in {*SIZES, "t", "d", "2t", "e", "p", "@", "#", "label", "carry"}, (
                f"{TABLE.name}, line {row.line}"
            )


@pytest.mark.parametrize(
    ("opcode", "name", "numbers"),
    [
        ("add.rn.ftz.f32", "add.ftz.f32", ()),
        ("add.rz.f32", "add.rz.f32", ()),
        ("cvt.rzi.ftz.s32.f32", "cvt.s32.f32", (1, 1, 0)),
        ("setp.lt.and.ftz.f32", "setp.lt.ftz.f32", (1,)),
        ("ld.global.nc.L1::evict_last.L2::cache_hint.v4.b32", "ld.global", ()),
        ("ld.acquire.gpu.global.u32", "ld.acquire.global", ()),
        ("ld.shared::cta.b8", "ld.shared", ()),
        ("ld.u32", "ld.generic", ()),
        ("atom.acq_rel.gpu.global.add.f32", "atom.global.add.f32", (3,)),
        ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", "wgmma.mma_async.f32.bf16.bf16", (128, 16)),
        ("barrier.sync.aligned", "bar.sync", ()),
        ("barrier.sync", "barrier.sync", ()),
    ],
)
def test_modifiers_stay_or_become_numbers_or_go(opcode: str, name: str, numbers: tuple[int, ...]):
    assert {(one.name, one.numbers) for one in matching(opcode)} == {(name, numbers)}


@pytest.mark.parametrize(
    "opcode", ["add.f31", "add.ftz.rn.f32", "cvt.u32.f32", "ld.global.v3.f32", "nonsense", "add", "shl.u32", "max.sat.f32"]
)
def test_what_is_not_in_the_table_matches_nothing(opcode: str):
    assert matching(opcode) == ()
