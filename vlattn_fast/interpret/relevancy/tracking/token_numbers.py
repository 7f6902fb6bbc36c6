"""The numbers of tokens, and what functions that move positions take to run over them.

Tokens are numbered where they first appear. The numbers of a tensor are an int64 tensor of as many dimensions, of size 1 if
all positions along a dimension are of one token, such as along features. Numbers below zero belong to no token.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

NONE, MERGED, ANY = -1, -2, -3  # of constants, such as padding; of positions that hold several tokens at once; not known


# Functions by their names in torch, without the underscores of those that work in place.
VIEWS = {*"view reshape flatten unflatten ravel view_as reshape_as squeeze unsqueeze".split()}  # positions keep their order
MOVES = {
    *"transpose permute movedim moveaxis swapaxes swapdims t adjoint T mT H mH repeat".split(),
    *"repeat_interleave tile flip fliplr flipud roll rot90 getitem index_select gather take_along_dim narrow select".split(),
    *"split split_with_sizes tensor_split unsafe_chunk unsafe_split unbind unfold masked_select diagonal hsplit vsplit".split(),
    *"pixel_shuffle pixel_unshuffle channel_shuffle chunk".split(),
}
BROADCASTS = {*"expand expand_as broadcast_to".split()}
CONCATENATIONS = {"cat", "concat", "concatenate"}  # along a dimension that the call names
JOINS = CONCATENATIONS | {"stack", "hstack", "vstack", "dstack"}
WRITES = {*"setitem index_copy scatter index_put masked_scatter slice_scatter select_scatter copy where".split()}
SUMS = {*"index_add scatter_add scatter_reduce index_reduce".split()}  # of what goes to one position
LAYOUTS = VIEWS | MOVES | BROADCASTS
PRODUCTS = {*"matmul rmatmul bmm mm baddbmm addmm addbmm".split()}
MADE = {*"zeros ones empty full rand randn arange linspace eye tensor as_tensor".split()}  # out of nothing
LOST = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, StopIteration)


@dataclass(eq=False)
class Numbers:
    """The numbers of a tensor's positions; `why` names what merged tokens, if something did."""

    shape: tuple[int, ...]
    begin: int = 0  # of the numbers of new tokens, which are made when they are first needed
    why: str = ""
    _ids: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        if self._ids is None:
            self._ids = torch.arange(self.begin, self.begin + prod(self.shape)).view(self.shape)
        return self._ids

    def over(self, shape: Sequence[int]) -> Tensor:
        """The number of each position of a tensor of this shape."""
        return self.ids.expand(tuple(shape))


@dataclass
class TorchCall:
    """A call of a function of torch, whose result gets numbers."""

    name: str
    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    result: Any
    path: str
    numbered: list[tuple[Tensor, Numbers]] = field(default_factory=list)
    parts: Numbers | None = None  # of what its result joins, if that has new tokens


def name_of(func: Any) -> str:
    name = getattr(func, "__name__", "")
    if name == "__get__":  # of a property
        name = getattr(func.__self__, "__name__", "")
    name = name.strip("_")
    return "zeros" if name.endswith("_like") or name.startswith("new_") else name


def fits(shape: Sequence[int], numbers: Sequence[int], result: Sequence[int]) -> bool:
    """Whether a result has the positions of the tokens of a tensor of this shape, each once."""
    ahead = len(result) - len(shape)
    if ahead < 0 or (ahead and max(result[:ahead]) > 1):
        return False
    if not ahead and numbers[-1] == 1 and shape[:-1] == result[:-1]:
        return True
    last = len(shape) - 1
    for dim, (size, number, of) in enumerate(zip(shape, numbers, result[ahead:], strict=True)):
        if (number > 1 and size != of) or (dim < last and size <= 1 and of != 1):
            return False
    return True


def are_equal(one: Numbers, second: Numbers) -> bool:
    return one is second or (one.shape == second.shape and torch.equal(one.ids, second.ids))


def narrowed(ids: Tensor) -> Tensor:
    """`ids` of size 1 along each dimension whose positions are of one token."""
    for dim, size in enumerate(ids.shape):
        if size > 1 and (ids.stride(dim) == 0 or bool((ids == ids.narrow(dim, 0, 1)).all())):
            ids = ids.narrow(dim, 0, 1)
    return ids.contiguous()


def key_of(*values: Any) -> Hashable:
    """`values` as a key; None if they hold tensors, or what cannot be one."""
    key, ahead = list[Any](), list[Any](values)
    for value in ahead:
        if isinstance(value, (tuple, list)):
            key.append(("several", len(value)))
            ahead += value
        elif isinstance(value, slice):
            key.append(("slice",))
            ahead += (value.start, value.stop, value.step)
        elif value is None or value is Ellipsis or isinstance(value, (int, str, float)):
            key.append(value)
        else:
            return None
    return tuple(key)


def on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    return type(value)(map(on_cpu, value)) if type(value) in (tuple, list) else value


def is_flat(index: Tensor, ndim: int) -> bool:
    """Whether an index is the same for all features."""
    return index.ndim == 1 or (index.ndim == ndim and (index.stride(-1) == 0 or index.shape[-1] == 1))


def leaves_last(index: Any, ndim: int) -> bool:
    """Whether an index of a tensor leaves its last dimension as it is."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(part is Ellipsis for part in parts):
        return False
    used = sum(part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else 1 for part in parts if part is not None)
    return used < ndim


def thinned(ids: Tensor, rest: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Sequence[Any], Mapping[str, Any]]:
    """The arguments of a gather for only the first feature, if the index is the same for all."""
    index = next(x for x in (*rest, *kwargs.values()) if isinstance(x, Tensor))
    dim = next((x for x in (*rest, kwargs.get("dim")) if isinstance(x, int)), -1)
    if not is_flat(index, ids.ndim) or dim % ids.ndim == ids.ndim - 1:
        return ids, rest, kwargs
    cut = lambda x: x[..., :1] if isinstance(x, Tensor) else x  # noqa: E731
    return ids[..., :1], [cut(x) for x in rest], {name: cut(x) for name, x in kwargs.items()}


def summed(ids: Tensor, dim: int, index: Tensor, values: Tensor) -> Tensor:
    """The numbers of a tensor with `ids` to which a tensor with the numbers `values` is added along `dim`, at an index of one
    dimension or at one of a scatter."""
    by_index = index.ndim == 1 and ids.ndim > 1
    put, add = (torch.index_copy, torch.index_add) if by_index else (torch.scatter, torch.scatter_add)
    added = put(torch.full_like(ids, NONE), dim, index, values.contiguous())  # if several come to one position: one of them
    there = added.index_select(dim, index) if by_index else added.gather(dim, index)
    added = torch.where(add(torch.zeros_like(ids), dim, index, (there != values).long()) > 0, MERGED, added)
    return torch.where((added == NONE) | (added == ids), ids, torch.where(ids < 0, added, MERGED))
