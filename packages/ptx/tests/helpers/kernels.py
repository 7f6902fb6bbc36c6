"""Triton kernels as others write them, and calls of them beside torch: a product of matrices, softmax, attention, layer norm.

They run in a process whose Triton kernels are compiled (`compiling` in tests/test_run.py).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.interpreter import InterpretedFunction

import ptx


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + o, tl.load(x + o, mask=o < n) + tl.load(y + o, mask=o < n), mask=o < n)


@triton.autotune([triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})], key=["n"], reset_to_zero=["out"])
@triton.heuristics({"EVEN": lambda arguments: arguments["n"] % arguments["BLOCK"] == 0})
@triton.jit
def tuned_add(x, y, out, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        tl.atomic_add(out + o, tl.load(x + o) + tl.load(y + o))
    else:
        tl.atomic_add(out + o, tl.load(x + o, mask=o < n) + tl.load(y + o, mask=o < n), mask=o < n)


@triton.jit
def everyone_writes_the_first(out):
    tl.store(out, tl.program_id(0))


@triton.jit
def unknown_opcode(x):
    o = tl.arange(0, 32)
    values = tl.inline_asm_elementwise("nul.b32 $0, $1;", "=r,r", [tl.load(x + o)], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(x + o, values)


@triton.jit
def matmul(a, b, c, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """c = a @ b, rows contiguous; tiles of c in columns, so that neighbours share tiles of b."""
    tiles = tl.cdiv(M, BLOCK_M)
    rows = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) // tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        left = tl.load(a + rows[:, None] * K + k, mask=(rows[:, None] < M) & (k < K), other=0.0)
        right = tl.load(b + k[:, None] * N + columns, mask=(k[:, None] < K) & (columns < N), other=0.0)
        total = tl.dot(left, right, total)
    tl.store(c + rows[:, None] * N + columns, total, mask=(rows[:, None] < M) & (columns < N))


@triton.jit
def softmax(x, y, n, BLOCK: tl.constexpr):
    row, o = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(x + row * n + o, mask=o < n, other=float("-inf"))
    powers = tl.exp(values - tl.max(values, 0))
    tl.store(y + row * n + o, powers / tl.sum(powers, 0), mask=o < n)


@triton.jit
def attention(q, k, v, out, N, M, scale, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr):
    """out = softmax(q · k · scale) v with the online softmax; one head a row of the grid."""
    rows, d = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, D)
    head = tl.program_id(1)
    query = tl.load(q + head * N * D + rows[:, None] * D + d, mask=rows[:, None] < N, other=0.0)
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total, sums = tl.zeros((BLOCK_Q,), tl.float32), tl.zeros((BLOCK_Q, D), tl.float32)
    end = tl.minimum(M, (tl.program_id(0) + 1) * BLOCK_Q) if CAUSAL else M
    for first in range(0, end, BLOCK_KV):
        columns = first + tl.arange(0, BLOCK_KV)
        key = tl.load(k + head * M * D + columns[:, None] * D + d, mask=columns[:, None] < M, other=0.0)
        value = tl.load(v + head * M * D + columns[:, None] * D + d, mask=columns[:, None] < M, other=0.0)
        visible = (columns < M) & (rows[:, None] >= columns) if CAUSAL else (columns < M) & (rows[:, None] >= 0)
        scores = tl.where(visible, tl.dot(query, tl.trans(key)) * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights, shrink = tl.exp(scores - larger[:, None]), tl.exp(largest - larger)
        total, largest = total * shrink + tl.sum(weights, 1), larger
        sums = tl.dot(weights.to(value.dtype), value, sums * shrink[:, None])
    tl.store(out + head * N * D + rows[:, None] * D + d, sums / total[:, None], mask=rows[:, None] < N)


@triton.jit
def layer_norm(x, weight, bias, y, mean, rstd, n, eps, BLOCK: tl.constexpr):
    row, o = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(x + row * n + o, mask=o < n, other=0.0)
    center = tl.sum(values, 0) / n
    values = tl.where(o < n, values - center, 0.0)
    factor = tl.rsqrt(tl.sum(values * values, 0) / n + eps)
    tl.store(mean + row, center)
    tl.store(rstd + row, factor)
    scaled = values * factor * tl.load(weight + o, mask=o < n) + tl.load(bias + o, mask=o < n)
    tl.store(y + row * n + o, scaled, mask=o < n)


@triton.jit
def layer_norm_backward(dy, x, weight, mean, rstd, dx, dweight, dbias, rows, n, BLOCK: tl.constexpr):
    """A program has each num_programs-th row, and adds its part of the parameters' gradients at its end."""
    o = tl.arange(0, BLOCK)
    scale = tl.load(weight + o, mask=o < n, other=0.0)
    sum_weight, sum_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        gradient = tl.load(dy + row * n + o, mask=o < n, other=0.0)
        normal = (tl.load(x + row * n + o, mask=o < n, other=0.0) - tl.load(mean + row)) * tl.load(rstd + row)
        normal = tl.where(o < n, normal, 0.0)
        product = gradient * scale
        product -= (tl.sum(product, 0) + normal * tl.sum(product * normal, 0)) / n
        tl.store(dx + row * n + o, product * tl.load(rstd + row), mask=o < n)
        sum_weight += gradient * normal
        sum_bias += gradient
    tl.atomic_add(dweight + o, sum_weight, mask=o < n)
    tl.atomic_add(dbias + o, sum_bias, mask=o < n)


# ---- calls, which give the largest error beside torch, and the launches


Outcome = tuple[float, list[ptx.Launch]]


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max() / exact.abs().max())


def call_matmul(arch: int, num_ctas: int = 1) -> Outcome:
    m, n, k = 100, 72, 200
    a, b, c = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16(), torch.empty(m, n)
    options = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_stages=3, num_ctas=num_ctas, arch=arch)
    launch = ptx.run(matmul, (2 * 2,), a, b, c, m, n, k, **options)
    return _error(c, a.double() @ b.double()), [launch]


def call_softmax(arch: int, num_ctas: int = 1) -> Outcome:
    x, y = torch.randn(5, 781), torch.empty(5, 781)
    launch = ptx.run(softmax, (5,), x, y, 781, BLOCK=1024, num_ctas=num_ctas, arch=arch)
    return _error(y, x.double().softmax(-1)), [launch]


def call_attention(arch: int, causal: bool = False) -> Outcome:
    n, m, d = 90, 130, 64
    q, k, v = (torch.randn(2, length, d).half() for length in (n, m, m))
    out = torch.empty(2, n, d)
    launch = ptx.run(attention, (2, 2), q, k, v, out, n, m, d**-0.5, BLOCK_Q=64, BLOCK_KV=32, D=d, CAUSAL=causal, arch=arch)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    return _error(out, exact), [launch]


def call_causal_attention(arch: int) -> Outcome:
    return call_attention(arch, causal=True)


def call_layer_norm(arch: int) -> Outcome:
    rows, n = 7, 100
    x, weight, bias, dy = torch.randn(rows, n), torch.randn(n), torch.randn(n), torch.randn(rows, n)
    with ptx.emulated(arch) as launches:  # here torch.empty is watched
        y, dx, mean, rstd = torch.empty(rows, n), torch.empty(rows, n), torch.empty(rows), torch.empty(rows)
        dweight, dbias = torch.zeros(n), torch.zeros(n)
        layer_norm[(rows,)](x, weight, bias, y, mean, rstd, n, 1e-5, BLOCK=128)
        layer_norm_backward[(3,)](dy, x, weight, mean, rstd, dx, dweight, dbias, rows, n, BLOCK=128)
    inputs = [one.double().requires_grad_() for one in (x, weight, bias)]
    exact = F.layer_norm(inputs[0], (n,), *inputs[1:])
    grads = torch.autograd.grad(exact, inputs, dy.double())
    return max(map(_error, (y, dx, dweight, dbias), (exact.detach(), *grads))), launches


CALLS: dict[str, tuple[Callable[[int], Outcome], float]] = {  # with the error that their dtypes allow
    "matmul": (call_matmul, 1e-6),
    "softmax": (call_softmax, 1e-6),
    "attention": (call_attention, 5e-4),
    "causal attention": (call_causal_attention, 5e-4),
    "layer norm": (call_layer_norm, 1e-6),
}


# ---- what tests/test_run.py asks of this process


def names() -> list[str]:
    return list(CALLS)


def outcome(name: str, arch: int) -> tuple[float, list[str], int]:
    """The error as a multiple of the allowed one, findings and instructions."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    call, allowed = CALLS[name]
    error, launches = call(arch)
    return error / allowed, [str(one) for launch in launches for one in launch.findings], sum(one.executed for one in launches)


def of_two_blocks(arch: int) -> list[tuple[float, list[str], bool]]:
    """As `outcome`, of programs of two blocks, and whether these read each other's memory."""
    torch.manual_seed(0)
    results = []
    for call in (call_matmul, call_softmax):
        error, (launch,) = call(arch, num_ctas=2)
        assert launch.grid[0] % 2 == 0 and launch.program
        results.append((error / 1e-6, [str(one) for one in launch.findings], "mapa" in launch.program.text))
    return results


def kept_in(folder: str) -> tuple[list[str], bool]:
    """Where a launch leaves what Triton compiles, and whether Triton's cache is this folder again."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        ptx.run(add, 1, *torch.randn(3, 7), 7, BLOCK=16)
        return sorted(os.listdir(folder)), triton.knobs.cache.dir == folder


def tuned() -> tuple[bool, tuple[int, ...], dict[str, int]]:
    x, y, out = torch.randn(300), torch.randn(300), torch.full((300,), 5.0)
    launch = ptx.run(tuned_add, lambda chosen: (triton.cdiv(300, chosen["BLOCK"]),), x, y, out, 300)
    return torch.equal(out, x + y), launch.grid, tuned_add.best_config.kwargs


def too_large() -> tuple[int, bool]:
    """A first configuration takes more shared memory than the GPU has, and the old way of timing is asked for."""
    with warnings.catch_warnings(action="ignore"):
        sizes = (dict(BLOCK_M=size, BLOCK_N=size, BLOCK_K=size) for size in (256, 64, 32))
        tuned_matmul = triton.autotune([triton.Config(one, num_stages=3) for one in sizes], key=["M"], warmup=1, rep=1)(matmul)
    a, b, c = torch.ones(64, 64), torch.ones(64, 64), torch.zeros(64, 64)
    with ptx.emulated(80) as launches:
        tuned_matmul[(1,)](a, b, c, 64, 64, 64)
    assert torch.equal(c, a @ b) and len(launches) == 1
    return tuned_matmul.best_config.kwargs["BLOCK_M"], bool(tuned_matmul.cache)


def race() -> tuple[str, str, dict[str, str]]:
    """The error, and the finding where it does not raise."""
    out = torch.zeros(1, dtype=torch.int32)
    (finding,) = ptx.run(everyone_writes_the_first, 3, out, strict=False).findings
    fields = {"kind": finding.kind, "source": finding.source, "instruction": finding.place}
    return *_attempt(lambda: ptx.run(everyone_writes_the_first, 3, out)), fields


def refusals() -> dict[str, tuple[str, str]]:
    x, y, out = torch.randn(300), torch.randn(300), torch.zeros(300)

    def run(kernel: Any = add, grid: Any = 3, first: Tensor = x, n: int = 300, **more: Any) -> None:
        ptx.run(kernel, grid, first, y, out, n, **{"BLOCK": 128, **more})

    def read_uninitialised() -> None:
        with ptx.emulated(80):
            add[(3,)](torch.empty(300), y, out, 300, BLOCK=128)

    return {
        "outside": _attempt(lambda: run(n=330)),
        "never written": _attempt(read_uninitialised),
        "opcode": _attempt(lambda: ptx.run(unknown_opcode, 1, x)),
        "device": _attempt(lambda: run(first=x.to("meta"))),
        "architecture": _attempt(lambda: run(arch=75)),
        "no kernel": _attempt(lambda: run(kernel=len)),
        "no grid": _attempt(lambda: run(grid=0)),
        "options": _attempt(lambda: run(options=3)),
        "interpreted": _attempt(lambda: run(kernel=InterpretedFunction(add.fn))),
        "nothing": _attempt(run),
    }


def _attempt(call: Callable[[], Any]) -> tuple[str, str]:
    """What a call raises: the name of its class, and its text."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""
