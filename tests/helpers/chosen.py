"""A plug-in of pytest: `-p tests.helpers.chosen`, as `make test` asks for it, keeps the tests that run in minutes.

A test in FOLDERS keeps its first case of each operator on each backend. A test that is marked `slow` is left out, or its cases
with a word that the mark names: `@pytest.mark.slow("triton")`. What saw a planted fault (`python -m tools.planted --core`) stays.
`make test-all` runs every case.
"""

import json
import os
import re
from pathlib import Path

import pytest

os.environ["VLATTN_QUICK"] = "ON"  # tests/helpers/cuda/building.py
# There cases are sizes, dtypes, masks and options of a call. Elsewhere a case is a thing of its own: a page, a file, an example.
FOLDERS = tuple(
    f"tests/{name}/" for name in ("attach", "cpu", "cuda", "interpret", "kernels", "model_classes", "nn", "ops", "power")
)
SEES_A_FAULT = {
    row.get("by") for row in json.loads((Path(__file__).parents[2] / "tools" / "planted" / "core.json").read_text()).values()
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from vlattn_fast.ops import OPERATORS  # not before tests/conftest.py has imported the kernels

    names = {*OPERATORS, *(backend for operator in OPERATORS.values() for backend in operator.backends)}
    seen, kept = set[tuple[str, ...]](), []
    for item in items:
        test, _, words = item.nodeid.partition("[")
        case = test, *(word for word in re.findall(r"\w+", words) if word in names)
        if item.nodeid in SEES_A_FAULT or (not (test.startswith(FOLDERS) and case in seen) and not slow(item, words)):
            kept.append(item)
        seen.add(case)
    config.hook.pytest_deselected(items=list({*items} - {*kept}))
    items[:] = kept


def slow(item: pytest.Item, words: str) -> bool:
    mark = item.get_closest_marker("slow")
    return mark is not None and (not mark.args or not {*mark.args}.isdisjoint(re.findall(r"\w+", words)))
