"""The description of an operator, for code that iterates over the operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vlattn_fast.dispatch.call import CallShape
from vlattn_fast.dispatch.choice import load
from vlattn_fast.dispatch.table import Table, refusals


class Operator(NamedTuple):
    """`call`: the public call, whose name is the operator's. `describe(**arguments)` checks the arguments of a call and returns
    the metadata that backends' limits use. `backends`: its table."""

    call: Callable[..., Any]
    describe: Callable[..., CallShape]
    backends: Table

    @property
    def stem(self) -> str:
        return self.call.__name__

    @property
    def formula(self) -> Callable[..., Any]:
        """Returns the call's formula, whose arguments are the call's without `backend`."""
        formula: Callable[..., Any] = getattr(load(self.backends, "reference"), self.stem)
        return formula

    def refusals(self, backend: str, arguments: Mapping[str, Any]) -> list[str]:
        """Returns why the backend does not support the call with these arguments, which are checked."""
        return refusals(self.backends, backend, self.describe(**arguments))
