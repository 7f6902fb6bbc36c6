"""An operator's description of itself, for all who go through the operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from vlattn_fast.dispatch.call import Call
from vlattn_fast.dispatch.table import Table


class Operator(NamedTuple):
    """`call`: the public call, whose name is the operator's. `describe(**arguments)` checks the arguments of a call and returns
    the facts that backends' limits read. `backends`: its table."""

    call: Callable[..., Any]
    describe: Callable[..., Call]
    backends: Table

    @property
    def stem(self) -> str:
        return self.call.__name__
