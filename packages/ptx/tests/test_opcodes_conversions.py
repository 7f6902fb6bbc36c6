"""cvt of all kinds, each against exact fractions."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest

from ptx.reading.opcodes import SIZES, rows, spelled
from tests.helpers import exact
from tests.helpers.opcodes import LANES, Case, run
from tests.test_opcodes_floats import drawn as drawn_floats
from tests.test_opcodes_integers import signed

FLOATS = ("f16", "bf16", "f32", "f64")
FORMATS = (*FLOATS, "tf32")
BYTES = {"e4m3x2": exact.Format(8, 3, -6, 0x7F), "e5m2x2": exact.Format(8, 2, -14, 0x7F)}


def drawn(kind: str, seed: int) -> list[int]:
    """Edges and any values; floats also near the ends of the integers."""
    draws = random.Random(f"{kind} {seed}")
    if kind in ("f16x2", "e4m3x2", "e5m2x2"):
        return [draws.getrandbits(8 * SIZES[kind]) for _ in range(LANES)]
    if kind in FLOATS:
        values = drawn_floats(kind, 1, seed)[0]
        for n in range(0, LANES, 3):
            near = draws.choice([1, -1]) * (
                2.0 ** draws.choice([7, 8, 15, 16, 31, 32, 63, 64]) + draws.choice([-1.5, -0.5, 0, 0.5, 1])
            )
            x = exact.rounded(Fraction(near if draws.random() < 0.6 else draws.randrange(-20, 20) / 4), kind)
            values[n] = exact.bits(x, kind)
        return values
    bits = 8 * SIZES[kind]
    edges = [0, 1, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1, 0x7F, 0x80]
    one = lambda: draws.choice(edges) if draws.random() < 0.4 else draws.getrandbits(bits) >> draws.randrange(bits)  # noqa: E731
    return [one() % (1 << bits) for _ in range(LANES)]


def opcodes() -> list[str]:
    return list(dict.fromkeys(one for row in rows() if row.kind == "convert" for one in spelled(row)))


def conversions() -> list[Case]:
    cases = []
    for opcode in opcodes():
        to, source = opcode.split(".")[-2:]
        two = to in ("f16x2", "bf16x2", *BYTES) and source == "f32"
        cases.append(Case(opcode, [drawn(source, n) for n in range(1 + two)]))
    return cases


class Modifiers:
    def __init__(self, opcode: str) -> None:
        *words, self.to, self.source = opcode.split(".")[1:]
        rounding = next((word for word in words if word[0] == "r" and word != "relu"), "")
        self.whole = rounding.endswith("i")  # to an integer
        self.mode = rounding.removesuffix("i") or "rn"
        self.ftz, self.sat, self.relu, self.finite = (word in words for word in ("ftz", "sat", "relu", "satfinite"))


def clamped(value: int, kind: str) -> int:
    bits = 8 * SIZES[kind]
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)
    return max(low, min(value, high))


def to_integer(x: float, how: Modifiers) -> int:
    if math.isnan(x):
        return 1 << 8 * SIZES[how.to] - 1 if how.source == "f64" or SIZES[how.to] == 8 else 0
    if math.isinf(x):
        return clamped(1 << 70 if x > 0 else -(1 << 70), how.to)
    return clamped(exact.to_integer(Fraction(x), how.mode), how.to)


def to_float(x: Fraction | float, how: Modifiers, kind: str) -> float:
    """With all modifiers, as a number of `kind`."""
    if isinstance(x, float) and how.ftz and how.source in ("f32", "f16") and (how.source, kind) != ("f16", "f32"):
        x = exact.flushed(x, how.source)
    if how.whole and isinstance(x, float) and math.isfinite(x):
        x = math.copysign(float(exact.to_integer(Fraction(x), how.mode)), x)
    y = exact.rounded(x, kind, how.mode)
    if how.ftz and how.source == "f64":
        y = exact.flushed(y, kind)
    if how.sat:
        y = 0.0 if math.isnan(y) or y <= 0 else min(y, 1.0)
    if how.relu and y <= 0:
        y = 0.0
    largest = float(exact.FORMATS[kind].largest)
    return max(-largest, min(y, largest)) if how.finite and not math.isnan(y) else y


def byte_value(bits: int, kind: str) -> float:
    form = BYTES[kind]
    exponent, mantissa = (bits & 0x7F) >> form.mantissa, bits & (1 << form.mantissa) - 1
    if kind == "e4m3x2" and bits & 0x7F == 0x7F or kind == "e5m2x2" and exponent == 31 and mantissa:
        return math.nan
    size = math.ldexp(
        mantissa + (1 << form.mantissa) * (exponent > 0), max(exponent, 1) - 1 + form.least_exponent - form.mantissa
    )
    return math.copysign(math.inf if kind == "e5m2x2" and exponent == 31 else size, -1 if bits & 0x80 else 1)


def to_byte(x: float, how: Modifiers) -> int:
    """The nearest of all bytes, the even one of two."""
    if math.isnan(x):
        return 0x7F
    if how.relu and x <= 0:
        return 0
    largest = {"e4m3x2": 448.0, "e5m2x2": 57344.0}[how.to]
    x = max(-largest, min(x, largest))
    values = [(abs(byte_value(n, how.to) - abs(x)), n & 1, n) for n in range(128) if math.isfinite(byte_value(n, how.to))]
    return min(values)[2] | (0x80 if math.copysign(1, x) < 0 else 0)


def expected(how: Modifiers, *operands: int) -> int:
    halves = lambda word: (word >> 16, word & 0xFFFF)  # noqa: E731
    if how.to in BYTES:
        numbers = (
            [exact.value(x, "f32") for x in operands]
            if how.source == "f32"
            else [exact.value(x, "f16") for x in halves(operands[0])]
        )
        return to_byte(numbers[0], how) << 8 | to_byte(numbers[1], how)
    if how.source in BYTES:
        numbers = [byte_value(x, how.source) for x in (operands[0] >> 8, operands[0] & 0xFF)]
        upper, lower = (exact.bits(0.0 if how.relu and x <= 0 else x, "f16") for x in numbers)
        return upper << 16 | lower
    if how.to in ("f16x2", "bf16x2"):
        kind = how.to.removesuffix("x2")
        upper, lower = (exact.bits(to_float(exact.value(x, "f32"), how, kind), kind) for x in operands)
        return upper << 16 | lower
    if how.source in FLOATS:
        x = exact.value(operands[0], how.source)
        if how.to in FORMATS:
            return exact.bits(to_float(x, how, how.to), how.to)
        x = exact.flushed(x, "f32") if how.ftz and how.source == "f32" else x
        return to_integer(x, how) % (1 << 8 * SIZES[how.to])
    number = signed(operands[0], how.source)
    if how.to in FORMATS:
        return exact.bits(to_float(Fraction(number), how, how.to), how.to)
    return (clamped(number, how.to) if how.sat else number) % (1 << 8 * SIZES[how.to])


def test_every_conversion_is_exact_up_to_one_rounding():
    cases = conversions()
    assert len(cases) > 1000
    run(cases)
    for case in cases:
        how = Modifiers(case.opcode)
        for n in range(len(case.opcode) % 6, LANES, 6):  # each opcode on a sixth of the values: there are many
            operands = [source[n] for source in case.sources]
            assert case.results[0][n] == expected(how, *operands), (case.opcode, [hex(x) for x in operands])


@pytest.mark.parametrize(
    ("opcode", "sources", "result"),
    [
        ("cvt.rzi.s32.f32", [0x4F000000], 0x7FFFFFFF),  # 2^31
        ("cvt.rzi.s32.f32", [0x7FC00000], 0),
        ("cvt.rzi.s64.f32", [0x7FC00000], 1 << 63),
        ("cvt.rni.s32.f32", [0x40200000], 2),  # 2.5
        ("cvt.rn.bf16.f32", [0x3F808000], 0x3F80),  # half of the last bit: to even
        ("cvt.rn.bf16.f32", [0x3F818000], 0x3F82),
        ("cvt.rn.bf16x2.f32", [0x3F800000, 0x40000000], 0x3F804000),  # the first operand becomes the upper half
        ("cvt.rn.f32.s64", [(1 << 62) + 1], 0x5E800000),
        ("cvt.rp.f32.s64", [(1 << 62) + 1], 0x5E800001),
        ("cvt.rna.tf32.f32", [0x3F801000], 0x3F802000),
        ("cvt.rn.satfinite.e4m3x2.f32", [0x43E00000, 0x7F800000], 0x7E7E),  # 448 and infinity
        ("cvt.sat.u8.s32", [300], 255),
        ("cvt.s16.s8", [0x80], 0xFF80),
    ],
)
def test_results_worked_by_hand(opcode: str, sources: list[int], result: int):
    case = Case(opcode, [[source] for source in sources])
    run([case])
    assert case.results[0] == [result] * LANES
