"""vlattn_fast.reference has every operator with its arguments, and refuses a name that it does not know, as public calls do."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.ops.every_call import small
from vlattn_fast.checking.cases import examples

X = torch.randn(1, 2, 3, 4)
ROWS = torch.zeros(1, 1, 3)
PLAIN = {example.operator: example for example in examples(small(3)) if not example.name}


def parameters(call: Callable[..., Any]) -> list[inspect.Parameter]:
    return [x for x in inspect.signature(call).parameters.values() if x.name != "backend"]


OPTIONS = [(name, option) for name in PLAIN for option in parameters(getattr(va, name)) if "str" in option.annotation]


@pytest.mark.parametrize("operator", PLAIN)
def test_a_formula_has_the_arguments_of_its_operator(operator: str) -> None:
    public, formula = (parameters(getattr(place, operator)) for place in (va, va.reference))
    expected = [(x.name, x.kind, x.default) for x in public]
    assert [(x.name, x.kind, x.default) for x in formula] == expected


@pytest.mark.parametrize(("operator", "option"), OPTIONS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_an_unknown_name_is_refused(operator: str, option: inspect.Parameter) -> None:
    arguments = PLAIN[operator].arguments(PLAIN[operator].tensors)
    wrong = {option.name: ("other",) if "[str" in option.annotation else "other"}
    for place in (va, va.reference):
        with pytest.raises(ValueError, match=f"^{option.name} must be "):
            getattr(place, operator)(**{**arguments, **wrong})


def test_every_option_of_names_is_asked() -> None:
    assert {option.name for _, option in OPTIONS} >= {"score", "rule", "weighting", "statistics", "kind", "aggregation"}


def test_the_rule_gradient_without_a_gradient_is_refused() -> None:
    for call in (lambda: va.reference.attention_map(X, X, rule="gradient"), lambda: va.reference.relevancy_step(ROWS, X, X)):
        with pytest.raises(ValueError, match="^value and grad_output must be given for rule='gradient'; got None"):
            call()
