"""The maps of recurrences and short convolutions, from unit impulses through the model's own functions.

The function of a recurrence is linear in its values. So its output for a value that is 1 at token s and 0 elsewhere is column s
of its map A. The run goes on with A times the values, which is the function's own output, so that the score has a gradient at A.
Nothing of the package makes these maps.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LINEAR = 1e-10  # how far A times the values may be from the function's output, as a part of its largest number


@dataclass(frozen=True)
class Values:
    """Where a function takes its values, and where their tokens are: "bnhd" = (B, N, H, D), and so on."""

    name: str
    layout: str

    def heads_first(self, tensor: Tensor) -> Tensor:
        """(B, H, N, D)."""
        return torch.einsum(f"{self.layout}->{'bhnd' if 'd' in self.layout else 'bhn'}", tensor).view(
            *(tensor.shape[self.layout.index(label)] for label in "bhn"), -1
        )

    def as_they_were(self, tensor: Tensor) -> Tensor:
        """`tensor` (B, H, N, D), as the model has it."""
        return torch.einsum(f"bhnd->{self.layout}", tensor) if "d" in self.layout else tensor[..., 0]


_DELTA = Values("value", "bnhd")
# By the functions' names in the files of transformers.
RECURRENCES = {"torch_chunk_gated_delta_rule": _DELTA, "chunk_kimi_delta_attention": _DELTA}
CONVOLUTION, CHANNELS = "causal_conv1d_fn", Values("hidden_states", "bhn")


@dataclass(frozen=True, eq=False)
class Mixed:
    """The map A (B, H, N, N) of a layer, and that of the convolution in front, K (B, C, N, N), None without one. `of_values`: the
    channels of the convolution that became the values."""

    map: Tensor
    before: Tensor | None = None
    of_values: Tensor | None = None


class Mixers:
    """A context in which each recurrence of a model goes by its map. `take` gets the maps; `cut`: they give constants."""

    def __init__(self, model: nn.Module, take: Callable[[Mixed], None], cut: bool = False) -> None:
        self.take, self.cut, self.files = take, cut, files_of(model)
        self._before: tuple[Tensor, Tensor] | None = None  # the map of the last convolution, and its output

    def __enter__(self) -> Mixers:
        self._replaced = [*self._replace()]
        return self

    def __exit__(self, *error: Any) -> None:
        for file, name, function in self._replaced:
            setattr(file, name, function)

    def _replace(self) -> Iterator[tuple[Any, str, Any]]:
        for file in self.files:
            recurs = [name for name in RECURRENCES if name in vars(file)]
            for name in recurs:
                function = getattr(file, name)
                setattr(file, name, functools.partial(self._recurrence, function, RECURRENCES[name]))
                yield file, name, function
            if CONVOLUTION in vars(file):
                function = getattr(file, CONVOLUTION)
                setattr(file, CONVOLUTION, functools.partial(self._convolution, function, bool(recurs)))
                yield file, CONVOLUTION, function

    def _recurrence(self, function: Any, values: Values, *args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        output = result[0] if isinstance(result, tuple) else result
        before, self._before = self._before, None
        if self.cut:
            output = output.detach()
        else:
            of_map, output = self._by_map(function, values, output, args, kwargs)
            given = bound(function, args, kwargs)[values.name]
            self.take(Mixed(of_map) if before is None else Mixed(of_map, before[0], _of_values(before[1], given)))
        return (output, *result[1:]) if isinstance(result, tuple) else output

    def _by_map(self, function: Any, values: Values, output: Tensor, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        """A, and A times the values."""
        arguments = bound(function, args, kwargs)
        given = values.heads_first(arguments[values.name])
        columns = []
        for token in range(given.shape[2]):
            impulse = torch.zeros_like(given)
            impulse[:, :, token, 0] = 1
            result = function(**{**arguments, values.name: values.as_they_were(impulse)})
            columns.append(values.heads_first(result[0] if isinstance(result, tuple) else result)[..., 0])
        of_map = torch.stack(columns, -1)
        product = values.as_they_were(of_map @ given)
        assert agree(product, output), "the function is not linear"
        return of_map, product

    def _convolution(self, function: Any, stands_in_front: bool, *args: Any, **kwargs: Any) -> Any:
        """The activation of z is its gate times z, z what the taps make of the values and a bias. The gate is one of the map."""
        output = function(*args, **kwargs)
        if self.cut:
            return output.detach()
        arguments = bound(function, args, kwargs)
        states, plain = arguments["hidden_states"], {**arguments, "bias": None, "activation": None}
        taps, summed = self._by_map(function, CHANNELS, function(**plain), (), plain)
        bias = arguments["bias"]
        summed = summed if bias is None else summed + bias[:, None]
        gate = torch.ones_like(summed) if arguments["activation"] is None else torch.sigmoid(summed)
        of_map = gate[..., None] * taps
        product = (of_map @ states[..., None])[..., 0]
        product = product if bias is None else product + gate * bias[:, None]
        assert agree(product, output), "the activation is none that is known"
        if stands_in_front:
            self._before = of_map, product
        else:
            self.take(Mixed(of_map))
        return product


def agree(product: Tensor, output: Tensor) -> bool:
    return bool((product - output).detach().abs().max() <= LINEAR * output.detach().abs().max())


def files_of(model: nn.Module) -> set[Any]:
    """The files of the classes of a model's modules."""
    return {sys.modules[kind.__module__] for part in model.modules() for kind in type(part).__mro__}


@contextlib.contextmanager
def each_within(model: nn.Module, mode: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """A context in which each recurrence of a model runs within a mode of torch, also where autograd runs it."""

    def within(function: Any) -> Any:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with mode():
                return function(*args, **kwargs)

        return run

    replaced = [(file, name, vars(file)[name]) for file in files_of(model) for name in RECURRENCES if name in vars(file)]
    try:
        for file, name, function in replaced:
            setattr(file, name, within(function))
        yield
    finally:
        for file, name, function in replaced:
            setattr(file, name, function)


def bound(function: Any, args: Sequence[Any], kwargs: Any) -> dict[str, Any]:
    """The arguments by their names, without those that the function does not know."""
    signature = inspect.signature(function)
    known = {name: value for name, value in kwargs.items() if name in signature.parameters}
    call = signature.bind(*args, **known)
    call.apply_defaults()
    return {name: value for name, value in call.arguments.items() if name not in ("kwargs", "_")}


def _of_values(output: Tensor, values: Tensor) -> Tensor:
    """The channels of a convolution's output that became values: those at which these have a gradient."""
    (gradient,) = torch.autograd.grad(values.sum(), output, retain_graph=True)
    return (gradient != 0).any(0).any(-1)
