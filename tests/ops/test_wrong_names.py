"""vlattn_fast.reference has the arguments of every operator; unknown names and groups that do not fit are refused."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.ops.backends import on
from tests.helpers.ops.every_call import small
from tests.helpers.ops.group_cases import GK, GQ, ON_GROUPS, H, M, N, groups, tensors
from tests.helpers.ops.properties import calls
from vlattn_fast.checking.cases import examples

X = torch.randn(1, 2, 3, 4)
ROWS = torch.zeros(1, 1, 3)
PLAIN = {example.operator: example for example in examples(small(3)) if not example.name}


OF_THE_CALL = "backend", "document_ids", "cu_seqlens"  # a formula is of one document


def parameters(call: Callable[..., Any]) -> list[inspect.Parameter]:
    return [x for x in inspect.signature(call).parameters.values() if x.name not in OF_THE_CALL]


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


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no bias": ({"group_bias": None}, ValueError, "group_bias must be given if one of query_groups"),
    "no pairs": ({"group_bias": torch.ones(H, 0, GK)}, ValueError, "Gq > 0 and Gk > 0; got a torch.float32 tensor"),
    "too large": (
        {"query_groups": torch.full((N,), GQ)},
        ValueError,
        r"query_groups must hold values from -1 \(no group\) to below 3; got values from 3 to 3",
    ),
    "too small": ({"key_groups": torch.full((M,), -2)}, ValueError, "key_groups must hold values from -1"),
}


@pytest.mark.parametrize("backend", ["streaming", "reference", "auto"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(backend: str, case: str) -> None:
    wrong, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        va.score_attention(**{**tensors(), **groups(), **wrong}, backend=backend)


@pytest.mark.parametrize("backend", ["streaming", "reference"])
@pytest.mark.parametrize("operator", ON_GROUPS)
def test_every_operator_checks_its_groups(operator: str, backend: str) -> None:
    call = next(call for call in calls(operator, "streaming") if "group_bias" in call.tensors)
    for wrong, words in ((torch.full((5,), 7), "query_groups must hold values from -1"), (None, "query_groups must be given")):
        with pytest.raises(ValueError, match=words):
            call.run(call.tensors, query_groups=wrong, backend=backend)


@on("sdpa")
def test_sdpa_refuses_it(backend: str) -> None:
    with pytest.raises(ValueError, match="SDPA has no group_bias"):
        va.score_attention(**tensors(backend), **groups(), backend=backend)
