"""Triton kernels that take tensor descriptors, calls of them beside torch, and the same calls with an instruction left out.

They run in a process whose Triton kernels are compiled (`compiling` in tests/test_descriptors.py).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged, store_ragged
from triton.tools.tensor_descriptor import TensorDescriptor

import ptx
import ptx.triton
from ptx.running.launch import Launch
from ptx.running.program import Program

warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")


@triton.jit
def copy(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    row, column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    tile = x.load([row, column])
    if TRANSPOSED:
        out.store([column, row], tile.T)
    else:
        out.store([row, column], tile)


@triton.jit
def matmul(a, b, c, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """c = a @ b.T. A program takes its tiles one after another, so that shared memory is written anew."""
    for row in range(tl.program_id(0) * ROWS, c.shape[0], tl.num_programs(0) * ROWS):
        for column in range(0, c.shape[1], COLUMNS):
            total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            for k in range(0, K, DEPTH):
                total = tl.dot(a.load([row, k]), b.load([column, k]).T, total)
            c.store([row, column], total.to(c.dtype))


@triton.jit
def heads(x, out, n, BLOCK: tl.constexpr):
    """Rows of one head of x (B, N, H, D), times two, to out (B, H, N, D)."""
    batch, head, row = tl.program_id(2), tl.program_id(1), tl.program_id(0) * BLOCK
    tile = x.load([batch, row, head, 0]).reshape([BLOCK, x.block_shape[3]])
    out.store([batch, head, row, 0], (tile + tile).reshape([1, 1, BLOCK, x.block_shape[3]]))


@triton.jit
def ragged(x, out, starts, BLOCK: tl.constexpr):
    """Rows from one start to the next, which Triton's own functions keep within bounds."""
    first = tl.load(starts + tl.program_id(0))
    size = tl.load(starts + tl.program_id(0) + 1) - first
    for row in range(0, size, BLOCK):
        store_ragged(out, first, size, [row, 0], load_ragged(x, first, size, [row, 0]))


Result = tuple[Launch, Tensor, Tensor]  # the kernel's output, and what it must be


def described(x: Tensor, block: Sequence[int], padding: str = "zero") -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, list(block), padding)


def _copied(rows: int, columns: int, dtype: torch.dtype, transposed: bool = False, **more: Any) -> Result:
    """Tiles that reach out of the tensor; the transposed output has rows of another stride."""
    x = (20 * torch.randn(100, 144)).abs().to(dtype)[:, :136]
    out = torch.zeros((136, 112) if transposed else (100, 144), dtype=dtype)[:, : 100 if transposed else 136]
    blocks = [rows, columns], [columns, rows] if transposed else [rows, columns]
    grid = triton.cdiv(100, rows), triton.cdiv(136, columns)
    launch = ptx.run(copy, grid, described(x, blocks[0]), described(out, blocks[1]), rows, columns, transposed, **more)
    return launch, out, x.T if transposed else x


def _multiplied(dtype: torch.dtype, depth: int = 64, **more: Any) -> Result:
    a, b, out = torch.randn(200, 136).to(dtype), torch.randn(72, 136).to(dtype), torch.zeros(200, 72, dtype=dtype)
    blocks = [64, depth], [64, depth], [64, 64]
    maps = [described(x, block) for x, block in zip((a, b, out), blocks, strict=True)]
    launch = ptx.run(matmul, (2,), *maps, 136, 64, 64, depth, **more)
    return launch, out, (a.double() @ b.double().T).to(dtype)


def _by_heads(**more: Any) -> Result:
    x = torch.randn(2, 37, 3, 64).half()
    out = torch.zeros(2, 3, 37, 64).half()
    maps = described(x, [1, 16, 1, 64]), described(out, [1, 1, 16, 64])
    return ptx.run(heads, (3, 3, 2), *maps, 37, 16, **more), out, 2 * x.transpose(1, 2)


def _ragged(**more: Any) -> Result:
    x, starts = torch.randn(100, 64).half(), torch.tensor([3, 40, 40, 57, 100], dtype=torch.int32)
    out = torch.zeros(100, 64).half()
    maps = [create_ragged_descriptor(one, [16, 64]) for one in (x, out)]
    expected = x.clone()
    expected[:3] = 0
    return ptx.run(ragged, (4,), *maps, starts, 16, **more), out, expected


def _padded(**more: Any) -> Result:
    """NaN stands outside: it reaches no output, because the output's tiles end at the same places."""
    x, out = torch.randn(50, 40), torch.zeros(64, 64)
    maps = described(x, [32, 32], "nan"), described(out, [32, 32])
    return (
        ptx.run(copy, (2, 2), *maps, 32, 32, False, **more),
        out.isnan(),
        torch.ones(64, 64).bool().index_fill_(0, torch.arange(50), False) | (torch.arange(64) >= 40),
    )


CALLS: dict[str, Callable[..., Result]] = {
    "copy float16": lambda **more: _copied(64, 64, torch.float16, **more),
    "copy wide": lambda **more: _copied(16, 256, torch.bfloat16, **more),
    "copy narrow": lambda **more: _copied(64, 16, torch.float16, **more),
    "copy narrower": lambda **more: _copied(64, 8, torch.float16, **more),
    "copy float32": lambda **more: _copied(32, 64, torch.float32, **more),
    "copy bytes": lambda **more: _copied(32, 64, torch.uint8, **more),
    "transposed": lambda **more: _copied(64, 32, torch.float16, transposed=True, **more),
    "matmul float16": lambda **more: _multiplied(torch.float16, **more),
    "matmul bfloat16 shallow": lambda **more: _multiplied(torch.bfloat16, depth=32, **more),
    "heads": _by_heads,
    "ragged": _ragged,
    "padded": _padded,
}


def names() -> list[str]:
    return list(CALLS)


def outcome(name: str, arch: int) -> tuple[float, list[str], bool]:
    """The largest error, findings of three orders, and whether boxes were copied by tensor maps."""
    worst, found, boxes = 0.0, list[str](), False
    for seed in range(3):
        torch.manual_seed(seed)
        launch, out, expected = CALLS[name](arch=arch, options=ptx.Options(seed=seed), strict=False)
        worst = max(worst, (out.double() - expected.double()).abs().max().item() / expected.double().abs().max().item())
        found += [str(finding) for finding in launch.findings]
        assert launch.program is not None
        boxes |= "cp.async.bulk.tensor" in launch.program.text
    return worst, found, boxes


FAULTS = {
    "wait for a load": r"(?m)^.*mbarrier\.try_wait.*\n.*bra.*$",
    "proxy fence": r"(?m)^.*fence\.proxy\.async.*$",
    "wait for a store": r"(?m)^.*cp\.async\.bulk\.wait_group.*$",
    "commit of a store": r"(?m)^.*cp\.async\.bulk\.commit_group.*$",
    "barriers": r"(?m)^\s*bar\.sync.*$",
}


def planted(name: str, arch: int, fault: str) -> tuple[int, list[set[str]]]:
    """How many instructions are left out, and, for each of four orders, what is found; an error counts as found."""
    left_out, found = 0, []

    def faulty(self: Any, called: str, program: Program, *more: Any) -> None:
        nonlocal left_out
        text, left_out = re.subn(FAULTS[fault], "", program.text)
        launched(self, called, Program(text, program.name), *more)

    launched = ptx.triton.Driver.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ptx.triton.Driver, "launch", faulty)
        for seed in range(4):
            try:
                launch, *_ = CALLS[name](arch=arch, options=ptx.Options(seed=seed), strict=False)
                found.append({finding.kind for finding in launch.findings})
            except ptx.EmulationError as error:
                found.append({str(error)})
    return left_out, found


def refused() -> tuple[str, str]:
    """A descriptor whose values are rounded on the way."""
    x = torch.randn(64, 64)
    rounded = described(x, [32, 32])
    rounded.round_f32_to_tf32 = True
    try:
        ptx.run(copy, (2, 2), rounded, described(x, [32, 32]), 32, 32, False)
    except NotImplementedError as error:
        return type(error).__name__, str(error)
    return "", ""
