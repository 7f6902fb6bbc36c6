"""VLATTN_SHARD=i/n keeps each n-th test of pytest from the i-th on. tests/conftest.py does it; packages take `-p tools.shard`."""

from __future__ import annotations

import os
from typing import Any


def pytest_collection_modifyitems(items: list[Any]) -> None:
    if shard := os.environ.get("VLATTN_SHARD"):
        i, n = map(int, shard.split("/"))
        items[:] = items[i::n]
