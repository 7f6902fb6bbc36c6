# ruff: noqa: F811
"""Twelve kernels, each with its launch and its formula in float64. faults.py changes their text; a section is one kernel.

`inputs(make, n)` makes the tensors of size n, `launch(*tensors, empty, BLOCK)` gives the output, which `empty` allocates.
`exact` says that whole numbers give whole numbers, without rounding.
"""

import torch
import triton
import triton.language as tl

# ---- add


@triton.jit
def kernel(x, y, out, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + o, tl.load(x + o, mask=o < n) + tl.load(y + o, mask=o < n), mask=o < n)


def launch(x, y, empty, BLOCK):
    n = x.numel()
    out = empty(n)
    kernel[(triton.cdiv(n, BLOCK),)](x, y, out, n, BLOCK=BLOCK)
    return out


def inputs(make, n):
    return make(n), make(n)


def formula(x, y):
    return x + y


exact = True

# ---- row sums


@triton.jit
def kernel(x, out, n, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n, BLOCK):
        o = first + tl.arange(0, BLOCK)
        total += tl.load(x + row * stride + o, mask=o < n, other=0.0)
    tl.store(out + row, tl.sum(total, 0))


def launch(x, empty, BLOCK):
    out = empty(x.shape[0])
    kernel[(x.shape[0],)](x, out, x.shape[1], x.stride(0), BLOCK=BLOCK)
    return out


def inputs(make, n):
    return (make(5, n),)


def formula(x):
    return x.sum(1)


exact = True

# ---- softmax


@triton.jit
def kernel(x, out, n, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    o = tl.arange(0, WIDTH)
    row = tl.program_id(0) * n
    values = tl.load(x + row + o, mask=o < n, other=float("-inf"))
    powers = tl.exp(values - tl.max(values, 0))
    tl.store(out + row + o, powers / tl.sum(powers, 0), mask=o < n)


def launch(x, empty, BLOCK):
    rows, n = x.shape
    out = empty(rows, n)
    kernel[(rows,)](x, out, n, BLOCK=BLOCK, WIDTH=max(BLOCK, triton.next_power_of_2(n)))
    return out


def inputs(make, n):
    return (make(5, n),)


def formula(x):
    return x.softmax(1)


exact = False

# ---- layer norm


@triton.jit
def kernel(x, weight, out, n, WIDTH: tl.constexpr):
    o = tl.arange(0, WIDTH)
    row = tl.program_id(0) * n
    values = tl.load(x + row + o, mask=o < n, other=0.0)
    center = tl.where(o < n, values - tl.sum(values, 0) / n, 0.0)
    scale = tl.rsqrt(tl.sum(center * center, 0) / n + 1e-5)
    tl.store(out + row + o, center * scale * tl.load(weight + o, mask=o < n), mask=o < n)


def launch(x, weight, empty, BLOCK):
    rows, n = x.shape
    out = empty(rows, n)
    width = max(BLOCK, triton.next_power_of_2(n))
    kernel[(rows,)](x, weight, out, n, WIDTH=width, enable_fp_fusion=False)  # findings/triton_fused_square.md
    return out


def inputs(make, n):
    return make(5, n), make(n)


def formula(x, weight):
    center = x - x.mean(1, keepdim=True)
    return center * (center.square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight


exact = False

# ---- matrix product


@triton.jit
def kernel(a, b, c, N, K, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        left = tl.load(a + rows[:, None] * K + k, mask=(rows[:, None] < N) & (k < K), other=0.0)
        right = tl.load(b + k[:, None] * N + columns, mask=(k[:, None] < K) & (columns < N), other=0.0)
        total += tl.dot(left, right, input_precision="ieee")
    tl.store(c + rows[:, None] * N + columns, total, mask=(rows[:, None] < N) & (columns < N))


def launch(a, b, empty, BLOCK):
    n, k = a.shape
    c = empty(n, n)
    kernel[(triton.cdiv(n, BLOCK), triton.cdiv(n, BLOCK))](a, b, c, n, k, BLOCK=BLOCK)
    return c


def inputs(make, n):
    return make(n, 48), make(48, n)


def formula(a, b):
    return a @ b


exact = True

# ---- transpose


@triton.jit
def kernel(x, out, N, M, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tile = tl.load(x + rows[:, None] * M + columns, mask=(rows[:, None] < N) & (columns < M), other=0.0)
    tl.store(out + columns[:, None] * N + rows, tl.trans(tile), mask=(columns[:, None] < M) & (rows < N))


def launch(x, empty, BLOCK):
    n, m = x.shape
    out = empty(m, n)
    kernel[(triton.cdiv(n, BLOCK), triton.cdiv(m, BLOCK))](x, out, n, m, BLOCK=BLOCK)
    return out


def inputs(make, n):
    return (make(n, 40),)


def formula(x):
    return x.T


exact = True

# ---- neighbours


@triton.jit
def kernel(x, out, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(x + o - 1, mask=(o >= 1) & (o < n), other=0.0)
    right = tl.load(x + o + 1, mask=o + 1 < n, other=0.0)
    tl.store(out + o, left + right, mask=o < n)


def launch(x, empty, BLOCK):
    n = x.numel()
    out = empty(n)
    kernel[(triton.cdiv(n, BLOCK),)](x, out, n, BLOCK=BLOCK)
    return out


def inputs(make, n):
    return (make(n),)


def formula(x):
    return torch.nn.functional.pad(x, (1, 1)).unfold(0, 3, 1)[:, ::2].sum(1)


exact = True

# ---- histogram


@triton.jit
def kernel(bins, weights, out, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out + tl.load(bins + o, mask=o < n, other=0), tl.load(weights + o, mask=o < n, other=0.0), mask=o < n)


def launch(bins, weights, empty, BLOCK):
    n = weights.numel()
    out = empty(8).zero_()
    kernel[(triton.cdiv(n, BLOCK),)](bins, weights, out, n, BLOCK=BLOCK)
    return out


def inputs(make, n):
    return torch.arange(n) * 5 % 8, make(n)


def formula(bins, weights):
    return weights.new_zeros(8).index_add(0, bins, weights)


exact = True

# ---- sum of all, with a lock


@triton.jit
def kernel(x, out, lock, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.sum(tl.load(x + o, mask=o < n, other=0.0), 0)
    while tl.atomic_cas(lock, 0, 1, sem="acquire") == 1:
        pass
    before = tl.load(out)
    tl.debug_barrier()  # each thread loads it, and one stores
    tl.store(out, before + part)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0, sem="release")


def launch(x, empty, BLOCK):
    n = x.numel()
    out = empty(1).zero_()
    kernel[(triton.cdiv(n, BLOCK),)](x, out, torch.zeros(1, dtype=torch.int32), n, BLOCK=BLOCK)
    return out


def inputs(make, n):
    return (make(n),)


def formula(x):
    return x.sum()[None]


exact = True

# ---- causal attention


@triton.jit
def kernel(q, k, v, out, N, scale, BLOCK: tl.constexpr, D: tl.constexpr):
    rows, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    query = tl.load(q + rows[:, None] * D + d, mask=rows[:, None] < N, other=0.0)
    largest, total = tl.full((BLOCK,), -1e9, tl.float32), tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK, D), tl.float32)
    for first in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        key = tl.load(k + columns[:, None] * D + d, mask=columns[:, None] < N, other=0.0)
        value = tl.load(v + columns[:, None] * D + d, mask=columns[:, None] < N, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where((rows[:, None] >= columns) & (columns < N), scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights, shrink = tl.exp(scores - larger[:, None]), tl.exp(largest - larger)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights, value, input_precision="ieee")
        largest = larger
    tl.store(out + rows[:, None] * D + d, sums / total[:, None], mask=rows[:, None] < N)


def launch(q, k, v, empty, BLOCK):
    n, d = q.shape
    out = empty(n, d)
    kernel[(triton.cdiv(n, BLOCK),)](q, k, v, out, n, d**-0.5, BLOCK=BLOCK, D=d)
    return out


def inputs(make, n):
    return make(n, 16), make(n, 16), make(n, 16)


def formula(q, k, v):
    scores = q @ k.T * q.shape[1] ** -0.5
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf")).softmax(1) @ v


exact = False

# ---- rows by index


@triton.jit
def kernel(table, index, out, n, D: tl.constexpr, BLOCK: tl.constexpr):
    o, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    row = tl.load(index + o, mask=o < n, other=0)
    values = tl.load(table + row[:, None] * D + d, mask=o[:, None] < n)
    tl.store(out + o[:, None] * D + d, values, mask=o[:, None] < n)


def launch(table, index, empty, BLOCK):
    n = index.numel()
    out = empty(n, table.shape[1])
    kernel[(triton.cdiv(n, BLOCK),)](table, index, out, n, D=table.shape[1], BLOCK=BLOCK)
    return out


def inputs(make, n):
    return make(9, 8), torch.arange(n) * 4 % 9


def formula(table, index):
    return table[index]


exact = True

# ---- reversed through memory


@triton.jit
def kernel(x, buffer, out, n, BLOCK: tl.constexpr):
    first = tl.program_id(0) * 128  # 128 elements are reversed, BLOCK of them at a time
    for start in range(0, 128, BLOCK):
        o = first + start + tl.arange(0, BLOCK)
        tl.store(buffer + o, tl.load(x + o, mask=o < n, other=0.0))
    tl.debug_barrier()
    for start in range(0, 128, BLOCK):
        o = first + start + tl.arange(0, BLOCK)
        tl.store(out + o, tl.load(buffer + 2 * first + 127 - o), mask=o < n)


def launch(x, empty, BLOCK):
    n = x.numel()
    out = empty(n)
    buffer = empty(triton.cdiv(n, 128) * 128)
    kernel[(triton.cdiv(n, 128),)](x, buffer, out, n, BLOCK=BLOCK)
    return out


def inputs(make, n):
    return (make(n),)


def formula(x):
    return torch.nn.functional.pad(x, (0, -x.numel() % 128)).view(-1, 128).flip(1).flatten()[: x.numel()]


exact = True
