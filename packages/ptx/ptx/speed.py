"""Prints how long emulated launches take, by kernel and size: `python -m ptx.speed 90`.

Seconds are the processor's, of one core, the least of three launches, without Triton's compilation.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import sys
import time

import torch
import triton
import triton.language as tl

import ptx


@triton.jit
def add(x, y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, mask=o < n) + 1, mask=o < n)


@triton.jit
def softmax(x, y, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    values = tl.load(x + tl.program_id(0) * n + o, mask=o < n, other=float("-inf"))
    powers = tl.exp(values - tl.max(values, 0))
    tl.store(y + tl.program_id(0) * n + o, powers / tl.sum(powers, 0), mask=o < n)


@triton.jit
def matmul(a, b, c, N, BLOCK: tl.constexpr):
    rows, columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, N, 32):
        k = first + tl.arange(0, 32)
        total = tl.dot(tl.load(a + rows[:, None] * N + k), tl.load(b + k[:, None] * N + columns), total)
    tl.store(c + rows[:, None] * N + columns, total)


def launched(kernel: str, size: int, arch: int) -> ptx.Launch:
    if kernel == "add":
        return ptx.run(add, (triton.cdiv(size**2, 1024),), *torch.randn(2, size**2), size**2, BLOCK=1024, arch=arch)
    if kernel == "softmax":
        return ptx.run(softmax, (size,), *torch.randn(2, size, size), size, BLOCK=triton.next_power_of_2(size), arch=arch)
    a, b = torch.randn(2, size, size).bfloat16()
    return ptx.run(matmul, (size // 64, size // 64), a, b, torch.empty(size, size), size, BLOCK=64, arch=arch)


def main(arch: int) -> None:
    torch.set_num_threads(1)
    print(f"| sm_{arch}, n × n | n | instructions of a warp | seconds | millions a second |\n| --- | ---: | ---: | ---: | ---: |")
    for kernel in ("add", "softmax", "matmul"):
        for size in (128, 256, 512):
            launched(kernel, size, arch)
            times = []
            for _ in range(3):
                start = time.process_time()
                launch = launched(kernel, size, arch)
                times.append(time.process_time() - start)
            rate = launch.executed / min(times) / 1e6
            print(f"| {kernel} | {size} | {launch.executed:,} | {min(times):.4f} | {rate:.1f} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 90)
