"""recurrent_step in O(N) memory with plain PyTorch, on any device and dtype.

The keys are swept from the last to the first. Each query t has a state row z, which is q_t when the sweep reaches it:

    A_ts = w_s z . k_s,  w_s = beta_s or 1;      then  z <- (z - beta_s (z . k_s) k_s) * a_s

No decay is divided by, and none is a difference of sums of logarithms, so a decay of 0 is as good as any. A step is linear in z.
So a chunk of C tokens is one matrix, `_sweep`: the sweep over its own queries and over the unit vectors. Its rows for unit
vectors take all later queries through the chunk in one product, z -> (columns of A, z after the chunk). A sequence of one chunk
has no later queries, and no such rows.
A tile of queries has its whole rows of A, and no tile is stored. Derivatives chain those of two formulas: of a chunk's matrix and
of a tile. Sweeps are recorded some chunks at a time, and tiles one by one, so their memory is O(N), too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype, expand_heads, fold_heads
from vlattn_fast.backends.reference.recurrent_step import mean_of_heads, sweep
from vlattn_fast.backends.streaming import _forward_mode, _tiles
from vlattn_fast.backends.streaming._forward_mode import Named

CHUNK = 64  # tokens that one product takes a query through


class RecurrentStepInputs(NamedTuple):
    """relevancy (B, T, N), query (B, Hq, N, Dk), key (B, Hk, N, Dk), value and grad_output (B, H, N, Dv), log_decay (B, H, N) or
    (B, H, N, Dk), beta and diagonal (B, H, N). Hq and Hk divide num_heads = H."""

    relevancy: Tensor
    query: Tensor
    key: Tensor
    value: Tensor | None
    grad_output: Tensor | None
    log_decay: Tensor | None
    beta: Tensor | None
    diagonal: Tensor | None
    num_heads: int
    rule: str
    row_normalize: bool
    backend: str


class RecurrentStepBackwardInputs(NamedTuple):
    """grad (B, T, N), the gradient of the result; the others as in RecurrentStepInputs. need_*: which gradients are asked for;
    need_inputs stands for all but relevancy's."""

    grad: Tensor
    relevancy: Tensor
    query: Tensor
    key: Tensor
    value: Tensor | None
    grad_output: Tensor | None
    log_decay: Tensor | None
    beta: Tensor | None
    diagonal: Tensor | None
    num_heads: int
    rule: str
    row_normalize: bool
    need_relevancy: bool
    need_inputs: bool
    backend: str


DIFFERENTIABLE = ("relevancy", "query", "key", "value", "grad_output", "log_decay", "beta", "diagonal")


def forward(inputs: RecurrentStepInputs) -> Tensor:
    """relevancy @ Abar, (B, T, N) -> (B, T, N)."""
    return _over_tiles(inputs, _Samples)


def backward(inputs: RecurrentStepBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of relevancy, query, key, value, grad_output, log_decay, beta and diagonal; None for those not needed."""
    names = [name for name in DIFFERENTIABLE if (inputs.need_relevancy if name == "relevancy" else inputs.need_inputs)]
    return _gradients(inputs, names, _Samples)


def jvp(inputs: Any) -> tuple[Tensor]:
    """The tangent of relevancy @ Abar."""
    return (_over_tiles(inputs, _SamplesWithTangents),)


def second(inputs: Any) -> tuple[Tensor | None, ...]:
    """The gradients of that tangent's product with `grad`."""
    return _gradients(inputs, DIFFERENTIABLE, _SamplesWithTangents)


def _over_tiles(inputs: Any, kind: type[_Samples]) -> Tensor:
    """The sum of the tiles' products."""
    result = torch.zeros_like(inputs.relevancy, dtype=compute_dtype(inputs.query), memory_format=torch.contiguous_format)
    for samples in _samples(inputs, kind):
        for places in samples.tiles():
            part = samples.product(places)[..., : samples.length]
            result[samples.b, :, : part.shape[2]] += part
    return result.to(inputs.relevancy.dtype)


def _gradients(inputs: Any, names: Sequence[str], kind: type[_Samples]) -> tuple[Tensor | None, ...]:
    """Those of `names`, None for others."""
    tensors = {name: x for name in names if (x := getattr(inputs, name)) is not None}
    gradients = {}
    for name, x in tensors.items():
        shape = (x.shape[0], inputs.num_heads, *x.shape[2:]) if name in ("query", "key") else x.shape
        gradients[name] = x.new_zeros(shape, dtype=compute_dtype(x))
    for samples in _samples(inputs, kind):
        for name, gradient in samples.gradients(names).items():
            gradients[name][samples.place(name)] += gradient[:, :, : samples.length]
    gradients = {name: fold_heads(y, tensors[name].shape[1]).to(tensors[name].dtype) for name, y in gradients.items()}
    return tuple([gradients.get(name) for name in DIFFERENTIABLE])


def _samples(inputs: Any, kind: type[_Samples]) -> Iterator[_Samples]:
    """As many samples and heads at a time as `tile_elements` allow, one of each at least; all heads if rows are divided by the
    sums of their mean."""
    batch, _, length, _ = inputs.query.shape
    heads = inputs.num_heads
    if not batch * heads * length:
        return
    per_head, most = CHUNK * length, _tiles.tile_elements(inputs.query)
    step_h = heads if inputs.row_normalize else max(1, min(heads, most // per_head))
    step_b = max(1, most // (per_head * heads)) if step_h == heads else 1
    for b in range(0, batch, step_b):
        for h in range(0, heads, step_h):
            yield kind(inputs, slice(b, min(b + step_b, batch)), slice(h, min(h + step_h, heads)))


class _Samples:
    """Some samples b and heads h: `x`, the inputs that have gradients, in the dtype of sums and padded to whole chunks, and the
    chunks' matrices, `own` and `later`, see `_matrices`."""

    def __init__(self, inputs: Any, b: slice, h: slice) -> None:
        self.inputs, self.b, self.h, self.length = inputs, b, h, inputs.query.shape[2]
        self.chunk = min(CHUNK, self.length)
        unused = ("value", "grad_output") if inputs.rule == "attention" else ()
        names = [name for name in DIFFERENTIABLE if getattr(inputs, name) is not None and name not in unused]
        self.x = {name: self.whole(name, getattr(inputs, name)) for name in names}
        self.tokens = self.by_chunks(self.x)
        self.add_matrices()

    def add_matrices(self) -> None:
        self.x |= self.of_chunks(_swept(self.tokens, self.length > self.chunk))

    def place(self, name: str) -> tuple[slice, ...]:
        return (self.b,) if name in ("relevancy", "grad") else (self.b, self.h)

    def whole(self, name: str, x: Tensor) -> Tensor:
        x = expand_heads(x, self.inputs.num_heads) if name in ("query", "key") else x
        x = x.detach()[self.place(name)].to(compute_dtype(self.inputs.query))
        padding = (0, 0) * (x.dim() - 3) + (0, -self.length % self.chunk)
        return F.pad(x, padding).contiguous()  # a dual has no overlapping memory

    def by_chunks(self, x: Named) -> Named:
        """The inputs of `_matrices`."""
        names = ("query", "key", "log_decay", "beta", "diagonal")
        return {name: x[name].unflatten(2, (-1, self.chunk)).flatten(0, 2) for name in names if name in x}

    def of_chunks(self, matrices: Named) -> Named:
        heads = self.b.stop - self.b.start, self.h.stop - self.h.start, -1
        return {name: x.unflatten(0, heads) for name, x in matrices.items()}

    def tiles(self) -> Iterator[Places]:
        """A tile has the queries of a chunk, with all keys up to them."""
        every = slice(None)
        for n in range(self.x["later"].shape[2]):
            stop = (n + 1) * self.chunk
            rows = (every, every, slice(stop - self.chunk, stop))
            keys = {"value": (every, every, slice(stop)), "later": (every, every, slice(n))}
            yield {"relevancy": rows, "grad_output": rows, "own": (every, every, n), **keys}

    def product(self, places: Places) -> Tensor:
        """A tile's part of the result."""
        return self.step(_cut(self.x, places))

    def step(self, x: Named) -> Tensor:
        """relevancy @ Abar (b, T, keys) of a tile."""
        own, value, grad_output = x["own"], x.get("value"), x.get("grad_output")
        blocks, z = [own[..., : self.chunk]], own[..., self.chunk :]
        for matrix in reversed(x["later"].unbind(2)):
            swept = z @ matrix
            blocks.append(swept[..., : self.chunk])
            z = swept[..., self.chunk :]
        a = torch.cat(blocks[::-1], -1)
        abar = mean_of_heads(a, value, grad_output, self.inputs.rule, self.inputs.row_normalize)
        return x["relevancy"] @ abar * (a.shape[1] / self.inputs.num_heads)

    def gradients(self, names: Sequence[str]) -> Named:
        """Those of `names` by the product of the result with `grad`: those of tiles, also by the matrices, and with these by the
        tokens."""
        through = "query" in names
        totals = self.zeros([name for name in self.x if name in names or (through and name in _MATRICES)])
        grad = self.whole("grad", self.inputs.grad)
        for n, places in enumerate(self.tiles()):
            for total, part in zip(totals, self.of_tile(places, totals[0], grad[..., : (n + 1) * self.chunk]), strict=True):
                for name, gradient in part.items():
                    total[name][places[name]] += gradient
        by_matrices = [{name: total.pop(name).flatten(0, 2) for name in _MATRICES} for total in totals] if through else []
        made = totals[0] | (self.of_chunks(self._through_matrices(by_matrices)) if through else {})
        return {name: y.view_as(self.x[name]) for name, y in made.items() if name in names}

    def zeros(self, names: Sequence[str]) -> list[Named]:
        return [{name: torch.zeros_like(self.x[name]) for name in names}]

    def of_tile(self, places: Places, names: Iterable[str], grad: Tensor) -> Sequence[Named]:
        x = _cut(self.x, places)
        leaves = {name: x[name] for name in names if name in x}
        return [_forward_mode.gradients(lambda y: [self.step(x | y)], leaves, [grad])]

    def _through_matrices(self, by_matrices: list[Named]) -> Named:
        """The gradients of the tokens, some chunks at a time."""
        count, chunk, dim = self.tokens["query"].shape
        most = 12 * _tiles.TILE_ELEMENTS // len(by_matrices) ** 2  # a graph of tangents takes more
        step = max(1, most // max(1, chunk * (chunk + dim) * dim))
        parts = []
        for first in range(0, count, step):
            some = dict.fromkeys((*self.tokens, *_MATRICES), (slice(first, first + step),))
            parts.append(self.of_tokens(some, [list(_cut(each, some).values()) for each in by_matrices]))
        return {name: torch.cat([part[name] for part in parts]) for name in self.tokens}

    def of_tokens(self, some: Places, cotangents: list[list[Tensor]]) -> Named:
        has_later = self.length > self.chunk
        return _forward_mode.gradients(lambda x: list(_matrices(x, has_later).values()), _cut(self.tokens, some), cotangents[0])


class _SamplesWithTangents(_Samples):
    """`u`: the tangents of `x`. The product and the gradients are those of the tangent."""

    def add_matrices(self) -> None:
        tangents = {name: getattr(self.inputs, f"{name}_tangent") for name in self.x}
        self.u = {name: torch.zeros_like(self.x[name]) if y is None else self.whole(name, y) for name, y in tangents.items()}
        self.tokens_tangent = self.by_chunks(self.u)
        x, u = _forward_mode.jvp(partial(_matrices, has_later=True), self.tokens, self.tokens_tangent)
        self.x, self.u = self.x | self.of_chunks(x), self.u | self.of_chunks(u)

    def product(self, places: Places) -> Tensor:
        tangent: Tensor = _forward_mode.jvp(self.step, _cut(self.x, places), _cut(self.u, places))[1]
        return tangent

    def zeros(self, names: Sequence[str]) -> list[Named]:
        return [*super().zeros(names), *super().zeros(names)]

    def of_tile(self, places: Places, names: Iterable[str], grad: Tensor) -> Sequence[Named]:
        return _forward_mode.gradients_of_jvp(self.step, _cut(self.x, places), _cut(self.u, places), [None], [grad])

    def of_tokens(self, some: Places, cotangents: list[list[Tensor]]) -> Named:
        tokens, u = _cut(self.tokens, some), _cut(self.tokens_tangent, some)
        return _forward_mode.gradients_of_jvp(partial(_matrices, has_later=True), tokens, u, *cotangents)[0]


_MATRICES = ("own", "later")
Places = dict[str, tuple[Any, ...]]  # indices of a tile's part of each tensor


def _cut(x: Named, places: Places) -> Named:
    return {name: x[name][place] for name, place in places.items() if name in x}


def _swept(tokens: Named, has_later: bool) -> Named:
    """`_matrices` in place; without those for `later` queries if there are none."""
    query, key, log_decay, beta = tokens["query"], tokens["key"], tokens.get("log_decay"), tokens.get("beta")
    decay = None if log_decay is None else log_decay.view(*query.shape[:2], -1).exp()
    count, chunk, dim = query.shape
    unit = torch.eye(dim, dtype=query.dtype, device=query.device)
    rows = torch.cat([query, unit.expand(count, dim, dim)], 1) if has_later else query.clone()
    columns = query.new_zeros(count, rows.shape[1], chunk)
    for s in reversed(range(chunk)):
        z = rows[:, s:]  # that of a query before the token is unchanged
        written = z @ key[:, s, :, None]
        if beta is not None:
            written = written * beta[:, s, None, None]
            z -= written * key[:, s, None]
        columns[:, s:, s] = written[..., 0]
        if decay is not None:
            z *= decay[:, s, None]
    if "diagonal" in tokens:
        columns[:, :chunk].diagonal(0, -2, -1).add_(tokens["diagonal"])
    matrix = torch.cat([columns, rows], -1)
    return {"own": matrix[:, :chunk], "later": matrix[:, chunk:]}


def _matrices(x: Named, has_later: bool) -> Named:
    """What chunks (G, C, ...) make of their `own` queries, (G, C, C + Dk), and of the unit vectors for all `later` ones,
    (G, Dk, C + Dk): the columns of A, then the state after the chunk. A formula that torch differentiates."""
    query = x["query"]
    count, chunk, dim = query.shape
    unit = torch.eye(dim, dtype=query.dtype, device=query.device).expand(count, dim, dim)[:, : dim * has_later]
    matrix = torch.cat(sweep(unit, query, x["key"], x.get("log_decay"), x.get("beta")), -1)
    if "diagonal" in x:
        matrix = matrix + F.pad(torch.diag_embed(x["diagonal"]), (0, dim, 0, dim * has_later))
    return {"own": matrix[:, :chunk], "later": matrix[:, chunk:]}
