"""Triton's sanitizers on emulated kernels: FpSan, under which equal formulas give equal bits, and ConSan, which watches copies.

FpSan puts integers modulo 2^w in place of floats of w bits: sums and products are exact, and exp2(x + y) = exp2(x) exp2(y).
Infinity is a number like any other there, and 2^-inf is not 0, so that a masked key would count. Here infinities are what masks
take them for: -inf is the least number, infinity plus, minus or times a number is infinity, and 2^-inf = 0. Its quotients and
logarithms stay numbers like any other. One integer of 256, or of 32 in float16, looks like NaN. Each equals itself here, but for
the one that a NaN in the kernel's text has.

    with ptx.sanitizers.fpsan(90):
        kernel[grid](x, out, BLOCK=64)  # compare with another launch under FpSan alone

A package that has an `emulated` of its own, as tools.emulated.triton here, hands it over.

ConSan asserts in the kernel: a failed assertion ends the launch with an EmulationError, whose line says what was touched.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import triton.language as tl
from triton import knobs
from triton.language.semantic import TritonSemantic

from ptx.running.launch import Launch
from ptx.running.reports import Options
from ptx.triton import emulated

Emulated = Callable[[int, Options | None], AbstractContextManager[list[Launch]]]  # as ptx.triton.emulated
UNOPTIMISED = "DISABLE_LLVM_OPT"  # a kernel compiles in less than half the time, and runs for a second longer
INFINITY = float("inf")
NAN = {"fp32": 0x7FC00000, "fp16": 0x7E00, "bf16": 0x7FC0}  # the bits of the NaN that a text names


@contextmanager
def fpsan(
    architecture: int, *, rounding: bool = True, options: Options | None = None, emulated: Emulated = emulated
) -> Iterator[list[Launch]]:
    """`emulated`, with kernels under FpSan.

    With `rounding` a conversion to fewer bits mixes all bits of a number, so that it must stand at the same place of both ways.
    Without it a conversion keeps the lower bits, and sums and products may stand on either side of it: compare the lower 16 bits
    of each `payload`. What the package sums, multiplies (`@`) or converts by torch follows.
    """
    with emulated(architecture, options) as launches, _compiled_with("fpsan", casts=not rounding), _infinities(), _host():
        yield launches


@contextmanager
def consan(architecture: int, options: Options | None = None, *, emulated: Emulated = emulated) -> Iterator[list[Launch]]:
    """`emulated`, with kernels under ConSan. The emulator looks for no races: lanes of ConSan's own read what others write."""
    if architecture < 90:
        raise ValueError(f"ConSan needs sm_90 or newer, since Triton 3.9 ends the process on others; got sm_{architecture}")
    with emulated(architecture, options or Options(races=False)) as launches, _compiled_with("consan"):
        yield launches


@contextmanager
def _compiled_with(mode: str, casts: bool = False) -> Iterator[None]:
    compilation, runtime = knobs.compilation, knobs.runtime
    before = compilation.instrumentation_mode, compilation.fpsan_homomorphic_casts, runtime.add_stages_inspection_hook
    lines, unoptimised = compilation.disable_line_info, os.environ.get(UNOPTIMISED)
    end_at_ptx = runtime.add_stages_inspection_hook
    version = hashlib.sha256(inspect.getsource(_infinities).encode()).hexdigest()  # Triton's cache keeps other texts apart

    def hook(*arguments: Any) -> Any:
        return end_at_ptx(*arguments) if arguments else (version, version)

    try:
        compilation.instrumentation_mode, compilation.fpsan_homomorphic_casts = mode, casts
        runtime.add_stages_inspection_hook = hook
        # with lines Triton 3.9 fails at some kernels: a call that ConSan puts in has none
        compilation.disable_line_info = lines or mode == "consan"
        if (
            mode == "fpsan"
        ):  # under ConSan products run asynchronously, and unoptimised code moves their registers before the wait
            os.environ[UNOPTIMISED] = "1"
        yield
    finally:
        compilation.instrumentation_mode, compilation.fpsan_homomorphic_casts, runtime.add_stages_inspection_hook = before
        compilation.disable_line_info = lines
        os.environ.pop(UNOPTIMISED, None) if unoptimised is None else os.environ.update({UNOPTIMISED: unoptimised})


# ---- numbers and the integers in their place

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
NARROW = (torch.bfloat16, torch.float16)
FACTORS = {4: 14940041, 2: 30601}  # of Triton 3.9, by bytes; tests/test_sanitizers.py compares them with a kernel


def payload(x: torch.Tensor) -> torch.Tensor:
    """The integers that stand in place of numbers of w bits, -2^(w-1) to 2^(w-1), in int64. 0, 1 and -1 keep their values."""
    bits = x.contiguous().view(BITS[x.dtype]).long()
    most, shift, first, second = _mixing(x.dtype)
    mixed = (bits & most) * first & most
    mixed = (mixed ^ mixed >> shift) * second & most
    return torch.where(bits < 0, torch.where(mixed == 0, ~most, -mixed), mixed)


def number(integers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers in whose place these integers stand, modulo 2^w."""
    most, shift, first, second = _mixing(dtype)
    negative = (integers & ~most & 2 * most + 1) != 0
    mixed = torch.where(negative, -integers, integers) & most
    mixed = mixed * pow(second, -1, most + 1) & most
    mixed ^= mixed >> shift
    if 2 * shift < most.bit_length():
        mixed ^= mixed >> 2 * shift
    bits = mixed * pow(first, -1, most + 1) & most
    return torch.where(negative, bits - most - 1, bits).to(BITS[dtype]).view(dtype)


def _mixing(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """The magnitude's bits, how far they are shifted, and the factors before and after; the second one keeps 1."""
    one = int(torch.ones((), dtype=dtype).view(BITS[dtype]))
    most, shift = (1 << 8 * dtype.itemsize - 1) - 1, (one & -one).bit_length() - 1
    first = FACTORS[dtype.itemsize]
    mixed = one * first & most
    return most, shift, first, pow(mixed ^ mixed >> shift, -1, most + 1)


@contextmanager
def _host() -> Iterator[None]:
    """Within it torch sums, multiplies matrices and converts to fewer bits as kernels do under FpSan: the package adds what
    programs have summed."""
    names = "sum", "to", "copy_", "__matmul__", "baddbmm_"
    before = [getattr(torch.Tensor, name) for name in names]
    sum_before, to_before, copy_before, product_before, _ = before

    def summed(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if x.dtype not in BITS:
            return sum_before(x, *arguments, **options)
        return number(sum_before(payload(x), *arguments, **options), x.dtype)

    def converted(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if x.dtype == torch.float32 and (dtype := arguments[0] if arguments else options.get("dtype")) in NARROW:
            return number(payload(x), dtype)
        return to_before(x, *arguments, **options)

    def copied(x: torch.Tensor, source: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return copy_before(x, source.to(x.dtype) if x.dtype in NARROW else source, *arguments)

    def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return number(product_before(payload(x), payload(y)), x.dtype) if x.dtype in BITS else product_before(x, y)

    def added(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return copy_before(x, number(payload(x) + product_before(payload(y), payload(z)), x.dtype))

    try:
        for name, function in zip(names, (summed, converted, copied, product, added), strict=True):
            setattr(torch.Tensor, name, function)
        yield
    finally:
        for name, function in zip(names, before, strict=True):
            setattr(torch.Tensor, name, function)


# ---- infinities


@contextmanager
def _infinities() -> Iterator[None]:  # noqa: C901
    """Within it what Triton compiles treats infinities as masks need it."""
    names = "add", "sub", "mul", "maximum", "minimum", "equal", "not_equal"
    before = [getattr(TritonSemantic, name) for name in names]
    powers, assembly = (tl.exp, tl.exp2), tl.inline_asm_elementwise
    add, sub, mul, maximum, minimum, equals, differs = before

    def infinite(semantic: Any, x: Any) -> Any:
        return semantic.or_(semantic.equal(x, INFINITY), semantic.equal(x, -INFINITY))

    def absorbed(compute: Any) -> Any:
        """A sum or a product, which is infinite if x or y is."""

        def computed(semantic: Any, x: Any, y: Any, sanitize_overflow: bool) -> Any:
            result = compute(semantic, x, y, sanitize_overflow)
            if not result.dtype.is_floating():
                return result
            for one in semantic.binary_op_type_checking_impl(x, y):
                result = semantic.where(infinite(semantic, one), one, result)
            return result

        return computed

    def subtract(semantic: Any, x: Any, y: Any, sanitize_overflow: bool) -> Any:
        difference = sub(semantic, x, y, sanitize_overflow)
        if not difference.dtype.is_floating():
            return difference
        x, y = semantic.binary_op_type_checking_impl(x, y, True, False)
        difference = semantic.where(semantic.equal(y, INFINITY), -INFINITY, difference)
        difference = semantic.where(semantic.equal(y, -INFINITY), INFINITY, difference)
        return semantic.where(infinite(semantic, x), x, difference)

    def extreme(compare: Any, precedes: Any, least: float) -> Any:
        """An order from `least` over what looks like NaN, which a maximum passes over, to the other numbers and -`least`; the
        floats' own, so that kernels may compare numbers with the largest one."""

        def compared(semantic: Any, x: Any, y: Any, propagate_nan: Any) -> Any:
            chosen = compare(semantic, x, y, propagate_nan)
            if not chosen.dtype.is_floating():
                return chosen
            x, y = semantic.binary_op_type_checking_impl(x, y)
            for one, other in ((x, y), (y, x)):
                chosen = semantic.where(precedes(semantic, one, other), one, chosen)
            nan_x, nan_y = differs(semantic, x, x), differs(semantic, y, y)
            for one, other, passed in (
                (x, y, semantic.and_(nan_x, semantic.not_(nan_y))),
                (y, x, semantic.and_(nan_y, semantic.not_(nan_x))),
            ):
                chosen = semantic.where(semantic.or_(passed, semantic.equal(one, least)), other, chosen)
            for one in (x, y):
                chosen = semantic.where(semantic.equal(one, -least), -least, chosen)
            return chosen

        return compared

    def equal(semantic: Any, x: Any, y: Any) -> Any:
        same = equals(semantic, x, y)
        x, y = semantic.binary_op_type_checking_impl(x, y)
        kind = x.dtype
        if kind.name not in NAN:
            return same
        x, y = (semantic.bitcast(one, tl.dtype(f"int{kind.primitive_bitwidth}")) for one in (x, y))
        return semantic.or_(same, semantic.and_(equals(semantic, x, y), differs(semantic, x, NAN[kind.name])))

    def power(raise_to: Any) -> Any:
        @tl.core.builtin  # type: ignore[untyped-decorator]
        def raised(x: Any, _semantic: Any = None) -> Any:
            return _semantic.where(_semantic.equal(x, -INFINITY), 0.0, raise_to(x, _semantic=_semantic))

        raised.__module__ = raise_to.__module__  # which Triton asks before it looks for what a kernel depends on
        return raised

    @tl.core.builtin  # type: ignore[untyped-decorator]
    def assembled(asm: Any, constraints: Any, args: Any, dtype: Any, is_pure: Any, pack: Any, _semantic: Any = None) -> Any:
        """Of integers FpSan makes a number that depends on them, whatever the instruction. So their result is one, too."""
        kind, registers = tl.core._unwrap_if_constexpr(dtype), tl.core._unwrap_if_constexpr(constraints)
        if kind != tl.float32 or any(x.dtype.is_floating() for x in args):
            return assembly(asm, constraints, args, dtype, is_pure, pack, _semantic=_semantic)
        bits = assembly(asm, registers.replace("=f", "=r"), args, tl.int32, is_pure, pack, _semantic=_semantic)
        return _semantic.bitcast(bits, tl.float32)

    assembled.__module__ = assembly.__module__

    try:
        for name, function in zip(
            names,
            (
                absorbed(add),
                subtract,
                absorbed(mul),
                extreme(maximum, TritonSemantic.greater_than, -INFINITY),
                extreme(minimum, TritonSemantic.less_than, INFINITY),
                equal,
                lambda semantic, x, y: semantic.not_(equal(semantic, x, y)),
            ),
            strict=True,
        ):
            setattr(TritonSemantic, name, function)
        tl.exp, tl.exp2 = map(power, powers)
        tl.inline_asm_elementwise = assembled
        yield
    finally:
        for name, function in zip(names, before, strict=True):
            setattr(TritonSemantic, name, function)
        tl.exp, tl.exp2 = powers
        tl.inline_asm_elementwise = assembly
