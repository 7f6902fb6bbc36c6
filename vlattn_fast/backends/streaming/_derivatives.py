"""Tangents and second derivatives of operators in O(N + M) memory, from their formulas on tiles (`_formulas`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.backends.streaming import _formulas, _forward_mode
from vlattn_fast.backends.streaming._forward_mode import Named
from vlattn_fast.backends.streaming._tiles import tile_elements


class Formula(NamedTuple):
    """How an operator divides into tiles.

    `of_tile(inputs, b, i, varies)` returns the formula of a tile, a function of the tile's inputs that returns its outputs;
    `varies` names the fields with a tangent. `shapes(inputs)` are those of the outputs, and `sums` says of each whether tiles add
    to it; else a tile has its rows: its queries are in the third dimension, in the second of three-dimensional maps.
    """

    fields: tuple[str, ...]
    of_tile: Callable[..., Callable[[Any], tuple[Tensor, ...]]]
    shapes: Callable[[Any], Sequence[tuple[int, ...]]]
    sums: tuple[bool, ...]
    rows: int = 2  # the dimension of the queries in outputs that are not sums


def jvp(formula: Formula, inputs: Any) -> tuple[Tensor, ...]:
    """The tangents of the outputs."""
    outputs = _zeros(formula, inputs)
    for tile in _tiles(formula, inputs):
        _, tangents = _forward_mode.jvp(tile.run, tile.tensors, tile.tangents)
        for output, part, where in zip(outputs, tangents, tile.places, strict=True):
            output[where] += part
    return outputs


def second(
    formula: Formula, inputs: Any, grads: Sequence[Tensor | None], grads_tangents: Sequence[Tensor | None] | None = None
) -> tuple[Tensor | None, ...]:
    """The gradients of the fields of <grads, J(x, u)>, `grads` of each output; with tangents of `grads`, those of the gradients
    of <grads, F(x)>."""
    grads_tangents = [None] * len(grads) if grads_tangents is None else grads_tangents
    dtype, contiguous = compute_dtype(inputs.query), torch.contiguous_format
    made: Named = {n: torch.zeros_like(x, dtype=dtype, memory_format=contiguous) for n, x in _given(formula, inputs).items()}
    for tile in _tiles(formula, inputs):
        by_tangents, by_outputs = (
            [x if x is None else x[where] for x, where in zip(each, tile.places, strict=True)] for each in (grads, grads_tangents)
        )
        gradients, _ = _forward_mode.gradients_of_jvp(tile.run, tile.tensors, tile.tangents, by_outputs, by_tangents)
        for name, part in gradients.items():
            made[name][tile.where(name)] += part
    return tuple([made[name].to(getattr(inputs, name).dtype) if name in made else None for name in formula.fields])


_CUT = ("query", "key", "value", "key_mask", "key_groups", "lse", "grad_output", "row_weight")  # fields, some without gradients


class _Tile(NamedTuple):
    tensors: Named  # those that have gradients
    tangents: Named  # those that are given
    run: Callable[[Named], tuple[Tensor, ...]]  # the outputs of some of the tensors; the others are constants
    places: list[Any]  # of the outputs
    where: Callable[[str], Any]  # of a tensor
    none: Tensor  # zero


def _given(formula: Formula, inputs: Any) -> Named:
    return {name: getattr(inputs, name) for name in formula.fields if getattr(inputs, name) is not None}


def _zeros(formula: Formula, inputs: Any) -> tuple[Tensor, ...]:
    dtype = compute_dtype(inputs.query)
    return tuple([inputs.query.new_zeros(shape, dtype=dtype) for shape in formula.shapes(inputs)])


def _tiles(formula: Formula, inputs: Any) -> Iterator[_Tile]:
    """A tile has the queries of one sample, as many as `tile_elements` allow for all heads, or all of several samples."""
    query, dtype = inputs.query, compute_dtype(inputs.query)
    (batch, heads, queries, _), keys = query.shape, inputs.key.shape[2]
    per_query, most = max(1, heads * keys), tile_elements(query)
    step_i = max(1, min(queries, most // per_query))
    step_b = max(1, most // (per_query * step_i)) if step_i == queries else 1
    given = _given(formula, inputs)
    varies = {name for name in given if getattr(inputs, f"{name}_tangent") is not None}
    for b in (slice(first, min(first + step_b, batch)) for first in range(0, batch, step_b)):
        for i in (slice(first, min(first + step_i, queries)) for first in range(0, queries, step_i)):

            def cut(name: str, b: slice = b, i: slice = i) -> Tensor:
                x: Tensor = getattr(inputs, name)[_formulas.place(name.removesuffix("_tangent"), b, i)].detach()
                return x.to(dtype).contiguous() if x.is_floating_point() else x  # a dual has no overlapping memory

            tensors = [name for name in _CUT if getattr(inputs, name, None) is not None]
            masks = {"attn_mask": _formulas.mask_of(inputs, b, i), "is_causal": False}
            whole = inputs._replace(**{name: cut(name) for name in {*given, *tensors}}, **masks)
            of_tile = formula.of_tile(inputs, b, i, varies)
            yield _Tile(
                tensors={name: getattr(whole, name) for name in given},
                tangents={name: cut(f"{name}_tangent") for name in varies},
                run=lambda x, whole=whole, of_tile=of_tile: of_tile(whole._replace(**x)),  # type: ignore[misc]
                places=[b if is_sum else (b, *[slice(None)] * (formula.rows - 1), i) for is_sum in formula.sums],
                where=lambda name, b=b, i=i: _formulas.place(name, b, i),  # type: ignore[misc]
                none=query.new_zeros((), dtype=dtype),
            )
