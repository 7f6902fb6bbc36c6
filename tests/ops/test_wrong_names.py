"""vlattn_fast.reference has every operator with its arguments, and refuses a name that it does not know, as public calls do."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import vlattn_fast as va

X = torch.randn(1, 2, 3, 4)
ROWS = torch.zeros(1, 1, 3)
CALLS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "score_attention": ((X, X, X), ("score",)),
    "relevancy_attention": ((X, X, X, ROWS), ("rule",)),
    "relevancy_residual": ((X[0], X[0], torch.zeros(2, 1, 3), torch.zeros(2, 1, 3)), ("weighting",)),
    "relevancy_step": ((ROWS, X, X), ("rule",)),
    "attention_map": ((X, X), ("rule", "head_reduction")),
    "attention_statistics": ((X, X), ("statistics",)),
    "congruence_loss": (((X, X), (X, X)), ("kind", "direction", "reduction")),
    "stacked_cross_attention": ((X[0], X[0]), ("direction", "first_norm", "aggregation")),
}


@pytest.mark.parametrize("operator", [*CALLS, "damsm_similarity"])
def test_a_formula_has_the_arguments_of_its_operator(operator: str) -> None:
    public, formula = (inspect.signature(getattr(place, operator)).parameters for place in (va, va.reference))
    expected = [(x.name, x.kind, x.default) for x in public.values() if x.name != "backend"]
    assert [(x.name, x.kind, x.default) for x in formula.values()] == expected


@pytest.mark.parametrize("operator, option", [(name, option) for name, (_, options) in CALLS.items() for option in options])
def test_an_unknown_name_is_refused(operator: str, option: str) -> None:
    for place in (va, va.reference):
        with pytest.raises(ValueError, match=f"^{option} must be "):
            getattr(place, operator)(*CALLS[operator][0], **{option: ("other",) if option == "statistics" else "other"})


def test_the_rule_gradient_without_a_gradient_is_refused() -> None:
    for call in (lambda: va.reference.attention_map(X, X, rule="gradient"), lambda: va.reference.relevancy_step(ROWS, X, X)):
        with pytest.raises(ValueError, match="^value and grad_output must be given for rule='gradient'; got None"):
            call()
