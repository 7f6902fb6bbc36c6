"""A model's forward pass with its attention where a trace sees it."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

from vlattn_fast.attach.session import visible
from vlattn_fast.interpret.records.record import Family
from vlattn_fast.interpret.records.unsupported import check_rules
from vlattn_fast.interpret.relevancy.method import Method
from vlattn_fast.interpret.relevancy.model_trace import Trace
from vlattn_fast.interpret.relevancy.tower_trace import submodule


class traced:  # noqa: N801 (used as a function is)
    """A trace of the forward pass within it; everything is put back on leaving, also by an exception."""

    def __init__(self, model: nn.Module, family: Family, method: Method) -> None:
        self._trace = Trace(model, family, method)
        self._roots = [submodule(model, tower.path, tower) for tower in family.towers]
        if self._trace.finds_towers:
            self._roots = [model.get_submodule(family.within)]
            check_rules(self._roots[0])
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Trace:
        try:
            # A context is pushed before it is entered, since Ctrl-C may come in between.
            contexts: tuple[contextlib.AbstractContextManager[Any], ...] = (visible(self._roots), self._trace)
            for context in contexts:
                self._stack.push(context)
                context.__enter__()
            for handle in self._trace.install():
                self._stack.callback(handle.remove)
        except BaseException:
            self._stack.close()
            raise
        return self._trace

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
