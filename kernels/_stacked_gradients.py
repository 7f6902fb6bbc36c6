"""stacked_cross_attention in Triton: gradients of the maps, through aggregation, cosine, softmax and first norm."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast.kernels._stacked_cosines import pool
from vlattn_fast.kernels._stacked_inputs import EPS, Constants, Contexts, Options, Queries, pair
from vlattn_fast.kernels._stacked_products import parts_of, store_parts
from vlattn_fast.kernels._stacked_weights import clip, columns, map_configuration, normal
from vlattn_fast.kernels._tiles import launched, load_tile, store_tile


class Attended(NamedTuple):
    """Each query row's attention to each context set."""

    alpha: Tensor  # (L, X, M)
    along: Tensor  # a . c, (X, L, M)
    cosine: Tensor  # cos(q, a), (X, L)
    norm_a: Tensor  # |a|, (X, L)


def gradient_maps(
    scores: Tensor, attention: Attended, grad: Tensor, queries: Queries, contexts: Contexts, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W (parts, L, X * M), V = diag(by_norm_a) alpha (L, X, M), grad_dot and by_norm_q (X, L). `grad` is (X, Y)."""
    alpha, along, cosine, norm_a = attention
    split = queries.rows.dtype == torch.bfloat16
    count = parts_of(torch.bfloat16)[0] if split else 1
    w = queries.new_map(count, *scores.shape, dtype=torch.bfloat16 if split else torch.float32)
    v = queries.new_map(*alpha.shape, dtype=along.dtype)
    grad_dot, by_norm_q = torch.zeros_like(cosine), torch.zeros_like(cosine)
    call = {
        "q": queries.arguments,
        "c": contexts.arguments,
        "scores": (scores, scores.stride(0)),
        "attention": ((alpha, *alpha.stride()[:2]), (along, *along.stride()[:2]), cosine, norm_a),
        "norms": contexts.norms,
        "grad": (grad, *grad.stride()),
        "outs": (w, w.stride(0), v, grad_dot, by_norm_q),
        "smooth": options.smooth,
        "sharpness": options.sharpness,
        "C": Constants(options.norm, options.clips, options.aggregation, count if split else 0),
    }
    _maps_kernel[(queries.sets * contexts.sets,)](**launched(call, map_configuration(contexts.size, 1024)))
    return w, v, grad_dot, by_norm_q


@triton.jit
def _maps_kernel(q, c, scores, attention, norms, grad, outs, smooth, sharpness, C: tl.constexpr):
    """W, V, grad_dot and by_norm_q of one pair, through aggregation, cosine, softmax and first norm."""
    i_x, i_y, begin, end, num = pair(q, c)
    L, M = q.L, c.M
    o_kv = tl.arange(0, C.BLOCK_KV)
    alpha, along, p_cosine, p_norm_a = attention
    p_w, stride_part, p_v, p_grad_dot, p_by_norm_q = outs
    p_s, stride_row = scores[0] + i_x * M, scores[1]
    p_cosine += i_x * L
    maps = (p_s, stride_row), (alpha[0] + i_x * alpha[2], alpha[1]), (along[0] + i_x * along[1], along[2])
    rows = p_cosine, p_norm_a + i_x * L, q.p_norm
    gradient = tl.where(num > 0, tl.load(grad[0] + i_x * grad[1] + i_y * grad[2]), 0.0)
    top, total = pool(p_cosine, begin, end, sharpness, C.AGGREGATION, C.BLOCK_Q)
    pooled = gradient, top, total, sharpness
    b_norm_c = tl.load(norms + i_x * M + o_kv, mask=o_kv < num, other=0.0)
    dtype: tl.constexpr = along[0].dtype.element_ty
    b_shift, b_norm = columns(p_s, stride_row, begin, end, o_kv, num, dtype, C)
    b_column = tl.zeros([C.BLOCK_KV], dtype=dtype)  # sum over the queries of normal * its gradient
    if C.NORM != "none":
        for n in range(begin, end, C.BLOCK_Q):
            o_q = n + tl.arange(0, C.BLOCK_Q)
            b_s, b_alpha, b_by_a, b_by_q, b_dot, b_grad = _grad_normal(
                maps, rows, b_norm_c, pooled, smooth, o_q, o_kv, end, num, C
            )
            b_normal = normal(b_s, b_shift, b_norm, C)
            b_column += tl.sum(tl.where((o_q < end)[:, None], b_normal * b_grad, 0.0), axis=0)
    for n in range(begin, end, C.BLOCK_Q):
        o_q = n + tl.arange(0, C.BLOCK_Q)
        b_s, b_alpha, b_by_a, b_by_q, b_dot, b_grad = _grad_normal(maps, rows, b_norm_c, pooled, smooth, o_q, o_kv, end, num, C)
        if C.NORM == "softmax":
            b_grad = normal(b_s, b_shift, b_norm, C) * (b_grad - b_column[None, :])
        elif C.NORM != "none":
            b_x = clip(b_s, C.CLIP)
            if C.NORM == "l1norm":
                b_slope = tl.where(b_x > 0.0, 1.0, tl.where(b_x < 0.0, -1.0, 0.0))
            else:
                b_slope = b_x / tl.where(b_norm > 0.0, b_norm, 1.0)[None, :]  # the gradient of a norm at 0 is 0
            b_grad = (b_grad - b_column[None, :] * b_slope) / (b_norm + EPS)[None, :]
        if C.CLIP:
            b_grad = tl.where(b_s > 0.0, b_grad, 0.1 * b_grad)
        b_w = tl.where((o_kv < num)[None, :], b_grad + b_dot[:, None] * (b_alpha - 1.0 / tl.maximum(num, 1)), 0.0)
        if C.PARTS > 0:
            store_parts(p_w + i_x * M, stride_part, stride_row, o_q, o_kv, end, M, b_w, C.PARTS)
        else:
            store_tile(p_w + i_x * M, stride_row, o_q, o_kv, end, M, b_w)
        store_tile(p_v + i_x * M, c.X * M, o_q, o_kv, end, M, b_by_a[:, None] * b_alpha)
        tl.store(p_grad_dot + i_x * L + o_q, b_dot, mask=o_q < end)
        tl.store(p_by_norm_q + i_x * L + o_q, b_by_q, mask=o_q < end)


@triton.jit
def _grad_normal(maps, rows, b_norm_c, pooled, smooth, o_q, o_kv, end, num, C: tl.constexpr):
    """For a tile [q,kv]: scores, alpha; by_norm_a, by_norm_q, the gradient at q . a, [q] each; that at the normalised scores.

    maps: scores, alpha and along, each with its stride of rows. rows: cosines, |a| and |q|. b_norm_c: |c| [kv]. pooled: the
    gradient at the similarity, the numbers of `pool`, the sharpness.

    The softmax over the contexts takes b_mean = <a, gradient at a> off each entry. It is 0, as a cosine does not change with the
    length of a, but where the clamp acts. Rounding of the scores leaves another number. Each context gives it in proportion to
    |c|, so that a zero context has none of it: the column's norm of 0 + EPS would make 1e8 times as much of it.
    """
    scores, alpha, along = maps
    grad, top, total, sharpness = pooled
    b_s = load_tile(scores[0], scores[1], o_q, o_kv, end, num).to(along[0].dtype.element_ty)
    b_alpha = load_tile(alpha[0], alpha[1], o_q, o_kv, end, num)
    b_along = load_tile(along[0], along[1], o_q, o_kv, end, num)
    b_r = tl.load(rows[0] + o_q, mask=o_q < end, other=0.0)
    b_norm_a = tl.load(rows[1] + o_q, mask=o_q < end, other=0.0)
    b_norm_q = tl.load(rows[2] + o_q, mask=o_q < end, other=0.0)
    if C.AGGREGATION == "logsumexp":
        b_dr = grad * tl.exp(b_r * sharpness - top) / total
    elif C.AGGREGATION == "max":
        b_dr = tl.where(top == top, tl.where(b_r == top, grad / tl.maximum(total, 1.0), 0.0), top)  # NaN where a cosine is
    elif C.AGGREGATION == "mean":
        b_dr = tl.where(o_q < end, grad / total, 0.0)
    else:
        b_dr = tl.where(o_q < end, grad, 0.0)
    b_length = b_norm_q * b_norm_a
    b_dot = b_dr / tl.maximum(b_length, EPS)
    b_dlength = tl.where(b_length >= EPS, -b_dot * b_r, 0.0)
    # gradients of the norms (0 at 0), divided by the norm
    b_by_a = tl.where(b_norm_a > 0.0, b_dlength * b_norm_q / tl.where(b_norm_a > 0.0, b_norm_a, 1.0), 0.0)
    b_by_q = tl.where(b_norm_q > 0.0, b_dlength * b_norm_a / tl.where(b_norm_q > 0.0, b_norm_q, 1.0), 0.0)
    b_dalpha = b_dot[:, None] * b_s + b_by_a[:, None] * b_along
    b_mean = tl.sum(b_alpha * b_dalpha, axis=1)[:, None]
    if C.NORM == "l1norm" or C.NORM == "l2norm":
        b_share = tl.where((b_length >= EPS)[:, None], b_norm_c[None, :], 1.0)
        b_total = tl.sum(b_alpha * b_share, axis=1)[:, None]
        b_mean = b_mean / tl.where(b_total > 0.0, b_total, 1.0) * b_share
    b_grad = smooth * b_alpha * (b_dalpha - b_mean)
    return b_s, b_alpha, b_by_a, b_by_q, b_dot, b_grad
