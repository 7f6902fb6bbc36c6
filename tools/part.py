"""A plug-in of pytest: a part of the tests, and no longer than asked. tests/conftest.py takes it; packages, by `-p tools.part`.

VLATTN_SHARD=i/n keeps each n-th test from the i-th on. After VLATTN_UNTIL, in seconds of time.time(), tests are skipped.
"""

from __future__ import annotations

import os
import time
from typing import Any

NO_TIME = "no time was left"


def pytest_collection_modifyitems(items: list[Any]) -> None:
    if shard := os.environ.get("VLATTN_SHARD"):
        i, n = map(int, shard.split("/"))
        items[:] = items[i::n]


def pytest_runtest_setup() -> None:
    import pytest

    if time.time() > float(os.environ.get("VLATTN_UNTIL", "inf")):
        pytest.skip(NO_TIME)
