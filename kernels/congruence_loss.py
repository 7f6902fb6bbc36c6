"""congruence_loss in Triton: head-mean blocks of attention, change of basis, symmetric KL; forward and backward.

Shapes: text queries and keys (B,H,L,D), image ones (B,H,V,D), the same for the cross block; loss (B). S = L + V.
Roofline: reading queries and keys once (HBM) and one exponential a head and pair (MUFU) at short lengths.
Trick: the four blocks lie in one map (B,S,S), text first, so that one launch with the heads looped inside makes all of them, and
its neighbouring programs share queries and keys in the cache; where a row fits in a tile (`_holds_rows`) nothing but that map is
stored, and the backward pass gives both gradients of a head in one sweep over its queries. Gradients at the map need no
cotangent: that of the sample is multiplied in last. Not yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from vlattn_fast.kernels._device import on_device
from vlattn_fast.kernels._tiles import LOG2_E, block_size, dot, input_precision, load_tile, store_tile
from vlattn_fast.kernels.congruence_maps import gradient_kernel, gradient_q_kernel, map_kernel, real_tokens, statistics_kernel

from vlattn_fast._tensors import unit_stride
from vlattn_fast.reference.congruence_loss import EPSILON

_CHUNK_BYTES, _MAPS = 1 << 28, 6  # samples are taken in chunks that hold about so many maps of so many bytes in all


@on_device
def forward(
    queries: list[Tensor],
    keys: list[Tensor],
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    kind: str,
    direction: str,
    scale: float,
) -> Tensor:
    """The loss of each sample, (B). Queries and keys: see reference.congruence_loss.block_inputs."""
    losses = [part.losses() for _, part in _chunks(queries, keys, text_mask, image_mask, kind, direction, scale)]
    if not losses:
        return queries[0].new_zeros(queries[0].shape[0], dtype=torch.float32)
    return torch.cat(losses) if len(losses) > 1 else losses[0]


@on_device
def backward(
    grad_loss: Tensor,
    queries: list[Tensor],
    keys: list[Tensor],
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    kind: str,
    direction: str,
    scale: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the queries and of the keys: of the first two, or of all four for "iais_distributed"."""
    distributed = kind == "iais_distributed"
    # iais_distributed in one direction leaves out the other modality's attention to itself
    zero = {"text": {1}, "image": {0}}.get(direction, set()) if distributed else set()
    if _without_tokens(queries):
        zero = {0, 1, 2, 3}
    grad_queries, grad_keys = (
        [(x.new_zeros if i in zero else x.new_empty)(x.shape) for i, x in enumerate(xs[: 4 if distributed else 2])]
        for xs in (queries, keys)
    )
    for b, part in _chunks(queries, keys, text_mask, image_mask, kind, direction, scale):
        part.gradients([grad[b] for grad in grad_queries], [grad[b] for grad in grad_keys], grad_loss[b].float().contiguous())
    return grad_queries, grad_keys


def _without_tokens(queries: list[Tensor]) -> bool:
    return min(*queries[0].shape[:3], queries[1].shape[2]) == 0


def _chunks(
    queries: list[Tensor],
    keys: list[Tensor],
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    kind: str,
    direction: str,
    scale: float,
) -> Iterator[tuple[slice, _Chunk]]:
    """The samples in chunks whose maps have a bounded size."""
    if _without_tokens(queries):
        return
    batch, length = queries[0].shape[0], queries[0].shape[2] + queries[1].shape[2]
    queries, keys = [unit_stride(x) for x in queries], [unit_stride(x) for x in keys]
    masks: tuple[Tensor, ...] | None = None
    if text_mask is not None or image_mask is not None:
        masks = tuple(
            x.new_ones(batch, x.shape[2], dtype=torch.bool) if mask is None else mask.contiguous()
            for mask, x in ((text_mask, queries[0]), (image_mask, queries[1]))
        )
    step = max(1, _CHUNK_BYTES // (_MAPS * 4 * length**2))
    for start in range(0, batch, step):
        b = slice(start, min(start + step, batch))
        part = tuple(x[b] for x in queries), tuple(x[b] for x in keys), masks and tuple(mask[b] for mask in masks)
        yield b, _Chunk(*part, kind, direction, scale)


class _Chunk:
    """Some samples. A map is (b,S,S): the blocks LL, LV over VL, VV."""

    def __init__(
        self,
        queries: tuple[Tensor, ...],
        keys: tuple[Tensor, ...],
        masks: tuple[Tensor, ...] | None,
        kind: str,
        direction: str,
        scale: float,
    ) -> None:
        self.queries, self.keys, self.masks = queries, keys, masks
        self.kind, self.scale = kind, scale
        self.sizes = queries[0].shape[2], queries[1].shape[2]
        self.batch, self.heads, _, self.features = queries[0].shape
        self.sides = [side for side, name in enumerate(("text", "image")) if direction in (name, "both")]
        self.whole = _holds_rows(self.sizes, self.features, queries[0].dtype)
        # 16-bit maps are multiplied inside the kernels, in tf32: it has their digits and the range of float32
        self.fused = self.whole and queries[0].dtype != torch.float32
        self.map, self.log_map, self.statistics = self._maps()

    def losses(self) -> Tensor:
        """(b)"""
        rows = [self._divergence(side, *self._target(side)[:2]).sum(1) for side in self.sides]
        return rows[0] if len(rows) == 1 else rows[0] + rows[1]

    def gradients(self, grad_queries: list[Tensor], grad_keys: list[Tensor], grad_loss: Tensor) -> None:
        """Writes those of queries and keys: of the blocks LL and VV, or of all four."""
        singular, both = self.kind == "iais_singular", len(self.sides) == 2
        by_map = torch.empty_like(self.map) if self.fused and (both or not singular) else torch.zeros_like(self.map)
        by_log = torch.zeros_like(self.map) if singular else by_map
        targets = []
        for side in self.sides:
            target, basis = self._target(side)
            targets.append((side, basis, self._divergence(side, target, basis, by_log)))
        for side, basis, by_target in targets:
            add = both and (self.kind == "cacr" or (side == 1 and not singular))
            (self._spread if self.fused else self._spread_long)(side, basis, by_target, by_map, add)
        self._write_gradients(by_map, by_log, grad_queries, grad_keys, grad_loss)

    def _target(self, side: int) -> tuple[Tensor, Tensor]:
        """What `_divergence_kernel` makes the target of one direction from: a block and the index (b,N) to pick from it, a block
        and the cross block to multiply it with, or the target (b,N,N) itself, and the cross block."""
        other = 1 - side
        basis = self._part(self.map, side, other)
        inner = self._part(self.map, other, side if self.kind == "iais_distributed" else other)
        if self.kind == "iais_singular":
            return inner, basis.argmax(-1)  # the first of equals
        if self.fused:
            return inner, basis
        return (basis @ inner @ basis.mT if self.kind == "cacr" else basis @ inner), basis

    def _divergence(self, side: int, target: Tensor, basis: Tensor, by_own: Tensor | None = None) -> Tensor:
        """The loss of each row of one direction (b,N); or, with `by_own`, the gradient at its own block there (at the logarithm
        for iais_singular) and that at the target as the result (b,N,N)."""
        size, other, grad = self.sizes[side], self.sizes[1 - side], by_own is not None
        out = self._empty(self.batch, size, size) if grad else self._empty(self.batch, size)
        own = self._part(self.log_map if self.kind == "iais_singular" else self.map, side, side)
        masks = (own, own) if self.masks is None else (self.masks[side], self.masks[1 - side])
        block = block_size(size)
        tiles = {"BLOCK_Q": max(1, 2048 // block), "num_warps": 4 if block <= 2048 else 16}
        if self.fused:
            tiles = {"BLOCK_Q": 32, "num_warps": 8}
        _divergence_kernel[(triton.cdiv(size, tiles["BLOCK_Q"]) * self.batch,)](
            own,
            target,
            basis,
            *masks,
            out,
            own if by_own is None else self._part(by_own, side, side),
            size,
            other,
            *own.stride()[:2],
            *target.stride()[:2],
            1.0 / self.heads,
            EPSILON,
            KIND=self.kind,
            MASKED=self.masks is not None,
            GRAD=grad,
            FUSED=self.fused,
            BLOCK_KV=block,
            BLOCK_M=block_size(other),
            **tiles,
        )
        return out

    def _spread(self, side: int, basis: Tensor, by_target: Tensor, by_map: Tensor, add: bool) -> None:
        """From the gradient at the target of one direction (b,N,N) to those at the blocks it was made from, written to `by_map`
        or, with `add`, added."""
        other = 1 - side
        size, across = self.sizes[side], self.sizes[other]
        distributed = self.kind == "iais_distributed"
        back, out = self._part(self.map, other, side), self._part(by_map, other, side if distributed else other)
        tiles = triton.cdiv(across, 32) + (triton.cdiv(size, 32) if distributed else 0)
        _spread_kernel[(tiles * self.batch,)](
            by_target,
            basis,
            back,
            self._part(by_map, side, other),
            out,
            size,
            across,
            *back.stride()[:2],
            KIND=self.kind,
            ADD=add,
            BLOCK_Q=32,
            BLOCK_N=block_size(size),
            BLOCK_M=block_size(across),
            num_warps=8,
        )

    def _spread_long(self, side: int, basis: Tensor, by_target: Tensor, by_map: Tensor, add: bool) -> None:
        """As `_spread`, by torch's products, and always added."""
        other = 1 - side
        if self.kind == "iais_distributed":
            self._part(by_map, side, other).baddbmm_(by_target, self._part(self.map, other, side).mT)
            self._part(by_map, other, side).baddbmm_(basis.mT, by_target)
            return
        if self.kind == "iais_singular":  # products with 0 and 1, not scatter_add: deterministic on a GPU
            basis = torch.zeros_like(self._part(self.map, side, other)).scatter_(-1, basis[:, :, None], 1.0)
        self._part(by_map, other, other).baddbmm_(basis.mT, by_target @ basis)

    def _maps(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The map of head means and its logarithm in base 2 (iais_singular). For long rows, of every row and head the greatest
        base-2 logit and the sum of the powers: (2,b,H,S), over the keys of the text and of the image."""
        length = sum(self.sizes)
        maps = self._empty(self.batch, length, length)
        log_maps = torch.empty_like(maps) if self.kind == "iais_singular" else maps
        inputs, constants = self._inputs("map")
        statistics = maps, maps
        row_tiles = sum(triton.cdiv(size, constants["BLOCK_Q"]) for size in self.sizes)
        if not self.whole:
            shape = 2, self.batch, self.heads, length
            statistics = self._empty(*shape), self._empty(*shape)
            meta = {name: x for name, x in constants.items() if name not in ("WHOLE", "LOG", "BLOCK_L")}
            statistics_kernel[(row_tiles * 2 * self.heads * self.batch,)](*inputs, *statistics, **meta)
        columns = 2 if self.whole else sum(triton.cdiv(size, constants["BLOCK_V"]) for size in self.sizes)
        map_kernel[(row_tiles * columns * self.batch,)](*inputs, *statistics, maps, log_maps, **constants)
        return maps, log_maps, statistics

    def _write_gradients(
        self, by_map: Tensor, by_log: Tensor, grad_queries: list[Tensor], grad_keys: list[Tensor], grad_loss: Tensor
    ) -> None:
        """From gradients at the map and its logarithm to those of queries and keys."""
        diagonal = len(grad_queries) == 2  # then the kernels leave the last two alone
        grad_q, grad_k = (tuple(grads * 2 if diagonal else grads) for grads in (grad_queries, grad_keys))
        unread = -1 if diagonal or len(self.sides) == 2 else 3 - 3 * self.sides[0]
        inputs, constants = self._inputs("gradient")
        cotangents = (by_map, by_log, self.log_map, *self.statistics, grad_loss)
        meta = {**constants, "DIAGONAL": diagonal, "UNREAD": unread}
        programs, delta = (2 if diagonal else 4) * self.heads * self.batch, grad_loss
        if not self.whole:
            delta = torch.empty_like(self.statistics[0])
            tiles = max(triton.cdiv(size, meta["BLOCK_Q"]) for size in self.sizes)
            long = {name: x for name, x in meta.items() if name not in ("WHOLE", "BLOCK_L")}
            gradient_q_kernel[(programs * tiles,)](*inputs, *cotangents, delta, grad_q, self.scale, tiles, **long)
        tiles = 1 if self.whole else max(triton.cdiv(size, meta["BLOCK_V"]) for size in self.sizes)
        gradient_kernel[(programs * tiles,)](*inputs, *cotangents, delta, grad_q, grad_k, self.scale, tiles, **meta)

    def _inputs(self, kernel: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What every kernel with heads takes."""
        strides = tuple(tuple(stride for x in xs for stride in x.stride()[:3]) for xs in (self.queries, self.keys))
        masks = self.queries[:2] if self.masks is None else self.masks
        constants = {
            "MASKED": self.masks is not None,
            "WHOLE": self.whole,
            "LOG": self.kind == "iais_singular",
            "BLOCK_D": block_size(self.features),
            "PRECISION": input_precision(),
            **_config(self.sizes, self.features, self.queries[0].dtype, kernel, self.kind),
        }
        return (self.queries, self.keys, *strides, *masks, self.heads, *self.sizes, self.features, self.scale * LOG2_E), constants

    def _empty(self, *shape: int) -> Tensor:
        return self.queries[0].new_empty(shape, dtype=torch.float32)

    def _part(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """The block of a map with these rows and columns: 0 the text, 1 the image."""
        parts = slice(0, self.sizes[0]), slice(self.sizes[0], None)
        return x[:, parts[rows], parts[columns]]


def _holds_rows(sizes: tuple[int, int], features: int, dtype: torch.dtype) -> bool:
    """Whether the kernels hold whole rows of a head in a tile."""
    return max(sizes) <= 128 and features <= (64 if dtype == torch.float32 else 128)


def _config(sizes: tuple[int, int], features: int, dtype: torch.dtype, kernel: str, kind: str) -> dict[str, int]:
    """Tiles by lengths, head size, dtype, kernel and kind. Not measured: the largest of those tried that compile for sm_90
    without spills and within 99 KB of shared memory."""
    if _holds_rows(sizes, features, dtype):
        tiles = {"BLOCK_L": block_size(sizes[0]), "BLOCK_V": block_size(sizes[1]), "num_warps": 8, "num_stages": 1}
        if dtype == torch.float32:
            return {"BLOCK_Q": 16, **tiles}
        if kernel == "map":
            return {"BLOCK_Q": 64, **tiles, "num_stages": 2 if features <= 64 else 1}
        return {"BLOCK_Q": 64 if kind == "cacr" and features <= 64 else 32, **tiles}
    if dtype == torch.float32:
        block = 64 if features <= 64 else 32
        return {"BLOCK_Q": 16, "BLOCK_L": block, "BLOCK_V": block, "num_warps": 8, "num_stages": 1}
    block = 64 if features <= 128 else 32
    warps = 8 if kernel == "gradient" and kind == "iais_singular" else 4
    return {"BLOCK_Q": block, "BLOCK_L": block, "BLOCK_V": block, "num_warps": warps, "num_stages": 1}


@triton.jit
def _expm1(x):
    """exp(x) - 1 to a few ulp: by its series where exp would cancel."""
    b = 1.0 + x * 0.1
    b = 1.0 + x * b * 0.1111111111111111
    b = 1.0 + x * b * 0.125
    b = 1.0 + x * b * 0.14285714285714285
    b = 1.0 + x * b * 0.16666666666666666
    b = 1.0 + x * b * 0.2
    b = 1.0 + x * b * 0.25
    b = 1.0 + x * b * 0.3333333333333333
    b = x * (1.0 + x * b * 0.5)
    return tl.where(tl.abs(x) < 0.7, b, tl.exp(x) - 1.0)


@triton.jit
def _log1p(x):
    """log(1 + x) for x > -1 to a few ulp: where 1 + x rounds, by the series of the inverse hyperbolic tangent."""
    z = x / (2.0 + x)
    zz = z * z
    b = 0.2 + zz * (0.14285714285714285 + zz * (0.1111111111111111 + zz * 0.09090909090909091))
    b = 2.0 * z * (1.0 + zz * (0.3333333333333333 + zz * b))
    return tl.where(tl.abs(x) < 0.4, b, tl.log(1.0 + x))


@triton.jit
def _divergence_kernel(
    p_own,
    p_target,
    p_basis,
    p_rows,
    p_others,
    p_out,
    p_by_own,
    N,
    M,
    stride_ob,
    stride_on,
    stride_tb,
    stride_tn,
    per_head,
    EPSILON,
    KIND: tl.constexpr,
    MASKED: tl.constexpr,
    GRAD: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """sym(p, t) of whole rows, or its gradients at own block and target over the number of heads. Written without cancellation:
    with d = log p - log t, sum (p - t) d = sum t expm1(d) d has no negative term."""
    tiles = tl.cdiv(N, BLOCK_Q)
    i = tl.program_id(0)
    i_b = (i // tiles).to(tl.int64)
    o_q = (i % tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_kv = tl.arange(0, BLOCK_KV)
    m_q, m_kv = real_tokens(p_rows + i_b * N, o_q, N, MASKED), real_tokens(p_rows + i_b * N, o_kv, N, MASKED)
    b_weight = tl.where(m_q, 1.0 / N, 0.0)
    if MASKED:
        real = tl.sum(m_kv.to(tl.int32), axis=0)
        others = 0
        for start in range(0, M, BLOCK_KV):
            others += tl.sum(real_tokens(p_others + i_b * M, start + o_kv, M, True).to(tl.int32), axis=0)
        b_weight = tl.where(m_q & (others > 0), 1.0 / tl.maximum(real, 1).to(tl.float32), 0.0)
    m_pair = (b_weight > 0.0)[:, None] & m_kv[None, :]
    offsets = o_q.to(tl.int64)[:, None] * stride_on + o_kv[None, :]
    b_own = tl.load(p_own + i_b * stride_ob + offsets, mask=m_pair, other=0.0)  # [q,kv]
    p_target += i_b * stride_tb
    if KIND == "iais_singular":
        b_row = tl.load(p_basis + i_b * N + o_q, mask=m_q, other=0)
        b_column = tl.load(p_basis + i_b * N + o_kv, mask=m_kv, other=0)
        b_target = tl.load(p_target + b_row[:, None] * stride_tn + b_column[None, :], mask=m_pair, other=0.0)  # [q,kv]
    elif FUSED:
        p_basis += i_b * stride_ob
        o_m = tl.arange(0, BLOCK_M)
        b_x = load_tile(p_basis, stride_on, o_q, o_m, N, M)  # [q,m]
        if KIND == "cacr":
            b_x = dot(b_x, load_tile(p_target, stride_tn, o_m, o_m, M, M), "tf32")
            b_back = tl.trans(load_tile(p_basis, stride_on, o_kv, o_m, N, M))  # [m,kv]
        else:
            b_back = load_tile(p_target, stride_tn, o_m, o_kv, M, N)  # [m,kv]
        b_target = dot(b_x, b_back, "tf32")
    else:
        b_target = tl.load(p_target + o_q.to(tl.int64)[:, None] * stride_tn + o_kv[None, :], mask=m_pair, other=0.0)  # [q,kv]
    b_weight = b_weight[:, None]
    if KIND == "iais_distributed":
        # t (log t - log(p + eps)) + p (log p - log(t + eps)), with log x - log(x + eps) = -log1p(eps / x)
        b_p, b_t = tl.maximum(b_own, 1.1754944e-38), tl.maximum(b_target, 1.1754944e-38)  # 0 log 0 = 0
        b_log_p, b_log_t = tl.log(b_own + EPSILON), tl.log(b_target + EPSILON)
        if GRAD:
            # log p - log(t + eps) + 1 - t / (p + eps), small where p is near t
            b_by_own = tl.log(b_p) - b_log_t + (b_own - b_target + EPSILON) / (b_own + EPSILON)
            b_by_target = tl.log(b_t) - b_log_p + (b_target - b_own + EPSILON) / (b_target + EPSILON)
        else:
            b_loss = (b_target - b_own) * (b_log_t - b_log_p)
            b_loss -= b_target * _log1p(EPSILON / b_t) + b_own * _log1p(EPSILON / b_p)
    else:
        b_t = tl.where(m_pair, tl.exp(b_target), 0.0)  # entries of the target lie in [0, 1]
        b_sum = tl.sum(b_t, axis=1)[:, None]
        b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
        b_t /= b_sum
        if KIND == "cacr":
            # log p - log t is the gap minus the difference of the two log-sum-exps, which is log sum t e^gap
            b_gap = b_own - b_target
            b_d = b_gap - _log1p(tl.sum(b_t * _expm1(b_gap), axis=1))[:, None]
        else:
            b_d = b_own * 0.6931471805599453 - (b_target - tl.log(b_sum))
        b_difference = b_t * _expm1(b_d)  # p - t
        if GRAD:
            b_p = b_t + b_difference
            b_by_own = b_p * b_d + b_difference
            b_by_target = -b_t * b_d - b_difference
            b_by_target -= b_t * tl.sum(b_by_target, axis=1)[:, None]
            if KIND == "cacr":
                b_by_own -= b_p * tl.sum(b_by_own, axis=1)[:, None]
        else:
            b_loss = b_difference * b_d
    if GRAD:
        b_weight *= per_head
        store_tile(p_by_own + i_b * stride_ob, stride_on, o_q, o_kv, N, N, tl.where(m_pair, b_weight * b_by_own, 0.0))
        p_out += i_b * N * N
        store_tile(p_out, N, o_q, o_kv, N, N, tl.where(m_pair, b_weight * b_by_target, 0.0))
    else:
        tl.store(p_out + i_b * N + o_q, tl.sum(tl.where(m_pair, b_weight * b_loss, 0.0), axis=1), mask=o_q < N)


@triton.jit
def _store_or_add(p, stride, o_row, o_col, num_rows, num_cols, b, ADD: tl.constexpr):
    if ADD:
        b += load_tile(p, stride, o_row, o_col, num_rows, num_cols)
    store_tile(p, stride, o_row, o_col, num_rows, num_cols, b)


@triton.jit
def _spread_kernel(
    p_by_target,
    p_basis,
    p_back,
    p_by_basis,
    p_out,
    N,
    M,
    stride_b,
    stride_n,
    KIND: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """With the gradient G (N,N) at the target and the basis X (N,M): X^T G X, a program per sample and tile of rows; for
    iais_distributed X^T G and, in programs of their own, G Y^T at the basis, Y the block that leads back."""
    tiles = tl.cdiv(M, BLOCK_Q)
    per_sample = tiles + tl.cdiv(N, BLOCK_Q) if KIND == "iais_distributed" else tiles
    i = tl.program_id(0)
    i_b, i_q = (i // per_sample).to(tl.int64), i % per_sample
    o_n, o_m, o_q = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    p_by_target += i_b * N * N
    if i_q < tiles:
        if KIND == "iais_singular":
            b_index = tl.load(p_basis + i_b * N + o_n, mask=o_n < N, other=-1)
            b_turned = tl.where(b_index[None, :] == o_q[:, None], 1.0, 0.0)  # [q,n]
        else:
            b_turned = tl.trans(load_tile(p_basis + i_b * stride_b, stride_n, o_n, o_q, N, M))  # [q,n]
        b_out = dot(b_turned, load_tile(p_by_target, N, o_n, o_n, N, N), "tf32")  # [q,n]
        if KIND == "iais_distributed":
            _store_or_add(p_out + i_b * stride_b, stride_n, o_q, o_n, M, N, b_out, ADD)
        else:
            if KIND == "iais_singular":
                b_x = tl.where(b_index[:, None] == o_m[None, :], 1.0, 0.0)  # [n,m]
            else:
                b_x = load_tile(p_basis + i_b * stride_b, stride_n, o_n, o_m, N, M)  # [n,m]
            _store_or_add(p_out + i_b * stride_b, stride_n, o_q, o_m, M, M, dot(b_out, b_x, "tf32"), ADD)
    elif KIND == "iais_distributed":
        o_row = o_q - tiles * BLOCK_Q
        b_back = tl.trans(load_tile(p_back + i_b * stride_b, stride_n, o_m, o_n, M, N))  # [n,m]
        b_by_basis = dot(load_tile(p_by_target, N, o_row, o_n, N, N), b_back, "tf32")  # [q,m]
        _store_or_add(p_by_basis + i_b * stride_b, stride_n, o_row, o_m, N, M, b_by_basis, ADD)
