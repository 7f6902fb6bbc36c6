"""Floating-point arithmetic in exact fractions, rounded once: what results of opcodes are held against."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from typing import NamedTuple


class Format(NamedTuple):
    bits: int
    mantissa: int
    least_exponent: int
    nan: int  # the NaN that a GPU gives

    @property
    def largest(self) -> Fraction:
        exponent = -self.least_exponent + 1
        return (2 - Fraction(1, 1 << self.mantissa)) * Fraction(2) ** exponent


FORMATS = {
    "f16": Format(16, 10, -14, 0x7FFF),
    "bf16": Format(16, 7, -126, 0x7FFF),
    "f32": Format(32, 23, -126, 0x7FFFFFFF),
    "tf32": Format(32, 10, -126, 0x7FFFFFFF),
    "f64": Format(64, 52, -1022, 0xFFF8000000000000),
}
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan)


def value(bits: int, kind: str) -> float:
    if kind == "f64":
        return struct.unpack("<d", bits.to_bytes(8, "little"))[0]
    if kind == "f16":
        return struct.unpack("<e", bits.to_bytes(2, "little"))[0]
    return struct.unpack("<f", (bits << 16 if kind == "bf16" else bits).to_bytes(4, "little"))[0]


def bits(number: float, kind: str) -> int:
    """Of a number that the format has, or of NaN."""
    if math.isnan(number):
        return FORMATS[kind].nan
    if kind == "f64":
        return int.from_bytes(struct.pack("<d", number), "little")
    if kind == "f16":
        return int.from_bytes(struct.pack("<e", number), "little")
    whole = int.from_bytes(struct.pack("<f", number), "little")
    assert kind == "f32" or not whole & (0xFFFF if kind == "bf16" else 0x1FFF), (number, kind)
    return whole >> 16 if kind == "bf16" else whole


def to_integer(x: Fraction, mode: str) -> int:
    """To nearest even, towards zero, down or up; `rna`: half away from zero."""
    if mode == "rn":
        return round(x)
    if mode == "rna":
        return int(math.copysign(1, x)) * math.floor(abs(x) + Fraction(1, 2))
    return {"rz": math.trunc, "rm": math.floor, "rp": math.ceil}[mode](x)


def rounded(x: Fraction | float, kind: str, mode: str = "rn", zero: float = 0.0) -> float:
    """`zero`: what an x of 0 becomes, for its sign."""
    form = FORMATS[kind]
    if isinstance(x, float):
        if x in SPECIAL or math.isnan(x):
            return x
        zero, x = math.copysign(0.0, x), Fraction(x)
    if x == 0:
        return zero
    exponent = max(_exponent(x), form.least_exponent)
    step = Fraction(2) ** (exponent - form.mantissa)
    y = to_integer(x / step, mode) * step
    sign = -1.0 if x < 0 else 1.0
    if abs(y) > form.largest:
        back = mode == "rz" or mode == "rm" and x > 0 or mode == "rp" and x < 0
        return math.copysign(float(form.largest), sign) if back else math.copysign(math.inf, sign)
    return math.copysign(float(y), sign)


def _exponent(x: Fraction) -> int:
    """The largest e with 2^e <= |x|."""
    e = abs(x.numerator).bit_length() - x.denominator.bit_length()
    return e if abs(x) >= Fraction(2) ** e else e - 1


def flushed(x: float, kind: str) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0 ** FORMATS[kind].least_exponent else x


def _finite(*numbers: float) -> bool:
    return all(map(math.isfinite, numbers))


def fma(a: float, b: float, c: float, kind: str, mode: str) -> float:
    if not _finite(a, b, c):
        product = math.nan if {abs(a), abs(b)} == {0.0, math.inf} else a * b if not _finite(a, b) else math.copysign(0.0, a) * b
        return product + c if not math.isnan(product) else math.nan
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    negative = [math.copysign(1, a) * math.copysign(1, b) < 0, math.copysign(1, c) < 0]
    same = Fraction(a) * Fraction(b) == 0 and c == 0 and negative[0] == negative[1]
    zero = -0.0 if (negative[1] if same else mode == "rm") else 0.0
    return rounded(exact, kind, mode, zero)


def add(a: float, b: float, kind: str, mode: str) -> float:
    return fma(1.0, a, b, kind, mode)


def sub(a: float, b: float, kind: str, mode: str) -> float:
    return fma(1.0, a, -b, kind, mode)


def mul(a: float, b: float, kind: str, mode: str) -> float:
    if not _finite(a, b):
        return math.nan if {abs(a), abs(b)} == {0.0, math.inf} else a * b
    return rounded(Fraction(a) * Fraction(b), kind, mode, math.copysign(0.0, a) * math.copysign(1.0, b))


def div(a: float, b: float, kind: str, mode: str) -> float:
    sign = math.copysign(1.0, a) * math.copysign(1.0, b)
    if math.isnan(a) or math.isnan(b) or a == b == 0 or math.isinf(a) and math.isinf(b):
        return math.nan
    if math.isinf(a) or b == 0:
        return sign * math.inf
    if math.isinf(b):
        return sign * 0.0
    return rounded(Fraction(a) / Fraction(b), kind, mode, sign * 0.0)


def rcp(a: float, kind: str, mode: str) -> float:
    return div(1.0, a, kind, mode)


def sqrt(a: float, kind: str, mode: str) -> float:
    if math.isnan(a) or a < 0:
        return math.nan
    if a == 0 or math.isinf(a):
        return a
    x = Fraction(a)
    scale = 1 << 2 * (1200 if x.denominator > 1 << 200 else 300)
    whole = math.isqrt(x.numerator * x.denominator * scale)
    exact = whole * whole == x.numerator * x.denominator * scale
    root = Fraction(2 * whole + (not exact), 2 * x.denominator * math.isqrt(scale))  # a rest below shows in the last bit
    return rounded(root, kind, mode)


def minimum(a: float, b: float, nan: bool) -> float:
    if math.isnan(a) or math.isnan(b):
        return math.nan if nan or math.isnan(a) and math.isnan(b) else b if math.isnan(a) else a
    return min((a, b), key=lambda x: (x, math.copysign(1, x)))


def maximum(a: float, b: float, nan: bool) -> float:
    return -minimum(-a, -b, nan)
