"""What a call leaves behind: nothing, whether it ends or fails, wherever."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import vlattn_fast as va
from tests.helpers.interpret.small_models import Small, every, made, method_named
from tests.helpers.interpret.traces import assert_same, state_of
from vlattn_fast.interpret.intervening.edits import EdgeEdit, HeadEdit, StateEdit
from vlattn_fast.interpret.relevancy.methods.registry import ABLATIONS, METHODS

pytestmark = pytest.mark.filterwarnings("ignore:A part of the map belongs to later tokens")  # of the published rollout


def marked(model: nn.Module) -> nn.Module:
    """A model with a state of its own for everything: mixed modes, a frozen part, a gradient, an implementation."""
    model.train()
    next(model.children()).eval()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    return model


class Planned(Exception):
    pass


def fail(*_: Any) -> Any:
    raise Planned


def stages(model: nn.Module, turn: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Where a run may fail: at the first and the last module of each class, in turn before it, after it, and in the backward pass
    through it. Each is a function that makes a hook."""
    chosen: dict[str, nn.Module] = {}
    for module in model.modules():
        chosen.setdefault(f"first {type(module).__name__}", module)
        chosen[f"last {type(module).__name__}"] = module

    def in_backward(module: nn.Module, args: Any, output: Any) -> None:
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(fail)

    kinds: list[tuple[str, Callable[[nn.Module], Any]]] = [
        ("before", lambda module: module.register_forward_pre_hook(fail)),
        ("after", lambda module: module.register_forward_hook(fail)),
        ("in the backward pass of", lambda module: module.register_forward_hook(in_backward)),
    ]
    for number, (name, module) in enumerate({id(module): (name, module) for name, module in chosen.items()}.values()):
        what, hook = kinds[(number + turn) % 3]
        yield f"{what} {name}", lambda hook=hook, module=module: hook(module)


@every(quick=("pooled", "llava"))
def test_a_call_leaves_nothing_behind_wherever_it_fails(method: str, model: str) -> None:
    small, chosen = made(model), method_named(method)
    inputs = small.batch()
    marked(small.model)
    small.model(**inputs)  # transformers puts hooks of its own in at the first run
    kept = {name: (x, x._version, x.clone()) for name, x in inputs.items()}
    before = state_of(small.model)
    expected = small.explain(inputs, chosen)
    assert_same(small.model, before, "a call")
    failed = 0
    for what, place in stages(small.model, [*METHODS, *ABLATIONS].index(method)):
        handle = place()
        within = state_of(small.model)
        try:
            small.explain(inputs, chosen)
        except Planned:
            failed += 1
        finally:
            assert_same(small.model, within, what)
            handle.remove()
    assert failed > 2
    if not chosen.takes_logits:
        with pytest.raises(Planned):
            small.explain(inputs, chosen, target=fail)
    assert_same(small.model, before, "failed calls")
    again = small.explain(inputs, chosen)
    assert all(torch.equal(again.relevancy[tower], row) for tower, row in expected.relevancy.items()), "the map has other bits"
    assert all(x._version == version and torch.equal(x, values) for x, version, values in kept.values()), "inputs were changed"


EDITS: dict[str, Callable[[Small, dict[str, Tensor]], Any]] = {
    "Knockout": lambda small, inputs: va.Knockout(heads=[0], layers=-1),
    "Steer": lambda small, inputs: va.Steer(keys=(0, 2), weight=0.5, layers=-1),
    "ScaleHeads": lambda small, inputs: va.ScaleHeads({1: [0]}, 0.5),
    "Patch": lambda small, inputs: va.Patch(va.record_heads(small.model, small.batch((1, 0))), {1: [0]}),
    "Residual": lambda small, inputs: va.Residual(0, scale=0.5),
    "Mlp": lambda small, inputs: va.Mlp(0, scale=0.5),
}
CONTEXTS: dict[str, Callable[[Small, dict[str, Tensor]], AbstractContextManager[Any]]] = {
    **{
        name: lambda small, inputs, edit=edit: va.intervene(small.model, inputs, edit(small, inputs))
        for name, edit in EDITS.items()
    },
    "capture_attention": lambda small, inputs: va.nn.capture_attention(small.model),
    "capture_relevancy": lambda small, inputs: va.nn.capture_relevancy(small.model),
    "replace_attention": lambda small, inputs: va.nn.replace_attention(small.model, score="cosine"),
}


def test_each_edit_has_a_line() -> None:
    kinds = [kind for base in (EdgeEdit, HeadEdit, StateEdit) for kind in base.__subclasses__()]
    assert {kind.__name__ for kind in kinds} == {*EDITS}, "add the new kind of edit to EDITS"


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("model", ["bert", "vit", "llama", "llava"])
def test_what_an_edit_changes_comes_back_to_the_bit(model: str, context: str) -> None:
    small = made(model)
    inputs, method = small.batch(), method_named("gradient")
    small.model(**inputs)
    before, logits, rows = state_of(small.model), small.model(**inputs).logits, small.explain(inputs, method).relevancy
    entered = CONTEXTS[context](small, inputs)
    with entered:
        edited = small.model(**inputs).logits
    assert torch.equal(edited, logits) == context.startswith("capture")
    if context != "replace_attention":
        for _ in range(2):  # a context may be entered again, also after an error in it
            with suppress(Planned), entered:
                small.model(**inputs)
                fail()
    for what in ("left", "left after an error"):
        assert_same(small.model, before, what)
    assert torch.equal(small.model(**inputs).logits, logits)
    for tower, row in small.explain(inputs, method).relevancy.items():
        assert torch.equal(row, rows[tower])
