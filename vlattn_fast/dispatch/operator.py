"""The description of an operator, for code that iterates over the operators."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vlattn_fast.dispatch.call import AttentionArguments, CallShape
from vlattn_fast.dispatch.choice import load
from vlattn_fast.dispatch.table import Table, refusals


class Operator(NamedTuple):
    """`call`: the public call, whose name is the operator's. `check` takes some of the call's arguments, and as `x` its
    `AttentionArguments`, checks them and returns the metadata that backends' limits use. `backends`: its table."""

    call: Callable[..., Any]
    check: Callable[..., CallShape]
    backends: Table

    @property
    def stem(self) -> str:
        return self.call.__name__

    @property
    def formula(self) -> Callable[..., Any]:
        """Returns the call's formula, whose arguments are the call's without `backend`."""
        formula: Callable[..., Any] = getattr(load(self.backends, "reference"), self.stem)
        return formula

    def describe(self, **named: Any) -> CallShape:
        """Checks the arguments of a call, and returns its metadata."""
        bound = inspect.signature(self.call).bind(**named)
        bound.apply_defaults()
        shared = {name: each for name, each in bound.arguments.items() if name in AttentionArguments._fields}
        names = inspect.signature(self.check).parameters
        return self.check(*[AttentionArguments(**shared) if name == "x" else bound.arguments[name] for name in names])

    def refusals(self, backend: str, arguments: Mapping[str, Any]) -> list[str]:
        """Returns why the backend does not support the call with these arguments, which are checked."""
        return refusals(self.backends, backend, self.describe(**arguments))
