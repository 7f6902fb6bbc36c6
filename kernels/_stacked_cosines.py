"""stacked_cross_attention in Triton: cosines of queries and attended vectors, and the similarity of a pair from its cosines."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast.kernels._configurations import configuration
from vlattn_fast.kernels._stacked_inputs import EPS, Contexts, Options, Queries, pair
from vlattn_fast.kernels._stacked_products import parts_of
from vlattn_fast.kernels._tiles import cdiv, dot, input_precision, launched, load_tile


def attended_cosines(parts: Tensor, queries: Queries, contexts: Contexts) -> tuple[Tensor, Tensor]:
    """cos(q, a) and |a|, (X, L) each, from `weight_parts`."""
    length, features = queries.rows.shape
    cosine = queries.norms.new_empty((contexts.sets, length))
    norm_a = torch.empty_like(cosine)
    meta = configuration("stacked_cross_attention", "attend", M=contexts.size, dtype=queries.rows.dtype)
    call = {
        "q": queries.arguments,
        "c": contexts.arguments,
        "parts": (parts, *parts.stride()[:3]),
        "outs": (cosine, norm_a),
        "D": features,
        "unscale": 1.0 / parts_of(queries.rows.dtype)[1],
        "C": _Constants(len(parts), contexts.size <= meta["BLOCK_KV"], input_precision(parts.dtype)),
    }
    _attend_kernel[(contexts.sets * cdiv(length, meta["BLOCK_Q"]),)](**launched(call, meta))
    return cosine, norm_a


def aggregate(cosine: Tensor, queries: Queries, contexts: Contexts, options: Options, out: Tensor) -> None:
    """The similarities of all pairs, from cos(q, a) (X, L) into `out` (X, Y)."""
    _aggregate_kernel[(queries.sets * contexts.sets,)](
        q=queries.arguments,
        c=contexts.arguments,
        p_cosine=cosine,
        out=(out, *out.stride()),
        sharpness=options.sharpness,
        AGGREGATION=options.aggregation,
        BLOCK_Q=128,
        num_warps=1,
        enable_fp_fusion=True,
    )


class _Constants(NamedTuple):
    PARTS: int
    ONE_BLOCK: bool
    PRECISION: str
    BLOCK_Q: int = 0
    BLOCK_KV: int = 0
    BLOCK_D: int = 0


@triton.jit
def _attend_kernel(q, c, parts, outs, D, unscale, C: tl.constexpr):
    """cos(q, a) and |a| of some query rows and one context set, which neighbouring programs share.

    a = alpha C is computed one block of features at a time.
    """
    L, M = q.L, c.M
    p_parts, stride_part, stride_row, stride_x = parts
    i = tl.program_id(0).to(tl.int64)
    num_q = tl.cdiv(L, C.BLOCK_Q)
    i_x, i_q = i // num_q, (i % num_q).to(tl.int32)
    o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    o_kv = tl.arange(0, C.BLOCK_KV)
    num = tl.load(c.p_lengths + i_x).to(tl.int32)
    p_c = c.p + i_x * M * D
    p_parts += i_x * stride_x
    b_dot = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    b_square = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    wide_part = tl.cast(stride_part, tl.int64)
    if C.ONE_BLOCK:
        # behind the contexts there are zeros up to a stride that is a known multiple of 16, so the mask does not split loads
        b_0 = load_tile(p_parts, stride_row, o_q, o_kv, L, stride_x)  # [q,kv]
        b_1 = load_tile(p_parts + (1 if C.PARTS > 1 else 0) * wide_part, stride_row, o_q, o_kv, L, stride_x)
        b_2 = load_tile(p_parts + (2 if C.PARTS > 2 else 0) * wide_part, stride_row, o_q, o_kv, L, stride_x)
    for d in range(0, tl.where(i_q * C.BLOCK_Q < tl.load(q.p_total), D, 0), C.BLOCK_D):
        o_d = d + tl.arange(0, C.BLOCK_D)
        b_a = tl.zeros([C.BLOCK_Q, C.BLOCK_D], dtype=tl.float32)
        if C.ONE_BLOCK:
            b_c = load_tile(p_c, D, o_kv, o_d, num, D)  # [kv,D]
            b_a += dot(b_0, b_c, C.PRECISION)
            if C.PARTS > 1:
                b_a += dot(b_1, b_c, C.PRECISION)
            if C.PARTS > 2:
                b_a += dot(b_2, b_c, C.PRECISION)
        else:
            for m in range(0, num, C.BLOCK_KV):
                b_c = load_tile(p_c, D, m + o_kv, o_d, num, D)
                for part in tl.static_range(C.PARTS):
                    b_part = load_tile(p_parts + part * wide_part, stride_row, o_q, m + o_kv, L, stride_x)
                    b_a += dot(b_part, b_c, C.PRECISION)
        b_q = load_tile(q.p, D, o_q, o_d, L, D).to(tl.float32)  # [q,D]
        b_dot += tl.sum(b_q * b_a, axis=1)
        b_square += tl.sum(b_a * b_a, axis=1)
    b_norm = tl.sqrt(b_square) * unscale
    b_norm_q = tl.load(q.p_norm + o_q, mask=o_q < L, other=0.0)
    b_cosine = b_dot * unscale / tl.maximum(b_norm_q * b_norm, EPS)
    tl.store(outs[0] + i_x * L + o_q, b_cosine, mask=o_q < L)
    tl.store(outs[1] + i_x * L + o_q, b_norm, mask=o_q < L)


@triton.jit
def _aggregate_kernel(q, c, p_cosine, out, sharpness, AGGREGATION: tl.constexpr, BLOCK_Q: tl.constexpr):
    """One similarity from the cosines of a pair; 0 where a side is empty."""
    i_x, i_y, begin, end, num = pair(q, c)
    top, total = pool(p_cosine + i_x * q.L, begin, end, sharpness, AGGREGATION, BLOCK_Q)
    if AGGREGATION == "logsumexp":
        value = (top + tl.log(tl.where(total == 0.0, 1.0, total))) / sharpness
    elif AGGREGATION == "mean":
        value = top / tl.maximum(total, 1.0)
    else:
        value = top
    tl.store(out[0] + i_x * out[1] + i_y * out[2], tl.where((num > 0) & (begin < end), value, 0.0))


@triton.jit
def pool(p_cosine, begin, end, sharpness, AGGREGATION: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Two numbers of the cosines of a pair.

    logsumexp: the maximum of sharpness * r and the sum of exponentials. max: the maximum and how often it occurs. Otherwise: the
    sum and the count.
    """
    dtype: tl.constexpr = p_cosine.dtype.element_ty
    top = tl.full([], 0.0 if AGGREGATION == "sum" or AGGREGATION == "mean" else float("-inf"), dtype=dtype)
    total = tl.full([], 0.0, dtype=dtype)
    for n in range(begin, end, BLOCK_Q):
        o_q = n + tl.arange(0, BLOCK_Q)
        b_r = tl.load(p_cosine + o_q, mask=o_q < end, other=0.0)
        if AGGREGATION == "sum" or AGGREGATION == "mean":
            top += tl.sum(b_r, axis=0)
            total += tl.sum((o_q < end).to(dtype), axis=0)
        else:
            if AGGREGATION == "logsumexp":
                b_r = b_r * sharpness
            b_r = tl.where(o_q < end, b_r, float("-inf"))
            new = tl.maximum(top, tl.max(b_r, axis=0) + tl.sum(tl.where(b_r == b_r, 0.0, b_r), axis=0), tl.PropagateNan.ALL)
            if AGGREGATION == "logsumexp":
                total = total * tl.exp(top - new) + tl.sum(tl.exp(b_r - new), axis=0)
            else:
                total = tl.where(top == new, total, 0.0) + tl.sum((b_r == new).to(dtype), axis=0)
            top = new
    return top, total
