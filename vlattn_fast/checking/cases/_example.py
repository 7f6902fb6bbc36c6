"""A call as an object: its tensors, its arguments, and what its users vary."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
FLOATS = (0.3, 0.45, 0.6, 0.7, 0.85)  # values that an option may take


class Sizes(NamedTuple):
    """Sizes of a call, by default those of `vlattn verify`: two samples, two heads, and at least as many keys as queries.

    By default the keys fill more than a tile, which has 64 of them in 16 bits.
    """

    queries: int = 33
    keys: int = 80
    head_dim: int = 16
    value_dim: int = 24
    regions: int = 36
    words: int = 12
    features: int = 32
    batch: int = 2
    heads: int = 2
    rows: int = 3  # that are carried
    images: int = 4
    captions: int = 4


@dataclass(frozen=True, eq=False)
class Example:
    """A call of the public function `call`. `name` says which kind of call it is; the plain one has none.

    `arrange(tensors)` makes keyword arguments of the tensors, and of others with the same names; `options` are the remaining
    arguments, and `complete` adds what follows from both. Lengths belong to the tensors: `arrange` reads them there. `floats` are
    options that are numbers, with values that they may take. The tensors `in_float32` stay so in calls of 16 bits. Without
    `differentiable` no gradient is asked for.
    """

    call: Callable[..., Any]
    name: str
    tensors: Tensors
    options: Mapping[str, Any] = field(default_factory=dict)
    arrange: Callable[[Tensors], dict[str, Any]] = dict
    floats: Mapping[str, Sequence[float]] = field(default_factory=dict)
    in_float32: tuple[str, ...] = ()
    differentiable: bool = True
    complete: Callable[[dict[str, Any]], dict[str, Any]] = dict

    @property
    def operator(self) -> str:
        return self.call.__name__

    @property
    def title(self) -> str:
        return f"{self.operator}, {self.name}" if self.name else self.operator

    def in_dtype(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensors:
        """The tensors in this dtype on this device."""
        wide = torch.promote_types(dtype, torch.float32)
        return {name: x.to(device, wide if name in self.in_float32 else dtype) for name, x in self.tensors.items()}

    def arguments(self, tensors: Tensors) -> dict[str, Any]:
        """The keyword arguments of the call with these tensors, whose device the options are moved to."""
        return self.complete({**self.arrange(tensors), **self.placed_options(tensors)})

    def placed_options(self, tensors: Tensors) -> dict[str, Any]:
        """The options on the tensors' device; those in float64 in the dtype of the call's sums."""
        first = next(iter(tensors.values()))
        sums = torch.promote_types(first.dtype, torch.float32)

        def placed(x: Any) -> Any:
            return x.to(first.device, sums if x.dtype == torch.float64 else x.dtype) if isinstance(x, Tensor) else x

        return {name: placed(x) for name, x in self.options.items()}

    def run(self, tensors: Tensors, **options: Any) -> Any:
        """The result of the call with these tensors, without what is not asked for; `options` come before the example's own."""
        out = self.call(**{**self.arguments(tensors), **options})
        if not isinstance(out, tuple) or not hasattr(out, "_asdict"):
            return out
        given = {name: x for name, x in out._asdict().items() if x is not None}
        if torch.compiler.is_compiling():  # which makes no classes
            return tuple(given.values())
        return namedtuple(type(out).__name__, given)(**given)


def normal(generator: torch.Generator) -> Callable[..., Tensor]:
    """Standard normal numbers in float64."""
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
