"""recurrent_step in O(N) memory with plain PyTorch, on any device and dtype.

The keys are swept from the last to the first. Each query t has a state row z, which is q_t when the sweep reaches it:

    A_ts = w_s z . k_s,  w_s = beta_s or 1;      then  z <- (z - beta_s (z . k_s) k_s) * a_s

No decay is divided by, and none is a difference of sums of logarithms, so a decay of 0 is as good as any. A step is linear in z.
So a chunk of C tokens is one matrix, `_sweep`: the sweep over its own queries and over the unit vectors. Its rows for unit
vectors take all later queries through the chunk in one product, z -> (columns of A, z after the chunk). A sequence of one chunk
has no later queries, and no such rows.
A tile of queries has its whole rows of A, and no tile is stored. The backward pass computes tiles and sweeps again.
Tangents and second derivatives chain those of two formulas by torch.func: of a chunk's matrix and of a tile. Sweeps are
recorded some chunks at a time, and tiles one by one, so their memory is O(N), too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype, expand_heads, fold_heads, not_zero
from vlattn_fast.backends.inputs import derivative_inputs
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
RecurrentStepJvpInputs, RecurrentStepSecondInputs = derivative_inputs(
    RecurrentStepBackwardInputs, DIFFERENTIABLE, grads=("grad",)
)
Inputs = RecurrentStepInputs | RecurrentStepBackwardInputs


def forward(inputs: RecurrentStepInputs) -> Tensor:
    """relevancy @ Abar, (B, T, N) -> (B, T, N)."""
    abar = _Abar(inputs)
    relevancy, divisors = inputs.relevancy.to(abar.dtype), _divisors(abar)
    result = torch.zeros_like(relevancy)
    for part in abar.parts():
        for tile in part.tiles():
            result[part.b, :, : tile.stop] += relevancy[part.b, :, tile.i] @ tile.over(divisors)
    return result.to(inputs.relevancy.dtype)


def _divisors(abar: _Abar) -> Tensor:
    """The divisors of the rows (B, N) of a sum over the heads: their number, or the row's sum with row_normalize. An inverse may
    be no number."""
    total = abar.query.new_zeros(abar.query.shape[0], abar.query.shape[2])
    if not abar.inputs.row_normalize:
        return total.fill_(max(1, abar.num_heads))
    for part in abar.parts():
        for tile in part.tiles():
            total[part.b, tile.i] += tile.each().sum((1, 3))
    return not_zero(total)


def backward(inputs: RecurrentStepBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of relevancy, query, key, value, grad_output, log_decay, beta and diagonal; None for those not needed.

    With u the gradient of the result, that of relevancy is u Abar^T and that of Abar is relevancy^T u, a tile at a time.
    """
    abar = _Abar(inputs)
    relevancy, grad = inputs.relevancy.to(abar.dtype), inputs.grad.to(abar.dtype)
    divisors = _divisors(abar)
    by_relevancy = torch.zeros_like(relevancy)
    if inputs.need_relevancy or inputs.row_normalize:
        for part in abar.parts():
            for tile in part.tiles():
                by_relevancy[part.b, :, tile.i] += grad[part.b, :, : tile.stop] @ tile.over(divisors).mT
    first = by_relevancy.to(inputs.relevancy.dtype) if inputs.need_relevancy else None
    if not inputs.need_inputs:
        return first, *(None,) * 7
    # a row that is divided by its sum: the gradient of the sum is that of all of the row's numbers
    grad_of_sum = (relevancy * by_relevancy).sum(1) / divisors if inputs.row_normalize else None
    weighted, gradients = relevancy / divisors[:, None], abar.zeros()
    for part in abar.parts(gradients):
        for tile in part.tiles():
            by_each = weighted[part.b, :, tile.i].mT @ grad[part.b, :, : tile.stop]
            if grad_of_sum is not None:
                by_each -= grad_of_sum[part.b, tile.i, None]
            tile.backward(by_each[:, None])
        part.backward()
    return first, *gradients.result(abar)


class _Abar:
    """Abar of a call, in parts of samples and heads. Tensors have all heads and the dtype of sums."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.num_heads, self.dtype = inputs, inputs.num_heads, compute_dtype(inputs.query)
        self.query, self.key = (expand_heads(x, self.num_heads).to(self.dtype) for x in (inputs.query, inputs.key))
        self.value, self.grad_output = (
            None if x is None or inputs.rule != "gradient" else x.to(self.dtype) for x in (inputs.value, inputs.grad_output)
        )
        self.beta, self.diagonal = (None if x is None else x.to(self.dtype) for x in (inputs.beta, inputs.diagonal))
        self.decay = None
        if inputs.log_decay is not None:
            log_decay = inputs.log_decay if inputs.log_decay.dim() == 4 else inputs.log_decay[..., None]
            self.decay = log_decay.to(self.dtype).exp()
        self.chunk = max(1, min(CHUNK, self.query.shape[2]))

    def parts(self, gradients: Gradients | None = None) -> Iterator[_Part]:
        """A part's tile has as many samples and heads as `tile_elements` allow, one of each at least."""
        batch, heads, length, _ = self.query.shape
        if not batch * heads * length:
            return
        per_head, most = self.chunk * length, _tiles.tile_elements(self.query)
        step_h = max(1, min(heads, most // per_head))
        step_b = max(1, most // (per_head * heads)) if step_h == heads else 1
        for b in range(0, batch, step_b):
            for h in range(0, heads, step_h):
                yield _Part(self, slice(b, min(b + step_b, batch)), slice(h, min(h + step_h, heads)), gradients)

    def zeros(self) -> Gradients:
        """Sums for the gradients of all parts: of query, key, value, grad_output, decay, beta and diagonal."""
        optional = self.value, self.grad_output, self.decay, self.beta, self.diagonal
        value, grad_output, decay, beta, diagonal = (None if x is None else _zeros(x) for x in optional)
        return Gradients(_zeros(self.query), _zeros(self.key), value, grad_output, decay, beta, diagonal)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, memory_format=torch.contiguous_format)


class Gradients(NamedTuple):
    """In the dtype of sums and with all heads."""

    query: Tensor
    key: Tensor
    value: Tensor | None
    grad_output: Tensor | None
    decay: Tensor | None
    beta: Tensor | None
    diagonal: Tensor | None

    def result(self, abar: _Abar) -> tuple[Tensor | None, ...]:
        """Those of the inputs, in their dtypes."""
        inputs = abar.inputs
        by_query, by_key = (fold_heads(grad, x.shape[1]) for grad, x in zip(self[:2], (inputs.query, inputs.key), strict=True))
        by_log = None
        if self.decay is not None and abar.decay is not None and inputs.log_decay is not None:
            by_log = (self.decay * abar.decay).view(inputs.log_decay.shape)
        grads = by_query, by_key, self.value, self.grad_output, by_log, self.beta, self.diagonal
        names = ("query", "key", "value", "grad_output", "log_decay", "beta", "diagonal")
        pairs = zip(grads, (getattr(inputs, name) for name in names), strict=True)
        return tuple(None if grad is None else grad.to(x.dtype) for grad, x in pairs)


class _Tokens(NamedTuple):
    """The inputs of a sweep: query and key (..., Dk), decay (..., 1 or Dk), beta (...); or the gradients of these."""

    query: Tensor
    key: Tensor
    decay: Tensor | None
    beta: Tensor | None

    def each(self, f: Callable[[Tensor], Tensor]) -> _Tokens:
        decay, beta = (None if x is None else f(x) for x in (self.decay, self.beta))
        return _Tokens(f(self.query), f(self.key), decay, beta)


class _Part:
    """Some samples b and heads h. `matrices` (b, h, chunks, *, C + Dk): what a chunk makes of a query's state, `_sweep`."""

    def __init__(self, abar: _Abar, b: slice, h: slice, gradients: Gradients | None) -> None:
        self.abar, self.b, self.h, self.gradients, self.chunk = abar, b, h, gradients, abar.chunk
        length = abar.query.shape[2]
        self.length, self.num_chunks = length, -(-length // self.chunk)
        self.heads = b.stop - b.start, h.stop - h.start
        self.tokens = _Tokens(abar.query, abar.key, abar.decay, abar.beta).each(lambda x: self._chunks(x[b, h]))
        self.matrices = _sweep(self.tokens, self.num_chunks > 1).unflatten(0, (*self.heads, self.num_chunks))
        self.by_matrices = torch.zeros_like(self.matrices) if gradients is not None else None

    def _chunks(self, x: Tensor) -> Tensor:
        """(b, h, N, ...) as (b * h * chunks, C, ...). Zeros after the last token reach none before it."""
        missing = self.num_chunks * self.chunk - self.length
        padding = (0, 0) * (x.dim() - 3) + (0, missing)
        return F.pad(x, padding).unflatten(2, (self.num_chunks, self.chunk)).flatten(0, 2)

    def tiles(self) -> Iterator[_Tile]:
        """Slices of whole chunks of the queries, the last of which may be shorter."""
        per_chunk = self.heads[0] * self.heads[1] * self.chunk * self.length
        step = max(1, _tiles.tile_elements(self.abar.query) // per_chunk) * self.chunk
        for start in range(0, self.length, step):
            yield _Tile(self, slice(start, min(start + step, self.length)))

    def backward(self) -> None:
        """The gradients of query, key and gates from those of the matrices, some chunks at a time."""
        assert self.gradients is not None and self.by_matrices is not None
        by_matrices = self.by_matrices.flatten(0, 2)
        count, rows, columns = by_matrices.shape
        step = max(1, 32 * _tiles.TILE_ELEMENTS // (self.chunk * rows * max(1, columns - self.chunk)))
        parts = []
        for first in range(0, count, step):
            some = itemgetter(slice(first, first + step))
            parts.append(_sweep_backward(self.tokens.each(some), some(by_matrices)))
        grads = self.gradients.query, self.gradients.key, self.gradients.decay, self.gradients.beta
        for total, pieces in zip(grads, zip(*parts, strict=True), strict=True):
            if total is not None:
                whole = torch.cat(pieces).view(*self.heads, self.num_chunks * self.chunk, *total.shape[3:])
                total[self.b, self.h] = whole[:, :, : self.length]


class _Tile:
    """Some queries i of a part with their keys, which end with the queries."""

    def __init__(self, part: _Part, i: slice) -> None:
        self.part, self.i, self.stop = part, i, i.stop

    def each(self) -> Tensor:
        """relu(A * dA), or the rows of |A| divided by their sums, of each head (b, h, i, stop)."""
        a = self._map()
        grad_a = self._grad_map()
        if grad_a is not None:
            return a.mul_(grad_a).clamp_min_(0.0)
        share = a.abs_()
        return share.div_(not_zero(share.sum(-1, keepdim=True)))

    def over(self, divisors: Tensor) -> Tensor:
        """The part of Abar (b, i, stop) that these heads have, its rows over `divisors` (B, N)."""
        return self.each().sum(1).div_(divisors[self.part.b, self.i, None])

    def backward(self, by_each: Tensor) -> None:
        """Adds to the gradients what those of `each`, (b, 1, i, stop), give."""
        part, grads = self.part, self.part.gradients
        assert grads is not None
        states: list[Tensor] = []
        a = self._map(states)
        grad_a = self._grad_map()
        if grad_a is not None:
            assert grads.value is not None and grads.grad_output is not None
            value, grad_output = part.abar.value, part.abar.grad_output
            assert value is not None and grad_output is not None
            by_each = torch.where(a * grad_a > 0, by_each, 0.0)
            by_grad = by_each * a
            grads.grad_output[part.b, part.h, self.i] += by_grad @ value[part.b, part.h, : self.stop]
            grads.value[part.b, part.h, : self.stop] += by_grad.mT @ grad_output[part.b, part.h, self.i]
            by_a = by_each * grad_a
        else:
            size = a.abs()
            total = not_zero(size.sum(-1, keepdim=True))
            by_a = (by_each - (by_each * size).sum(-1, keepdim=True) / total) / total * a.sign()
        by_a = by_a.tril_(self.i.start)
        if grads.diagonal is not None:
            grads.diagonal[part.b, part.h, self.i] += by_a.diagonal(self.i.start, -2, -1)
        self._map_backward(by_a, states)

    def _map(self, states: list[Tensor] | None = None) -> Tensor:
        """A (b, h, i, stop). `states` takes the queries' states before each chunk, from the last chunk to the first."""
        part, query = self.part, self.part.abar.query
        num_rows, chunk = self.i.stop - self.i.start, part.chunk
        a = query.new_zeros(*part.heads, num_rows, self.stop)
        z = query.new_empty(*part.heads, num_rows, query.shape[3])
        for keys, those, later in self._chunks():
            matrix = part.matrices[:, :, keys.start // chunk]
            size = keys.stop - keys.start
            if states is not None:
                states.append(z[:, :, later].clone())
            if later.start < num_rows:
                swept = z[:, :, later] @ matrix[:, :, chunk:]
                a[:, :, later, keys], z[:, :, later] = swept[..., :size], swept[..., chunk:]
            if those is not None:
                a[:, :, those, keys], z[:, :, those] = matrix[:, :, :size, :size], matrix[:, :, :size, chunk:]
        if (diagonal := part.abar.diagonal) is not None:
            a.diagonal(self.i.start, -2, -1).add_(diagonal[part.b, part.h, self.i])
        return a

    def _map_backward(self, by_a: Tensor, states: list[Tensor]) -> None:
        """The gradients of the chunks' matrices."""
        part, chunk = self.part, self.part.chunk
        assert part.by_matrices is not None
        by_z = by_a.new_zeros(*by_a.shape[:3], part.abar.query.shape[3])
        for (keys, those, later), z in zip(reversed(list(self._chunks())), reversed(states), strict=True):
            matrix, by_matrix = (x[:, :, keys.start // chunk] for x in (part.matrices, part.by_matrices))
            size = keys.stop - keys.start
            if those is not None:
                by_matrix[:, :, :size, :size] += by_a[:, :, those, keys]
                by_matrix[:, :, :size, chunk:] += by_z[:, :, those]
            if later.start == by_a.shape[2]:
                continue
            by_columns = F.pad(by_a[:, :, later, keys], (0, chunk - size))
            by_swept = torch.cat([by_columns, by_z[:, :, later]], -1)
            by_matrix[:, :, chunk:] += z.mT @ by_swept
            by_z[:, :, later] = by_swept @ matrix[:, :, chunk:].mT

    def _chunks(self) -> Iterator[tuple[slice, slice | None, slice]]:
        """From the last chunk to the first: its keys, and among the tile's rows its queries, if they are here, and all later
        ones."""
        chunk, start = self.part.chunk, self.i.start
        num_rows = self.stop - start
        for first in reversed(range(0, self.stop, chunk)):
            stop = min(first + chunk, self.stop)
            those = slice(first - start, stop - start) if first >= start else None
            yield slice(first, stop), those, slice(max(0, stop - start), num_rows)

    def _grad_map(self) -> Tensor | None:
        """dA = grad_output . value (b, h, i, stop) for rule "gradient"; 0 for later tokens, whatever their values are."""
        part, value, grad_output = self.part, self.part.abar.value, self.part.abar.grad_output
        if value is None or grad_output is None:
            return None
        product = grad_output[part.b, part.h, self.i] @ value[part.b, part.h, : self.stop].mT
        return product.tril_(self.i.start)


def _sweep(tokens: _Tokens, has_later: bool, states: list[Tensor] | None = None) -> Tensor:
    """The matrices (G, C + Dk or C, C + Dk) of chunks, whose tokens are (G, C, ...).

    The first C rows are those of the chunk's queries; if it `has_later` queries the others are those of the unit vectors. The
    first C columns are those of A, the others the state after the chunk. `states` takes the states before each token, the
    last first.
    """
    query, key, decay, beta = tokens
    count, chunk, dim = query.shape
    unit = torch.eye(dim, dtype=query.dtype, device=query.device)
    rows = torch.cat([query, unit.expand(count, dim, dim)], 1) if has_later else query.clone()
    columns = query.new_zeros(count, rows.shape[1], chunk)
    for s in reversed(range(chunk)):
        z = rows[:, s:]  # that of a query before the token is unchanged
        if states is not None:
            states.append(z.clone())
        written = z @ key[:, s, :, None]
        if beta is not None:
            written = written * beta[:, s, None, None]
            z -= written * key[:, s, None]
        columns[:, s:, s] = written[..., 0]
        if decay is not None:
            z *= decay[:, s, None]
    return torch.cat([columns, rows], -1)


def _sweep_backward(tokens: _Tokens, by_matrix: Tensor) -> _Tokens:
    """The gradients of the tokens."""
    query, key, decay, beta = tokens
    chunk = query.shape[1]
    states: list[Tensor] = []
    _sweep(tokens, by_matrix.shape[1] > chunk, states)
    by_columns, by_rows = by_matrix[..., :chunk], by_matrix[..., chunk:].clone()
    by_key = torch.zeros_like(key)
    by_decay, by_beta = (None if x is None else torch.zeros_like(x) for x in (decay, beta))
    for s, z in enumerate(reversed(states)):
        k, by_z = key[:, s, None], by_rows[:, s:]  # (G, 1, Dk), (G, rows, Dk)
        dots = z @ k.mT
        written = dots if beta is None else dots * beta[:, s, None, None]
        if decay is not None and by_decay is not None:
            by_features = (by_z * (z if beta is None else z - written * k)).sum(1)
            by_decay[:, s] = by_features if decay.shape[2] > 1 else by_features.sum(-1, keepdim=True)
            by_z *= decay[:, s, None]
        by_written = by_columns[:, s:, s, None]
        if beta is not None and by_beta is not None:
            by_written = by_written - by_z @ k.mT
            by_beta[:, s] = (by_written * dots).sum((1, 2))
            by_key[:, s] -= (written * by_z).sum(1)
            by_written = by_written * beta[:, s, None, None]
        by_key[:, s] += (by_written * z).sum(1)
        by_z += by_written * k
    return _Tokens(by_rows[:, :chunk], by_key, by_decay, by_beta)


# ------------------------------------------------------------------ tangents and second derivatives


def jvp(inputs: Any) -> tuple[Tensor]:
    """The tangent of relevancy @ Abar."""
    result = torch.zeros_like(inputs.relevancy, memory_format=torch.contiguous_format)
    for samples in _samples(inputs):
        total = torch.zeros_like(samples.x["relevancy"])
        for places in samples.tiles():
            tangent = samples.tangent(_cut(samples.x, places), _cut(samples.u, places))
            total[..., : tangent.shape[2]] += tangent
        result[samples.b] = total[..., : samples.length]
    return (result,)


def second(inputs: Any) -> tuple[Tensor | None, ...]:
    """The gradients of that tangent's product with `grad`."""
    given = {name: x for name in DIFFERENTIABLE if (x := getattr(inputs, name)) is not None}
    made = {name: torch.zeros_like(x, memory_format=torch.contiguous_format) for name, x in given.items()}
    for samples in _samples(inputs):
        for name, gradient in samples.second().items():
            made[name][samples.b] = fold_heads(gradient[:, :, : samples.length], made[name].shape[1])
    return tuple([made.get(name) for name in DIFFERENTIABLE])


def _samples(inputs: Any) -> Iterator[_Samples]:
    """As many samples at a time as `tile_elements` allow, one at least."""
    batch, _, length, _ = inputs.query.shape
    if inputs.num_heads and length:
        step = max(1, _tiles.tile_elements(inputs.query) // (inputs.num_heads * CHUNK * length))
        for first in range(0, batch, step):
            yield _Samples(inputs, slice(first, min(first + step, batch)))


class _Samples:
    """Some samples b: `x`, the inputs that have gradients, and `u`, their tangents, with all heads, in the dtype of sums and
    padded to whole chunks. Both have the chunks' matrices, too: `own` and `later`, see `_matrices`."""

    def __init__(self, inputs: Any, b: slice) -> None:
        self.inputs, self.b, self.length = inputs, b, inputs.query.shape[2]
        self.chunk = min(CHUNK, self.length)
        unused = ("value", "grad_output") if inputs.rule == "attention" else ()
        names = [name for name in DIFFERENTIABLE if getattr(inputs, name) is not None and name not in unused]
        x = {name: self._whole(name, getattr(inputs, name)) for name in names}
        tangents = {name: getattr(inputs, f"{name}_tangent") for name in names}
        u = {name: torch.zeros_like(x[name]) if y is None else self._whole(name, y) for name, y in tangents.items()}
        self.tokens, self.tokens_tangent = self._by_chunks(x), self._by_chunks(u)
        matrices = _forward_mode.jvp(_matrices, self.tokens, self.tokens_tangent)
        chunks = b.stop - b.start, inputs.num_heads, -1
        self.x, self.u = (
            {**given, **{name: y.unflatten(0, chunks) for name, y in made.items()}}
            for given, made in zip((x, u), matrices, strict=True)
        )

    def _whole(self, name: str, x: Tensor) -> Tensor:
        x = x.detach()[self.b].to(compute_dtype(self.inputs.query))
        x = expand_heads(x, self.inputs.num_heads) if name in ("query", "key") else x
        padding = (0, 0) * (x.dim() - 3) + (0, -self.length % self.chunk)
        return F.pad(x, padding).contiguous()  # a dual has no overlapping memory

    def _by_chunks(self, x: Named) -> Named:
        """The inputs of `_matrices`."""
        names = ("query", "key", "log_decay", "beta", "diagonal")
        return {name: x[name].unflatten(2, (-1, self.chunk)).flatten(0, 2) for name in names if name in x}

    def tiles(self) -> Iterator[Places]:
        """A tile has the queries of a chunk, with all keys up to them."""
        every = slice(None)
        for n in range(self.x["later"].shape[2]):
            stop = (n + 1) * self.chunk
            rows = (every, every, slice(stop - self.chunk, stop))
            keys = {"value": (every, every, slice(stop)), "later": (every, every, slice(n))}
            yield {"relevancy": rows, "grad_output": rows, "own": (every, every, n), **keys}

    def tangent(self, x: Named, u: Named) -> Tensor:
        """That of a tile's part of the result."""
        tangent: Tensor = _forward_mode.jvp(self._step, x, u)[1]
        return tangent

    def _step(self, x: Named) -> Tensor:
        """relevancy @ Abar (b, T, keys) of a tile."""
        own, value, grad_output = x["own"], x.get("value"), x.get("grad_output")
        blocks, z = [own[..., : self.chunk]], own[..., self.chunk :]
        for matrix in reversed(x["later"].unbind(2)):
            swept = z @ matrix
            blocks.append(swept[..., : self.chunk])
            z = swept[..., self.chunk :]
        a = torch.cat(blocks[::-1], -1)
        return x["relevancy"] @ mean_of_heads(a, value, grad_output, self.inputs.rule, self.inputs.row_normalize)

    def second(self) -> Named:
        """The gradients of the tangent's product with `grad`: those of tiles, also by the matrices and by their tangents, and
        with these by the tokens."""
        grad = self._whole("grad", self.inputs.grad)
        by_x, by_u = ({name: torch.zeros_like(y) for name, y in each.items()} for each in (self.x, self.u))

        for n, places in enumerate(self.tiles()):
            by_tangent = grad[..., : (n + 1) * self.chunk]
            x, u = _cut(self.x, places), _cut(self.u, places)
            parts = _forward_mode.gradients_of_jvp(self._step, x, u, [None], [by_tangent])
            for total, part in zip((by_x, by_u), parts, strict=True):
                for name, gradient in part.items():
                    total[name][places[name]] += gradient
        by_matrices, by_tangents = ({name: each[name].flatten(0, 2) for name in _MATRICES} for each in (by_x, by_u))
        by_x |= {name: y.view_as(by_x[name]) for name, y in self._through_matrices(by_matrices, by_tangents).items()}
        return {name: by_x[name] for name in DIFFERENTIABLE if name in by_x}

    def _through_matrices(self, by_matrices: Named, by_tangents: Named) -> Named:
        """The gradients of the tokens, some chunks at a time."""
        count, chunk, dim = self.tokens["query"].shape
        step = max(1, 4 * _tiles.TILE_ELEMENTS // max(1, chunk * (chunk + dim) * dim))
        parts = []
        for first in range(0, count, step):
            some = dict.fromkeys((*self.tokens, *_MATRICES), (slice(first, first + step),))
            tokens, u = _cut(self.tokens, some), _cut(self.tokens_tangent, some)
            cotangents = [list(_cut(each, some).values()) for each in (by_matrices, by_tangents)]
            parts.append(_forward_mode.gradients_of_jvp(_matrices, tokens, u, *cotangents)[0])
        return {name: torch.cat([part[name] for part in parts]) for name in self.tokens}


_MATRICES = ("own", "later")
Places = dict[str, tuple[Any, ...]]  # indices of a tile's part of each tensor


def _cut(x: Named, places: Places) -> Named:
    return {name: x[name][place] for name, place in places.items() if name in x}


def _matrices(x: Named) -> Named:
    """`_sweep` as a formula that torch.func differentiates, with the diagonal: what chunks (G, C, ...) make of their `own`
    queries, (G, C, C + Dk), and of the unit vectors for all `later` ones, (G, Dk, C + Dk)."""
    query = x["query"]
    count, chunk, dim = query.shape
    unit = torch.eye(dim, dtype=query.dtype, device=query.device).expand(count, dim, dim)
    matrix = torch.cat(sweep(unit, query, x["key"], x.get("log_decay"), x.get("beta")), -1)
    if "diagonal" in x:
        matrix = matrix + F.pad(torch.diag_embed(x["diagonal"]), (0, dim, 0, dim))
    return {"own": matrix[:, :chunk], "later": matrix[:, chunk:]}
