"""stacked_cross_attention in Triton: the options of a call, its sets, and which of them a chunk holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast.backends.inputs import StackedCrossAttentionBackwardInputs, StackedCrossAttentionInputs
from vlattn_fast.backends.reference.stacked_cross_attention import split_norm
from vlattn_fast.kernels._tiles import cdiv

MAP_ELEMENTS = 1 << 22  # the least that `_map_elements` gives
EPS = tl.constexpr(1e-8)  # of SCAN's norms and cosine

Inputs = StackedCrossAttentionInputs | StackedCrossAttentionBackwardInputs
Side = tuple[Tensor, Tensor | None]  # rows (B, L, D), and how many of each are real


class Options(NamedTuple):
    """How scores become weights, and cosines a similarity."""

    norm: str  # "none", "softmax", "l1norm", "l2norm": over the queries, after the clipping
    clips: bool
    smooth: float
    aggregation: str
    sharpness: float  # lambda_lse

    @classmethod
    def of(cls, inputs: Inputs) -> Options:
        clips, norm = split_norm(inputs.first_norm)
        return cls("none" if norm is None else norm, clips, inputs.smooth, inputs.aggregation, inputs.lambda_lse)


class QueryRows(NamedTuple):
    """`Queries` of a launch. p_total: how many of the L rows are real."""

    p: Tensor
    p_norm: Tensor
    p_start: Tensor
    p_total: Tensor
    L: int


class ContextSets(NamedTuple):
    """`Contexts` of a launch."""

    p: Tensor
    p_lengths: Tensor
    X: int
    M: int


class Constants(NamedTuple):
    """NORM, CLIP, AGGREGATION: see `Options`. PARTS: how many numbers an entry of the map that is written has, 0 if one."""

    NORM: str
    CLIP: bool
    AGGREGATION: str
    PARTS: int
    BLOCK_Q: int = 0
    BLOCK_KV: int = 0


def sides(inputs: Inputs) -> tuple[Side, Side]:
    """The side of the queries and the side of the contexts."""
    image = inputs.images.contiguous(), inputs.image_lengths
    caption = inputs.captions.contiguous(), inputs.caption_lengths
    return (caption, image) if inputs.direction == "t2i" else (image, caption)


def chunks(context: Side, query: Side) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of the context sets, each with the slices of the query sets. They only depend on shapes and the device's size."""
    (num_x, size, _), (num_y, n, _) = context[0].shape, query[0].shape
    m, most = padded(size), _map_elements(context[0].device)
    step_x = _even(num_x, most // (m * max(m, num_y * n)))  # m for the Gram matrices
    step_y = _even(num_y, most // (m * step_x * n))
    tiles_y = [slice(y, min(y + step_y, num_y)) for y in range(0, num_y, step_y)]
    for x in range(0, num_x, step_x):
        yield slice(x, min(x + step_x, num_x)), tiles_y


def padded(size: int) -> int:
    """How many contexts a set has in maps of alpha."""
    return cdiv(size, 16) * 16


def _map_elements(device: torch.device) -> int:
    """Elements of each map of a chunk, or of one pair if that is more: a power of two.

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


class Contexts:
    """Context sets x: rows (X * M, D), lengths (X). With `dtype` also the sums over a set that the backward pass takes, in it."""

    wide: Tensor  # the rows in `dtype`, (X, M, D)
    share: Tensor  # 1 / the number of real rows, (X, 1)
    mean: Tensor  # of the real rows, (X, D)
    norms: Tensor  # |c| of the rows, (X, M)
    gram: Tensor  # C C^T of each set, (X, M, M)

    def __init__(self, side: Side, x: slice, dtype: torch.dtype | None = None) -> None:
        rows, lengths = side[0][x], side[1]
        self.sets, self.size, features = rows.shape
        self.rows = rows.reshape(self.sets * self.size, features)
        self.lengths = rows.new_full((self.sets,), self.size, dtype=torch.int64) if lengths is None else lengths[x].contiguous()
        self.arguments = ContextSets(self.rows, self.lengths, self.sets, self.size)
        if dtype is not None:
            self.wide = self.rows.to(dtype).view(self.sets, self.size, features)
            self.share = self.lengths.clamp(min=1).to(dtype).reciprocal()[:, None]
            self.mean = self.wide.sum(1) * self.share
            self.norms = torch.linalg.vector_norm(self.wide, dim=2)
            self.gram = self.wide @ self.wide.mT


class Queries:
    """Query sets y: rows (L, D). The real rows of set i go from start[i] to start[i + 1]; the rest are zeros.

    With `dtype`, for the backward pass, norms and `wide` are of it.
    """

    wide: Tensor  # the rows in `dtype`, (L, D)

    def __init__(self, side: Side, y: slice, dtype: torch.dtype | None = None) -> None:
        rows, lengths = side[0][y], side[1]
        self.sets, size, features = rows.shape
        count = self.sets * size
        self.rows, self.place = rows.reshape(count, features), None
        if lengths is None:
            self.start = torch.arange(0, count + 1, size, device=rows.device)
        else:
            real = (torch.arange(size, device=rows.device) < lengths[y, None]).flatten()
            self.start = F.pad(lengths[y].cumsum(0), (1, 0))
            self.place = torch.where(real, real.cumsum(0) - 1, self.start[-1] + (~real).cumsum(0) - 1)
            self.rows = torch.empty_like(self.rows).index_copy_(0, self.place, self.rows)
        self.norms = torch.linalg.vector_norm(self.rows, dim=1, dtype=dtype or torch.float32)
        self.total = self.start[-1:]
        self.arguments = QueryRows(self.rows, self.norms, self.start, self.total, count)
        if dtype is not None:
            self.wide = self.rows.to(dtype)

    def new_map(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """(L, ...), or (parts, L, ...). A product takes whole maps, so there must be no garbage after the packed rows."""
        return self.rows.new_empty(shape, dtype=dtype) if self.place is None else self.rows.new_zeros(shape, dtype=dtype)

    def unpack(self, x: Tensor) -> Tensor:
        """Rows (L, ...) at their positions among all rows of the sets."""
        return x if self.place is None else x[self.place]


@triton.jit
def pair(q, c):
    """For a grid of (X * Y,): context set, query set, the range of its query rows, the number of contexts."""
    i = tl.program_id(0).to(tl.int64)
    i_x, i_y = i % c.X, i // c.X
    begin, end = tl.load(q.p_start + i_y).to(tl.int32), tl.load(q.p_start + i_y + 1).to(tl.int32)
    return i_x, i_y, begin, end, tl.load(c.p_lengths + i_x).to(tl.int32)
