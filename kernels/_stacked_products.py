"""stacked_cross_attention in Triton: products over the features of all pairs at once.

A float32 factor is split into numbers of the inputs' dtype that sum to it, so that 16-bit tensor cores multiply it without loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast.kernels._configurations import configuration
from vlattn_fast.kernels._stacked_inputs import Contexts, Queries
from vlattn_fast.kernels._tiles import cdiv, dot, input_precision, launched, load_tile, store_tile


def parts_of(dtype: torch.dtype) -> tuple[int, float]:
    """How many numbers of `dtype` sum to a float32 in [0, 1], and the factor that they are stored with.

    float16 has 11 bits per number, and its smallest step is 2^-24. The factor keeps the parts far above it.
    """
    return {torch.bfloat16: (3, 1.0), torch.float16: (2, 4096.0), torch.float32: (1, 1.0)}[dtype]


def products(queries: Queries, contexts: Contexts) -> Tensor:
    """q . c, (L, X * M) float32."""
    if queries.rows.dtype == torch.float32:
        return queries.rows @ contexts.rows.mT
    scores = queries.rows.new_empty((len(queries.rows), len(contexts.rows)), dtype=torch.float32)
    _matmul(queries.rows[None], contexts.rows.mT, queries.total, scores, inner=False, add=False)
    return scores


def add_product(w: Tensor, rows: Tensor, total: Tensor, out: Tensor, inner: bool) -> None:
    """out += w @ rows, with w (parts, i, k) from `gradient_maps`. The first `total` of its rows count, or of k with `inner`."""
    if w.dtype == torch.float32:  # float16 has not enough range to split W
        out.addmm_(w[0], rows.float())
    else:
        _matmul(w, rows, total, out, inner, add=True)


def _matmul(a: Tensor, b: Tensor, total: Tensor, out: Tensor, inner: bool, add: bool) -> None:
    (parts, num_i, num_k), num_j = a.shape, b.shape[1]
    meta = configuration("stacked_cross_attention", "matmul", parts=parts)
    grid = (cdiv(num_i, meta["BLOCK_I"]) * cdiv(num_j, meta["BLOCK_J"]),)
    call = {
        "a": (a, *a.stride()),
        "b": (b, *b.stride()),
        "p_total": total,
        "out": (out, out.stride(0)),
        "sizes": (num_i, num_j, num_k),
        "C": _Constants(parts, inner, add, input_precision(b.dtype)),
    }
    if grid[0] > 0:
        _matmul_kernel[grid](**launched(call, meta))


class _Constants(NamedTuple):
    PARTS: int
    INNER: bool
    ADD: bool
    PRECISION: str
    BLOCK_I: int = 0
    BLOCK_J: int = 0
    BLOCK_K: int = 0


@triton.jit
def _matmul_kernel(a, b, p_total, out, sizes, C: tl.constexpr):
    """out (i, j), or out plus, the sum of the parts of a (parts, i, k) times b (k, j).

    Rows of a from `total` on are zero and are skipped; with INNER inner indices.
    """
    p_a, stride_part, stride_ai, stride_ak = a
    p_b, stride_bk, stride_bj = b
    num_rows, num_cols, num_inner = sizes
    num_i = tl.cdiv(num_rows, C.BLOCK_I)
    i = tl.program_id(0)
    o_i = (i % num_i) * C.BLOCK_I + tl.arange(0, C.BLOCK_I)
    o_j = (i // num_i) * C.BLOCK_J + tl.arange(0, C.BLOCK_J)
    total = tl.load(p_total).to(tl.int32)
    end = tl.minimum(num_inner, total) if C.INNER else tl.where((i % num_i) * C.BLOCK_I < total, num_inner, 0)
    b_out = tl.zeros([C.BLOCK_I, C.BLOCK_J], dtype=tl.float32)
    for k in range(0, end, C.BLOCK_K):
        o_k = k + tl.arange(0, C.BLOCK_K)
        m_a = (o_i < num_rows)[:, None] & (o_k < end)[None, :]
        m_b = (o_k < end)[:, None] & (o_j < num_cols)[None, :]
        offsets = o_i.to(tl.int64)[:, None] * stride_ai + o_k.to(tl.int64)[None, :] * stride_ak
        b_b = tl.load(p_b + o_k.to(tl.int64)[:, None] * stride_bk + o_j.to(tl.int64)[None, :] * stride_bj, mask=m_b, other=0.0)
        for part in tl.static_range(C.PARTS):
            b_a = tl.load(p_a + part * tl.cast(stride_part, tl.int64) + offsets, mask=m_a, other=0.0)  # [i,k]
            b_out += dot(b_a, b_b, C.PRECISION)
    if C.ADD:
        b_out += load_tile(out[0], out[1], o_i, o_j, num_rows, num_cols)
    store_tile(out[0], out[1], o_i, o_j, num_rows, num_cols, b_out)


@triton.jit
def store_parts(p, stride_part, stride_row, o_row, o_col, num_rows, num_cols, b, PARTS: tl.constexpr):
    """`b` as PARTS tiles of p's dtype that sum to it. Each tile holds what the earlier ones rounded away."""
    for part in tl.static_range(PARTS):
        b_part = b.to(p.dtype.element_ty)
        store_tile(p + part * tl.cast(stride_part, tl.int64), stride_row, o_row, o_col, num_rows, num_cols, b_part)
        b -= b_part.to(tl.float32)
