"""Operators on packed documents: sequences behind one another in one row, whose tokens attend to their own document only.

Documents of equal lengths are one batch, on which the operator runs as on any other. So every backend and every derivative has
packing, pairs of two documents cost nothing, and no mask is made.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_tensor, describe, readable
from vlattn_fast.ops._dimensions import DIMENSIONS

Ids = Tensor | tuple[Tensor, Tensor] | None


class Run(NamedTuple):
    """Documents of equal lengths behind one another: how many, in which row, and where their queries and keys begin."""

    documents: int
    row: int
    starts: dict[str, int]
    lengths: dict[str, int]

    def tokens(self, side: str) -> int:
        return self.documents * self.lengths[side]


def over_documents(call: Callable[..., Any], x: dict[str, Any], outputs: Sequence[str]) -> Any:
    """The result of a public call on packed documents.

    Args:
        x: the arguments of the call by name, `locals()` at the start of its body.
        outputs: the dimensions of each result, as in DIMENSIONS. One without tokens has an entry for each document.
    """
    if torch.compiler.is_compiling():  # which lengths from tensors would stop
        return torch.compiler.disable(over_documents)(call, x, outputs)
    ids, ends = x["document_ids"], x["cu_seqlens"]
    x = x | {"document_ids": None, "cu_seqlens": None}
    tensors = {name: x[name] for name in x if name in DIMENSIONS and isinstance(x[name], Tensor)}
    offsets: dict[str, Tensor] = {}
    if any([t.is_nested for t in tensors.values()]):
        if ids is not None or ends is not None:
            raise ValueError("document_ids and cu_seqlens must be None if tensors are nested, which have both; got one")
        tensors = {name: _opened(name, t, DIMENSIONS[name], offsets) for name, t in tensors.items()}
        ends = offsets["q"], offsets.get("k", offsets["q"])
    runs = _runs(_documents(ids, ends, {side: _size(tensors, side) for side in "bqk"}))
    if not runs:
        return call(**x)
    cut = {name: pieces for name, t in tensors.items() if (pieces := _pieces(name, t, DIMENSIONS[name], runs))}
    results: dict[int, Sequence[Any]] = {}
    for group in _of_equal_lengths(runs):
        result = call(**x | {name: _cat([pieces[i] for i in group]) for name, pieces in cut.items()})
        parts = (result,) if isinstance(result, Tensor) else result
        split = [[None] * len(group) if part is None else part.split([runs[i].documents for i in group]) for part in parts]
        results |= dict(zip(group, zip(*split, strict=True), strict=True))
    columns = zip(outputs, zip(*[results[i] for i in range(len(runs))], strict=True), strict=False)
    whole = [None if column[0] is None else _joined(column, dims, runs, offsets) for dims, column in columns]
    if isinstance(result, Tensor):
        return whole[0]
    return type(result)(*whole) if hasattr(result, "_fields") else tuple(whole)


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _size(tensors: dict[str, Tensor], side: str) -> int:
    """The number of samples, queries or keys, of which a recurrence has as many as queries."""
    sizes = [t.shape[DIMENSIONS[name].index(side)] for name, t in tensors.items() if t.ndim == 4 and side in DIMENSIONS[name]]
    return sizes[0] if sizes else _size(tensors, "q")


def _opened(name: str, t: Tensor, dims: str, offsets: dict[str, Tensor]) -> Tensor:
    """The values of a nested tensor, as one row."""
    side = next((letter for letter in dims.partition(":")[0] if letter in "qk"), "")
    if not t.is_nested:
        if not side and t.ndim < len(dims):
            return t
        raise TypeError(f"{name} must be a nested tensor, like query, or have neither tokens nor a batch; got {describe(t)}")
    if t.layout is not torch.jagged or t.lengths() is not None or dims.find(side) != t._ragged_idx:  # type: ignore[attr-defined]
        raise TypeError(f"{name} must be a jagged tensor without gaps, in which the number of tokens varies; got {describe(t)}")
    offsets.setdefault(side, t.offsets())  # type: ignore[attr-defined]
    return t.values()[None]


def _documents(ids: Ids, ends: Ids, sizes: dict[str, int]) -> list[list[tuple[int, int]]]:
    """The numbers of queries and of keys of the documents in each row."""
    if ids is not None and ends is not None:
        raise ValueError("document_ids or cu_seqlens must be None, since both say the same; got two")
    name, given, read = ("document_ids", ids, _lengths) if ends is None else ("cu_seqlens", ends, _ends)
    if isinstance(given, Tensor) and sizes["q"] != sizes["k"]:
        raise ValueError(f"{name} must be a pair, of {sizes['q']} queries and of {sizes['k']} keys; got {describe(given)}")
    pair = (given, given) if isinstance(given, Tensor) else given
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name} must be a tensor, or a pair of one for queries and one for keys; got {describe(given)}")
    queries, keys = (read(name, each, sizes["b"], sizes[side]) for each, side in zip(pair, "qk", strict=True))
    rows = []
    for of_queries, of_keys in zip(queries, keys, strict=True):
        if ends is not None and len(of_queries) != len(of_keys):
            found = f"{len(of_keys)} for {len(of_queries)}"
            raise ValueError(f"cu_seqlens must have as many documents of keys as of queries; got {found}")
        documents = sorted({*of_queries, *of_keys}) or [0]
        rows.append([(of_queries.get(document, 0), of_keys.get(document, 0)) for document in documents])
    return rows


def _values(name: str, x: Any) -> list[Any]:
    check_tensor(name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int64 or int32; got {describe(x)}")
    if not readable(x):
        raise ValueError(f"{name} must have values to read, which traces and vmap have not; got {describe(x)}")
    return list(x.tolist())


def _ends(name: str, x: Any, batch: int, tokens: int) -> list[dict[int, int]]:
    """The length of each document, for each sample."""
    places = _values(name, x)
    if x.ndim != 1 or batch != 1 or not places or (places[0], places[-1]) != (0, tokens) or places != sorted(places):
        found = f"{describe(x) if x.ndim != 1 else places} for a batch of {batch}"
        raise ValueError(f"{name} must be (documents + 1), rise from 0 to {tokens}, and belong to a batch of 1; got {found}")
    return [{i: end - start for i, (start, end) in enumerate(zip(places, places[1:], strict=False))}]


def _lengths(name: str, x: Any, batch: int, tokens: int) -> list[dict[int, int]]:
    rows = _values(name, x)
    if x.shape not in ((tokens,), (batch, tokens)):
        raise ValueError(f"{name} must be ({tokens}) or ({batch}, {tokens}); got {describe(x)}")
    rows = rows if x.ndim == 2 else [rows] * batch
    if any([row != sorted(row) for row in rows]):
        raise ValueError(f"{name} must not fall from one token to the next, since a document is in one piece; got {describe(x)}")
    return [Counter(row) for row in rows]


def _runs(rows: Sequence[Sequence[tuple[int, int]]]) -> list[Run]:
    runs = []
    for row, documents in enumerate(rows):
        starts = {"q": 0, "k": 0}
        for lengths, alike in itertools.groupby(documents):
            runs.append(Run(len([*alike]), row, starts, dict(zip("qk", lengths, strict=True))))
            starts = {side: starts[side] + runs[-1].tokens(side) for side in "qk"}
    return runs


def _of_equal_lengths(runs: Sequence[Run]) -> list[list[int]]:
    groups: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, run in enumerate(runs):
        groups[tuple(run.lengths.values())].append(i)
    return list(groups.values())


def _pieces(name: str, t: Tensor, dims: str, runs: Sequence[Run]) -> list[Tensor]:
    """A batch of documents of each run; none if all have the same."""
    dims, _, places = dims.partition(":")
    sides = [side for side in "qk" if side in dims]
    if t.ndim < len(dims):
        if not sides:
            return []
        t = t[(None,) * (len(dims) - t.ndim)]
    if len(t) not in (1, runs[-1].row + 1):
        raise ValueError(f"{name} must have a batch of {runs[-1].row + 1}; got {describe(t)}")
    rows = t.unbind(0) if len(t) > 1 else [t.squeeze(0)] * (runs[-1].row + 1)  # a selected row's gradient would be a copy
    mine = itertools.groupby(runs, lambda run: run.row)
    pieces = [piece for row, of_row in mine for piece in _of_row(name, rows[row], dims[1:], [*of_row])]
    if not places:
        return pieces
    own = [piece - _starts(run, piece.ndim, piece.device) for piece, run in zip(pieces, runs, strict=True)]
    return [torch.where((x >= 0) & (x < run.lengths["k"]), x, -1) for x, run in zip(own, runs, strict=True)]


def _of_row(name: str, t: Tensor, dims: str, runs: Sequence[Run]) -> list[Tensor]:
    split = []  # the dimensions that are divided
    for side in [side for side in "qk" if side in dims]:
        tokens = sum([run.tokens(side) for run in runs])
        if t.shape[dims.index(side)] not in (1, tokens):
            raise ValueError(f"{name} must have {tokens} {'queries' if side == 'q' else 'keys'}; got {t.shape[dims.index(side)]}")
        if t.shape[dims.index(side)] == tokens:
            split.append((side, dims.index(side)))
    if not split:
        return [t.expand(run.documents, *t.shape) for run in runs]
    side, dim = split[0]
    parts = t.split([run.tokens(side) for run in runs], dim) if len(runs) > 1 else (t,)
    parts = tuple(
        part.unflatten(dim, (run.documents, run.lengths[side])).movedim(dim, 0) for part, run in zip(parts, runs, strict=True)
    )
    if len(split) == 1:
        return [*parts]
    side, dim = split[1]  # only of masks, which have no derivative
    parts = tuple(part.narrow(dim + 1, run.starts[side], run.tokens(side)) for part, run in zip(parts, runs, strict=True))
    parts = tuple(part.unflatten(dim + 1, (run.documents, run.lengths[side])) for part, run in zip(parts, runs, strict=True))
    return [part.diagonal(dim1=0, dim2=dim + 1).movedim(-1, 0) for part in parts]


def _starts(run: Run, ndim: int, device: torch.device) -> Tensor:
    """Where the keys of each document begin."""
    starts = run.starts["k"] + run.lengths["k"] * torch.arange(run.documents, device=device)
    return starts.view(-1, *[1] * (ndim - 1))


def _joined(column: Sequence[Tensor], dims: str, runs: Sequence[Run], offsets: dict[str, Tensor]) -> Tensor:
    """A result of all documents, from those of each run, which may lack heads."""
    dims, _, places = dims.partition(":")
    dims = "b" + dims[len(dims) + 1 - column[0].ndim :]
    dim = next((i for i, letter in enumerate(dims) if letter in "qk"), 0)
    if dim == 0:
        return _cat(column)
    if places:
        column = [torch.where(x < 0, x, x + _starts(run, x.ndim, x.device)) for x, run in zip(column, runs, strict=True)]
    rows: defaultdict[int, list[Tensor]] = defaultdict(list)
    for run, part in zip(runs, column, strict=True):
        rows[run.row].append(part.movedim(0, dim - 1).flatten(dim - 1, dim))
    whole = [_cat(parts, dim - 1) for parts in rows.values()]
    if not offsets:
        return whole[0][None] if len(whole) == 1 else torch.stack(whole)
    nested = torch.nested.nested_tensor_from_jagged(whole[0].movedim(dim - 1, 0), offsets[dims[dim]])
    return nested.transpose(1, dim) if dim > 1 else nested
