"""stacked_cross_attention in Triton: the weights alpha from the scores, through clipping, first norm and softmax."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast.kernels._stacked_inputs import EPS, Constants, Contexts, Options, Queries, padded, pair
from vlattn_fast.kernels._stacked_products import parts_of, store_parts
from vlattn_fast.kernels._tiles import block_size, launched, load_tile, store_tile


def weight_parts(scores: Tensor, queries: Queries, contexts: Contexts, options: Options) -> Tensor:
    """alpha as numbers of the inputs' dtype that sum to it, (parts, L, X, M), M padded."""
    if queries.rows.dtype == torch.float32:
        return _launch(scores, queries, contexts, options, torch.float32, split=False)[0][None]
    return _launch(scores, queries, contexts, options, None, split=True)[1]


def weights(scores: Tensor, queries: Queries, contexts: Contexts, options: Options, dtype: torch.dtype) -> Tensor:
    """alpha (L, X, M) in `dtype`."""
    return _launch(scores, queries, contexts, options, dtype, split=False)[0][..., : contexts.size]


def weights_and_parts(scores: Tensor, queries: Queries, contexts: Contexts, options: Options) -> tuple[Tensor, Tensor]:
    """`weights` in float32 and `weight_parts` of 16-bit inputs."""
    alpha, parts = _launch(scores, queries, contexts, options, torch.float32, split=True)
    return alpha[..., : contexts.size], parts


def _launch(
    scores: Tensor, queries: Queries, contexts: Contexts, options: Options, dtype: torch.dtype | None, split: bool
) -> tuple[Any, Any]:
    """alpha (L, X, M) in `dtype`, and with `split` its parts (parts, L, X, M), M padded; None for what is not computed."""
    shape = len(queries.rows), contexts.sets, padded(contexts.size)
    count, factor = parts_of(queries.rows.dtype)
    alpha: Any = None if dtype is None else queries.new_map(*shape, dtype=dtype)
    parts = queries.new_map(count, *shape, dtype=queries.rows.dtype) if split else None
    strided = alpha[None] if parts is None else parts
    call = {
        "q": queries.arguments,
        "c": contexts.arguments,
        "scores": (scores, scores.stride(0)),
        "p_alpha": alpha,
        "parts": (strided, *strided.stride()[:3]),
        "smooth": options.smooth,
        "factor": factor,
        "C": Constants(options.norm, options.clips, options.aggregation, count if split else 0),
    }
    _weights_kernel[(queries.sets * contexts.sets,)](**launched(call, map_configuration(contexts.size, 2048)))
    return alpha, parts


def map_configuration(size: int, elements: int) -> dict[str, int]:
    """Rows of whole contexts, `elements` in all. Not measured: few enough for the registers of sm_90."""
    block = block_size(size)
    return {"BLOCK_Q": max(1, min(64, elements // block)), "BLOCK_KV": block, "num_warps": 4 if block <= 1024 else 8}


@triton.jit
def _weights_kernel(q, c, scores, p_alpha, parts, smooth, factor, C: tl.constexpr):
    """The softmax over the contexts of the normalised scores of one pair."""
    i_x, _, begin, end, num = pair(q, c)
    o_kv = tl.arange(0, C.BLOCK_KV)
    p_s, stride_row = scores[0] + i_x * c.M, scores[1]
    p_parts, stride_part, stride_alpha_row, stride_alpha_x = parts
    dtype: tl.constexpr = tl.float32 if p_alpha is None else p_alpha.dtype.element_ty
    b_shift, b_norm = columns(p_s, stride_row, begin, end, o_kv, num, dtype, C)
    for n in range(begin, end, C.BLOCK_Q):
        o_q = n + tl.arange(0, C.BLOCK_Q)
        b_s = load_tile(p_s, stride_row, o_q, o_kv, end, num).to(dtype)  # [q,kv]
        b_x = smooth * normal(b_s, b_shift, b_norm, C)
        b_x = tl.where((o_kv < num)[None, :], b_x, float("-inf"))
        b_max = tl.max(b_x, axis=1)
        b_p = tl.exp(b_x - tl.where(b_max == float("-inf"), 0.0, b_max)[:, None])
        b_sum = tl.sum(b_p, axis=1)
        b_p = b_p / tl.where(b_sum > 0.0, b_sum, 1.0)[:, None]
        if p_alpha is not None:
            store_tile(p_alpha + i_x * stride_alpha_x, stride_alpha_row, o_q, o_kv, end, stride_alpha_x, b_p)
        if C.PARTS > 0:
            p = p_parts + i_x * stride_alpha_x
            store_parts(p, stride_part, stride_alpha_row, o_q, o_kv, end, stride_alpha_x, b_p * factor, C.PARTS)


@triton.jit
def clip(b_s, CLIP: tl.constexpr):
    if CLIP:
        b_s = tl.where(b_s >= 0.0, b_s, 0.1 * b_s)
    return b_s


@triton.jit
def columns(p_s, stride_row, begin, end, o_kv, num, dtype: tl.constexpr, C: tl.constexpr):
    """The arguments b_shift and b_norm of `normal`, [kv] each: the maximum and the sum of exponentials, or 0 and the norm."""
    b_shift = tl.full(o_kv.shape, float("-inf") if C.NORM == "softmax" else 0.0, dtype=dtype)
    b_sum = tl.zeros(o_kv.shape, dtype=dtype)
    if C.NORM != "none":
        for n in range(begin, end, C.BLOCK_Q):
            o_q = n + tl.arange(0, C.BLOCK_Q)
            b_x = clip(load_tile(p_s, stride_row, o_q, o_kv, end, num).to(dtype), C.CLIP)
            if C.NORM == "softmax":
                b_x = tl.where((o_q < end)[:, None], b_x, float("-inf"))
                b_new = tl.maximum(b_shift, tl.max(b_x, axis=0))
                b_sum = b_sum * tl.exp(b_shift - b_new) + tl.sum(tl.exp(b_x - b_new[None, :]), axis=0)
                b_shift = b_new
            elif C.NORM == "l1norm":
                b_sum += tl.sum(tl.abs(b_x), axis=0)
            else:
                b_sum += tl.sum(b_x * b_x, axis=0)
    return b_shift, tl.sqrt(b_sum) if C.NORM == "l2norm" else b_sum


@triton.jit
def normal(b_s, b_shift, b_norm, C: tl.constexpr):
    """Scores [q,kv] after clipping and the first norm."""
    b_x = clip(b_s, C.CLIP)
    if C.NORM == "softmax":
        b_x = tl.exp(b_x - b_shift[None, :]) / b_norm[None, :]
    elif C.NORM != "none":
        b_x = b_x / (b_norm + EPS)[None, :]
    return b_x
