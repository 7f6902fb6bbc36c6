"""Triton's sanitizers on emulated kernels: FpSan, under which equal formulas give equal bits, and ConSan, which watches copies.

FpSan puts integers modulo 2^w in place of floats of w bits: sums and products are exact, and exp2(x + y) = exp2(x) exp2(y).
Infinity is a number like any other there, and 2^-inf is not 0, so that a masked key would count. Here infinities are what masks
take them for: -inf is the least number, infinity minus or times a number is infinity, and 2^-inf = 0.

    with ptx.sanitizers.fpsan(90):
        one = va.score_attention(query, key, value, backend="triton")      # compare with another call under FpSan alone

ConSan asserts in the kernel: a failed assertion ends the launch with an EmulationError, whose line says what was touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from triton import knobs
from triton.language.semantic import TritonSemantic

from ptx.running.launch import Launch
from ptx.running.reports import Options
from ptx.triton import emulated

INFINITY = float("inf")
VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # Triton's cache keeps kernels of other texts apart


@contextmanager
def fpsan(architecture: int, *, rounding: bool = True, options: Options | None = None) -> Iterator[list[Launch]]:
    """`emulated`, with kernels under FpSan.

    With `rounding` a conversion to fewer bits mixes all bits of the number, so that it must stand at the same place of both formulas.
    Without it a conversion keeps the lower bits, and sums and products may stand on either side of it: compare by `low_bits`.
    """
    with emulated(architecture, options) as launches, _compiled_with("fpsan", casts=not rounding), _infinities():
        yield launches


@contextmanager
def consan(architecture: int, options: Options | None = None) -> Iterator[list[Launch]]:
    """`emulated`, with kernels under ConSan. The emulator looks for no races: lanes of ConSan's own read what others write."""
    with emulated(architecture, options or Options(races=False)) as launches, _compiled_with("consan"):
        yield launches


@contextmanager
def _compiled_with(mode: str, casts: bool = False) -> Iterator[None]:
    compilation, runtime = knobs.compilation, knobs.runtime
    before = compilation.instrumentation_mode, compilation.fpsan_homomorphic_casts, runtime.add_stages_inspection_hook
    end_at_ptx = runtime.add_stages_inspection_hook

    def hook(*arguments: Any) -> Any:
        return end_at_ptx(*arguments) if arguments else (VERSION, VERSION)

    try:
        compilation.instrumentation_mode, compilation.fpsan_homomorphic_casts = mode, casts
        runtime.add_stages_inspection_hook = hook
        yield
    finally:
        compilation.instrumentation_mode, compilation.fpsan_homomorphic_casts, runtime.add_stages_inspection_hook = before


# ---- infinities


@contextmanager
def _infinities() -> Iterator[None]:
    """Within it what Triton compiles treats infinities as masks need it."""
    names = "sub", "mul", "maximum", "minimum"
    before = [getattr(TritonSemantic, name) for name in names]
    exp2 = tl.exp2
    sub, mul, maximum, minimum = before

    def infinite(semantic: Any, x: Any) -> Any:
        return semantic.or_(semantic.equal(x, INFINITY), semantic.equal(x, -INFINITY))

    def subtract(semantic: Any, x: Any, y: Any, sanitize_overflow: bool) -> Any:
        difference = sub(semantic, x, y, sanitize_overflow)
        if not difference.dtype.is_floating():
            return difference
        x, y = semantic.binary_op_type_checking_impl(x, y, True, False)
        difference = semantic.where(semantic.equal(y, INFINITY), -INFINITY, difference)
        difference = semantic.where(semantic.equal(y, -INFINITY), INFINITY, difference)
        return semantic.where(infinite(semantic, x), x, difference)

    def multiply(semantic: Any, x: Any, y: Any, sanitize_overflow: bool) -> Any:
        product = mul(semantic, x, y, sanitize_overflow)
        if not product.dtype.is_floating():
            return product
        x, y = semantic.binary_op_type_checking_impl(x, y)
        for one in (x, y):
            product = semantic.where(infinite(semantic, one), one, product)
        return product

    def extreme(compare: Any, least: float) -> Any:
        def compared(semantic: Any, x: Any, y: Any, propagate_nan: Any) -> Any:
            found = compare(semantic, x, y, propagate_nan)
            if not found.dtype.is_floating():
                return found
            x, y = semantic.binary_op_type_checking_impl(x, y)
            found = semantic.where(semantic.equal(x, least), y, found)
            return semantic.where(semantic.equal(y, least), x, found)

        return compared

    @tl.core.builtin
    def power(x: Any, _semantic: Any = None) -> Any:
        return _semantic.where(_semantic.equal(x, -INFINITY), 0.0, exp2(x, _semantic=_semantic))

    power.__module__ = exp2.__module__  # which Triton asks before it looks for what a kernel depends on
    try:
        for name, function in zip(
            names, (subtract, multiply, extreme(maximum, -INFINITY), extreme(minimum, INFINITY)), strict=True
        ):
            setattr(TritonSemantic, name, function)
        tl.exp2 = power
        yield
    finally:
        for name, function in zip(names, before, strict=True):
            setattr(TritonSemantic, name, function)
        tl.exp2 = exp2
