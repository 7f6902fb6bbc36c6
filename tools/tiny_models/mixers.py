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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tools.tiny_models.inline_mixers import lightning, parts_of, token_shift, without_bias

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
        tensor, labels = (tensor, "bhnd") if "d" in self.layout else (tensor[..., 0], "bhn")
        return torch.einsum(f"{labels}->{self.layout}", tensor).contiguous()


_DELTA = Values("value", "bnhd")
# By the functions' names in the files of transformers.
RECURRENCES = {
    "torch_chunk_gated_delta_rule": _DELTA,
    "chunk_kimi_delta_attention": _DELTA,
    "mamba_selective_scan": Values("hidden_states", "bhn"),
    "mamba2_chunk_scan": Values("hidden_states", "bnhd"),
    "rwkv_linear_attention": Values("value", "bnh"),
}
# And methods of modules, by the names of their classes.
METHODS = {
    "xLSTMBackend": ("forward", Values("value", "bhnd")),
    "RecurrentGemmaRglru": ("_rnn_scan", Values("hidden_states", "bnh")),
}
CONVOLUTION, CHANNELS = "causal_conv1d_fn", Values("hidden_states", "bhn")


@dataclass(frozen=True, eq=False)
class Mixed:
    """The maps A (B, H, N, N) of a layer, one for each call of its function, which have heads of their own; and those of the
    convolution in front, K (B, C, N, N), of the channels that became the values, and on the way of the values alone."""

    maps: list[Tensor]
    before: list[Tensor]


class Mixers:
    """A context in which each recurrence of a model goes by its map. `take` gets the maps; `cut`: they give constants."""

    def __init__(self, model: nn.Module, take: Callable[[Mixed], None], cut: bool = False) -> None:
        self.model, self.take, self.cut = model, take, cut
        self._mixed: Mixed | None = None  # what the last convolution was in front of
        self._values: Tensor | None = None  # the map of the last convolution, where the values are made of its output
        self._before: tuple[Tensor, Tensor, Tensor] | None = None  # the map of the last convolution, its values and its output

    def __enter__(self) -> Mixers:
        self._replaced = [*self._replace()]
        return self

    def __exit__(self, *error: Any) -> None:
        _put_back(self._replaced)

    def _replace(self) -> Iterator[tuple[Any, str, Any]]:
        for file in files_of(self.model):
            recurs = [name for name in RECURRENCES if name in vars(file)]
            for name in recurs:
                function = getattr(file, name)
                setattr(file, name, functools.partial(self._recurrence, function, RECURRENCES[name]))
                yield file, name, function
            if CONVOLUTION in vars(file):
                function = getattr(file, CONVOLUTION)
                setattr(file, CONVOLUTION, functools.partial(self._convolution, function, bool(recurs)))
                yield file, CONVOLUTION, function
        for kind, (name, values) in METHODS.items():
            for module in parts_of(self.model, kind):
                function = getattr(module, name)
                setattr(module, name, functools.partial(self._recurrence, function, values))
                yield module, name, None
        for module in parts_of(self.model, "RecurrentGemmaRecurrentBlock"):
            run = without_bias(module.conv_1d)
            module.conv_1d.forward = functools.partial(self._convolution, run, True, bias=module.conv_1d.bias, activation=None)
            yield module.conv_1d, "forward", None
        for module in parts_of(self.model, "MiniMaxLightningAttention"):
            module.forward = functools.partial(lightning(module), self._of_values)
            yield module, "forward", None
        for module in parts_of(self.model, "RwkvSelfAttention"):
            module.extract_key_value = functools.partial(self._shifted_values, module, module.extract_key_value)
            yield module, "extract_key_value", None
        for module in parts_of(self.model, "RwkvFeedForward"):
            module.forward = functools.partial(self._shifted_layer, module)
            yield module, "forward", None

    def _of_values(self, function: Any, value: Tensor) -> Tensor:
        """The result of a function of the values (B, N, H, D), by its map."""
        output: Tensor = self._recurrence(lambda value: function(value), _DELTA, value)
        return output

    def _shifted_values(self, module: Any, function: Any, hidden: Tensor, state: Any = None) -> Any:
        """The values of RWKV, which are made of shifted tokens; keys and gates are held fixed."""
        gate, key, value, state = function(hidden, state)
        if self.cut:
            return gate.detach(), key, value, state
        run = token_shift(module, module.time_mix_value)
        states = hidden.transpose(1, 2)
        mixing_map, product = self._by_map(run, CHANNELS, run(states), (states,), {})
        self._values = mixing_map.detach().requires_grad_()
        change = (self._values @ states.detach()[..., None])[..., 0]
        return gate, key, module.value((product + change - change.detach()).transpose(1, 2)), state

    def _shifted_layer(self, module: Any, hidden: Tensor, state: Any = None) -> Any:
        """The feed-forward layer of RWKV, whose map is that of the shift of both of its inputs."""
        states, maps, mixed = hidden.transpose(1, 2), [], []
        for mix in (module.time_mix_key, module.time_mix_receptance):
            run = token_shift(module, mix)
            mixing_map, product = self._by_map(run, CHANNELS, run(states), (states,), {})
            maps.append(mixing_map)
            mixed.append(product)
        both = torch.cat(maps, 1)
        key, gate = (both @ torch.cat([states, states], 1)[..., None])[..., 0].transpose(1, 2).chunk(2, -1)
        if self.cut:
            key, gate = key.detach(), gate.detach()
        else:
            self.take(Mixed([both], []))
        return torch.sigmoid(module.receptance(gate)) * module.value(torch.relu(module.key(key)).square()), state

    def _recurrence(self, function: Any, values: Values, *args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        output = result[0] if isinstance(result, tuple) else result
        before = self._before
        if self.cut:
            output = output.detach()
        else:
            arguments = bound(function, args, kwargs)
            value_map, self._values = self._values, None
            if before is not None:
                value_map, arguments[values.name] = _apart(*before, arguments[values.name], values)
            mixing_map, output = self._by_map(function, values, output, (), arguments)
            maps_before = [] if value_map is None else [value_map]
            if before is not None and self._mixed is not None:  # a further call of the same module, for other channels
                self._mixed.maps.append(mixing_map)
                self._mixed.before.extend(maps_before)
            else:
                self._mixed = Mixed([mixing_map], maps_before)
                self.take(self._mixed)
        return (output, *result[1:]) if isinstance(result, tuple) else output

    def _by_map(self, function: Any, values: Values, output: Tensor, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        """A, and A times the values."""
        arguments = bound(function, args, kwargs)
        by_head = values.heads_first(arguments[values.name])
        columns = []
        for token in range(by_head.shape[2]):
            impulse = torch.zeros_like(by_head)
            impulse[:, :, token, 0] = 1
            result = function(**{**arguments, values.name: values.as_they_were(impulse)})
            columns.append(values.heads_first(result[0] if isinstance(result, tuple) else result)[..., 0])
        mixing_map = torch.stack(columns, -1)
        product = values.as_they_were(mixing_map @ by_head)
        assert agree(product, output), "the function is not linear"
        return mixing_map, product

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
        mixing_map = gate[..., None] * taps
        product = (mixing_map @ states[..., None])[..., 0]
        product = product if bias is None else product + gate * bias[:, None]
        assert agree(product, output), "the activation is none that is known"
        if stands_in_front:
            self._before, self._mixed = (mixing_map, states, product), None
        else:
            self.take(Mixed([mixing_map], []))
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
    methods = [(module, name) for kind, (name, _) in METHODS.items() for module in parts_of(model, kind) if name != "forward"]
    try:
        for file, name, function in replaced:
            setattr(file, name, within(function))
        for module, name in methods:
            setattr(module, name, within(getattr(module, name)))
        yield
    finally:
        _put_back([*replaced, *((module, name, None) for module, name in methods)])


def _put_back(replaced: Iterable[tuple[Any, str, Any]]) -> None:
    """Attributes as they were; None = a module has the method of its class."""
    for target, name, function in replaced:
        if function is None:
            delattr(target, name)
        else:
            setattr(target, name, function)


def bound(function: Any, args: Sequence[Any], kwargs: Any) -> dict[str, Any]:
    """The arguments by their names, without those that the function does not know."""
    signature = inspect.signature(function)
    known = {name: value for name, value in kwargs.items() if name in signature.parameters}
    call = signature.bind(*args, **known)
    call.apply_defaults()
    return {name: value for name, value in call.arguments.items() if name not in ("kwargs", "_")}


def _apart(mixing_map: Tensor, states: Tensor, output: Tensor, given: Tensor, values: Values) -> tuple[Tensor, Tensor]:
    """The map of the channels of a convolution's output that became the values `given`, those at which these have a gradient,
    and the values, which have a gradient at it. Queries, keys and gates that are made of the same channels have none."""
    (gradient,) = torch.autograd.grad(given.sum(), output, retain_graph=True)
    channels = (gradient != 0).any(0).any(-1)
    value_map = mixing_map.detach()[:, channels].requires_grad_()
    product = (value_map @ states[:, channels, :, None].detach())[..., 0]
    like = values.heads_first(given)
    change, before = (x.view(*like.shape[:2], like.shape[3], -1).transpose(2, 3) for x in (product, output[:, channels]))
    written = (like / before).detach().nan_to_num(0.0, 0.0, 0.0)  # gates that the values have taken, and zeros of padding
    return value_map, given + values.as_they_were(written * (change - change.detach()))
