"""A plug-in of pytest: `-p tests.helpers.cases`, as `make test` asks for it, keeps some cases of each test.

A test in FOLDERS keeps its first case of each operator on each backend, and one in eight of the others, drawn by their names:
the same everywhere.
"""

from __future__ import annotations

import re

import pytest

from tests.helpers.accuracy import drawn

# There cases are sizes, dtypes, masks and options of a call. Elsewhere a case is a thing of its own: a page, a file, an example.
FOLDERS = tuple(f"tests/{name}/" for name in ("attach", "cpu", "cuda", "interpret", "kernels", "lab", "nn", "ops", "power"))
SHARE = "0/8"  # of the other cases


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Before items are deselected by -k, so that what is asked for by name is drawn as it is without."""
    from vlattn_fast.ops import OPERATORS  # not before tests/conftest.py has imported the kernels

    names = {*OPERATORS, *(backend for operator in OPERATORS.values() for backend in operator.backends)}
    seen, kept = set[tuple[str, ...]](), []
    for item in items:
        test, _, words = item.nodeid.partition("[")
        case = test, *(word for word in re.findall(r"\w+", words) if word in names)
        if not test.startswith(FOLDERS) or case not in seen or drawn(item.nodeid, SHARE):
            kept.append(item)
        seen.add(case)
    config.hook.pytest_deselected(items=list({*items} - {*kept}))
    items[:] = kept
