"""Small kernels under FpSan and ConSan."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.semantic import TritonSemantic

import ptx.sanitizers
from ptx.running.reports import EmulationError

LENGTH = 128


@triton.jit
def _arithmetic(x, y, z, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b, c = tl.load(x + i), tl.load(y + i), tl.load(z + i)
    results = (a * b + c - a, a / b, tl.exp2(a + b), tl.exp2(a) * tl.exp2(b), tl.maximum(a, b), a.to(tl.bfloat16).to(tl.float32))
    for k in tl.static_range(6):
        tl.store(out + k * N + i, results[k])


@triton.jit
def _infinities(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    masked = tl.where(i % 2 == 0, a, float("-inf"))
    results = (
        tl.exp2(masked - a),
        tl.exp(masked * a),
        tl.exp2(a - float("inf")),
        tl.maximum(masked, a),
        tl.minimum(float("inf"), a),
        tl.minimum(masked, float("nan")),
        tl.exp2(masked + a),
        tl.exp2(a + masked),
        tl.sum(masked, axis=0) + a,
    )
    for k in tl.static_range(9):
        tl.store(out + k * N + i, results[k])


@triton.jit
def _itself(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    tl.store(out + i, ((a == a) & ~(a != a)).to(tl.int8))


@triton.jit
def _assembled(out, N: tl.constexpr):
    zero = tl.inline_asm_elementwise("mov.b32 $0, 0;", "=f,r", [tl.num_programs(0)], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(out + tl.arange(0, N), tl.full([N], zero, dtype=tl.float32))


@gluon.jit
def _copied(x, out, WAITS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i = gl.arange(0, 128, layout)
    shared = gl.allocate_shared_memory(gl.float32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    async_copy.async_load(shared, x + i)
    async_copy.commit_group()
    if WAITS:
        async_copy.wait_group(0)
    gl.store(out + i, shared.load(layout))


def arithmetic(rounding: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The integers in place of three vectors and of the six results."""
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(LENGTH, generator=generator) for _ in range(3)]
    out = torch.empty(6, LENGTH)
    with ptx.sanitizers.fpsan(90, rounding=rounding):
        _arithmetic[(1,)](*vectors, out, N=LENGTH)
    return [ptx.sanitizers.payload(x) for x in vectors], ptx.sanitizers.payload(out)


def products() -> tuple[list[list[list[int]]], list[list[int]], list[list[int]]]:
    """The integers in place of three matrices, of the product of two, and of the third with this product added."""
    generator = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(*shape, generator=generator) for shape in ((2, 4), (4, 3), (2, 3)))
    total = z[None].clone()
    with ptx.sanitizers.fpsan(90):
        product = x @ y
        total.baddbmm_(x[None], y[None])
    integers = [ptx.sanitizers.payload(matrix).tolist() for matrix in (x, y, z, product, total[0])]
    return integers[:3], integers[3], integers[4]


def infinities() -> tuple[torch.Tensor, torch.Tensor]:
    x, out = torch.randn(LENGTH, generator=torch.Generator().manual_seed(0)), torch.empty(9, LENGTH)
    with ptx.sanitizers.fpsan(90):
        _infinities[(1,)](x, out, N=LENGTH)
    return x, out


def equal_to_itself(bits: list[int], dtype: torch.dtype) -> list[bool]:
    """Which numbers of these bits a kernel finds equal to themselves."""
    integers = torch.tensor(bits, dtype={2: torch.int16, 4: torch.int32}[dtype.itemsize])
    out = torch.zeros(len(bits), dtype=torch.int8)
    with ptx.sanitizers.fpsan(90):
        _itself[(1,)](integers.view(dtype), out, N=len(bits))
    return out.bool().tolist()


def zero_of_an_instruction() -> torch.Tensor:
    out = torch.ones(LENGTH)
    with ptx.sanitizers.fpsan(90):
        _assembled[(3,)](out, N=LENGTH)
    return ptx.sanitizers.payload(out)


def copied(waits: bool) -> tuple[bool, str]:
    """Whether a copy through shared memory comes through under ConSan, and what the error says."""
    x, out = torch.randn(128), torch.zeros(128)
    try:
        with ptx.sanitizers.consan(90):
            _copied[(1,)](x, out, WAITS=waits, num_warps=4)
    except EmulationError as error:
        return False, str(error)
    return torch.equal(x, out), ""


def changed_by_a_mode() -> tuple[bool, bool]:
    """Whether all that a mode changes outside of kernels changes within it, and whether any of it is changed after it."""

    def facts() -> tuple[Any, ...]:
        options = knobs.compilation.instrumentation_mode, knobs.compilation.fpsan_homomorphic_casts
        names = "sum", "__matmul__", "baddbmm_"
        host = [getattr(torch.Tensor, name) for name in names]
        return (
            *options,
            knobs.runtime.add_stages_inspection_hook,
            TritonSemantic.sub,
            tl.exp,
            tl.exp2,
            tl.inline_asm_elementwise,
            *host,
        )

    before = facts()
    with ptx.sanitizers.fpsan(90, rounding=False):
        within = facts()
    return all(x is not y for x, y in zip(before, within, strict=True)), facts() != before
