"""Tangents and second derivatives of operators in O(N + M) memory, from their formulas on tiles (`_formulas`) by torch.func."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import _C, Tensor
from torch._functorch import eager_transforms

from vlattn_fast._ground.checks import has_forward_mode
from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.backends.streaming import _formulas
from vlattn_fast.backends.streaming._tiles import tile_elements

Named = dict[str, Tensor]


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


@contextmanager
def derivable() -> Iterator[None]:
    """A context in which torch.func works. The kernels of operators run below autograd, where derivatives would be zeros. Within
    forward_ad.dual_level torch.func.jvp would open a level of its own, which torch does not support, unless it is in another."""
    excluded = _C._dispatch_tls_local_exclude_set() - _ABOVE
    outer = eager_transforms.jvp_increment_nesting() if has_forward_mode() and not eager_transforms.JVP_NESTING else nullcontext()
    with outer, _C._ForceDispatchKeyGuard(_C._dispatch_tls_local_include_set(), excluded):
        yield


def _keys(*names: str) -> Any:
    first, *rest = [_C.DispatchKeySet(getattr(_C.DispatchKey, name)) for name in names]
    for each in rest:
        first = first | each
    return first


_ABOVE = _keys("AutogradCPU", "AutogradCUDA", "AutogradMeta", "AutogradXPU", "AutogradOther", "ADInplaceOrView") - _keys(
    "CPU", "CUDA", "Meta", "XPU"
)
# Below a dispatch mode these are excluded, too: kernels would get torch.func's wrapped tensors, and zero tangents without memory
_ABOVE = _ABOVE | _keys("FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode", "FuncTorchGradWrapper", "ZeroTensor")


def jvp(formula: Formula, inputs: Any) -> tuple[Tensor, ...]:
    """The tangents of the outputs."""
    outputs = _zeros(formula, inputs)
    for tile in _tiles(formula, inputs):
        x = {name: tile.tensors[name] for name in tile.tangents}
        with derivable():
            _, tangents, *_ = torch.func.jvp(tile.run, (x,), (tile.tangents,))
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
        places = [*tile.places, *tile.places]
        cotangents = [x if x is None else x[where] for x, where in zip([*grads, *grads_tangents], places, strict=True)]

        def product(x: Named, tile: Any = tile, cotangents: Any = cotangents) -> Tensor:
            varied = {name: x[name] for name in tile.tangents}
            outputs, tangents, *_ = torch.func.jvp(lambda y: tile.run({**x, **y}), (varied,), (tile.tangents,))
            pairs = zip(cotangents, [*tangents, *outputs], strict=True)
            return sum([(grad.to(y.dtype) * y).sum() for grad, y in pairs if grad is not None], tile.none)

        with derivable():
            gradients = torch.func.grad(product)(tile.tensors)
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
