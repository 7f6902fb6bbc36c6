"""congruence_loss in Triton: head-mean blocks of attention, change of basis, symmetric KL; forward and backward.

Shapes: queries and keys of the blocks LL, VV, LV, VL, (B, H, L or V, D); loss (B). S = L + V. LL is text to text, VV image to
image, LV text to image, VL image to text.
Roofline: at short lengths reading queries and keys once (HBM) and one exponential per head and pair (MUFU).
Trick: the four blocks lie in one map (B, S, S), text first. One launch with the heads in an inner loop computes all of them, and
its neighbouring programs share queries and keys in the cache. One more launch compares both directions with their targets. Where
a row fits in a tile (`_holds_rows`) only that map is stored, for iais_singular its logarithm as well, and the backward pass
computes both gradients of a head in one sweep over its queries. Gradients at the map are taken without the cotangent, which is
multiplied in last. Measured on an H100: docs/operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast._ground.tensors import unit_strides
from vlattn_fast.backends.inputs import CongruenceLossBackwardInputs, CongruenceLossInputs, queries_and_keys
from vlattn_fast.backends.reference.congruence_loss import EPSILON, num_gradients, of_all_blocks
from vlattn_fast.kernels._configurations import cached_launch, configuration
from vlattn_fast.kernels._device import on_device
from vlattn_fast.kernels._tiles import (
    LOG2_E,
    block_size,
    cdiv,
    dot,
    heads_of,
    input_precision,
    launched,
    load_tile,
    real_tokens,
    round_tf32,
    store_tile,
)
from vlattn_fast.kernels.congruence_maps import (
    Constants,
    Gradients,
    Stats,
    gradient_kernel,
    gradient_q_kernel,
    map_kernel,
    statistics_kernel,
)

_CHUNK_BYTES, _MAPS = 1 << 28, 6  # a chunk of samples holds about _MAPS maps of _CHUNK_BYTES in all


@on_device
def forward(inputs: CongruenceLossInputs) -> tuple[Tensor, Tensor]:
    """The loss of each sample, (B), and an empty tensor: nothing is stored for the backward pass."""
    losses = [part.losses() for _, part in _chunks(inputs)]
    if len(losses) == 1:
        loss = losses[0]
    else:
        text = inputs.text_query
        loss = torch.cat(losses) if losses else text.new_zeros(text.shape[0], dtype=torch.float32)
    return loss, loss.new_empty(0)


@on_device
def backward(inputs: CongruenceLossBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of the queries and of the keys; None for those of blocks that are constants."""
    (queries, keys), direction = queries_and_keys(inputs), inputs.direction
    distributed = inputs.kind == "iais_distributed"
    # iais_distributed in one direction does not use the other modality's attention to itself
    zero = {"text": {1}, "image": {0}}.get(direction, set()) if distributed else set()
    if _without_tokens(queries):
        zero = {0, 1, 2, 3}
    grad_queries, grad_keys = (
        [(x.new_zeros if i in zero else x.new_empty)(x.shape) for i, x in enumerate(xs[: num_gradients(inputs.kind)])]
        for xs in (queries, keys)
    )
    for b, part in _chunks(inputs):
        part.gradients(_at(grad_queries, b), _at(grad_keys, b), _at([inputs.grad_loss], b)[0].float().contiguous())
    return of_all_blocks([*grad_queries, *grad_keys])


def _at(xs: list[Tensor], b: slice | None) -> list[Tensor]:
    """These samples of each; None: all of them, without a view, which takes the host longer than a launch."""
    return xs if b is None else [x[b] for x in xs]


def _without_tokens(queries: list[Tensor]) -> bool:
    return min(*queries[0].shape[:3], queries[1].shape[2]) == 0


def _chunks(inputs: CongruenceLossInputs | CongruenceLossBackwardInputs) -> Iterator[tuple[slice | None, _Chunk]]:
    """The samples in chunks whose maps have a bounded size; None where one chunk has all of them."""
    (queries, keys), text_mask, image_mask = queries_and_keys(inputs), inputs.text_mask, inputs.image_mask
    if _without_tokens(queries):
        return
    batch, length = queries[0].shape[0], queries[0].shape[2] + queries[1].shape[2]
    queries, keys = list(unit_strides(*queries)), list(unit_strides(*keys))
    masks: list[Tensor] | None = None
    if text_mask is not None or image_mask is not None:
        masks = [
            x.new_ones(batch, x.shape[2], dtype=torch.bool) if mask is None else mask.contiguous()
            for mask, x in ((text_mask, queries[0]), (image_mask, queries[1]))
        ]
    step = max(1, _CHUNK_BYTES // (_MAPS * 4 * length**2))
    for start in range(0, batch, step):
        b = None if step >= batch else slice(start, min(start + step, batch))
        yield b, _Chunk(_at(queries, b), _at(keys, b), masks and _at(masks, b), inputs)


class _Chunk:
    """Some samples. A map is (b, S, S): the blocks LL, LV over VL, VV."""

    def __init__(self, queries: list[Tensor], keys: list[Tensor], masks: list[Tensor] | None, inputs: Any) -> None:
        self.queries, self.keys, self.masks = queries, keys, masks
        self.kind, self.scale, self.as_they_are = inputs.kind, inputs.scale, inputs.normalize == "none"
        self.logs = self.kind == "iais_singular" and not self.as_they_are  # whether a map's logarithm is compared
        L, V = self.sizes = queries[0].shape[2], queries[1].shape[2]
        self.parts = slice(0, L), slice(L, None)  # of a map's rows and columns: text, image
        self.batch, self.heads, _, self.features = queries[0].shape
        self.sides = [side for side, name in enumerate(("text", "image")) if inputs.direction in (name, "both")]
        # then maps are multiplied inside the kernels in tf32, which has the digits of 16-bit inputs and the range of float32
        self.whole = _holds_rows(self.sizes, self.features, queries[0].dtype)
        self.blocks = {
            "qs": tuple(map(heads_of, queries)),
            "ks": tuple(map(heads_of, keys)),
            "p_masks": tuple(queries[:2] if masks is None else masks),
            "H": self.heads,
            "L": L,
            "V": V,
            "D": self.features,
            "scale_log2": self.scale * LOG2_E,
        }
        self.map, self.log_map, self.stats = self._maps()

    def losses(self) -> Tensor:
        """(b)"""
        return self._divergence([self._target(side) for side in self.sides])[0].sum(1)

    def gradients(self, grad_queries: list[Tensor], grad_keys: list[Tensor], grad_loss: Tensor) -> None:
        """Writes the gradients of queries and keys: of the blocks LL and VV, or of all four."""
        both = len(self.sides) == 2
        grad_map = torch.empty_like(self.map) if self.whole and (both or not self.logs) else torch.zeros_like(self.map)
        grad_log = torch.zeros_like(self.map) if self.logs else None
        targets = [self._target(side) for side in self.sides]
        grad_targets = self._divergence(targets, grad_map if grad_log is None else grad_log)
        for side, target, grad_target in zip(self.sides, targets, grad_targets, strict=True):
            cross = target if self.kind == "iais_singular" else self._part(self.map, side, 1 - side)
            if self.whole:
                add = both and not self.logs and (side == 1 or self.kind != "iais_distributed")
                self._target_backward(side, cross, grad_target, grad_map, add)
            else:
                self._add_target_backward(side, cross, grad_target, grad_map)
        self._write_gradients(Gradients(grad_map, grad_log, self.log_map, grad_loss), grad_queries, grad_keys)

    def _target(self, side: int) -> Tensor:
        """The argument from which `_divergence_kernel` takes the target of one direction.

        For iais_singular: the indices (b, N) of the rows and columns of the other modality's block. For the other kinds: the map,
        of which the kernel computes the target; where `whole` is off, the target (b, N, N).
        """
        if self.whole and self.kind != "iais_singular":
            return self.map
        across = 1 - side
        cross = self._part(self.map, side, across)
        if self.kind == "iais_singular":
            return cross.argmax(-1)  # the first of equal entries
        inner = self._part(self.map, across, side if self.kind == "iais_distributed" else across)
        return cross @ inner @ cross.mT if self.kind == "cacr" else cross @ inner

    def _divergence(self, targets: list[Tensor], grad_intra: Tensor | None = None) -> list[Tensor]:
        """The loss of each row of all directions, [(b, N or S)].

        With `grad_intra` they are the gradients at the target of each direction (b, N, N), and the gradient at the modality's own
        block is written to `grad_intra`: at its logarithm for iais_singular, which is then that of the sum over the heads.
        """
        sizes, grad = [self.sizes[side] for side in self.sides], grad_intra is not None
        out = [self._empty(self.batch, size, size) for size in sizes] if grad else [self._empty(self.batch, sum(sizes))]
        intra = self.map if self.log_map is None else self.log_map
        kind = self.kind, self.as_they_are
        tiles, options = _divergence_launch(self.sizes, tuple(self.sides), kind, self.masks is not None, self.whole, grad)
        call = {
            "maps": (intra, self.map, grad_intra),
            "p_targets": tuple(targets * 2)[:2],
            "p_masks": (intra, intra) if self.masks is None else tuple(self.masks),
            "p_outs": tuple(out * 2)[:2],
            "L": self.sizes[0],
            "V": self.sizes[1],
            "per_head": 1.0 / self.heads,
            "epsilon": EPSILON,
        }
        _divergence_kernel[(tiles * self.batch,)](**call, **options)
        return out

    def _target_backward(self, side: int, cross: Tensor, grad_target: Tensor, grad_map: Tensor, add: bool) -> None:
        """From the gradient at the target of one direction (b, N, N) to those at the blocks that the target is made of.

        They are written to `grad_map` or, with `add`, added to it.
        """
        across, distributed = 1 - side, self.kind == "iais_distributed"
        size, size_across = self.sizes[side], self.sizes[across]
        back = self._part(self.map, across, side)
        call = {
            "p_grad_target": grad_target,
            "p_cross": cross,
            "p_back": back,
            "p_grad_cross": self._part(grad_map, side, across),
            "p_out": self._part(grad_map, across, side if distributed else across),
            "N": size,
            "M": size_across,
            "stride_b": back.stride(0),
            "stride_n": back.stride(1),
            "C": _Target(self.kind, add, 32, block_size(size), block_size(size_across)),
        }
        tiles = cdiv(size_across, 32) + (cdiv(size, 32) if distributed else 0)
        _target_backward_kernel[(tiles * self.batch,)](**launched(call), num_warps=8)

    def _add_target_backward(self, side: int, cross: Tensor, grad_target: Tensor, grad_map: Tensor) -> None:
        """As `_target_backward`, by torch's products, and always added to `grad_map`."""
        across = 1 - side
        if self.kind == "iais_distributed":
            self._part(grad_map, side, across).baddbmm_(grad_target, self._part(self.map, across, side).mT)
            self._part(grad_map, across, side).baddbmm_(cross.mT, grad_target)
            return
        if self.kind == "iais_singular":  # products with 0 and 1, not scatter_add: deterministic on a GPU
            cross = torch.zeros_like(self._part(self.map, side, across)).scatter_(-1, cross[:, :, None], 1.0)
        self._part(grad_map, across, across).baddbmm_(cross.mT, grad_target @ cross)

    def _maps(self) -> tuple[Tensor, Tensor | None, Stats | None]:
        """The map of head means, for iais_singular the base-2 logarithm of the sum over the heads, and for long rows `Stats`."""
        L, V = self.sizes
        length = L + V
        maps = self._empty(self.batch, length, length)
        log_map = torch.empty_like(maps) if self.logs else None
        call, constants = self._call("map")
        row_tiles, stats = cdiv(L, constants.BLOCK_Q) + cdiv(V, constants.BLOCK_Q), None
        if not self.whole:
            shape = 2, self.batch, self.heads, length
            stats = Stats(self.batch * self.heads * length, self._empty(*shape), self._empty(*shape))
            statistics_kernel[(row_tiles * 2 * self.heads * self.batch,)](**call, stats=stats)
        columns = cdiv(L, constants.BLOCK_L) + cdiv(V, constants.BLOCK_V)
        map_kernel[(row_tiles * columns * self.batch,)](**call, stats=stats, p_map=maps, p_log=log_map)
        return maps, log_map, stats

    def _write_gradients(self, grads: Gradients, grad_queries: list[Tensor], grad_keys: list[Tensor]) -> None:
        """From gradients at the map and its logarithm to those of queries and keys."""
        blocks = len(grad_queries)  # if two, then the kernels leave the last two alone
        grad_q, grad_k = (tuple(grads * 2)[:4] for grads in (grad_queries, grad_keys))
        unread = -1 if blocks == 2 or len(self.sides) == 2 else 3 - 3 * self.sides[0]
        call, constants = self._call("gradient", blocks, unread)
        call |= {"grads": grads, "p_grad_qs": grad_q, "scale": self.scale}
        programs, tiles, stats = blocks * self.heads * self.batch, 1, self.stats
        if stats is not None:
            delta = torch.empty_like(stats.p_max)
            stats = stats._replace(p_delta=delta, p_delta_log=None if grads.p_log is None else torch.empty_like(delta))
            tiles = cdiv(max(self.sizes), constants.BLOCK_Q)
            gradient_q_kernel[(programs * tiles,)](**call, stats=stats, tiles=tiles)
            tiles = cdiv(max(self.sizes), constants.BLOCK_V)
        gradient_kernel[(programs * tiles,)](**call, stats=stats, p_grad_ks=grad_k, tiles=tiles)

    def _call(self, kernel: str, blocks: int = 4, unread: int = -1) -> tuple[dict[str, Any], Constants]:
        """The named arguments that all kernels with heads share, and their constants."""
        dtype = self.queries[0].dtype
        masked, precision = self.masks is not None, input_precision(dtype)
        options, constants = _gradient_launch(
            kernel, self.kind, dtype, self.sizes, self.features, self.whole, masked, precision, blocks, unread
        )
        return {**self.blocks, **options}, constants

    def _empty(self, *shape: int) -> Tensor:
        return self.queries[0].new_empty(shape, dtype=torch.float32)

    def _part(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """The block of a map with these rows and columns: 0 for text, 1 for image."""
        return x[:, self.parts[rows], self.parts[columns]]


@cached_launch
def _divergence_launch(
    sizes: tuple[int, int], sides: tuple[int, ...], kind: tuple[str, bool], masked: bool, whole: bool, grad: bool
) -> tuple[int, dict[str, Any]]:
    """The tiles of a sample, and the named arguments that all launches with this metadata share."""
    blocks = [block_size(size) for size in sizes]
    few = 16 if kind[0] == "iais_distributed" else 32  # with 32 rows an SM of sm_90 holds one program, with 16 it holds two
    rows = [few if whole else max(1, 2048 // block) for block in blocks]
    light = kind == ("iais_singular", False) and whole and not grad  # eight warps would spill under Triton 3.6
    num_warps = 4 if light else 8 if max(blocks) <= 2048 else 16
    constants = _Divergence(*kind, masked, whole, 0 in sides, 1 in sides, *blocks, *rows)
    return sum(cdiv(sizes[side], rows[side]) for side in sides), launched({"C": constants, "num_warps": num_warps})


@cached_launch
def _gradient_launch(
    kernel: str,
    kind: str,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    features: int,
    whole: bool,
    masked: bool,
    precision: str,
    blocks: int,
    unread: int,
) -> tuple[dict[str, Any], Constants]:
    """The named arguments that all launches with this metadata share, and their constants."""
    L, V = sizes
    facts = {"kind": kind, "dtype": dtype, "L": L, "V": V, "size": features, "whole": whole}
    config = {**configuration("congruence_loss", kernel, **facts)}
    block_q, block_kv = config.pop("BLOCK_Q"), config.pop("BLOCK_KV", None)
    block_l, block_v = (block_size(L), block_size(V)) if block_kv is None else (block_kv, block_kv)
    constants = Constants(masked, whole, precision, block_size(features), block_q, block_l, block_v, blocks, unread)
    return launched({"C": constants}, config), constants


def _holds_rows(sizes: tuple[int, int], features: int, dtype: torch.dtype) -> bool:
    """Whether tiles hold whole rows of a head: in float32, of which a dot takes three parts, they would exceed shared memory."""
    return dtype != torch.float32 and max(sizes) <= 128 and features <= 128


class _Divergence(NamedTuple):
    """The constants of `_divergence_kernel`. TEXT, IMAGE: the directions."""

    KIND: str
    AS_THEY_ARE: bool
    MASKED: bool
    FUSED: bool
    TEXT: bool
    IMAGE: bool
    BLOCK_L: int
    BLOCK_V: int
    ROWS_L: int
    ROWS_V: int


class _Target(NamedTuple):
    """The constants of `_target_backward_kernel`."""

    KIND: str
    ADD: bool
    BLOCK_Q: int
    BLOCK_N: int
    BLOCK_M: int


@triton.jit
def _dot_tf32(b_a, b_b):
    """b_a @ b_b of float32 tiles in tf32."""
    return dot(round_tf32(b_a), round_tf32(b_b), "tf32")


@triton.jit
def expm1(x):
    """exp(x) - 1 to a few ulp. Small x take the power series, since exp(x) - 1 would cancel."""
    b = x * 2.755731922398589e-07 + 2.755731922398589e-06  # x^n / (n + 2)!, n from 8 to 0
    b = b * x + 2.48015873015873e-05
    b = b * x + 0.0001984126984126984
    b = b * x + 0.001388888888888889
    b = b * x + 0.008333333333333333
    b = b * x + 0.041666666666666664
    b = b * x + 0.16666666666666666
    b = b * x + 0.5
    b = x * b * x + x
    return tl.where(tl.abs(x) < 0.7, b, tl.exp(x) - 1.0)


@triton.jit
def log1p_by(x, z):
    """log(1 + x) for x > -1 to a few ulp, with z = x / (2 + x). Small x take the series of the inverse hyperbolic tangent, since
    1 + x would round."""
    zz = z * z
    b = 0.2 + zz * (0.14285714285714285 + zz * (0.1111111111111111 + zz * 0.09090909090909091))
    b = 2.0 * z * (1.0 + zz * (0.3333333333333333 + zz * b))
    return tl.where(tl.abs(x) < 0.4, b, tl.log(1.0 + x))


@triton.jit
def log1p(x):
    return log1p_by(x, x / (2.0 + x))


@triton.jit
def _divergence_kernel(maps, p_targets, p_masks, p_outs, L, V, per_head, epsilon, C: tl.constexpr):
    """The part of each row in the loss sym(p, t), or the gradients at p and t: p is a modality's block of the map, t its target.

    With N tokens of this modality and M of the other, X its cross block (N, M), Y the cross block of the way back (M, N), and Z
    the other modality's own block (M, M):
    iais_singular      t = softmax(Z[argmax X, argmax X])
    iais_distributed   t = X Y
    cacr               t = softmax(X Z X^T), and p is softmax(p), too
    loss_i = weight_i sum_j (t_ij - p_ij) (log t_ij - log p_ij), weight_i = 1 / the number of real tokens
    AS_THEY_ARE: neither p nor t has a softmax.
    One program per sample and tile of rows, of the text direction first, then of the image direction.

    maps: the modalities' blocks, all blocks, and the gradient at the first, if gradients are computed. With one direction alone,
    both entries of p_targets and p_outs are of that one.
    """
    tiles_l = tl.cdiv(L, C.ROWS_L) if C.TEXT else 0
    tiles_v = tl.cdiv(V, C.ROWS_V) if C.IMAGE else 0
    i = tl.program_id(0)
    i_b, i_q = (i // (tiles_l + tiles_v)).to(tl.int64), i % (tiles_l + tiles_v)
    text, image = p_masks[0] + i_b * L, p_masks[1] + i_b * V
    begin = i_b * 0 + L  # of the image's tokens, in 64 bits, since offsets are products of it
    if C.TEXT:
        if i_q < tiles_l:
            p_text = p_outs[0]
            if maps[2] is None:
                p_text += i_b * (L + V) if C.IMAGE else i_b * L
            sizes = i_b, i_q * C.ROWS_L, 0, begin, L, V, per_head, epsilon
            _divergence_tile(maps, p_targets[0], (text, image), p_text, sizes, C, C.ROWS_L, C.BLOCK_L, C.BLOCK_V)
    if C.IMAGE:
        if i_q >= tiles_l:
            p_image = p_outs[1]
            if maps[2] is None:
                p_image += i_b * (L + V) + L if C.TEXT else i_b * V
            sizes = i_b, (i_q - tiles_l) * C.ROWS_V, begin, 0, V, L, per_head, epsilon
            _divergence_tile(maps, p_targets[1], (image, text), p_image, sizes, C, C.ROWS_V, C.BLOCK_V, C.BLOCK_L)


@triton.jit
def _divergence_tile(
    maps, p_target, masks, p_out, sizes, C: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_M: tl.constexpr
):
    """The loss of whole rows, or its gradients at the modality's block and at the target.

    The gradients are divided by the number of heads, but not at a block that is the logarithm of the sum over the heads.

    sizes: the sample, the first row, where the tokens of this modality and of the other one begin in the sample's map, how many
    there are; 1 / H, epsilon.
    """
    i_b, start, first_token, first_across, N, M, per_head, epsilon = sizes
    GRAD: tl.constexpr = maps[2] is not None
    S = N + M
    p_intra, p_map = maps[0] + i_b * S * S, maps[1] + i_b * S * S
    o_q, o_kv = start + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_KV)
    m_q, m_kv = real_tokens(masks[0], o_q, N, C.MASKED), real_tokens(masks[0], o_kv, N, C.MASKED)
    b_weight = _weight_of_rows(masks, m_q, m_kv, o_kv, N, M, C)
    m_pair = (b_weight > 0.0)[:, None] & m_kv[None, :]
    # iais_distributed takes the blocks across both ways; the others the cross block and the other modality's block
    intra = first_token * S + first_token
    b_intra = tl.load(p_intra + intra + o_q.to(tl.int64)[:, None] * S + o_kv[None, :], mask=m_pair, other=0.0)  # [q,kv]
    p_inner = p_map + first_across * S + (first_token if C.KIND == "iais_distributed" else first_across)
    if C.KIND == "iais_singular":
        b_row = tl.load(p_target + i_b * N + o_q, mask=m_q, other=0)
        b_column = tl.load(p_target + i_b * N + o_kv, mask=m_kv, other=0)
        b_target = tl.load(p_inner + b_row[:, None] * S + b_column[None, :], mask=m_pair, other=0.0)  # [q,kv]
    elif C.FUSED:
        p_cross = p_map + first_token * S + first_across
        b_target = _products_of_blocks(p_cross, p_inner, o_q, o_kv, N, M, S, C.KIND, BLOCK_M)
    else:
        offsets = (i_b * N + o_q)[:, None] * N + o_kv[None, :]
        b_target = tl.load(p_target + offsets, mask=m_pair, other=0.0)  # [q,kv]
    b_weight = b_weight[:, None]
    if C.AS_THEY_ARE:
        b_terms = _divergence_as_they_are(b_intra, b_target, epsilon, GRAD)
    elif C.KIND == "iais_distributed":
        b_terms = _divergence_of_products(b_intra, b_target, epsilon, GRAD)
    else:
        b_terms = _divergence_of_softmax(b_intra, b_target, m_pair, per_head, C.KIND, GRAD)
    if GRAD:
        b_grad_intra, b_grad_target = b_terms
        b_grad_target *= per_head
        if C.AS_THEY_ARE or C.KIND != "iais_singular":  # a head's share of the logarithm is taken where it is known
            b_grad_intra *= per_head
        store_tile(maps[2] + i_b * S * S + intra, S, o_q, o_kv, N, N, tl.where(m_pair, b_weight * b_grad_intra, 0.0))
        store_tile(p_out + i_b * N * N, N, o_q, o_kv, N, N, tl.where(m_pair, b_weight * b_grad_target, 0.0))
    else:
        tl.store(p_out + o_q, tl.sum(tl.where(m_pair, b_weight * b_terms, 0.0), axis=1), mask=o_q < N)


@triton.jit
def _weight_of_rows(masks, m_q, m_kv, o_kv, N, M, C: tl.constexpr):
    """1 / the number of real tokens for real rows [q], else 0; also where the other modality has no real token."""
    b_weight = tl.where(m_q, 1.0 / N, 0.0)
    if C.MASKED:
        num_real = tl.sum(m_kv.to(tl.int32), axis=0)
        num_across = 0
        for begin in range(0, M, o_kv.shape[0]):
            num_across += tl.sum(real_tokens(masks[1], begin + o_kv, M, True).to(tl.int32), axis=0)
        b_weight = tl.where(m_q & (num_across > 0), 1.0 / tl.maximum(num_real, 1).to(tl.float32), 0.0)
    return b_weight


@triton.jit
def _products_of_blocks(p_cross, p_inner, o_q, o_kv, N, M, S, KIND: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile [q,kv] of X Y (iais_distributed) or X Z X^T (cacr), with X at p_cross and Y or Z at p_inner."""
    o_m = tl.arange(0, BLOCK_M)
    if KIND == "cacr":
        b_cross = load_tile(p_cross, S, o_q, o_m, N, M)  # [q,m]
    b_target = tl.zeros([o_q.shape[0], o_kv.shape[0]], dtype=tl.float32)
    for begin in range(0, M, 32):  # the other modality's tokens in parts, since all of them would spill
        o_part = begin + tl.arange(0, 32)
        if KIND == "cacr":
            b_x = _dot_tf32(b_cross, load_tile(p_inner, S, o_m, o_part, M, M))  # [q,part]
            b_back = tl.trans(load_tile(p_cross, S, o_kv, o_part, N, M))  # [part,kv]
        else:
            b_x = load_tile(p_cross, S, o_q, o_part, N, M)  # [q,part]
            b_back = load_tile(p_inner, S, o_part, o_kv, M, N)  # [part,kv]
        b_target += _dot_tf32(b_x, b_back)
    return b_target


@triton.jit
def _divergence_as_they_are(b_p, b_t, epsilon, GRAD: tl.constexpr):
    """(p - t) (log(p + eps) - log(t + eps)), or with GRAD its derivatives by p and t.

    From log1p(y) of y >= 0, so that it is never negative and keeps its digits near 0.
    """
    b_gap = b_p - b_t
    b_d = log1p(tl.abs(b_gap) / (tl.minimum(b_p, b_t) + epsilon))
    if GRAD:
        b_d = tl.where(b_gap < 0.0, -b_d, b_d)
        return b_d + b_gap / (b_p + epsilon), -b_d - b_gap / (b_t + epsilon)
    else:
        return tl.abs(b_gap) * b_d


@triton.jit
def _divergence_of_products(b_p, b_t, epsilon, GRAD: tl.constexpr):
    """t (log t - log(p + eps)) + p (log p - log(t + eps)), or with GRAD its derivatives by p and t.

    log x - log(x + eps) = -log1p(eps / x) takes out of the logarithms what nearly cancels.
    """
    b_p_safe, b_t_safe = tl.maximum(b_p, 1.1754944e-38), tl.maximum(b_t, 1.1754944e-38)  # 0 log 0 = 0
    b_log_p, b_log_t = tl.log(b_p + epsilon), tl.log(b_t + epsilon)
    if GRAD:
        # log p - log(t + eps) + 1 - t / (p + eps), small where p is near t
        b_grad_p = tl.log(b_p_safe) - b_log_t + (b_p - b_t + epsilon) / (b_p + epsilon)
        b_grad_t = tl.log(b_t_safe) - b_log_p + (b_t - b_p + epsilon) / (b_t + epsilon)
        return b_grad_p, b_grad_t
    else:
        b_loss = (b_t - b_p) * (b_log_t - b_log_p)
        b_loss -= b_t * log1p(epsilon / b_t_safe) + b_p * log1p(epsilon / b_p_safe)
        return b_loss


@triton.jit
def _divergence_of_softmax(b_intra, b_target, m_pair, per_head, KIND: tl.constexpr, GRAD: tl.constexpr):
    """(p - t) (log p - log t) of t = softmax(target), or with GRAD its derivatives by `intra` and by the target.

    p is softmax(intra) for cacr. For iais_singular it is the mean over the heads, and `intra` the base-2 logarithm of their sum.
    Nothing cancels: with d = log p - log t, the loss is t expm1(d) d, which is never negative.
    """
    b_t = tl.where(m_pair, tl.exp(b_target), 0.0)  # entries of the target lie in [0, 1]
    b_sum = tl.sum(b_t, axis=1)[:, None]
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_t /= b_sum
    if KIND == "cacr":
        # log p - log t is the gap minus the difference of the two log-sum-exps, which is log sum t e^gap
        b_gap = b_intra - b_target
        b_d = b_gap - log1p(tl.sum(b_t * expm1(b_gap), axis=1))[:, None]
    else:
        b_log_p = b_intra * 0.6931471805599453 + tl.log(per_head)  # of the mean over the heads
        b_d = b_log_p - (b_target - tl.log(b_sum))
    b_difference = b_t * expm1(b_d)  # p - t
    if GRAD:
        b_p = b_t + b_difference
        b_grad_intra = b_p * b_d + b_difference
        b_grad_target = -b_t * b_d - b_difference
        b_grad_target -= b_t * tl.sum(b_grad_target, axis=1)[:, None]  # through the softmax of the target
        if KIND == "cacr":
            b_grad_intra -= b_p * tl.sum(b_grad_intra, axis=1)[:, None]
        return b_grad_intra, b_grad_target
    else:
        return b_difference * b_d


@triton.jit
def _store_or_add(p, stride, o_row, o_col, num_rows, num_cols, b, ADD: tl.constexpr):
    if ADD:
        b += load_tile(p, stride, o_row, o_col, num_rows, num_cols)
    store_tile(p, stride, o_row, o_col, num_rows, num_cols, b)


@triton.jit
def _target_backward_kernel(p_grad_target, p_cross, p_back, p_grad_cross, p_out, N, M, stride_b, stride_n, C: tl.constexpr):
    """X^T G X from the gradient G (N, N) at the target and the cross block X (N, M), one program per sample and tile of rows.

    For iais_distributed it is X^T G, and other programs compute G Y^T at the cross block, where Y is the cross block of the way
    back.
    """
    tiles = tl.cdiv(M, C.BLOCK_Q)
    per_sample = tiles + tl.cdiv(N, C.BLOCK_Q) if C.KIND == "iais_distributed" else tiles
    i = tl.program_id(0)
    i_b, i_q = (i // per_sample).to(tl.int64), i % per_sample
    o_n, o_m, o_q = tl.arange(0, C.BLOCK_N), tl.arange(0, C.BLOCK_M), i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    p_grad_target += i_b * N * N
    if i_q < tiles:
        if C.KIND == "iais_singular":
            b_index = tl.load(p_cross + i_b * N + o_n, mask=o_n < N, other=-1)
            b_cross_t = tl.where(b_index[None, :] == o_q[:, None], 1.0, 0.0)  # [q,n]
        else:
            b_cross_t = tl.trans(load_tile(p_cross + i_b * stride_b, stride_n, o_n, o_q, N, M))  # [q,n]
        b_out = _dot_tf32(b_cross_t, load_tile(p_grad_target, N, o_n, o_n, N, N))  # [q,n]
        if C.KIND == "iais_distributed":
            _store_or_add(p_out + i_b * stride_b, stride_n, o_q, o_n, M, N, b_out, C.ADD)
        else:
            if C.KIND == "iais_singular":
                b_x = tl.where(b_index[:, None] == o_m[None, :], 1.0, 0.0)  # [n,m]
            else:
                b_x = load_tile(p_cross + i_b * stride_b, stride_n, o_n, o_m, N, M)  # [n,m]
            _store_or_add(p_out + i_b * stride_b, stride_n, o_q, o_m, M, M, _dot_tf32(b_out, b_x), C.ADD)
    elif C.KIND == "iais_distributed":
        o_row = o_q - tiles * C.BLOCK_Q
        b_back = tl.trans(load_tile(p_back + i_b * stride_b, stride_n, o_m, o_n, M, N))  # [n,m]
        b_grad_cross = _dot_tf32(load_tile(p_grad_target, N, o_row, o_n, N, N), b_back)  # [q,m]
        _store_or_add(p_grad_cross + i_b * stride_b, stride_n, o_row, o_m, N, M, b_grad_cross, C.ADD)
