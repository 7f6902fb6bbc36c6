"""Comparisons, choices, moves, and logic of predicates."""

from __future__ import annotations

import math
import random

import pytest
import torch

from ptx.reading.opcodes import SIZES
from tests.helpers import exact
from tests.helpers.opcodes import LANES, Case, names, run
from tests.helpers.programs import run as run_program
from tests.test_opcodes_conversions import drawn
from tests.test_opcodes_integers import signed

COMBINE = {"and": lambda a, b: a and b, "or": lambda a, b: a or b, "xor": lambda a, b: a != b}
ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


def compared(word: str, a: float, b: float) -> bool:
    """`...u` and `nan` are true where one of the two is NaN, all others false."""
    unordered = math.isnan(a) or math.isnan(b)
    if word in ("num", "nan"):
        return unordered == (word == "nan")
    sign = ORDERED[word if word in ORDERED else word.removesuffix("u")]
    return word not in ORDERED if unordered else eval(f"a {sign} b", {"a": a, "b": b})


def equal_often(kind: str) -> list[list[int]]:
    """Two lists whose numbers are equal in a fourth of the lanes; for a pair each half, in lanes of its own."""
    if kind.endswith("x2"):
        return [[low | high << 16 for low, high in zip(x, [*x[1:], x[0]], strict=True)] for x in equal_often(kind[:-2])]
    first, second = drawn(kind, 0), drawn(kind, 1)
    return [first, [a if n % 4 == 0 else b for n, (a, b) in enumerate(zip(first, second, strict=True))]]


def number(word: int, kind: str, ftz: bool) -> float | int:
    if kind not in exact.FORMATS:
        return signed(word, kind)
    x = exact.value(word, kind)
    return exact.flushed(x, kind) if ftz else x


PREDICATE = [random.Random(5).randrange(2) for _ in range(LANES)]


def comparisons(head: str) -> list[Case]:
    """Each comparison alone, and `lt` or `eq` combined with another predicate in all ways."""
    cases = []
    for opcode in names(head):
        kind = opcode.split(".")[-1]
        combined = set(opcode.split(".")) & COMBINE.keys()
        if combined and opcode.split(".")[1] != ("eq" if kind[0] == "b" and kind[1] != "f" else "lt"):
            continue
        cases.append(Case(opcode, [*equal_often(kind), *([PREDICATE] if combined else [])]))
    return cases


def holds(opcode: str, operands: list[int], opposite: bool = False) -> bool:
    words = opcode.split(".")
    values = [number(x, words[-1], "ftz" in words) for x in operands[:2]]
    result = compared(words[1], *values) != opposite
    how = next((word for word in words if word in COMBINE), None)
    return COMBINE[how](result, bool(operands[2])) if how else result


def alone(opcode: str, operands: list[int]) -> list[tuple[str, list[int]]]:
    """The comparisons that one instruction makes: that of its numbers, or those of the low and the high halves."""
    if not opcode.endswith("x2"):
        return [(opcode, operands)]
    a, b, *predicate = operands
    return [(opcode[:-2], [a >> shift & 0xFFFF, b >> shift & 0xFFFF, *predicate]) for shift in (0, 16)]


def test_comparisons_into_two_predicates():
    cases = comparisons("setp")
    assert len(cases) == 234
    run(cases)
    for case in cases:
        for n in range(len(case.opcode) % 2, LANES, 2):
            operands = [source[n] for source in case.sources]
            got = [bool(result[n]) for result in case.results]
            expected = [holds(*one) for one in alone(case.opcode, operands)]
            if len(expected) == 1:
                expected.append(holds(case.opcode, operands, opposite=True))
            assert got == expected, (case.opcode, operands)


TRUE = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80}


def test_comparisons_into_numbers():
    cases = comparisons("set")
    assert len(cases) > 400
    run(cases)
    for case in cases:
        to = case.opcode.split(".")[-2]
        true = TRUE.get(to.removesuffix("x2"), (1 << 8 * SIZES[to]) - 1)
        for n in range(len(case.opcode) % 8, LANES, 8):
            operands = [source[n] for source in case.sources]
            expected = sum(true * holds(*one) << 16 * half for half, one in enumerate(alone(case.opcode, operands)))
            assert case.results[0][n] == expected, (case.opcode, operands)


def test_a_negated_predicate_is_combined():
    out = torch.zeros(32, dtype=torch.int32)
    run_program(
        """
        setp.lt.u32 %p2, %r1, 8;
        setp.lt.and.u32 %p3|%p4, %r1, 16, !%p2;
        selp.u32 %r10, 1, 0, %p3;
        selp.u32 %r11, 2, 0, %p4;
        set.ge.or.u32.u32 %r12, %r1, 30, !%p2;
        and.b32 %r12, %r12, 4;
        or.b32 %r10, %r10, %r11;
        or.b32 %r10, %r10, %r12;
        st.global.u32 [%rd100], %r10;
        """,
        out,
    )
    assert out.tolist() == [0] * 8 + [1 + 4] * 8 + [2 + 4] * 16


def test_not_pred():
    case = Case("not.pred", [PREDICATE])
    run([case])
    assert [bool(x) for x in case.results[0]] == [not x for x in PREDICATE]


def test_properties_of_one_number():
    kinds = {"finite": math.isfinite, "infinite": math.isinf, "number": lambda x: not math.isnan(x), "notanumber": math.isnan}
    cases = [Case(opcode, [drawn(opcode.split(".")[-1], 0)]) for opcode in names("testp")]
    run(cases)
    assert len(cases) == 12
    for case in cases:
        _, which, kind = case.opcode.split(".")
        least = 2.0 ** exact.FORMATS[kind].least_exponent
        tests = kinds | {
            "normal": lambda x, least=least: math.isfinite(x) and abs(x) >= least,
            "subnormal": lambda x, least=least: 0 < abs(x) < least,
        }
        for source, result in zip(case.sources[0], case.results[0], strict=True):
            assert bool(result) == tests[which](exact.value(source, kind)), (case.opcode, hex(source))


def test_logic_of_predicates():
    second = [random.Random(6).randrange(2) for _ in range(LANES)]
    cases = [Case(f"{head}.pred", [PREDICATE, second]) for head in COMBINE] + [Case("mov.pred", [PREDICATE])]
    run(cases)
    for case in cases:
        for *operands, result in zip(*case.sources, case.results[0], strict=True):
            combine = COMBINE.get(case.opcode.split(".")[0], lambda a: a)
            assert bool(result) == bool(combine(*operands)), case.opcode


def bits_of(kind: str, seed: int) -> list[int]:
    draws = random.Random(f"{kind} {seed}")
    return [draws.getrandbits(8 * SIZES[kind]) for _ in range(LANES)]


def test_moves_and_choices():
    moves = [Case(one, [bits_of(one.split(".")[-1], 0)]) for one in names("mov") if one not in ("mov.pred", "mov.b128")]
    choices = [Case(one, [bits_of(one.split(".")[-1], 0), bits_of(one.split(".")[-1], 1), PREDICATE]) for one in names("selp")]
    run(moves + choices)
    assert len(moves) == 13 and len(choices) == 11
    for case in moves:
        assert case.results[0] == case.sources[0], case.opcode
    for case in choices:
        assert case.results[0] == [a if p else b for a, b, p in zip(*case.sources, strict=True)], case.opcode


def test_choices_by_sign():
    cases = [
        Case(one, [bits_of(one.split(".")[-2], 0), bits_of(one.split(".")[-2], 1), drawn(one.split(".")[-1], 2)])
        for one in names("slct")
    ]
    run(cases)
    for case in cases:
        for a, b, sign, result in zip(*case.sources, case.results[0], strict=True):
            x = number(sign, case.opcode.split(".")[-1], ".ftz." in case.opcode)
            assert result == (a if x >= 0 else b), (case.opcode, x)


PARTS = [("b16", 2, "b8"), ("b32", 2, "b16"), ("b32", 4, "b8"), ("b64", 2, "b32"), ("b64", 4, "b16"), ("b128", 2, "b64")]


@pytest.mark.parametrize(("kind", "count", "part"), PARTS)
def test_parts_of_a_register(kind: str, count: int, part: str):
    """A register is made of parts, and split again in the opposite order."""
    step = SIZES[part]
    data = torch.randint(0, 256, (32, count * step), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = torch.zeros_like(data)
    into = [f"%part{n}" for n in range(count)]
    loads = "".join(f"ld.global.{part} {name}, [%rd200+{n * step}];" for n, name in enumerate(into))
    stores = "".join(f"st.global.{part} [%rd201+{n * step}], {name};" for n, name in enumerate(into))
    run_program(
        f"""
        .reg .{part} {", ".join(into)}; .reg .{kind} %whole; .reg .b64 %rd200, %rd201;
        mad.wide.u32 %rd200, %r0, {count * step}, %rd0; mad.wide.u32 %rd201, %r0, {count * step}, %rd1;
        {loads}
        mov.{kind} %whole, {{{", ".join(into)}}};
        mov.{kind} {{{", ".join(into[::-1])}}}, %whole;
        {stores}
        """,
        data,
        out,
    )
    assert out.view(32, count, step).flip(1).equal(data.view(32, count, step))


def test_a_move_of_128_bits_and_a_part_that_is_dropped():
    out = torch.zeros(32, 2, dtype=torch.int64)
    run_program(
        """
        .reg .b128 %wide, %copy; .reg .b64 %low, %high;
        cvt.u64.u32 %low, %r0;
        shl.b64 %high, %low, 40;
        mov.b128 %wide, {%low, %high};
        mov.b128 %copy, %wide;
        mov.b128 {_, %high}, %copy;
        mad.wide.u32 %rd90, %r0, 16, %rd0;
        createpolicy.fractional.L2::evict_first.b64 %low, 1.0;
        st.global.v2.b64 [%rd90], {%low, %high};
        """,
        out,
    )
    assert out.tolist() == [[0, n << 40] for n in range(32)]  # a cache policy is 0 here
