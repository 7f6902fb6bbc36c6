"""Integer opcodes, each against Python's integers."""

from __future__ import annotations

import random
import re

import pytest

from ptx.reading.opcodes import rows, spelled
from tests.helpers.opcodes import LANES, Case, names, run

EDGES = {bits: [0, 1, 2, 3, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1, (1 << bits - 1) + 1] for bits in (16, 32, 64)}
COUNTS = [0, 1, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 255, 256, 300, 0xFFFFFFFF, 0x80000000]


def width(kind: str) -> int:
    return int(kind[1:].removesuffix("x2"))


def signed(value: int, kind: str) -> int:
    """The number that bits stand for in a type."""
    bits = width(kind)
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> bits - 1 else value


def drawn(kind: str, seed: int) -> list[int]:
    draws = random.Random(f"{kind} {seed}")
    bits = width(kind)
    one = lambda: draws.choice(EDGES[bits]) if draws.random() < 0.5 else draws.getrandbits(bits) >> draws.randrange(bits)  # noqa: E731
    if kind.endswith("x2"):
        return [one() | one() << bits for _ in range(LANES)]
    return [one() for _ in range(LANES)]


def counts(seed: int) -> list[int]:
    draws = random.Random(seed)
    return [draws.choice(COUNTS) if draws.random() < 0.5 else draws.randrange(70) for _ in range(LANES)]


def quotient(a: int, b: int, kind: str) -> int:
    if b == 0:
        return -1  # as GPUs do; PTX leaves it open
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def clamp(value: int) -> int:
    return max(-(1 << 31), min(value, (1 << 31) - 1))


def multiply(a: int, b: int, kind: str, high: bool) -> int:
    return signed(a * b >> (width(kind) if high else 0), kind)


BINARY = {
    "add": lambda a, b, kind: a + b,
    "sub": lambda a, b, kind: a - b,
    "div": quotient,
    "rem": lambda a, b, kind: a - b * quotient(a, b, kind) if b else a,
    "min": lambda a, b, kind: min(a, b),
    "max": lambda a, b, kind: max(a, b),
    "and": lambda a, b, kind: a & b,
    "or": lambda a, b, kind: a | b,
    "xor": lambda a, b, kind: a ^ b,
}


def test_sums_quotients_extrema_and_logic():
    opcodes = [one for one in names(*BINARY) if re.fullmatch(r"\w+(\.relu)?\.[usb]\d+(x2)?", one)]
    cases = [Case(one, [drawn(one.split(".")[-1], 0), drawn(one.split(".")[-1], 1)]) for one in opcodes]
    run(cases)
    assert len(cases) > 45
    for case in cases:
        head, *modifiers, kind = case.opcode.split(".")
        for a, b, result in zip(*case.sources, case.results[0], strict=True):
            for shift in (0, 16) if kind.endswith("x2") else (0,):
                expected = BINARY[head](signed(a >> shift, kind), signed(b >> shift, kind), kind)
                expected = max(expected, 0) if modifiers else expected
                assert (result >> shift) % (1 << width(kind)) == expected % (1 << width(kind)), (case.opcode, a, b)


def three(opcode: str) -> int:
    """The exact value of a product with its sum, as a function of the operands."""
    head, *modifiers, kind = opcode.split(".")
    wide, high, saturates = "wide" in modifiers, "hi" in modifiers, "sat" in modifiers

    def of(a: int, b: int, c: int = 0) -> int:
        a, b = signed(a, kind), signed(b, kind)
        if head == "sad":
            return signed(c, kind) + abs(a - b)
        result = (a * b if wide else multiply(a, b, kind, high)) + (c if wide else signed(c, kind))
        return clamp(result) if saturates else result

    return of


def test_products_and_their_sums():
    opcodes = [one for one in names("mul", "mad", "sad") if one.split(".")[-1][0] in "us" and ".cc" not in one]
    cases = []
    for one in opcodes:
        kind = one.split(".")[-1]
        third = f"{kind[0]}{2 * width(kind)}" if "wide" in one else kind
        cases.append(Case(one, [drawn(kind, 0), drawn(kind, 1), *([] if one.startswith("mul") else [drawn(third, 2)])]))
    run(cases)
    assert len(cases) > 35
    for case in cases:
        bits = width(case.opcode.split(".")[-1]) * (2 if "wide" in case.opcode else 1)
        for *operands, result in zip(*case.sources, case.results[0], strict=True):
            assert result == three(case.opcode)(*operands) % (1 << bits), (case.opcode, operands)


def test_saturated_sums():
    cases = [Case(f"{head}.sat.s32", [drawn("s32", 0), drawn("s32", 1)]) for head in ("add", "sub")]
    run(cases)
    for case, sign in zip(cases, (1, -1), strict=True):
        for a, b, result in zip(*case.sources, case.results[0], strict=True):
            assert signed(result, "s32") == clamp(signed(a, "s32") + sign * signed(b, "s32"))


def leading_zeros(a: int, kind: str) -> int:
    return width(kind) - a.bit_length()


def highest(a: int, kind: str) -> int:
    return (~a if a < 0 else a).bit_length() - 1


UNARY = {
    "neg": lambda a, kind: -a,
    "abs": lambda a, kind: abs(a),
    "not": lambda a, kind: ~a,
    "cnot": lambda a, kind: int(a == 0),
    "popc": lambda a, kind: a.bit_count(),
    "clz": leading_zeros,
    "brev": lambda a, kind: int(f"{a:0{width(kind)}b}"[::-1], 2),
    "bfind": highest,
}


def test_unary_opcodes():
    cases = [Case(one, [drawn(one.split(".")[-1], 0)]) for one in names(*UNARY) if re.search(r"\.[usb]\d+$", one)]
    run(cases)
    for case in cases:
        head, *modifiers, kind = case.opcode.split(".")
        bits = 32 if head in ("popc", "clz", "bfind") else width(kind)
        for a, result in zip(case.sources[0], case.results[0], strict=True):
            expected = UNARY[head](signed(a, kind), kind)
            if modifiers and expected >= 0:
                expected = width(kind) - 1 - expected
            assert result == expected % (1 << bits), (case.opcode, a)


def test_shifts_by_any_count():
    cases = [Case(one, [drawn(one.split(".")[-1], 0), counts(1)]) for one in names("shl", "shr")]
    run(cases)
    assert len(cases) == 12
    for case in cases:
        head, kind = case.opcode.split(".")
        for a, count, result in zip(*case.sources, case.results[0], strict=True):
            expected = signed(a, kind) << min(count, 64) if head == "shl" else signed(a, kind) >> min(count, 64)
            assert result == expected % (1 << width(kind)), (case.opcode, a, count)


def test_funnel_shifts():
    cases = [Case(one, [drawn("b32", 0), drawn("b32", 1), counts(2)]) for one in names("shf")]
    run(cases)
    assert len(cases) == 4
    for case in cases:
        for low, high, count, result in zip(*case.sources, case.results[0], strict=True):
            count = count % 32 if "wrap" in case.opcode else min(count, 32)
            both = high << 32 | low
            expected = both << count >> 32 if ".l." in case.opcode else both >> count
            assert result == expected % (1 << 32), (case.opcode, low, high, count)


def bit(a: int, n: int) -> int:
    return a >> n & 1


def extracted(a: int, position: int, length: int, kind: str) -> int:
    """The PTX ISA's own description of bfe, bit by bit."""
    top = width(kind) - 1
    position, length = position & 255, length & 255
    sign = 0 if kind[0] == "u" or length == 0 else bit(a, min(position + length - 1, top))
    result = 0
    for n in range(top + 1):
        result |= (bit(a, position + n) if n < length and position + n <= top else sign) << n
    return result


def inserted(a: int, b: int, position: int, length: int, kind: str) -> int:
    position, length, result = position & 255, length & 255, b
    for n in range(length):
        if position + n < width(kind):
            result = result & ~(1 << position + n) | bit(a, n) << position + n
    return result


def test_fields_of_bits():
    extract = [Case(one, [drawn(one.split(".")[-1], 0), counts(3), counts(4)]) for one in names("bfe")]
    insert = [
        Case(one, [drawn(one.split(".")[-1], 0), drawn(one.split(".")[-1], 1), counts(5), counts(6)]) for one in names("bfi")
    ]
    run(extract + insert)
    assert len(extract) == 4 and len(insert) == 2
    for cases, function in ((extract, extracted), (insert, inserted)):
        for case in cases:
            for *operands, result in zip(*case.sources, case.results[0], strict=True):
                assert result == function(*operands, case.opcode.split(".")[-1]), (case.opcode, operands)


def test_masks_and_extensions_of_fields():
    masks = [Case(one, [counts(7), counts(8)]) for one in names("bmsk")]
    extensions = [Case(one, [drawn(one.split(".")[-1], 0), counts(9)]) for one in names("szext")]
    run(masks + extensions)
    for case in masks + extensions:
        for a, b, result in zip(*case.sources, case.results[0], strict=True):
            limit = (lambda x: x % 32) if "wrap" in case.opcode else (lambda x: min(x, 32))
            if case in masks:
                expected = (1 << limit(b)) - 1 << limit(a)
            else:
                expected = a % (1 << limit(b))
                if case.opcode.endswith("s32") and limit(b) and bit(a, limit(b) - 1):
                    expected -= 1 << limit(b)
            assert result == expected % (1 << 32), (case.opcode, a, b)


def test_the_nth_set_bit():
    case = Case("fns.b32", [drawn("b32", 0), [n % 33 for n in range(LANES)], [n % 9 - 4 for n in range(LANES)]])
    run([case])
    for mask, base, offset, result in zip(*case.sources, case.results[0], strict=True):
        places = [n for n in range(32) if bit(mask, n) and (n >= base if offset > 0 else n <= base)]
        if offset == 0:
            expected = base if base < 32 and bit(mask, base) else 0xFFFFFFFF
        else:
            inside = base < 32 and abs(offset) <= len(places)
            expected = (places[offset - 1] if offset > 0 else places[offset]) if inside else 0xFFFFFFFF
        assert result == expected, (mask, base, offset)


MODES = {  # the PTX ISA's table: for each selector the bytes of the result, highest first
    "f4e": ["3210", "4321", "5432", "6543"],
    "b4e": ["5670", "6701", "7012", "0123"],
    "rc8": ["0000", "1111", "2222", "3333"],
    "ecl": ["3210", "3211", "3222", "3333"],
    "ecr": ["0000", "1110", "2210", "3210"],
    "rc16": ["1010", "3232", "1010", "3232"],
}


def test_permuted_bytes():
    cases = [Case(one, [drawn("b32", 0), drawn("b32", 1), drawn("b32", 2)]) for one in names("prmt")]
    run(cases)
    assert len(cases) == 7
    for case in cases:
        for low, high, selector, result in zip(*case.sources, case.results[0], strict=True):
            data = (high << 32 | low).to_bytes(8, "little")
            mode = case.opcode.split(".")[-1]
            if mode in MODES:
                expected = bytes(data[int(n)] for n in MODES[mode][selector & 3][::-1])
            else:
                chosen = [selector >> 4 * n & 15 for n in range(4)]
                expected = bytes(255 * (data[n & 7] >> 7) if n & 8 else data[n] for n in chosen)
            assert result == int.from_bytes(expected, "little"), (case.opcode, selector)


@pytest.mark.parametrize("table", [0x00, 0x80, 0xE8, 0x96, 0x1B, 0xCA, 0xFF])
def test_logic_of_three(table: int):
    case = Case("lop3.b32", [drawn("b32", 0), drawn("b32", 1), drawn("b32", 2), str(table)])
    run([case])
    for a, b, c, result in zip(*case.sources[:3], case.results[0], strict=True):
        assert result == sum(bit(table, 4 * bit(a, n) + 2 * bit(b, n) + bit(c, n)) << n for n in range(32))


def test_dot_products_of_bytes():
    cases = [Case(one, [drawn("b32", 0), drawn("b32", 1), drawn("s32", 2)]) for one in names("dp4a")]
    run(cases)
    assert len(cases) == 4
    for case in cases:
        kinds = [f"{kind[0]}8" for kind in case.opcode.split(".")[1:]]
        for a, b, c, result in zip(*case.sources, case.results[0], strict=True):
            products = [signed(a >> 8 * n & 255, kinds[0]) * signed(b >> 8 * n & 255, kinds[1]) for n in range(4)]
            assert result == (c + sum(products)) % (1 << 32)


CARRIES = [("add.cc", "addc.cc", "addc"), ("sub.cc", "subc.cc", "subc"), ("mad.lo.cc", "madc.lo.cc", "madc.lo")]
CARRIES += [("mad.hi.cc", "madc.hi.cc", "madc.hi")]


def test_sums_with_carries_over_three_registers():
    """The chain is one long sum: the carry of each part goes into the next."""
    kinds = ["u32", "s32", "u64", "s64"]
    cases = [
        Case(f"{opcode}.{kind}", [drawn(kind, n), drawn(kind, n + 3), *([drawn(kind, n + 6)] if "mad" in opcode else [])])
        for chain in CARRIES
        for kind in kinds
        for n, opcode in enumerate(chain)
    ]
    with_carry = [row for row in rows() if any(operand.type == "carry" for operand in row.operands)]
    assert {case.opcode for case in cases} == {opcode for row in with_carry for opcode in spelled(row)}
    run(cases)
    for start in range(0, len(cases), 3):
        chain = cases[start : start + 3]
        kind = chain[0].opcode.split(".")[-1]
        bits = width(kind)
        for lane in range(LANES):
            carry = 0
            for case in chain:
                operands = [source[lane] for source in case.sources]
                if "mad" in case.opcode:
                    product = signed(operands[0], kind) * signed(operands[1], kind) >> (bits if ".hi" in case.opcode else 0)
                    operands = [product, operands[2]]
                first, second = (operand % (1 << bits) for operand in operands)
                total = first - second - carry if case.opcode.startswith("sub") else first + second + carry
                carry = total >> bits & 1
                assert case.results[0][lane] == total % (1 << bits), (case.opcode, operands)
