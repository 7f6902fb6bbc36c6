"""Floating-point opcodes, each against exact fractions that are rounded once; approximations against their documented errors."""

from __future__ import annotations

import math
import random

import pytest

from ptx.reading.opcodes import matching
from ptx.running.reports import Options
from tests.helpers import exact
from tests.helpers.opcodes import LANES, Case, names, run

F32 = [
    0,
    0x80000000,
    1,
    0x80000001,
    0x007FFFFF,
    0x00800000,
    0x3F800000,
    0xBF800000,
    0x3F800001,
    0x40490FDB,
    0x7F7FFFFF,
    0xFF7FFFFF,
]
F32 += [0x7F800000, 0xFF800000, 0x7FC00000, 0xFF812345, 0x33800000, 0x34000001, 0x4B800001, 0xCB800000, 0x1F800001, 0x5F000000]
F16 = [
    0,
    0x8000,
    1,
    0x8001,
    0x03FF,
    0x0400,
    0x3C00,
    0xBC00,
    0x3C01,
    0x4248,
    0x7BFF,
    0xFBFF,
    0x7C00,
    0xFC00,
    0x7E00,
    0xFD01,
    0x1000,
]
BF16 = sorted({bits >> 16 for bits in F32} | {0x3F81, 0x3380, 0x0080, 0x7F7F})
F64 = [0, 1 << 63, 1, 0x000FFFFFFFFFFFFF, 0x0010000000000000, 0x3FF0000000000000, 0xBFF0000000000001, 0x400921FB54442D18]
F64 += [0x7FEFFFFFFFFFFFFF, 0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000000, 0x3CA0000000000000, 0x4340000000000001]
EDGES = {"f32": F32, "f16": F16, "bf16": BF16, "f64": F64}


def drawn(kind: str, count: int, seed: int, near: bool = True) -> list[list[int]]:
    """`count` lists of LANES numbers: edges with one another, numbers near 1, and any bits."""
    draws = random.Random(f"{kind} {seed}")
    form, edges = exact.FORMATS[kind], EDGES[kind]

    def one() -> int:
        choice = draws.randrange(4)
        if choice < 2:
            return draws.choice(edges)
        if choice == 2:
            return draws.getrandbits(form.bits)
        exponent = -form.least_exponent + 1 + draws.randint(-3, 3)
        return draws.getrandbits(1) << form.bits - 1 | exponent << form.mantissa | draws.getrandbits(form.mantissa)

    return [[one() for _ in range(LANES)] for _ in range(count)]


def packed(kind: str, count: int) -> list[list[int]]:
    """Sources of an opcode: of packed types two numbers in each."""
    base = kind.removesuffix("x2")
    width = exact.FORMATS[base].bits
    lower = drawn(base, count, 0)
    if not kind.endswith("x2"):
        return lower
    return [
        [low | high << width for low, high in zip(*pair, strict=True)] for pair in zip(lower, drawn(base, count, 1), strict=True)
    ]


def parts(word: int, kind: str) -> list[int]:
    base = kind.removesuffix("x2")
    width = exact.FORMATS[base].bits
    return [word & ((1 << width) - 1), word >> width] if kind.endswith("x2") else [word]


class Modifiers:
    def __init__(self, opcode: str) -> None:
        words = opcode.split(".")
        self.head, self.kind = words[0], words[-1]
        self.base = self.kind.removesuffix("x2")
        self.mode = next((word for word in words if word in ("rn", "rz", "rm", "rp")), "rn")
        self.words = words
        self.ftz, self.sat, self.relu, self.nan, self.xorsign = (w in words for w in ("ftz", "sat", "relu", "NaN", "xorsign"))

    def of(self, *numbers: float) -> float:
        if self.ftz:
            numbers = tuple(exact.flushed(x, self.base) for x in numbers)
        result = self.calculate(*numbers)
        if self.ftz:
            result = exact.flushed(result, self.base)
        if self.sat:
            result = 0.0 if math.isnan(result) or result <= 0 else min(result, 1.0)
        return 0.0 if self.relu and result <= 0 else result

    def calculate(self, *numbers: float) -> float:
        if self.head in ("min", "max"):
            choose = exact.minimum if self.head == "min" else exact.maximum
            if not self.xorsign:
                result = numbers[0]
                for number in numbers[1:]:
                    result = choose(result, number, self.nan)
                return result
            sign = math.copysign(1, numbers[0]) * math.copysign(1, numbers[1])
            return sign * choose(abs(numbers[0]), abs(numbers[1]), self.nan)
        if self.head == "copysign":
            return math.copysign(numbers[1], numbers[0])
        return getattr(exact, "fma" if self.head == "mad" else self.head)(*numbers, self.base, self.mode)


def arithmetic() -> list[tuple[str, int]]:
    """Opcodes with the number of their sources."""
    heads = ("add", "sub", "mul", "fma", "mad", "div", "rcp", "sqrt", "min", "max", "copysign")
    kinds = {*exact.FORMATS, *(f"{kind}x2" for kind in exact.FORMATS)}
    opcodes = [(opcode, row) for opcode in dict.fromkeys(names(*heads)) for row in matching(opcode)]
    return [
        (opcode, sum(o.access == "read" for o in choice.row.operands))
        for opcode, choice in opcodes
        if opcode.split(".")[-1] in kinds and ".f32." not in opcode and choice.row.kind == "float"
    ]


def test_arithmetic_is_exact_up_to_one_rounding():
    cases = [Case(opcode, packed(opcode.split(".")[-1], count)) for opcode, count in arithmetic()]
    assert len(cases) > 200
    run(cases)
    for case in cases:
        modifiers = Modifiers(case.opcode)
        for n, result in enumerate(case.results[0]):
            sources = [parts(source[n], modifiers.kind) for source in case.sources]
            numbers = [modifiers.of(*(exact.value(x, modifiers.base) for x in pair)) for pair in zip(*sources, strict=True)]
            bits = [exact.bits(x, modifiers.base) for x in numbers]
            assert parts(result, modifiers.kind) == bits, (case.opcode, [hex(source[n]) for source in case.sources])


def test_neg_and_abs_change_the_sign_alone():
    opcodes = [one for one in names("neg", "abs") if one.split(".")[-1].removesuffix("x2") in exact.FORMATS]
    cases = [Case(opcode, packed(opcode.split(".")[-1], 1)) for opcode in opcodes]
    run(cases)
    for case in cases:
        modifiers = Modifiers(case.opcode)
        form = exact.FORMATS[modifiers.base]
        sign = 1 << form.bits - 1
        for source, result in zip(case.sources[0], case.results[0], strict=True):
            for before, after in zip(parts(source, modifiers.kind), parts(result, modifiers.kind), strict=True):
                if modifiers.ftz and not before >> form.mantissa & (1 << form.bits - 1 - form.mantissa) - 1:
                    before &= sign
                assert after == (before ^ sign if modifiers.head == "neg" else before & ~sign), case.opcode


def test_mixed_arithmetic_takes_narrow_factors():
    cases = []
    for opcode in names("add", "sub", "fma"):
        narrow = opcode.split(".")[-1]
        if ".f32." in opcode:
            factors = 2 if opcode.startswith("fma") else 1
            cases.append(Case(opcode, [*drawn(narrow, factors, 3), *drawn("f32", 1, 3)]))
    run(cases)
    assert len(cases) == 12
    for case in cases:
        narrow = case.opcode.split(".")[-1]
        for n, result in enumerate(case.results[0]):
            numbers = [exact.value(source[n], narrow) for source in case.sources[:-1]] + [exact.value(case.sources[-1][n], "f32")]
            expected = getattr(exact, case.opcode.split(".")[0])(*numbers, "f32", "rn")
            if ".sat." in case.opcode:
                expected = 0.0 if math.isnan(expected) or expected <= 0 else min(expected, 1.0)
            assert result == exact.bits(expected, "f32"), case.opcode


# The largest errors that the PTX ISA documents: relative, or for sin and cos absolute; lg2: absolute near 1.
FUNCTIONS = {
    "ex2": (lambda x: 2.0**x if x < 1100 else math.inf, 2**-22),
    "lg2": (lambda x: math.log2(x) if x > 0 else -math.inf if x == 0 else math.nan, 2**-22),
    "sin": (lambda x: math.sin(x) if math.isfinite(x) else math.nan, 2**-20),
    "cos": (lambda x: math.cos(x) if math.isfinite(x) else math.nan, 2**-20),
    "rsqrt": (lambda x: math.nan if x < 0 else math.copysign(math.inf, x) if x == 0 else 1 / math.sqrt(x), 2**-22),
    "rcp": (lambda x: math.copysign(math.inf, x) if x == 0 else 1 / x, 2**-23),
    "sqrt": (lambda x: math.nan if x < 0 else math.sqrt(x), 2**-23),
    "tanh": (math.tanh, 2**-11),
}
HALF_ERRORS = {("tanh", "f16"): 2**-10.987, ("tanh", "bf16"): 2**-8, ("ex2", "f16"): 2**-9.9, ("ex2", "bf16"): 2**-7}
UNITS = {"f32": 2**-24, "f16": 2**-11, "bf16": 2**-8, "f64": 2**-20}  # rounding of the result; f64: the documented error


def approximations() -> list[Case]:
    unary = [Case(opcode, packed(opcode.split(".")[-1], 1)) for opcode in names(*FUNCTIONS) if ".approx." in opcode]
    return unary + [Case(opcode, packed("f32", 2)) for opcode in names("div") if "approx" in opcode or "full" in opcode]


@pytest.mark.parametrize("noise", [False, True])
def test_approximations_err_no_more_than_documented(noise):
    cases = approximations()
    assert len(cases) == 30
    run(cases, Options(noise=noise, seed=3))
    for case in cases:
        modifiers = Modifiers(case.opcode)
        for n, result in enumerate(case.results[0]):
            words = [parts(source[n], modifiers.kind) for source in case.sources]
            for operands, after in zip(zip(*words, strict=True), parts(result, modifiers.kind), strict=True):
                numbers = [exact.value(word, modifiers.base) for word in operands]
                check_approximation(modifiers, numbers, exact.value(after, modifiers.base), noise)


def check_approximation(modifiers: Modifiers, numbers: list[float], result: float, noise: bool) -> None:
    if modifiers.ftz:
        numbers = [exact.flushed(x, modifiers.base) for x in numbers]
    if modifiers.head == "div":
        expected, error = exact.div(*numbers, "f64", "rn"), 2**-23
        if "approx" in modifiers.words and 2.0**126 < abs(numbers[1]) < math.inf:
            expected = math.nan if not math.isfinite(numbers[0]) else math.copysign(0.0, numbers[0])
    else:
        function, error = FUNCTIONS[modifiers.head]
        expected = numbers[0] if math.isnan(numbers[0]) else function(numbers[0])
        error = HALF_ERRORS.get((modifiers.head, modifiers.base), error)
    if math.isnan(expected):
        assert math.isnan(result), (modifiers.words, numbers)
        return
    nearest = exact.rounded(expected, modifiers.base)
    if modifiers.ftz:
        nearest = exact.flushed(nearest, modifiers.base)
    if not math.isfinite(nearest) or nearest == 0:
        small = 2.0 ** exact.FORMATS[modifiers.base].least_exponent
        largest = float(exact.FORMATS[modifiers.base].largest)
        assert result == nearest or nearest == 0 and abs(result) <= small or abs(result) == largest, (modifiers.words, numbers)
        return
    absolute = modifiers.head in ("sin", "cos") or modifiers.head == "lg2" and 0.5 < numbers[0] < 2
    bound = (error if noise else 0) * (1 if absolute else abs(expected)) + UNITS[modifiers.base] * abs(expected) * 1.01
    step = 2.0 ** (exact.FORMATS[modifiers.base].least_exponent - exact.FORMATS[modifiers.base].mantissa)  # of subnormal numbers
    flushed_to_zero = modifiers.ftz and result == 0 and abs(nearest) < 2.0 ** exact.FORMATS[modifiers.base].least_exponent * 1.001
    assert abs(result - expected) <= bound + step or flushed_to_zero, (modifiers.words, numbers, result, expected)


def test_noise_depends_on_the_input_and_its_number_alone():
    results = []
    for seed, noise in enumerate((1, 1, 2)):
        case = Case("ex2.approx.ftz.f32", [[0x3F012345 + n for n in range(LANES)]])
        run([case], Options(noise=noise, seed=seed))
        results.append(case.results)
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize(
    ("opcode", "sources", "result"),
    [
        ("add.rn.f32", [0x3F800000, 0x33800000], 0x3F800000),  # 1 + 2^-24: the half goes to the even number
        ("add.rp.f32", [0x3F800000, 0x00000001], 0x3F800001),  # any rest lifts it
        ("add.rm.f32", [0x3F800000, 0xBF800000], 0x80000000),  # 1 - 1 rounded down is -0
        ("mul.rn.ftz.f32", [0x00800000, 0x3F000000], 0),  # half of the smallest normal number
        ("fma.rn.f32", [0x3F800001, 0x3F800001, 0xBF800002], 0x28800000),  # the square's last bit is not lost
        ("max.f32", [0x80000000, 0], 0),
        ("max.f32", [0x7FC00000, 0x3F800000], 0x3F800000),
        ("max.NaN.f32", [0x7FC00000, 0x3F800000], 0x7FFFFFFF),
        ("add.rn.f16", [0x7BFF, 0x5000], 0x7C00),  # 65504 + 32 is infinite
        ("fma.rn.relu.bf16", [0x3F80, 0xBF80, 0], 0),
        ("ex2.approx.ftz.f32", [0xC2FC0000], 0x00800000),  # 2^-126
        ("div.rn.f32", [0x3F800000, 0x40400000], 0x3EAAAAAB),
        ("sqrt.rz.f32", [0x40000000], 0x3FB504F3),
    ],
)
def test_results_worked_by_hand(opcode: str, sources: list[int], result: int):
    case = Case(opcode, [[source] for source in sources])
    run([case])
    assert case.results[0] == [result] * LANES
