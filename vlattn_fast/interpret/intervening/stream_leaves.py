"""The parts of a residual stream: one run of a model in which each is a leaf, and nothing else hands a gradient on.

A stream starts with the embeddings; each layer adds the outputs of its heads and of its MLP to it. A leaf is one of these: what
it was computed from has no gradient, and norms divide by constants (`attach.frozen`). Between the leaves and what is read from
the stream, the model is then a linear function, and a gradient at a leaf, times the leaf, is the share of the leaf. The graph
shows whether that is so: a layer that adds something else raises an error.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlattn_fast._ground.attachments import add_hook, add_pre_hook
from vlattn_fast.attach.events import AttentionEvent, ModuleRun, Subscriber
from vlattn_fast.attach.frozen import Frozen, is_held
from vlattn_fast.attach.observer import Observer
from vlattn_fast.attach.session import Steps, named
from vlattn_fast.interpret.intervening.editing import EditedCalls
from vlattn_fast.interpret.intervening.plans import Plans
from vlattn_fast.interpret.intervening.state_places import StatePlace
from vlattn_fast.interpret.intervening.state_plans import entry_of, last_of
from vlattn_fast.interpret.intervening.traced_model import ModelCall, TracedTower

PARTS = ("layers", "heads")
# Attention may multiply its outputs by a gate, which is a constant factor of them here.
_GATES = (torch.sigmoid, Tensor.sigmoid, functional.sigmoid, functional.silu)


@dataclass(frozen=True, eq=False)
class Leaf:
    """A part of the stream: (B, N, C), or (B, H, N, Dv), the outputs of the heads of a call."""

    name: str
    tensor: Tensor
    call: ModelCall | None = None


@dataclass(eq=False)
class Leaves:
    """The parts of the stream of a tower, the calls of attention that a run met, and the outputs of a run to the end."""

    leaves: list[Leaf] = field(default_factory=list)
    events: dict[ModelCall, AttentionEvent] = field(default_factory=dict)
    outputs: Any = None

    def add(self, name: str, value: Tensor, call: ModelCall | None = None) -> Tensor:
        """A copy, since a model may add to it in place."""
        self.leaves.append(Leaf(name, value.detach().requires_grad_(), call))
        return self.leaves[-1].tensor.clone()

    def part_names(self, parts: str) -> list[str]:
        """The names of the parts, of `PARTS`."""
        names = []
        for leaf in self.leaves:
            if leaf.call is not None and parts == "heads":
                kind = "cross-head" if leaf.call.crosses else "head"
                names += [f"{kind} {leaf.call.layer}.{head}" for head in range(leaf.tensor.shape[1])]
            else:
                names.append(leaf.name)
        return names

    def gradients(self, output: Tensor, cotangent: Tensor) -> list[Tensor]:
        """Those of sum(output * cotangent) at the leaves."""
        leaves = [leaf.tensor for leaf in self.leaves]
        gradients = torch.autograd.grad(output, leaves, cotangent, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, gradients, strict=True)]

    def shares(self, gradients: Sequence[Tensor], whole: Tensor, parts: str) -> Tensor:
        """(B, P + 1): the share of each part in a number (B,) with these gradients, and what is missing in their sum."""
        columns = list[Tensor]()
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            kept = 2 if leaf.call is not None and parts == "heads" else 1
            share = (gradient.double() * leaf.tensor.detach().double()).flatten(kept).sum(kept)
            columns.append(share.view(len(share), -1))
        shares = torch.cat(columns, 1)
        if len(shares) != len(whole):
            found = f"{len(whole)}, and {len(shares)} in the tower"
            raise ValueError(f"inputs must have one sample if a tower packs the tokens of several; got {found}")
        return torch.cat([shares, whole.double()[:, None] - shares.sum(1, keepdim=True)], 1)


class _Found(Exception):
    """Ends a run in which the call has been captured."""


def run_with_leaves(plans: Plans, tower: TracedTower, what: str, last: ModelCall | None = None) -> Leaves:
    """Runs a traced model with the parts of a tower's stream as leaves.

    `last`: the run ends at this call, and the leaves are those of the layers before. None = those of all layers.
    """
    traced, model, leaves = plans.traced, plans.traced.model, Leaves()
    frozen = Frozen(similarities=True)
    mlps = plans.state_places["mlp"][tower]
    attending = [plan for plan in plans.calls if plan.call.tower is tower]
    for plan in attending:
        kind = "cross-attention" if plan.call.crosses else "attention"
        if last is None or plan.call.layer < last.layer:
            plan.meets = functools.partial(leaves.events.__setitem__, plan.call)
            plan.through = functools.partial(leaves.add, f"{kind} {plan.call.layer}", call=plan.call)
        elif plan.call is last:
            plan.meets = functools.partial(_keep_and_end, leaves, last)
    for number, place in mlps.items():
        if isinstance(place, StatePlace) and (last is None or number < last.layer):
            plans.add_change(place, functools.partial(_leaf_of_state, leaves, f"mlp {number}"))
    ends = list[Tensor]()
    if last is None:
        plans.add_change(last_of(traced, plans.state_places, tower, what), functools.partial(_keep_state, ends))
    mixing = {model.get_submodule(path): f"mixer {number}" for of, number, path in traced.mixing if of is tower}
    gated = {model.get_submodule(plan.call.path) for plan in attending}
    stream = _Stream(leaves, model, entry_of(plans.state_places, tower, what), mixing, gated)
    observer = Observer(model, [EditedCalls(plans), stream, frozen], parts=traced.roots)
    with torch.inference_mode(False), torch.enable_grad(), observer, contextlib.suppress(_Found):
        leaves.outputs = model(**traced.arguments)
    if frozen.missed:
        raise ValueError(f"model must have norms that {what} can hold fixed; got {', '.join(frozen.missed[:3])}")
    without = [f"layer {number}, which {place}" for number, place in mlps.items() if isinstance(place, str)]
    if last is None:
        _check_linear(ends, leaves, what, without)
        return leaves
    event = leaves.events.get(last)  # a softmax that a module takes itself is no call
    is_dot = event is not None and event.masks is not None and (event.inputs is None or event.inputs.attention.score == "dot")
    if event is None or not is_dot or event.written is not None:
        raise ValueError(
            "model must attend by dot products through transformers' AttentionInterface or scaled_dot_product_attention; got "
            f"another score, or attention that is written out by hand, in {named(last.path, model.get_submodule(last.path))}"
        )
    _check_linear((event.query, event.key), leaves, what, without)
    return leaves


def _keep_and_end(leaves: Leaves, call: ModelCall, event: AttentionEvent) -> None:
    leaves.events[call] = event
    raise _Found


# The nodes of functions that are not linear. Nor are products if both factors depend on a part.
_CURVES = (
    *("Gelu", "Silu", "Relu", "LeakyRelu", "Elu", "Tanh", "Sigmoid", "LogSigmoid", "Softplus", "Mish", "Hardtanh", "Hardswish"),
    *("Softmax", "LogSoftmax", "Exp", "Log", "Pow", "Sin", "Cos", "Abs", "Erf", "Glu", "PreluKernel"),
)
_PRODUCTS = ("Mul", "Div", "Mm", "Addmm", "Bmm", "Baddbmm", "Addcmul", "Dot", "Mv")


def _curved(outputs: Iterable[Tensor], leaves: Leaves) -> str | None:
    """The node of a function between the parts and `outputs` that is not linear; None if there is none."""
    ends = {id(leaf.tensor) for leaf in leaves.leaves}
    depends = dict[Any, bool]()  # node -> whether it depends on a part
    stack = [output.grad_fn for output in outputs]
    while stack:
        node = stack[-1]
        before = [] if node is None or is_held(node) else [each for each, _ in node.next_functions if each is not None]
        if ahead := [each for each in before if each not in depends]:
            stack += ahead
            continue
        stack.pop()
        if node is None or node in depends:
            continue
        count = sum(depends[each] for each in before)
        depends[node] = count > 0 or id(getattr(node, "variable", None)) in ends
        kind = node.name().partition("Backward")[0]
        if count and (kind in _CURVES or (count > 1 and kind in _PRODUCTS)):
            return str(node.name())
    return None


def _check_linear(outputs: Iterable[Tensor], leaves: Leaves, what: str, without: Sequence[str]) -> None:
    """ValueError if something between the parts and `outputs` is not linear; `without`: the layers whose MLPs are no parts."""
    if (node := _curved(outputs, leaves)) is not None:
        found = without[0] if without else "something else that its layers add"
        raise ValueError(
            f"model must add only outputs of attention and of MLPs to its residual stream for {what}; got {found}, "
            f"and a function of the stream that is not linear ({node})"
        )


def _leaf_of_state(leaves: Leaves, name: str, state: Tensor, start: int, total: int) -> Tensor:
    return leaves.add(name, state)


def _keep_state(kept: list[Tensor], state: Tensor, start: int, total: int) -> Tensor:
    kept.append(state)
    return state


def constant_options(event: AttentionEvent) -> dict[str, Any]:
    """The options of a call without dropout; a mask that the model computes from its tokens is a constant."""
    options = {name: option for name, option in (event.masks or {}).items() if name != "dropout_p"}
    return {name: option.detach() if isinstance(option, Tensor) else option for name, option in options.items()}


class _Stream(Subscriber):
    """Makes the input of the first layer a leaf, and the outputs of mixers; gates are constants."""

    def __init__(
        self, leaves: Leaves, model: nn.Module, entry: StatePlace, mixing: Mapping[nn.Module, str], gated: set[nn.Module]
    ) -> None:
        self._leaves, self._entry, self._mixing, self._gated = leaves, entry, mixing, gated
        self._first, self._has_begun = model.get_submodule(entry.path), False

    def begins(self, observer: Observer) -> Steps:
        yield add_pre_hook(self._first, observer.hook(self._enter), with_kwargs=True)
        for module in self._mixing:
            yield add_hook(module, observer.hook(self._mixed), prepend=True)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._has_begun:  # a module that is all layers, as in ALBERT
            return None
        self._has_begun = True
        taken: dict[int | str, Any] = dict(enumerate(args))
        taken.update(kwargs)
        name = next(name for name, x in taken.items() if self._entry.may_be(x))
        leaf = self._leaf("embedding", taken[name])
        if isinstance(name, int):
            return (*args[:name], leaf, *args[name + 1 :]), kwargs
        return args, {**kwargs, name: leaf}

    def _mixed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = output if isinstance(output, Tensor) else output[0]
        leaf = self._leaf(self._mixing[module], first)
        return leaf if isinstance(output, Tensor) else type(output)((leaf, *output[1:]))

    def _leaf(self, name: str, state: Tensor) -> Tensor:
        return self._entry.changed(state, self._entry.sizes(state), functools.partial(self._leaves.add, name))

    def on_call(self, run: ModuleRun, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if func in _GATES and run.module in self._gated:
            return func(*args, **kwargs).detach()
        return NotImplemented
