"""Where a model has the residual stream after each layer, and what each layer's MLP adds to it: runs of its modules.

They are found in one forward pass, from which modules run, what they take and what they return. No class of models is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlattn_fast.attach.events import ModuleRun, Subscriber
from vlattn_fast.attach.observer import Observer
from vlattn_fast.attach.session import Steps, at_rest, named, uncompiled
from vlattn_fast.interpret.intervening.traced_model import TracedModel, TracedTower

KINDS = ("residual", "mlp")
Element = int | str | None  # of an output: a number in a tuple, a name in a dict; None = all of it


@dataclass(frozen=True, eq=False)
class StatePlace:
    """A state: the output of one run of a module, or an element of this output. It is (B, N, C), or has these numbers in order,
    such as (B * N, C) or (B, H, W, C). `tokens_first`: it is (N, B, C), as in nn.TransformerEncoder by default."""

    tower: TracedTower
    layer: int
    path: str
    run: tuple[int, int]  # which run of the module in a forward pass, and of how many
    element: Element
    channels: int
    tokens_first: bool
    followed_by: str = ""  # a later module of the same list that ran, if this is the last layer that attends or mixes

    def may_be(self, x: Any) -> bool:
        """Whether an argument of the tower's modules may be its stream."""
        return isinstance(x, Tensor) and x.ndim > 1 and x.shape[-1] == self.channels

    def sizes(self, state: Tensor) -> tuple[int, int]:
        """(B, N) of a state."""
        first, second = sizes_of(state)
        return (second, first) if self.tokens_first else (first, second)

    def changed(self, state: Tensor, sizes: tuple[int, int], change: Callable[[Tensor], Tensor]) -> Tensor:
        """The state after `change`, which takes and returns it as (B, N, C); `sizes`: (B, N)."""
        if self.tokens_first:
            return change(state.reshape(*sizes[::-1], -1).transpose(0, 1)).transpose(0, 1).reshape(state.shape)
        return change(state.reshape(*sizes, -1)).reshape(state.shape)

    def replaced(self, output: Any, sizes: tuple[int, int], change: Callable[[Tensor], Tensor]) -> Any:
        """The output with a changed state."""
        if self.element is None:
            return self.changed(output, sizes, change)
        if isinstance(output, Mapping):
            state = self.changed(output[self.element], sizes, change)
            return type(output)(**{**output, self.element: state})
        assert isinstance(self.element, int)
        changed = list(output)
        changed[self.element] = self.changed(output[self.element], sizes, change)
        return type(output)(*changed) if hasattr(output, "_fields") else type(output)(changed)


# Kind -> tower -> layer -> the place, or why there is none.
StatePlaces = dict[str, dict[TracedTower, dict[int, StatePlace | str]]]


def find_states(traced: TracedModel) -> StatePlaces:
    """Runs the model once more, in eval mode."""
    places: StatePlaces = {kind: {} for kind in KINDS}
    layers = dict[str, dict[TracedTower, list[int]]]()  # by path of a module: the layers that are its runs
    for tower, paths in _attending(traced).items():
        roots = _layer_paths(paths)
        for layer, path in paths.items():
            if roots is not None:
                layers.setdefault(roots[layer], {}).setdefault(tower, []).append(layer)
            for kind in KINDS:
                where = named(path, traced.model.get_submodule(path))
                places[kind].setdefault(tower, {})[layer] = f"{where} is in no list of layers"
    mixing = {call.path for call in traced.calls} | {path for _, _, path in traced.mixing}
    notes = _Notes(traced.model, layers, mixing)
    observer = Observer(traced.model, [notes], parts=traced.roots)  # another thread may have replaced them
    with torch.inference_mode(False), torch.no_grad(), at_rest(traced.model), observer:
        traced.model(**traced.arguments)
    for path, towers in layers.items():
        for tower, numbers in towers.items():
            for kind, found in notes.places(path, tower, numbers, max(places["residual"][tower])).items():
                places[kind][tower].update(found)
            if len(towers) > 1 and (first := min(places["residual"][tower])) in numbers:  # nothing tells whose states come in
                places["residual"][tower][first] = f"{named(path, traced.model.get_submodule(path))} begins several towers"
    return places


def sizes_of(state: Tensor) -> tuple[int, int]:
    """(B, N) of a state (B, N, C), (B, H, W, C), or (N, C) of one sample; (N, B) of one (N, B, C)."""
    return (1 if state.ndim == 2 else len(state)), state.shape[-2] * (state.shape[1] if state.ndim == 4 else 1)


def _tensors(output: Any) -> dict[Element, Tensor]:
    """The tensors in the output of a module, by their number or name in it."""
    parts: dict[Element, Any] = {None: output} if isinstance(output, Tensor) else {}
    if isinstance(output, (tuple, list)):
        parts = dict(enumerate(output))
    elif isinstance(output, Mapping):
        parts = dict(output)
    return {number: x for number, x in parts.items() if isinstance(x, Tensor) and x.is_floating_point() and x.ndim in (2, 3, 4)}


def _attending(traced: TracedModel) -> dict[TracedTower, dict[int, str]]:
    """By tower and layer, the path of the module that attends, to the tower itself if one does."""
    paths = dict[TracedTower, dict[int, str]]()
    for call in sorted(traced.calls, key=lambda call: call.crosses):
        paths.setdefault(call.tower, {}).setdefault(call.layer, call.path)
    for tower, layer, path in traced.mixing:
        paths.setdefault(tower, {}).setdefault(layer, path)
    return {tower: dict(sorted(of.items())) for tower, of in paths.items()}


def _layer_paths(paths: Mapping[int, str]) -> dict[int, str] | None:
    """The module of each layer: the outermost elements of lists that tell the layers apart, such as T5's `block.3` for
    `block.3.layer.0.SelfAttention`. If one module is all layers, as in ALBERT, the innermost element. None = there is no list."""
    ends = {layer: [n for n, name in enumerate(path.split("."), 1) if name.isdigit()] for layer, path in paths.items()}
    depths, distinct = range(min(map(len, ends.values()))), len(set(paths.values()))
    for depth in depths if distinct > 1 else reversed(depths):
        roots = {layer: ".".join(path.split(".")[: ends[layer][depth]]) for layer, path in paths.items()}
        if len(set(roots.values())) == distinct:
            return roots
    return None


@dataclass(eq=False)
class _Ran:
    """A run of a module within a layer."""

    module: nn.Module
    number: int  # which of the module's runs
    attends: bool
    taken: Sequence[Tensor]  # the tensors among its arguments
    children: list[_Ran] = field(default_factory=list)
    output: Any = None

    def matrices(self) -> int:
        weights = (*self.module.parameters(), *self.module.buffers())  # quantised weights may be buffers
        return sum(sum(size > 1 for size in weight.shape) > 1 for weight in weights)


class _State(NamedTuple):
    """A state: the run of a module that has it, and the rest of its `StatePlace`."""

    module: nn.Module
    number: int
    element: Element
    channels: int
    tokens_first: bool


class _Notes(Subscriber):
    """Notes which modules run within each layer, and at the end of a layer where its states are."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Mapping[TracedTower, Any]], attending: set[str]) -> None:
        self._model = model
        self._paths = {module: path for path, module in model.named_modules()}
        self._towers = {model.get_submodule(path): list(towers) for path, towers in layers.items()}
        self._attending = {model.get_submodule(path) for path in attending}
        self._under_way: list[_Ran] = []
        self._runs: Counter[nn.Module] = Counter()
        self._found: dict[nn.Module, list[dict[tuple[str, TracedTower], _State | str]]] = {module: [] for module in self._towers}
        self._before: dict[TracedTower, _Ran] = {}  # the layer that ran before

    def begins(self, observer: Observer) -> Steps:
        plainly = uncompiled(self._model)
        yield plainly.__exit__
        plainly.__enter__()

    def on_enter(self, run: ModuleRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert run.module is not None
        self._runs[run.module] += 1
        if not self._under_way and run.module not in self._towers:
            return
        taken = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        ran = _Ran(run.module, self._runs[run.module] - 1, run.module in self._attending, taken)
        if self._under_way:
            self._under_way[-1].children.append(ran)
        self._under_way.append(ran)
        for tower in self._towers.get(run.module, ()):
            self._check_handed(tower, taken)

    def _check_handed(self, tower: TracedTower, taken: Sequence[Tensor]) -> None:
        """A module that attends itself is a layer only if the next one takes its output, and not the sum of it and the stream."""
        before = self._before.pop(tower, None)
        if before is None or before.module not in self._attending:
            return
        if not any(x is output for x in taken for output in _tensors(before.output).values()):
            problem = "is attention and no layer, since the next one does not take its output"
            self._found[before.module][-1].update({(kind, tower): problem for kind in KINDS})

    def on_leave(self, run: ModuleRun, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if all(ran.module is not run.module for ran in self._under_way):
            return
        while (ran := self._under_way.pop()).module is not run.module:
            pass  # left by an error that the model has caught
        ran.output = output
        if self._under_way:
            self._under_way[-1].attends |= ran.attends
        if (towers := self._towers.get(ran.module)) is not None:
            self._before |= dict.fromkeys(towers, ran)
            self._found[ran.module].append(
                {(kind, tower): _state(kind, ran, tower, towers) for kind in KINDS for tower in towers}
            )

    def places(self, path: str, tower: TracedTower, layers: Sequence[int], last: int) -> dict[str, dict[int, StatePlace | str]]:
        """By kind and layer, of the `layers` that are runs of the module at `path`; `last`: the tower's last layer."""
        module = self._model.get_submodule(path)
        found, where = self._found[module], named(path, module)
        if len(found) != len(layers):
            times = f"runs {len(found)} times for {len(layers)} layers" if found else "is no module that runs"
            return {kind: dict.fromkeys(layers, f"{where} {times}") for kind in KINDS}
        places: dict[str, dict[int, StatePlace | str]] = {kind: {} for kind in KINDS}
        for layer, states in zip(layers, found, strict=True):
            for kind in KINDS:
                state = states[kind, tower]
                if isinstance(state, str):
                    places[kind][layer] = f"{where} {state}"
                    continue
                run = state.number, self._runs[state.module]
                followed = self._later(path) if layer == last else ""
                places[kind][layer] = StatePlace(tower, layer, self._paths[state.module], run, *state[2:], followed)
        return places

    def _later(self, path: str) -> str:
        """A module of the same class after that at `path`, in the same list, that ran."""
        parent, _, number = path.rpartition(".")
        siblings, kind = self._model.get_submodule(parent).named_children(), type(self._model.get_submodule(path))
        after = (each for name, each in siblings if name.isdigit() and int(name) > int(number) and type(each) is kind)
        later = (self._paths[each] for each in after if self._runs[each])
        return next(later, "")


def _state(kind: str, layer: _Ran, tower: TracedTower, towers: Sequence[TracedTower]) -> _State | str:
    """Where a layer of `tower` has its state, or why it has none; `towers`: those with a layer in this module."""
    states, turned = _tensors(layer.output), tower.shape[::-1]
    fitting = [number for number, x in states.items() if sizes_of(x) == tower.shape]
    fitting = fitting or [number for number, x in states.items() if sizes_of(x) == turned]
    if not fitting:
        return f"returns no state of (B, N) = {tower.shape} tokens"
    if len(towers) > 1 and (len(fitting) > 1 or kind == "mlp"):
        return f"is a layer of several towers, {', '.join(repr(each.name) for each in towers)}, which it does not tell apart"
    element = fitting[0]
    state = states[element]
    if len(towers) == 1 and sum(states[number].shape == state.shape for number in fitting) > 1:
        return f"returns several states of (B, N, C) = {(*tower.shape, state.shape[-1])}, so that none is the sum"
    # If B equals N, only torch's layers tell.
    tokens_first = sizes_of(state) != tower.shape or (tower.shape == turned and _takes_tokens_first(layer))
    channels = state.shape[-1]
    if kind == "residual":
        return _State(layer.module, layer.number, element, channels, tokens_first)
    ran = _mlp(layer, state)
    if isinstance(ran, str):
        return ran
    for number, x in _tensors(ran.output).items():
        if _is_alike(x, state):
            return _State(ran.module, ran.number, number, channels, tokens_first)
    return f"has an MLP, {type(ran.module).__name__}, that returns no state of (B, N, C) = {(*tower.shape, channels)}"


def _takes_tokens_first(ran: _Ran) -> bool:
    """Whether a layer attends with torch's nn.MultiheadAttention over (N, B, C)."""
    if isinstance(ran.module, nn.MultiheadAttention):
        return not ran.module.batch_first
    return any(_takes_tokens_first(child) for child in ran.children)


def _is_alike(x: Tensor, state: Tensor) -> bool:
    """Whether a tensor has the numbers of a state in the same order, perhaps in another shape."""
    same = x.numel() == state.numel() and x.shape[-1] == state.shape[-1]
    return same and (x.ndim != 3 or state.ndim != 3 or x.shape == state.shape)


def _mlp(layer: _Ran, state: Tensor) -> _Ran | str:
    """The module whose output a layer adds to its stream next to attention, or why there is none: its only part that is a whole
    MLP, else the last one with a matrix of weights, such as the second of two linear layers. If that module adds to the stream
    itself, the one within it."""
    around = layer
    while True:
        with_matrix = [number for number, ran in enumerate(around.children) if ran.matrices()]
        whole = [n for n in with_matrix if _is_whole(around.children[n], state) and not _is_fed_on(around.children, n)]
        if len(whole) > 1:
            several = ", ".join(type(around.children[number].module).__name__ for number in whole)
            return f"has several MLPs, or other parts with weights: {several}"
        if not with_matrix or (not whole and around.children[with_matrix[-1]].attends):
            return "has no MLP after its attention"
        last = (whole or with_matrix)[-1]
        ran = around.children[last]
        if not ran.children or not _adds(ran, state):
            break
        around = ran
    for after in around.children[last + 1 :]:  # a norm or a factor of this output alone
        if not after.taken or all(after.taken[0] is not output for output in _tensors(ran.output).values()):
            break
        ran = after
    return ran


def _is_whole(ran: _Ran, state: Tensor) -> bool:
    """Whether a run without attention makes a state of a state with several matrices, as an MLP, a mixture of experts or a
    convolution does."""
    makes_state = any(_is_alike(x, state) for x in _tensors(ran.output).values())
    return makes_state and not ran.attends and ran.matrices() > 1


def _is_fed_on(parts: Sequence[_Ran], number: int) -> bool:
    """Whether a later part of the layer, attention or one with weights, takes the output: a norm with a learned gate, as in
    AXK2."""
    outputs = _tensors(parts[number].output).values()
    later = (x for part in parts[number + 1 :] if part.attends or part.matrices() for x in part.taken)
    return any(x is output for x in later for output in outputs)


def _adds(ran: _Ran, state: Tensor) -> bool:
    """Whether a module adds to the residual stream itself: it takes the stream beside a branch of it, as in BERT, or takes the
    stream and begins with its norm, as in T5."""
    tokens = [x for x in ran.taken if x.is_floating_point() and x.shape[:-1] == state.shape[:-1]]
    with_weights = [child for child in ran.children if next(child.module.parameters(), None) is not None]
    return len(tokens) > 1 or (len(with_weights) > 1 and not with_weights[0].matrices())
