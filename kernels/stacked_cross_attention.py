"""stacked_cross_attention in Triton: every query row attends to every context set, chunk by chunk; forward and backward.

Shapes: images (Bi, R, D), captions (Bc, T, D); similarity (Bi, Bc). A chunk has X context sets of M rows and Y query sets. The L
real rows of the query sets are packed one after the other, so padding costs nothing. The maps of a chunk are (L, X * M), those of
alpha (L, X, M), row-major with M padded to a multiple of 16, so that 16-bit elements are loaded 16 bytes at a time.
Roofline: tensor cores for 16-bit inputs, FP32 issue for float32 (per map element 2 products over D forward, 3 or 4 backward).
Trick: only the products over D are large. They are tiled over the rows of all pairs at once, not pair by pair: a program of
`_attend_kernel` combines one context set with rows of many query sets. alpha is float32, as in the formula. It is split into
16-bit parts whose sum it is, so that the tensor cores multiply it with 16-bit contexts without loss. The attended vectors exist
only in registers. Their Gram form would cancel in float32, so it is taken in float64, for the gradients of float32 inputs. Maps
live for one chunk. There are no atomics. Not yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast.backends.inputs import StackedCrossAttentionBackwardInputs, StackedCrossAttentionInputs
from vlattn_fast.backends.reference.stacked_cross_attention import split_norm
from vlattn_fast.kernels._configurations import configuration
from vlattn_fast.kernels._device import on_device
from vlattn_fast.kernels._tiles import block_size, cdiv, dot, input_precision, load_tile, store_tile

MAP_ELEMENTS = 1 << 22  # the least that `_map_elements` gives
EPS = tl.constexpr(1e-8)  # of SCAN's norms and cosine


@on_device
def forward(inputs: StackedCrossAttentionInputs) -> Tensor:
    """similarity (Bi, Bc) float32. Rows beyond the lengths must be zero; the public call zeroes them."""
    images, captions, direction = inputs.images, inputs.captions, inputs.direction
    smooth, aggregation, lambda_lse = inputs.smooth, inputs.aggregation, inputs.lambda_lse
    similarity = images.new_empty((images.shape[0], captions.shape[0]), dtype=torch.float32)
    if images.shape[1] == 0 or captions.shape[1] == 0:
        return similarity.zero_()
    query, context = _sides(inputs)
    by_context = similarity if direction == "t2i" else similarity.mT
    rule = _rule(inputs.first_norm)
    for x, tiles_y in _chunks(context, query):
        contexts = _Contexts(context, x)
        for y in tiles_y:
            queries = _Queries(query, y)
            scores = _scores(queries, contexts)
            _, parts = _weights(scores, queries, contexts, rule, smooth, keep=None)
            cosine, _ = _attend(parts, queries, contexts)
            out = by_context[x, y]
            _aggregate_kernel[(queries.sets * contexts.sets,)](
                p_cosine=cosine,
                p_start=queries.start,
                p_lengths=contexts.lengths,
                p_out=out,
                X=contexts.sets,
                L=len(queries.rows),
                stride_x=out.stride(0),
                stride_y=out.stride(1),
                sharpness=lambda_lse,
                AGGREGATION=aggregation,
                BLOCK_Q=128,
                num_warps=1,
            )
    return similarity


@on_device
def backward(inputs: StackedCrossAttentionBackwardInputs) -> tuple[Tensor, Tensor]:
    """Gradients of images and captions.

    With W = grad_score + diag(grad_dot) (alpha - 1/m): grad_q = W C + grad_dot mean(C) + diag(by_norm_q) q and
    grad_C = W^T q + sum_q grad_dot q / m + U C, where by_norm is the gradient of a norm over that norm and
    U = alpha^T diag(by_norm_a) alpha is summed over the query sets. Terms cancel where a is short or close to q: for float32
    inputs all maps behind alpha, and the small products a C^T = alpha C C^T and U C, are float64, and a is not formed.
    """
    images, captions, direction = inputs.images, inputs.captions, inputs.direction
    smooth, aggregation, lambda_lse = inputs.smooth, inputs.aggregation, inputs.lambda_lse
    query, context = _sides(inputs)
    grad_q, grad_c = (torch.zeros_like(rows, dtype=torch.float32) for rows, _ in (query, context))
    grad = inputs.grad_similarity.float() if direction == "t2i" else inputs.grad_similarity.float().mT
    rule = _rule(inputs.first_norm)
    dtype = torch.float64 if images.dtype == torch.float32 else torch.float32
    for x, tiles_y in _chunks(context, query) if images.shape[1] > 0 and captions.shape[1] > 0 else ():
        contexts = _Contexts(context, x)
        wide = contexts.rows.to(dtype).view(contexts.sets, contexts.size, -1)
        share = contexts.lengths.clamp(min=1).to(dtype).reciprocal()[:, None]
        mean, gram = wide.sum(1) * share, wide @ wide.mT
        grad_mean, grad_gram = torch.zeros_like(mean), torch.zeros_like(gram)
        grad_rows = grad_c[x].view(len(contexts.rows), -1)
        for y in tiles_y:
            queries = _Queries(query, y, dtype)
            wide_q = queries.rows.to(dtype)
            scores = _scores(queries, contexts)
            alpha, parts = _weights(scores, queries, contexts, rule, smooth, keep=dtype)
            by_set = alpha.transpose(0, 1)  # (X,L,M)
            along = by_set @ gram  # a . c
            if dtype == torch.float64:
                norm_a = (by_set * along).sum(2).clamp_(min=0.0).sqrt_()  # rounding may give a negative number
                dot = ((by_set - share[..., None]) * scores.view(-1, *wide.shape[:2]).transpose(0, 1)).sum(2) + mean @ wide_q.mT
                cosine = dot / (queries.norms * norm_a).clamp_(min=EPS.value)
            else:
                cosine, norm_a = _attend(parts, queries, contexts)
            del parts
            w, v, grad_dot, by_norm_q = _maps(
                scores, alpha, along, cosine, norm_a, grad[x, y], queries, contexts, rule, smooth, aggregation, lambda_lse
            )
            del scores, along
            grad_packed = (grad_dot.mT @ mean + by_norm_q.sum(0)[:, None] * wide_q).float()
            _multiply(w, contexts.rows, queries.start[-1:], grad_packed, inner=False)
            _multiply(w.mT, queries.rows, queries.start[-1:], grad_rows, inner=True)
            grad_gram += v.permute(1, 2, 0) @ by_set
            grad_mean += grad_dot @ wide_q
            grad_q[y] += queries.unpack(grad_packed).view_as(grad_q[y])
        grad_c[x] += grad_gram @ wide + (grad_mean * share)[:, None]
    grad_q, grad_c = grad_q.to(images.dtype), grad_c.to(images.dtype)
    return (grad_c, grad_q) if direction == "t2i" else (grad_q, grad_c)


Side = tuple[Tensor, Tensor | None]  # rows (B,L,D), and how many of each are real


def _sides(inputs: StackedCrossAttentionInputs | StackedCrossAttentionBackwardInputs) -> tuple[Side, Side]:
    """The side of the queries and the side of the contexts."""
    image = inputs.images.contiguous(), inputs.image_lengths
    caption = inputs.captions.contiguous(), inputs.caption_lengths
    return (caption, image) if inputs.direction == "t2i" else (image, caption)


def _chunks(context: Side, query: Side) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of the context sets, each with the slices of the query sets. They depend on shapes and the device's size alone."""
    (num_x, size, _), (num_y, n, _) = context[0].shape, query[0].shape
    m, most = _padded(size), _map_elements(context[0].device)
    step_x = _even(num_x, most // (m * max(m, num_y * n)))  # m for the Gram matrices
    step_y = _even(num_y, most // (m * step_x * n))
    tiles_y = [slice(y, min(y + step_y, num_y)) for y in range(0, num_y, step_y)]
    for x in range(0, num_x, step_x):
        yield slice(x, min(x + step_x, num_x)), tiles_y


def _padded(size: int) -> int:
    """How many contexts a set has in maps of alpha."""
    return cdiv(size, 16) * 16


def _map_elements(device: torch.device) -> int:
    """Elements of each map of a chunk, or of one pair where that is more: a power of two.

    The backward pass holds about twelve maps of at most eight bytes. They take a sixteenth of the device's memory; what of it is
    free is not asked, since the order of sums would depend on it.
    """
    if device.type != "cuda":
        return MAP_ELEMENTS
    most = int(torch.cuda.get_device_properties(device).total_memory) // (16 * 12 * 8)
    return max(MAP_ELEMENTS, 1 << (most.bit_length() - 1))


def _even(count: int, most: int) -> int:
    """The step that covers `count` in the fewest steps of at most `most` (at least 1), so that no step is much smaller."""
    return cdiv(count, cdiv(count, max(1, most))) if count > 0 else 1


class _Contexts:
    """Context sets x: rows (X * M, D), lengths (X)."""

    def __init__(self, side: Side, x: slice) -> None:
        rows, lengths = side[0][x], side[1]
        self.sets, self.size = rows.shape[:2]
        self.rows = rows.reshape(self.sets * self.size, rows.shape[2])
        self.lengths = rows.new_full((self.sets,), self.size, dtype=torch.int64) if lengths is None else lengths[x].contiguous()


class _Queries:
    """Query sets y: rows (L, D). The real rows of set i go from start[i] to start[i + 1]; the rest are zeros."""

    def __init__(self, side: Side, y: slice, dtype: torch.dtype = torch.float32) -> None:
        rows, lengths = side[0][y], side[1]
        self.sets, size = rows.shape[:2]
        count = self.sets * size
        self.rows, self.place = rows.reshape(count, rows.shape[2]), None
        if lengths is None:
            self.start = torch.arange(0, count + 1, size, device=rows.device)
        else:
            real = (torch.arange(size, device=rows.device) < lengths[y, None]).flatten()
            self.start = F.pad(lengths[y].cumsum(0), (1, 0))
            self.place = torch.where(real, real.cumsum(0) - 1, self.start[-1] + (~real).cumsum(0) - 1)
            self.rows = torch.empty_like(self.rows).index_copy_(0, self.place, self.rows)
        self.norms = torch.linalg.vector_norm(self.rows, dim=1, dtype=dtype)

    def new_map(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """(L, ...), or (parts, L, ...). What is multiplied as a whole must not hold garbage behind the packed rows."""
        return self.rows.new_empty(shape, dtype=dtype) if self.place is None else self.rows.new_zeros(shape, dtype=dtype)

    def unpack(self, x: Tensor) -> Tensor:
        return x if self.place is None else x[self.place]


def _rule(first_norm: str | None) -> dict[str, Any]:
    """The constants NORM, which follows the clipping, and CLIP."""
    clips, norm = split_norm(first_norm)
    return {"NORM": "none" if norm is None else norm, "CLIP": clips}


def _parts(dtype: torch.dtype) -> tuple[int, float]:
    """How many numbers of `dtype` sum to a float32 in [0, 1], and the factor that they are stored with.

    float16 has 11 bits per number, and its smallest step is 2^-24. The factor keeps the parts far above it.
    """
    return {torch.bfloat16: (3, 1.0), torch.float16: (2, 4096.0), torch.float32: (1, 1.0)}[dtype]


def _scores(queries: _Queries, contexts: _Contexts) -> Tensor:
    """q . c, (L, X * M) float32."""
    if queries.rows.dtype == torch.float32:
        return queries.rows @ contexts.rows.mT
    scores = queries.rows.new_empty((len(queries.rows), len(contexts.rows)), dtype=torch.float32)
    _matmul(queries.rows[None], contexts.rows.mT, queries.start[-1:], scores, inner=False, add=False)
    return scores


def _multiply(w: Tensor, rows: Tensor, total: Tensor, out: Tensor, inner: bool) -> None:
    """out += w @ rows, with w (parts, i, k) from `_maps`. The first `total` of its rows count, or of k with `inner`."""
    if w.dtype == torch.float32:  # float16 has not enough range to split W
        out.addmm_(w[0], rows.float())
    else:
        _matmul(w, rows, total, out, inner, add=True)


def _matmul(a: Tensor, b: Tensor, total: Tensor, out: Tensor, inner: bool, add: bool) -> None:
    (parts, num_i, num_k), num_j = a.shape, b.shape[1]
    meta = configuration("stacked_cross_attention", "matmul", parts=parts)
    grid = (cdiv(num_i, meta["BLOCK_I"]) * cdiv(num_j, meta["BLOCK_J"]),)
    if grid[0] > 0:
        _matmul_kernel[grid](
            p_a=a,
            p_b=b,
            p_total=total,
            p_out=out,
            num_rows=num_i,
            num_cols=num_j,
            num_inner=num_k,
            stride_part=a.stride(0),
            stride_ai=a.stride(1),
            stride_ak=a.stride(2),
            stride_bk=b.stride(0),
            stride_bj=b.stride(1),
            stride_oi=out.stride(0),
            PARTS=parts,
            INNER=inner,
            ADD=add,
            PRECISION=input_precision(),
            **meta,
        )


def _weights(
    scores: Tensor, queries: _Queries, contexts: _Contexts, rule: dict[str, Any], smooth: float, keep: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """alpha (L, X, M) in the dtype `keep`, and its parts (parts, L, X, M) in the dtype of the inputs, M padded.

    `keep` = None stores alpha only where the parts need it.
    """
    dtype = queries.rows.dtype
    count, factor = _parts(dtype)
    split = dtype != torch.float32
    shape = (len(queries.rows), contexts.sets, _padded(contexts.size))
    alpha = scores if split and keep is None else queries.new_map(*shape, dtype=keep or torch.float32)
    parts = queries.new_map(count, *shape, dtype=dtype) if split else alpha[None]
    _weights_kernel[(queries.sets * contexts.sets,)](
        p_s=scores,
        p_alpha=alpha,
        p_parts=parts,
        p_start=queries.start,
        p_lengths=contexts.lengths,
        X=contexts.sets,
        M=contexts.size,
        stride_row=scores.stride(0),
        stride_part=parts.stride(0),
        stride_alpha_row=parts.stride(1),
        stride_alpha_x=parts.stride(2),
        smooth=smooth,
        factor=factor,
        **rule,
        PARTS=count if split else 0,
        KEEP=not split or keep is not None,
        **_config_maps(contexts.size, 2048),
    )
    return alpha[..., : contexts.size], parts


def _attend(parts: Tensor, queries: _Queries, contexts: _Contexts) -> tuple[Tensor, Tensor]:
    """cos(q, a) and |a|, (X, L) each."""
    length, features = queries.rows.shape
    cosine = queries.norms.new_empty((contexts.sets, length))
    norm_a = torch.empty_like(cosine)
    meta = configuration("stacked_cross_attention", "attend", M=contexts.size, dtype=queries.rows.dtype)
    _attend_kernel[(contexts.sets * cdiv(length, meta["BLOCK_Q"]),)](
        p_q=queries.rows,
        p_c=contexts.rows,
        p_parts=parts,
        p_norm_q=queries.norms,
        p_total=queries.start[-1:],
        p_lengths=contexts.lengths,
        p_cosine=cosine,
        p_norm_a=norm_a,
        L=length,
        M=contexts.size,
        D=features,
        stride_part=parts.stride(0),
        stride_row=parts.stride(1),
        stride_x=parts.stride(2),
        unscale=1.0 / _parts(queries.rows.dtype)[1],
        PARTS=len(parts),
        ONE_BLOCK=contexts.size <= meta["BLOCK_KV"],
        PRECISION=input_precision(),
        **meta,
    )
    return cosine, norm_a


def _maps(
    scores: Tensor,
    alpha: Tensor,
    along: Tensor,
    cosine: Tensor,
    norm_a: Tensor,
    grad: Tensor,
    queries: _Queries,
    contexts: _Contexts,
    rule: dict[str, Any],
    smooth: float,
    aggregation: str,
    lambda_lse: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W (parts, L, X * M), V = diag(by_norm_a) alpha (L, X, M), grad_dot and by_norm_q (X, L). `along` is (X, L, M)."""
    split = queries.rows.dtype == torch.bfloat16
    count = _parts(torch.bfloat16)[0] if split else 1
    w = queries.new_map(count, *scores.shape, dtype=torch.bfloat16 if split else torch.float32)
    v = queries.new_map(*alpha.shape, dtype=along.dtype)
    grad_dot, by_norm_q = torch.zeros_like(cosine), torch.zeros_like(cosine)
    _maps_kernel[(queries.sets * contexts.sets,)](
        p_s=scores,
        p_alpha=alpha,
        p_along=along,
        p_cosine=cosine,
        p_norm_a=norm_a,
        p_norm_q=queries.norms,
        p_grad=grad,
        p_start=queries.start,
        p_lengths=contexts.lengths,
        p_w=w,
        p_v=v,
        p_grad_dot=grad_dot,
        p_by_norm_q=by_norm_q,
        X=contexts.sets,
        L=len(queries.rows),
        M=contexts.size,
        stride_row=scores.stride(0),
        stride_alpha_row=alpha.stride(0),
        stride_alpha_x=alpha.stride(1),
        stride_along_x=along.stride(0),
        stride_along_row=along.stride(1),
        stride_part=w.stride(0),
        stride_grad_x=grad.stride(0),
        stride_grad_y=grad.stride(1),
        smooth=smooth,
        sharpness=lambda_lse,
        **rule,
        AGGREGATION=aggregation,
        PARTS=count if split else 0,
        **_config_maps(contexts.size, 1024),
    )
    return w, v, grad_dot, by_norm_q


def _config_maps(size: int, elements: int) -> dict[str, int]:
    """Rows of whole contexts, `elements` in all. Not measured: few enough for the registers of sm_90."""
    block = block_size(size)
    return {"BLOCK_Q": max(1, min(64, elements // block)), "BLOCK_KV": block, "num_warps": 4 if block <= 1024 else 8}


@triton.jit
def _matmul_kernel(
    p_a,
    p_b,
    p_total,
    p_out,
    num_rows,
    num_cols,
    num_inner,
    stride_part,
    stride_ai,
    stride_ak,
    stride_bk,
    stride_bj,
    stride_oi,
    PARTS: tl.constexpr,
    INNER: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out (i, j), or out plus, the sum of the parts of a (parts, i, k) times b (k, j).

    Rows of a from `total` on are zero and are skipped; with INNER inner indices.
    """
    num_i = tl.cdiv(num_rows, BLOCK_I)
    i = tl.program_id(0)
    o_i = (i % num_i) * BLOCK_I + tl.arange(0, BLOCK_I)
    o_j = (i // num_i) * BLOCK_J + tl.arange(0, BLOCK_J)
    total = tl.load(p_total).to(tl.int32)
    end = tl.minimum(num_inner, total) if INNER else tl.where((i % num_i) * BLOCK_I < total, num_inner, 0)
    b_out = tl.zeros([BLOCK_I, BLOCK_J], dtype=tl.float32)
    for k in range(0, end, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_a = (o_i < num_rows)[:, None] & (o_k < end)[None, :]
        m_b = (o_k < end)[:, None] & (o_j < num_cols)[None, :]
        offsets = o_i.to(tl.int64)[:, None] * stride_ai + o_k.to(tl.int64)[None, :] * stride_ak
        b_b = tl.load(p_b + o_k.to(tl.int64)[:, None] * stride_bk + o_j.to(tl.int64)[None, :] * stride_bj, mask=m_b, other=0.0)
        for part in tl.static_range(PARTS):
            b_a = tl.load(p_a + part * tl.cast(stride_part, tl.int64) + offsets, mask=m_a, other=0.0)  # [i,k]
            b_out += dot(b_a, b_b, PRECISION)
    if ADD:
        b_out += load_tile(p_out, stride_oi, o_i, o_j, num_rows, num_cols)
    store_tile(p_out, stride_oi, o_i, o_j, num_rows, num_cols, b_out)


@triton.jit
def _weights_kernel(
    p_s,
    p_alpha,
    p_parts,
    p_start,
    p_lengths,
    X,
    M,
    stride_row,
    stride_part,
    stride_alpha_row,
    stride_alpha_x,
    smooth,
    factor,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
    PARTS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """The softmax over the contexts of the normalised scores of one pair."""
    i_x, _, begin, end, num = _pair(p_start, p_lengths, X)
    o_kv = tl.arange(0, BLOCK_KV)
    p_s += i_x * M
    dtype: tl.constexpr = p_alpha.dtype.element_ty
    b_shift, b_norm = _columns(p_s, stride_row, begin, end, o_kv, num, dtype, NORM, CLIP, BLOCK_Q, BLOCK_KV)
    for n in range(begin, end, BLOCK_Q):
        o_q = n + tl.arange(0, BLOCK_Q)
        b_s = load_tile(p_s, stride_row, o_q, o_kv, end, num).to(dtype)  # [q,kv]
        b_x = smooth * _normal(b_s, b_shift, b_norm, NORM, CLIP)
        b_x = tl.where((o_kv < num)[None, :], b_x, float("-inf"))
        b_max = tl.max(b_x, axis=1)
        b_p = tl.exp(b_x - tl.where(b_max == float("-inf"), 0.0, b_max)[:, None])
        b_sum = tl.sum(b_p, axis=1)
        b_p = b_p / tl.where(b_sum > 0.0, b_sum, 1.0)[:, None]
        if KEEP:
            store_tile(p_alpha + i_x * stride_alpha_x, stride_alpha_row, o_q, o_kv, end, stride_alpha_x, b_p)
        if PARTS > 0:
            p = p_parts + i_x * stride_alpha_x
            _store_parts(p, stride_part, stride_alpha_row, o_q, o_kv, end, stride_alpha_x, b_p * factor, PARTS)


@triton.jit
def _attend_kernel(
    p_q,
    p_c,
    p_parts,
    p_norm_q,
    p_total,
    p_lengths,
    p_cosine,
    p_norm_a,
    L,
    M,
    D,
    stride_part,
    stride_row,
    stride_x,
    unscale,
    PARTS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """cos(q, a) and |a| of some query rows and one context set, which neighbouring programs share.

    a = alpha C is computed one block of features at a time.
    """
    i = tl.program_id(0).to(tl.int64)
    num_q = tl.cdiv(L, BLOCK_Q)
    i_x, i_q = i // num_q, (i % num_q).to(tl.int32)
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_kv = tl.arange(0, BLOCK_KV)
    num = tl.load(p_lengths + i_x).to(tl.int32)
    p_c += i_x * M * D
    p_parts += i_x * stride_x
    b_dot = tl.zeros([BLOCK_Q], dtype=tl.float32)
    b_square = tl.zeros([BLOCK_Q], dtype=tl.float32)
    wide_part = tl.cast(stride_part, tl.int64)
    if ONE_BLOCK:
        # behind the contexts there are zeros up to a stride that is a known multiple of 16, so the mask does not split loads
        b_0 = load_tile(p_parts, stride_row, o_q, o_kv, L, stride_x)  # [q,kv]
        b_1 = load_tile(p_parts + (1 if PARTS > 1 else 0) * wide_part, stride_row, o_q, o_kv, L, stride_x)
        b_2 = load_tile(p_parts + (2 if PARTS > 2 else 0) * wide_part, stride_row, o_q, o_kv, L, stride_x)
    for d in range(0, tl.where(i_q * BLOCK_Q < tl.load(p_total), D, 0), BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        b_a = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
        if ONE_BLOCK:
            b_c = load_tile(p_c, D, o_kv, o_d, num, D)  # [kv,D]
            b_a += dot(b_0, b_c, PRECISION)
            if PARTS > 1:
                b_a += dot(b_1, b_c, PRECISION)
            if PARTS > 2:
                b_a += dot(b_2, b_c, PRECISION)
        else:
            for m in range(0, num, BLOCK_KV):
                b_c = load_tile(p_c, D, m + o_kv, o_d, num, D)
                for part in tl.static_range(PARTS):
                    b_part = load_tile(p_parts + part * wide_part, stride_row, o_q, m + o_kv, L, stride_x)
                    b_a += dot(b_part, b_c, PRECISION)
        b_q = load_tile(p_q, D, o_q, o_d, L, D).to(tl.float32)  # [q,D]
        b_dot += tl.sum(b_q * b_a, axis=1)
        b_square += tl.sum(b_a * b_a, axis=1)
    b_norm = tl.sqrt(b_square) * unscale
    b_norm_q = tl.load(p_norm_q + o_q, mask=o_q < L, other=0.0)
    b_cosine = b_dot * unscale / tl.maximum(b_norm_q * b_norm, EPS)
    tl.store(p_cosine + i_x * L + o_q, b_cosine, mask=o_q < L)
    tl.store(p_norm_a + i_x * L + o_q, b_norm, mask=o_q < L)


@triton.jit
def _aggregate_kernel(
    p_cosine, p_start, p_lengths, p_out, X, L, stride_x, stride_y, sharpness, AGGREGATION: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """One similarity from the cosines of a pair; 0 where a side is empty."""
    i_x, i_y, begin, end, num = _pair(p_start, p_lengths, X)
    top, total = _pool(p_cosine + i_x * L, begin, end, sharpness, AGGREGATION, BLOCK_Q)
    if AGGREGATION == "logsumexp":
        value = (top + tl.log(tl.where(total == 0.0, 1.0, total))) / sharpness
    elif AGGREGATION == "max":
        value = top
    elif AGGREGATION == "mean":
        value = top / tl.maximum(total, 1.0)
    else:
        value = top
    tl.store(p_out + i_x * stride_x + i_y * stride_y, tl.where((num > 0) & (begin < end), value, 0.0))


@triton.jit
def _maps_kernel(
    p_s,
    p_alpha,
    p_along,
    p_cosine,
    p_norm_a,
    p_norm_q,
    p_grad,
    p_start,
    p_lengths,
    p_w,
    p_v,
    p_grad_dot,
    p_by_norm_q,
    X,
    L,
    M,
    stride_row,
    stride_alpha_row,
    stride_alpha_x,
    stride_along_x,
    stride_along_row,
    stride_part,
    stride_grad_x,
    stride_grad_y,
    smooth,
    sharpness,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
    AGGREGATION: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """W, V, grad_dot and by_norm_q of one pair, through aggregation, cosine, softmax and first norm."""
    i_x, i_y, begin, end, num = _pair(p_start, p_lengths, X)
    o_kv = tl.arange(0, BLOCK_KV)
    p_s += i_x * M
    p_alpha += i_x * stride_alpha_x
    p_along += i_x * stride_along_x
    p_cosine += i_x * L
    p_norm_a += i_x * L
    grad = tl.where(num > 0, tl.load(p_grad + i_x * stride_grad_x + i_y * stride_grad_y), 0.0)
    top, total = _pool(p_cosine, begin, end, sharpness, AGGREGATION, BLOCK_Q)
    dtype: tl.constexpr = p_along.dtype.element_ty
    b_shift, b_norm = _columns(p_s, stride_row, begin, end, o_kv, num, dtype, NORM, CLIP, BLOCK_Q, BLOCK_KV)
    b_column = tl.zeros([BLOCK_KV], dtype=dtype)  # sum over the queries of normal * its gradient
    if NORM != "none":
        for n in range(begin, end, BLOCK_Q):
            o_q = n + tl.arange(0, BLOCK_Q)
            b_s, b_alpha, b_by_a, b_by_q, b_dot, b_grad = _grad_normal(
                p_s,
                p_alpha,
                p_along,
                p_cosine,
                p_norm_a,
                p_norm_q,
                grad,
                top,
                total,
                sharpness,
                smooth,
                stride_row,
                stride_alpha_row,
                stride_along_row,
                o_q,
                o_kv,
                end,
                num,
                AGGREGATION,
            )
            b_normal = _normal(b_s, b_shift, b_norm, NORM, CLIP)
            b_column += tl.sum(tl.where((o_q < end)[:, None], b_normal * b_grad, 0.0), axis=0)
    for n in range(begin, end, BLOCK_Q):
        o_q = n + tl.arange(0, BLOCK_Q)
        b_s, b_alpha, b_by_a, b_by_q, b_dot, b_grad = _grad_normal(
            p_s,
            p_alpha,
            p_along,
            p_cosine,
            p_norm_a,
            p_norm_q,
            grad,
            top,
            total,
            sharpness,
            smooth,
            stride_row,
            stride_alpha_row,
            stride_along_row,
            o_q,
            o_kv,
            end,
            num,
            AGGREGATION,
        )
        if NORM == "softmax":
            b_grad = _normal(b_s, b_shift, b_norm, NORM, CLIP) * (b_grad - b_column[None, :])
        elif NORM != "none":
            b_x = _clip(b_s, CLIP)
            if NORM == "l1norm":
                b_slope = tl.where(b_x > 0.0, 1.0, tl.where(b_x < 0.0, -1.0, 0.0))
            else:
                b_slope = b_x / tl.where(b_norm > 0.0, b_norm, 1.0)[None, :]  # the gradient of a norm at 0 is 0
            b_grad = (b_grad - b_column[None, :] * b_slope) / (b_norm + EPS)[None, :]
        if CLIP:
            b_grad = tl.where(b_s > 0.0, b_grad, 0.1 * b_grad)
        b_w = tl.where((o_kv < num)[None, :], b_grad + b_dot[:, None] * (b_alpha - 1.0 / tl.maximum(num, 1)), 0.0)
        if PARTS > 0:
            _store_parts(p_w + i_x * M, stride_part, stride_row, o_q, o_kv, end, M, b_w, PARTS)
        else:
            store_tile(p_w + i_x * M, stride_row, o_q, o_kv, end, M, b_w)
        store_tile(p_v + i_x * M, X * M, o_q, o_kv, end, M, b_by_a[:, None] * b_alpha)
        tl.store(p_grad_dot + i_x * L + o_q, b_dot, mask=o_q < end)
        tl.store(p_by_norm_q + i_x * L + o_q, b_by_q, mask=o_q < end)


@triton.jit
def _pair(p_start, p_lengths, X):
    """For a grid of (X * Y,): context set, query set, the range of its query rows, the number of contexts."""
    i = tl.program_id(0).to(tl.int64)
    i_x, i_y = i % X, i // X
    begin, end = tl.load(p_start + i_y).to(tl.int32), tl.load(p_start + i_y + 1).to(tl.int32)
    return i_x, i_y, begin, end, tl.load(p_lengths + i_x).to(tl.int32)


@triton.jit
def _store_parts(p, stride_part, stride_row, o_row, o_col, num_rows, num_cols, b, PARTS: tl.constexpr):
    """`b` as PARTS tiles of p's dtype that sum to it. Each tile holds what the earlier ones rounded away."""
    for part in tl.static_range(PARTS):
        b_part = b.to(p.dtype.element_ty)
        store_tile(p + part * tl.cast(stride_part, tl.int64), stride_row, o_row, o_col, num_rows, num_cols, b_part)
        b -= b_part.to(tl.float32)


@triton.jit
def _clip(b_s, CLIP: tl.constexpr):
    if CLIP:
        b_s = tl.where(b_s >= 0.0, b_s, 0.1 * b_s)
    return b_s


@triton.jit
def _columns(
    p_s,
    stride_row,
    begin,
    end,
    o_kv,
    num,
    dtype: tl.constexpr,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """What `_normal` subtracts and divides by, [kv] each: the maximum and the sum of exponentials, or 0 and the norm."""
    b_shift = tl.full([BLOCK_KV], float("-inf") if NORM == "softmax" else 0.0, dtype=dtype)
    b_sum = tl.zeros([BLOCK_KV], dtype=dtype)
    if NORM != "none":
        for n in range(begin, end, BLOCK_Q):
            o_q = n + tl.arange(0, BLOCK_Q)
            b_x = _clip(load_tile(p_s, stride_row, o_q, o_kv, end, num).to(dtype), CLIP)
            if NORM == "softmax":
                b_x = tl.where((o_q < end)[:, None], b_x, float("-inf"))
                b_new = tl.maximum(b_shift, tl.max(b_x, axis=0))
                b_sum = b_sum * tl.exp(b_shift - b_new) + tl.sum(tl.exp(b_x - b_new[None, :]), axis=0)
                b_shift = b_new
            elif NORM == "l1norm":
                b_sum += tl.sum(tl.abs(b_x), axis=0)
            else:
                b_sum += tl.sum(b_x * b_x, axis=0)
    return b_shift, tl.sqrt(b_sum) if NORM == "l2norm" else b_sum


@triton.jit
def _normal(b_s, b_shift, b_norm, NORM: tl.constexpr, CLIP: tl.constexpr):
    """Scores [q,kv] after clipping and the first norm."""
    b_x = _clip(b_s, CLIP)
    if NORM == "softmax":
        b_x = tl.exp(b_x - b_shift[None, :]) / b_norm[None, :]
    elif NORM != "none":
        b_x = b_x / (b_norm + EPS)[None, :]
    return b_x


@triton.jit
def _pool(p_cosine, begin, end, sharpness, AGGREGATION: tl.constexpr, BLOCK_Q: tl.constexpr):
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


@triton.jit
def _grad_normal(
    p_s,
    p_alpha,
    p_along,
    p_cosine,
    p_norm_a,
    p_norm_q,
    grad,
    top,
    total,
    sharpness,
    smooth,
    stride_row,
    stride_alpha_row,
    stride_along_row,
    o_q,
    o_kv,
    end,
    num,
    AGGREGATION: tl.constexpr,
):
    """For a tile [q,kv]: scores, alpha; by_norm_a, by_norm_q, the gradient at q . a, [q] each; that at the normalised scores."""
    b_s = load_tile(p_s, stride_row, o_q, o_kv, end, num).to(p_along.dtype.element_ty)
    b_alpha = load_tile(p_alpha, stride_alpha_row, o_q, o_kv, end, num)
    b_along = load_tile(p_along, stride_along_row, o_q, o_kv, end, num)
    b_r = tl.load(p_cosine + o_q, mask=o_q < end, other=0.0)
    b_norm_a = tl.load(p_norm_a + o_q, mask=o_q < end, other=0.0)
    b_norm_q = tl.load(p_norm_q + o_q, mask=o_q < end, other=0.0)
    if AGGREGATION == "logsumexp":
        b_dr = grad * tl.exp(b_r * sharpness - top) / total
    elif AGGREGATION == "max":
        b_dr = tl.where(top == top, tl.where(b_r == top, grad / tl.maximum(total, 1.0), 0.0), top)  # NaN where a cosine is
    elif AGGREGATION == "mean":
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
    b_grad = smooth * b_alpha * (b_dalpha - tl.sum(b_alpha * b_dalpha, axis=1)[:, None])
    return b_s, b_alpha, b_by_a, b_by_q, b_dot, b_grad
