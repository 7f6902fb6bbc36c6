"""Attention that a module writes out: scores, their softmax, and the softmax times values, where no function hands it over.

The map is followed from the softmax to its product with the values. The call is then that of a dot product whose logits are the
map's logarithms. A map that goes through anything else is none that the rules cover, and its module is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlattn_fast._ground.marks import add_mark, new_mark, read_mark
from vlattn_fast.interpret.relevancy.traced_call import Scored

_PRODUCTS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)
# Functions that leave the numbers of a map as they are, in eval mode.
_KEEPING = (
    *(functional.dropout, torch.dropout, Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16),
    *(Tensor.contiguous, Tensor.clone, Tensor.view, Tensor.reshape, torch.reshape),
)
_BY_HAND = (
    "Call scaled_dot_product_attention there; or va.relevancy_attention, which carries relevancy through layers of your own "
    "(examples/relevancy_in_your_transformer.py); or va.relevancy_step behind attention that stays as it is "
    "(examples/relevancy_behind_sdpa.py)"
)


@dataclass(frozen=True, eq=False)
class WrittenCall:
    """A product of a map with values."""

    number: int  # of the map, among those that were taken
    probabilities: Tensor  # (B, H, N, M)
    value: Tensor  # (B, H, M, Dv)
    output: Tensor  # (B, H, N, Dv)
    marks: tuple[Tensor, Tensor, Tensor]  # the module's tensors whose marks query, key and value get
    as_product: Callable[[Tensor], Tensor]  # gives the output the shape in which the module goes on with it

    def as_call(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Query, key, value and masks of an attention call that gives the product."""
        dtype, (batch, heads, _, keys) = torch.promote_types(self.probabilities.dtype, self.value.dtype), self.probabilities.shape
        probabilities = self.probabilities.to(dtype)
        query = probabilities.clamp(min=torch.finfo(dtype).tiny).log()
        key = torch.eye(keys, dtype=dtype, device=query.device).expand(batch, heads, keys, keys)
        value = self.value.to(dtype).expand(batch, heads, -1, -1)
        score = Scored("dot", None, 0.0, self.output, by_hand=True)
        masks = {"attn_mask": probabilities > 0, "key_mask": None, "is_causal": False, "scale": 1.0, "score": score}
        return query, key, value, masks


class WrittenMaps:
    """The maps (B, H, N, M) of a run that modules took themselves. `keeps_graph`: the calls have gradients by the maps."""

    def __init__(self, keeps_graph: bool) -> None:
        self._keeps_graph = keeps_graph
        self._mark = new_mark("maps")  # of a tensor: the map that it holds, as a bit
        self._maps: list[tuple[str, Tensor | None]] = []  # with the module's path; None = multiplied with its values
        self._changed: set[str] = set()  # modules that do something else with a map

    def take(self, path: str, result: Tensor, heads: int | None = None) -> int:
        """A map that the module at `path` took: (B, H, N, M), or (B * H, N, M) of a module with `heads`. Returns its number."""
        add_mark(result, self._mark, 1 << len(self._maps))
        self._maps.append((path, result if heads is None else result.view(-1, heads, *result.shape[-2:])))
        return len(self._maps) - 1

    def holds(self, value: Any) -> bool:
        """Whether this is a map that was taken, as it is."""
        return isinstance(value, Tensor) and bool(read_mark((value,), self._mark))

    def leave_out(self, path: str) -> None:
        """Notes that the module at `path` has another map, which is not followed."""
        self._changed.add(path)

    def check(
        self, model: nn.Module, by_hand: Mapping[str, set[torch.Size]], called: set[str], towers: Sequence[tuple[int, int]]
    ) -> None:
        """ValueError for a module that took a map itself, whose call was not seen, and for a model without calls.

        Args:
            by_hand: the modules that took a softmax, and the shapes of those that may be maps for sure.
            called: the modules of the towers that called attention.
            towers: (B, N) of each.
        """
        for path, shapes in by_hand.items():
            # (B, N, n, n) mixes streams of one token, as hyper-connections do.
            is_map = any(shape[:2] not in towers for shape in shapes)
            kind = type(model.get_submodule(path)).__name__
            seen = self.covers(path) and any(not path or f"{caller}.".startswith(f"{path}.") for caller in called)
            if (is_map or "ttention" in kind) and not seen:
                place = f"'{path}' ({kind})" if path else kind
                raise ValueError(
                    "model must compute attention through transformers' AttentionInterface or scaled_dot_product_attention; got "
                    f"{place}, which takes a softmax itself. {_BY_HAND}"
                )
        if not called:
            raise ValueError(
                "model must call attention through transformers' AttentionInterface or scaled_dot_product_attention; got a "
                f"forward pass of {type(model).__name__} without a call. {_BY_HAND}"
            )

    def covers(self, path: str) -> bool:
        """Whether the module at `path` multiplied each map with values, once and unchanged, or none."""
        of_module = [stored for where, stored in self._maps if where == path]
        multiplied = [stored is None for stored in of_module]
        return not any(multiplied) or (all(multiplied) and path not in self._changed)

    def product(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> WrittenCall | None:
        """The call that a function of torch completes, if it multiplies a map with values."""
        equation, args = _einsum(func, args)
        bits = read_mark((*args, *kwargs.values()), self._mark)
        if not bits or not isinstance(result, (Tensor, tuple, list)) or isinstance(result, torch.Size):
            return None
        number = bits.bit_length() - 1
        path, stored = self._maps[number]
        single = bits == 1 << number and bool(args) and bool(read_mark(args[:1], self._mark))
        if single and func in _KEEPING and isinstance(result, Tensor) and stored is not None:
            if result.numel() == stored.numel() and result.shape[-2:] == stored.shape[-2:]:
                add_mark(result, self._mark, bits)
                return None
        if single and stored is not None and isinstance(result, Tensor) and _alike(result, stored):
            self._maps[number] = path, result.view(stored.shape)
            add_mark(result, self._mark, bits)
            return None
        parts = None
        if single and stored is not None and len(args) > 1 and not read_mark(args[1:], self._mark):
            parts = _by_equation(equation, args, result) if equation else _by_matmul(func, stored, args[1], result)
        if parts is None or stored is None:
            self._changed.add(path)
            return None
        value, output, as_product = parts
        self._maps[number] = path, None
        stored = stored if self._keeps_graph else stored.detach()
        return WrittenCall(number, stored, value, output, (args[0], args[1], args[1]), as_product)


Parts = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]  # values (B, H, M, D), output (B, H, N, D), and `as_product`


def _by_matmul(func: Any, stored: Tensor, value: Tensor, result: Tensor) -> Parts | None:
    """The parts of a product of a map with values (B, H, M, D) or (B * H, M, D)."""
    if func not in _PRODUCTS or value.ndim not in (3, 4):
        return None
    batch, heads, _, keys = stored.shape
    value = value.reshape(batch, heads, keys, -1) if value.ndim == 3 else value
    return value, result.reshape(batch, heads, -1, value.shape[-1]), lambda output: output.reshape(result.shape)


def _einsum(func: Any, args: Sequence[Any]) -> tuple[str, Sequence[Any]]:
    """The equation of an einsum over two tensors and these, of which a map comes first; "" and `args` of another function."""
    if func is not torch.einsum or not isinstance(args[0], str):
        return "", args
    operands = tuple(args[1]) if len(args) == 2 and isinstance(args[1], (tuple, list)) else tuple(args[1:])
    return args[0].replace(" ", ""), operands


def _by_equation(equation: str, operands: Sequence[Tensor], result: Tensor) -> Parts | None:
    """The parts of an einsum such as "bhnm,bmhd->bnhd"."""
    factors, _, product = equation.partition("->")
    of_map, _, of_value = factors.partition(",")
    if len(operands) != 2 or len(of_map) != 4 or len(set(of_value) - set(of_map)) != 1:
        return None
    (feature,) = set(of_value) - set(of_map)
    order, values = of_map[:3] + feature, of_map[:2] + of_map[3] + feature
    if sorted(of_value) != sorted(values) or sorted(product) != sorted(order):
        return None
    value = operands[1].permute([of_value.index(label) for label in values])
    output = result.permute([product.index(label) for label in order])
    return value, output, lambda output: output.permute([order.index(label) for label in product])


def _alike(result: Tensor, stored: Tensor) -> bool:
    """Whether a function left the numbers of a map as they are, as a mask does that the map has already; or made zeros of the
    rows that see no key, which are NaN."""
    if result.numel() != stored.numel() or result.shape[-2:] != stored.shape[-2:] or result.dtype != stored.dtype:
        return False
    return torch.equal(result.detach().view(stored.shape), stored.detach().nan_to_num(0.0))
