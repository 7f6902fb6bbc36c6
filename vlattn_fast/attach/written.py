"""Attention that a module writes out by hand: scores, their softmax, and the softmax times values.

`WrittenScores` follows the scores, from the product of queries and keys to the softmax: which suffices to observe the attention.
`WrittenMaps` follows the softmax to its product with the values: which is needed to replace the attention. The rules do
not cover a map that goes through anything else, so its module raises an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlattn_fast._ground.attachments import Records
from vlattn_fast._ground.tensors import joined

PRODUCTS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)

_CASTS = ("float", "to", "type", "type_as", "contiguous")
_MASKED = -1e4  # models mask with this or less, so that the weight is 0


class WrittenScores:
    """One product of queries and keys, with the module's scale, softcap and mask.

    query: (B, H, N, D). transposed_key: (B, H, D, M). shape: of the scores.
    """

    def __init__(self, query: Tensor, transposed_key: Tensor, scores: Tensor) -> None:
        self.query, self.transposed_key, self.shape = query, transposed_key, scores.shape
        self._scores: Callable[[], Tensor | None] = weakref.ref(scores)
        self._scale = 1.0  # of the product
        self._cap: float | None = None  # of its tanh; None = none is taken
        self._mask: Tensor | None = None

    def masks(self, scores: Tensor) -> Mapping[str, Any] | None:
        """attn_mask, is_causal, scale and softcap, if there is one, of `scores` in front of the softmax; None if another
        operation changed the scores."""
        if self._scores() is not scores:
            return None
        masks = {"attn_mask": self._mask, "is_causal": False, "scale": self._scale}
        if self._cap is None:
            return masks
        # cap * tanh(scale * product) is a softcap of the product times cap * scale. One that is not above 0 is not a softcap.
        return {**masks, "scale": self._cap * self._scale, "softcap": self._cap} if self._cap > 0 else None

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Follows the scores to `result` if `func` scales, caps, masks or casts them; stops after another operation."""
        scores = self._scores()
        if scores is None or all(x is not scores for x in args):
            return
        name = getattr(func, "__name__", "").rstrip("_")
        operand = None if len(args) < 2 else args[1] if args[0] is scores else args[0]
        if name in _CASTS or (not kwargs and self._takes(name, args, operand, scores)):
            self._scores = weakref.ref(result)
        elif result is None or result is scores:
            self._scores = lambda: None

    def _takes(self, name: str, args: Sequence[Any], operand: Any, scores: Tensor) -> bool:
        """Keeps a scale, a softcap or a mask; whether the operation is one."""
        if name == "tanh" and self._cap is None and self._mask is None:
            self._cap = 1.0
            return True
        if name == "mul" or (name == "div" and args[0] is scores):
            if self._mask is not None or not _is_number(operand):
                return False
            factor = float(operand) if name == "mul" else 1 / float(operand)
            if self._cap is None:
                self._scale *= factor
            else:
                self._cap *= factor
            return True
        if name == "add" and isinstance(operand, Tensor) and operand.is_floating_point():
            self._mask = joined(self._mask, operand)
            return True
        if name == "masked_fill" and _is_number(args[2]) and float(args[2]) <= _MASKED:
            self._mask = joined(self._mask, ~args[1])
            return True
        return False


def is_masked_score(scores: Tensor) -> Tensor:
    """bool, True for keys masked by a mask that was added to finished scores."""
    return scores <= _MASKED / 2  # it may be added to a positive score


def is_masked(mask: Tensor) -> Tensor:
    """bool, of the mask's shape: True if a query does not see a key."""
    return ~mask if mask.dtype == torch.bool else mask <= _MASKED


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) or (isinstance(x, Tensor) and x.ndim == 0 and not x.requires_grad)


# --- maps ---

# Functions that leave the numbers of a map as they are, in eval mode.
_KEEPING = (
    *(functional.dropout, torch.dropout, Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16),
    *(Tensor.contiguous, Tensor.clone, Tensor.view, Tensor.reshape, torch.reshape),
)
_BY_HAND = (
    "Call scaled_dot_product_attention there; or va.relevancy_attention, which carries relevancy through layers of your own "
    "(examples/relevancy_in_your_transformer.py); or va.relevancy_step after attention that stays unchanged "
    "(examples/relevancy_behind_sdpa.py)"
)


@dataclass(frozen=True, eq=False)
class WrittenProduct:
    """A product of a map with values."""

    number: int  # of the map, among those that modules computed
    probabilities: Tensor  # (B, H, N, M)
    value: Tensor  # (B, H, M, Dv)
    output: Tensor  # (B, H, N, Dv)
    given: tuple[Tensor, Tensor, Tensor]  # of the module: the map, and twice the values
    as_product: Callable[[Tensor], Tensor]  # the output in the shape in which the module continues with it

    def as_call(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Query, key, value and masks of an attention call that gives the product: its logits are the map's logarithms."""
        dtype, (batch, heads, _, keys) = torch.promote_types(self.probabilities.dtype, self.value.dtype), self.probabilities.shape
        probabilities = self.probabilities.to(dtype)
        query = probabilities.clamp(min=torch.finfo(dtype).tiny).log()
        key = torch.eye(keys, dtype=dtype, device=query.device).expand(batch, heads, keys, keys)
        value = self.value.to(dtype).expand(batch, heads, -1, -1)
        return query, key, value, {"attn_mask": probabilities > 0, "key_mask": None, "is_causal": False, "scale": 1.0}


class WrittenMaps:
    """The maps (B, H, N, M) that modules computed themselves in a run, in its `records`. `keeps_graph`: the calls have gradients
    with respect to the maps."""

    def __init__(self, records: Records, keeps_graph: bool) -> None:
        self._records, self._keeps_graph = records, keeps_graph
        self._maps: list[tuple[str, Tensor | None]] = []  # with the module's path; None = multiplied with its values
        self._changed: set[str] = set()  # modules that use a map otherwise
        self.are_open = False  # there is one

    def take(self, path: str, result: Tensor, heads: int | None = None) -> int:
        """Notes a map of the module at `path`, (B, H, N, M), or (B * H, N, M) of a module with `heads`; returns its number."""
        self.are_open = True
        self._records.at(result).maps |= 1 << len(self._maps)
        self._maps.append((path, result if heads is None else result.view(-1, heads, *result.shape[-2:])))
        return len(self._maps) - 1

    @property
    def count(self) -> int:
        """How many there are: the number of the next one."""
        return len(self._maps)

    def holds(self, value: Any) -> bool:
        """Whether this is one of the maps, unchanged."""
        return isinstance(value, Tensor) and bool(self._records.of(value).maps)

    def leave_out(self, path: str) -> None:
        """Notes that the module at `path` has another map, which is not followed."""
        self._changed.add(path)

    def check(
        self, model: nn.Module, by_hand: Mapping[str, set[torch.Size]], called: set[str], towers: Sequence[tuple[int, int]]
    ) -> None:
        """ValueError for a module that computed a map itself without a call, and for a model without calls.

        Args:
            by_hand: the modules that computed a softmax, and the shapes of those that are certainly maps.
            called: the modules of the towers that called attention.
            towers: (B, N) of each.
        """
        for path, shapes in by_hand.items():
            # (B, N, n, n) mixes streams of one token, as hyper-connections do.
            is_map = any(shape[:2] not in towers for shape in shapes)
            kind = type(model.get_submodule(path)).__name__
            is_covered = self.covers(path) and any(not path or f"{caller}.".startswith(f"{path}.") for caller in called)
            if (is_map or "ttention" in kind) and not is_covered:
                place = f"'{path}' ({kind})" if path else kind
                raise ValueError(
                    "model must compute attention through transformers' AttentionInterface or scaled_dot_product_attention; got "
                    f"{place}, which computes a softmax itself. {_BY_HAND}"
                )
        if not called:
            raise ValueError(
                "model must call attention through transformers' AttentionInterface or scaled_dot_product_attention; got a "
                f"forward pass of {type(model).__name__} without a call. {_BY_HAND}"
            )

    def covers(self, path: str) -> bool:
        """Whether the module at `path` multiplied each map with values, once and unchanged, or none."""
        module_maps = [stored for where, stored in self._maps if where == path]
        multiplied = [stored is None for stored in module_maps]
        return not any(multiplied) or (all(multiplied) and path not in self._changed)

    def product(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> WrittenProduct | None:
        """The product of a map with values that a function of torch computed, if any."""
        equation, args = _einsum(func, args)
        bits = self._records.bits((*args, *kwargs.values()), "maps")
        if not bits or not isinstance(result, (Tensor, tuple, list)) or isinstance(result, torch.Size):
            return None
        number = bits.bit_length() - 1
        path, stored = self._maps[number]
        single = bits == 1 << number and bool(args) and bool(self._records.bits(args[:1], "maps"))
        if single and func in _KEEPING and isinstance(result, Tensor) and stored is not None:
            if result.numel() == stored.numel() and result.shape[-2:] == stored.shape[-2:]:
                self._records.at(result).maps |= bits
                return None
        if single and stored is not None and isinstance(result, Tensor) and _alike(result, stored):
            self._maps[number] = path, result.view(stored.shape)
            self._records.at(result).maps |= bits
            return None
        parts = None
        if single and stored is not None and len(args) > 1 and not self._records.bits(args[1:], "maps"):
            parts = _by_equation(equation, args, result) if equation else _by_matmul(func, stored, args[1], result)
        if parts is None or stored is None:
            self._changed.add(path)
            return None
        value, output, as_product = parts
        self._maps[number] = path, None
        stored = stored if self._keeps_graph else stored.detach()
        return WrittenProduct(number, stored, value, output, (args[0], args[1], args[1]), as_product)


Parts = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]  # values (B, H, M, D), output (B, H, N, D), and `as_product`


def _by_matmul(func: Any, stored: Tensor, value: Tensor, result: Tensor) -> Parts | None:
    """The parts of a product of a map with values (B, H, M, D) or (B * H, M, D)."""
    if func not in PRODUCTS or value.ndim not in (3, 4):
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
    map_labels, _, value_labels = factors.partition(",")
    if len(operands) != 2 or len(map_labels) != 4 or len(set(value_labels) - set(map_labels)) != 1:
        return None
    (feature,) = set(value_labels) - set(map_labels)
    order, values = map_labels[:3] + feature, map_labels[:2] + map_labels[3] + feature
    if sorted(value_labels) != sorted(values) or sorted(product) != sorted(order):
        return None
    value = operands[1].permute([value_labels.index(label) for label in values])
    output = result.permute([product.index(label) for label in order])
    return value, output, lambda output: output.permute([order.index(label) for label in product])


def _alike(result: Tensor, stored: Tensor) -> bool:
    """Whether a function left the numbers of a map unchanged, as a mask does that was applied already; or replaced the NaN of
    rows that see no key with zeros."""
    if result.numel() != stored.numel() or result.shape[-2:] != stored.shape[-2:] or result.dtype != stored.dtype:
        return False
    return torch.equal(result.detach().view(stored.shape), stored.detach().nan_to_num(0.0))
