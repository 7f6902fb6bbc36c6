"""Whose tokens the keys of an attention call are, if it joins several: those of another tower, a learned key, zeros, a prefix.

Tensors remember how torch.cat and pad joined them, of parts that came from the model's inputs and of parts that did not. At an
attention call the first kind are the tokens. A part that no function of the run made, and that is not one of the model's tensors,
came from elsewhere, such as the keys of a cache. Tokens that came through other attention calls are another tower's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from vlattn_fast._ground.checks import is_wrapped
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.traced_call import TracedCall
from vlattn_fast.interpret.relevancy.tracking.tensor_records import TensorRecords

_CAT = (torch.cat, torch.concat, torch.concatenate)
JOINING = {*_CAT, functional.pad}
# Functions that may give the tokens another order.
_MOVES = {"flip", "fliplr", "roll", "index_select", "gather", "take_along_dim", "sort", "argsort", "where"}


@dataclass(frozen=True)
class Part:
    """Some of the positions of a tensor that was joined."""

    size: int
    origin: str  # "tokens"; "model" = learned or constant; "elsewhere"
    within: tuple[Part, ...] = ()  # its own parts, if it was joined, too
    calls: int = 0  # the attention calls that it came through, as bits
    entered: int = 0  # the states that entered a layer and that it came through, as bits
    keys_of: int = 0  # the towers whose self-attention took it for its keys, as bits


@dataclass(frozen=True)
class Join:
    """How a tensor was joined along dimension `dim`, of this size."""

    dim: int
    size: int
    parts: tuple[Part, ...]


class JoinedKeys:
    """The joins of a run, in its `records`. `strict`: an error for keys from elsewhere, which may be tokens that ran earlier."""

    def __init__(self, records: TensorRecords, strict: bool) -> None:
        self._records, self._strict = records, strict

    def follow(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any, source: Tensor | None) -> None:
        """After a function of torch: its results remember how they were joined. `source`: the argument that was joined."""
        join = None
        if func in _CAT:
            join = self._cat(result, *args, **kwargs)
        elif func is functional.pad:
            join = self._pad(*args, **kwargs)
        if join is not None:
            self._records.at(result).join = join
        elif source is not None:
            self._hand_on(func, args, source, result)

    def copy(self, tensor: Tensor, source: Tensor) -> None:
        """`tensor` has the numbers of `source`, in another shape."""
        join: Join | None = self._records.of(source).join
        if join is not None and (dim := _place(source, join, tensor)) is not None:
            self._records.at(tensor).join = join if dim == join.dim else replace(join, dim=dim)

    def with_columns(self, call: TracedCall, sizes: Sequence[int]) -> TracedCall:
        """The call with the columns of its tokens, one of `sizes` many, if it has further keys that differ from them."""
        known = None if call.tokens in sizes else self._columns(call.key, call.value, sizes)
        if known is None or (known[1] and not self._strict):
            return call
        columns, strange = known
        if strange:
            raise ValueError(
                f"inputs must give the whole sequence in one forward pass; got {call.tokens - len(columns)} keys in attention "
                f"'{call.path}' from outside of it, such as from a cache. A learned prefix must be a parameter of the model"
            )
        return replace(call, columns=torch.tensor(columns, device=call.key.device))

    def _columns(self, key: Tensor, value: Tensor, sizes: Sequence[int]) -> tuple[list[int], bool] | None:
        """The columns of the tokens among the keys (B, H, M, D), and whether others are from elsewhere; None if the tokens are
        none of `sizes` many."""
        key_levels, value_levels = (self._levels(tensor, key.shape[2]) for tensor in (key, value))
        for parts, others in zip(key_levels, value_levels, strict=False):
            origins = [part.origin for part in parts for _ in range(part.size)]
            if origins != [part.origin for part in others for _ in range(part.size)]:
                return None
            columns = [place for place, origin in enumerate(origins) if origin == "tokens"]
            if len(columns) in sizes:
                return columns, "elsewhere" in origins
        return None

    def parts_of_towers(self, key: Tensor, value: Tensor) -> Iterator[list[tuple[Part, Tensor]]]:
        """The parts of the keys (B, H, M, D), each with its columns, if all are tokens; then the parts of those."""
        for parts, others in zip(*(self._levels(tensor, key.shape[2]) for tensor in (key, value)), strict=False):
            if [(part.size, part.origin) for part in parts] == [(part.size, "tokens") for part in others]:
                columns = torch.arange(key.shape[2], device=key.device).split([part.size for part in parts])
                yield list(zip(parts, columns, strict=True))

    def _levels(self, tensor: Tensor, size: int) -> Iterator[tuple[Part, ...]]:
        """The parts of keys or values, then what those were joined of, and so on."""
        join: Join | None = self._records.of(tensor).join
        parts = join.parts if join is not None and join.dim == 2 and join.size == size else ()
        while parts:
            yield parts
            deeper = tuple(inner for part in parts for inner in (part.within or (part,)))
            parts = () if deeper == parts else deeper

    def _cat(self, result: Tensor, tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Join | None:
        dim = kwargs.get("axis", dim) % max(result.ndim, 1)
        joined = [tensor for tensor in tensors if tensor.ndim == result.ndim and tensor.shape[dim]]
        return _mixed(dim, [self._part(tensor, dim) for tensor in joined])

    def _pad(self, input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Join | None:
        widths = {input.ndim - 1 - place // 2: tuple(pad[place : place + 2]) for place in range(0, len(pad), 2)}
        padded = [(dim, width) for dim, width in widths.items() if any(width)]
        if len(padded) != 1 or min(padded[0][1]) < 0:
            return None
        dim, (before, after) = padded[0]
        edge = Part(0, "model") if mode == "constant" else self._part(input, dim)
        parts = [replace(edge, size=before, within=()), self._part(input, dim), replace(edge, size=after, within=())]
        return _mixed(dim, [part for part in parts if part.size])

    def _part(self, tensor: Tensor, dim: int) -> Part:
        record = self._records.of(tensor)
        join: Join | None = record.join
        within = join.parts if join is not None and join.dim == dim else ()
        return Part(tensor.shape[dim], self._records.where_from(tensor), within, record.calls, record.entered, record.keys)

    def _hand_on(self, func: Any, args: Sequence[Any], source: Tensor, result: Any) -> None:
        """Hands the join of an argument on to the result of a function."""
        name = getattr(func, "__name__", "")
        if name in _MOVES:
            return
        if func is torch.einsum and isinstance(result, Tensor):
            join = self._records.of(source).join
            if (place := _by_label(args, source, join.dim)) is not None:
                self._records.at(result).join = replace(join, dim=place)
            return
        for tensor in _tensors((result,)):
            if tensor is not source and (name != "__getitem__" or _is_view(source, tensor)):
                self.copy(tensor, source)


class Joint(NamedTuple):
    """Keys of one call that are tokens of a tower."""

    tower: TowerTrace | None  # None = that of the queries
    columns: Tensor
    calls: int  # the attention calls that they came through, as bits


def joint_keys(
    joins: JoinedKeys,
    call: TracedCall,
    owner: TowerTrace | None,
    towers: Sequence[TowerTrace],
    reached: Callable[[int], list[TowerTrace]],
) -> list[Joint]:
    """The keys of a call that attends to the tokens of its queries and of other towers at once, those of the queries first; none
    if its keys are not joined from such parts. `owner`: the tower that the queries continue; None = they begin one."""
    for parts in joins.parts_of_towers(call.key, call.value):
        joint = []
        for part, columns in parts:
            with_keys = [tower for number, tower in enumerate(towers) if part.keys_of >> number & 1]
            with_states = [tower for tower in towers if tower.entered & part.entered] if owner is None else []
            tower = next(iter(with_keys or reached(part.calls) or with_states), None)
            joint.append(Joint(None if tower is owner else tower, columns, part.calls))
        joint.sort(key=lambda keys: keys.tower is not None)
        sizes = [call.query.shape[2] if keys.tower is None else keys.tower.size for keys in joint]
        if [keys.tower for keys in joint].count(None) == 1 < len(joint) and sizes == [len(keys.columns) for keys in joint]:
            return joint
    return []


def check_cross(call: TracedCall, owner: TowerTrace | None, reached: Sequence[TowerTrace], knows: bool) -> None:
    """ValueError for cross-attention to keys that are not another tower's.

    Args:
        owner: the tower that the queries continue; None = they begin one.
        reached: those that the keys came through, the last first.
        knows: there are such calls, or states that both came through.
    """
    as_one = call.calls == call.key_calls  # the keys came through the same calls as the queries
    path, queries, keys = call.path, call.query.shape[2], call.tokens
    if owner is None and as_one and reached and keys == reached[0].size:
        raise ValueError(f"model must not pool tokens before attention; got {queries} queries for {keys} tokens in '{path}'")
    if knows and (as_one or reached[:1] == [owner]):
        raise ValueError(
            f"model must have one key for each token of a tower; got {queries} queries and {keys} keys in '{path}', made from "
            "the same tokens, such as with a strided convolution. Keys that are not tokens are supported if torch.cat or pad "
            "joins them to those of the tokens"
        )
    if any(keys == queries + source.size for source in reached if source is not owner):
        kinds = f"{queries} tokens of its own and {keys - queries} of another tower"
        raise ValueError(f"model must attend to one tower in a call; got '{path}', whose {keys} keys are {kinds}")


def _mixed(dim: int, parts: list[Part]) -> Join | None:
    """The join of parts, of which some are tokens and others are not, or another tower's; else None."""
    some = {(part.origin == "tokens", part.calls, part.entered, part.keys_of) for part in parts}
    return Join(dim, sum(part.size for part in parts), tuple(parts)) if len(some) > 1 else None


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _by_label(args: Sequence[Any], source: Tensor, dim: int) -> int | None:
    """The dimension of an einsum's result that has the label of dimension `dim` of `source`; None without one."""
    if not isinstance(args[0], str) or "->" not in args[0] or "." in args[0]:
        return None
    factors, _, product = args[0].replace(" ", "").partition("->")
    for labels, tensor in zip(factors.split(","), _tensors(args[1:]), strict=True):
        if tensor is source:
            return product.find(labels[dim]) if labels[dim] in product else None
    return None


def _is_view(source: Tensor, tensor: Tensor) -> bool:
    return _memory(tensor) == _memory(source)


def _memory(x: Tensor) -> int:
    """Where the storage of a tensor begins. Transforms of torch.func wrap the tensor that has it."""
    while is_wrapped(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.untyped_storage().data_ptr()


def _place(source: Tensor, join: Join, result: Tensor) -> int | None:
    """The dimension of `result` in which the joined dimension of `source` lies; None if that cannot be told. A view keeps its
    stride, and a reshape the number of elements before it. Else the index is the same, from the left or the right."""
    dim, size = join.dim, join.size
    if result.shape == source.shape and result.stride() == source.stride():
        return dim
    if result.shape == source.shape and not _is_view(source, result):
        return dim
    if _is_view(source, result):
        dims = {i for i in range(result.ndim) if result.stride(i) == source.stride(dim)}
    elif result.numel() == source.numel():
        before = prod(source.shape[:dim])
        dims = {i for i in range(result.ndim) if prod(result.shape[:i]) == before}
    else:
        dims = {dim, dim + result.ndim - source.ndim}
    dims = {i for i in dims if 0 <= i < result.ndim and result.shape[i] == size}
    return dims.pop() if len(dims) == 1 else None
