"""A plug-in of pytest: `-p tests.helpers.cases --one-case-in 4`, as `make test` asks for it, keeps some cases of each test.

A test in FOLDERS keeps its first case on each backend, and one in four of the others, drawn by their names: the same everywhere.
"""

from __future__ import annotations

import pytest

from tests.helpers.accuracy import drawn

# There cases are sizes, dtypes, masks and options of a call. Elsewhere a case is a thing of its own: a page, a file, an example.
FOLDERS = tuple(f"tests/{name}/" for name in ("attach", "cpu", "cuda", "interpret", "kernels", "lab", "nn", "ops", "power"))
SOME_CASES = ("-p", "tests.helpers.cases", "--one-case-in", "4")  # as `make test` has it, for tests that run pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-case-in", type=int, default=1, help="some cases of each test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Before items are deselected by -k, so that what is asked for by name is drawn as it is without."""
    many, seen = config.getoption("one_case_in"), set[tuple[str, str]]()
    kept = [item for item in items if _is_first(item, seen) or drawn(item.nodeid, f"0/{many}")]
    config.hook.pytest_deselected(items=list({*items} - {*kept}))
    items[:] = kept


def _is_first(item: pytest.Item, seen: set[tuple[str, str]]) -> bool:
    """Whether the test has no such case before; `seen` takes it up."""
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    case = item.nodeid.partition("[")[0], str(parameters.get("backend"))
    first = case not in seen or not item.nodeid.startswith(FOLDERS)
    seen.add(case)
    return first
