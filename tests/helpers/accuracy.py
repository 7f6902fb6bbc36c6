"""Which tests compare with the formula; tests/conftest.py marks them `accuracy`."""

import types
from collections.abc import Callable, Iterator
from typing import Any

COMPARATORS = ("assert_close_to", "assert_all_close_to")


def compares(function: Callable[..., Any], seen: set[int] | None = None) -> bool:
    """Whether the test calls a comparator of compare.py, by itself or through helpers of the tests."""
    seen = set() if seen is None else seen
    function = getattr(function, "__wrapped__", function)
    if not isinstance(function, types.FunctionType) or id(function) in seen:
        return False
    seen.add(id(function))
    for name in _names(function.__code__):
        called = function.__globals__.get(name)
        if name in COMPARATORS and called is not None:
            return True
        if getattr(called, "__module__", "").startswith("tests.") and compares(called, seen):
            return True
    return False


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)
