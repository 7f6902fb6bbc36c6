"""A plug-in of pytest: `-p tests.helpers.chosen`, as `make test` asks for it, keeps the tests that run in minutes.

A test in FOLDERS keeps its first case of each operator on each backend. What is marked `slow` is left out. `make test-all` runs
every case.
"""

from __future__ import annotations

import re

import pytest

# There cases are sizes, dtypes, masks and options of a call. Elsewhere a case is a thing of its own: a page, a file, an example.
FOLDERS = tuple(f"tests/{name}/" for name in ("attach", "cpu", "cuda", "interpret", "kernels", "nn", "ops", "power"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from vlattn_fast.ops import OPERATORS  # not before tests/conftest.py has imported the kernels

    names = {*OPERATORS, *(backend for operator in OPERATORS.values() for backend in operator.backends)}
    seen, kept = set[tuple[str, ...]](), []
    for item in items:
        test, _, words = item.nodeid.partition("[")
        case = test, *(word for word in re.findall(r"\w+", words) if word in names)
        again = test.startswith(FOLDERS) and case in seen
        if not again and item.get_closest_marker("slow") is None:
            kept.append(item)
        seen.add(case)
    config.hook.pytest_deselected(items=list({*items} - {*kept}))
    items[:] = kept
