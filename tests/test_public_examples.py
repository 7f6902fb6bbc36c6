"""Each operator, layer, score and training term has an example in its docstring; `--doctest-modules` runs them."""

import inspect
from typing import Any

import pytest
from torch import nn

import vlattn_fast as va
from vlattn_fast.attach.training import TrainingContext

PUBLIC: dict[str, Any] = {
    f"{package.__name__}.{name}": getattr(package, name)
    for package in (va, va.models, va.nn, va.scores, va.train)
    for name in package.__all__
}
OPERATORS = {name for name, x in PUBLIC.items() if inspect.isfunction(x) and x.__module__.startswith("vlattn_fast.ops.")}
CLASSES = {name for name, x in PUBLIC.items() if inspect.isclass(x) and issubclass(x, (nn.Module, TrainingContext))}
SCORES = {f"vlattn_fast.scores.{score.__name__}" for score in va.scores.SCORES.values()}


@pytest.mark.parametrize("name", sorted(OPERATORS | CLASSES | SCORES))
def test_has_an_example(name: str) -> None:
    assert ">>>" in (inspect.getdoc(PUBLIC[name]) or "")
