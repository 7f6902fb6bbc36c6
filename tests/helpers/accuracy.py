"""Which tests compare with the formula (marked `accuracy`), and a draw of them; tests/conftest.py applies both."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Iterator
from typing import Any

SEED = 9  # stored, so that a draw is the same everywhere
COMPARATORS = ("assert_close_to", "assert_all_close_to")


def compares(function: Callable[..., Any], seen: set[int] | None = None) -> bool:
    """Whether the test calls a comparator of compare.py, by itself or through helpers of the tests."""
    seen = set() if seen is None else seen
    function = getattr(function, "__wrapped__", function)  # hypothesis's and others' wrappers
    inner = getattr(getattr(function, "hypothesis", None), "inner_test", None)
    if not isinstance(function := inner or function, types.FunctionType) or id(function) in seen:
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


def drawn(test: str, share: str) -> bool:
    """Whether the test, by its name, is in this share: "i/n" is one test in n, and no test is in two of them."""
    which, of = map(int, share.split("/"))
    return int(hashlib.sha256(f"{SEED} {test}".encode()).hexdigest(), 16) % of == which
