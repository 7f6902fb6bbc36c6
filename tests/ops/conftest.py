"""The suites of the operators: each behaviour once, for every backend (backends.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ops.backends import INTERPRET, backend, cuda_library  # noqa: F401  fixtures
from vlattn_fast.streaming import _tiles

# `make gpu` asks for no more than pytest: what needs hypothesis lies in files of this name
collect_ignore_glob = [] if INTERPRET else ["*_properties.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a device only what takes a backend runs: the rest says nothing about it."""
    if not INTERPRET:
        here = Path(__file__).parent
        items[:] = [item for item in items if item.path.parent != here or "backend" in getattr(item, "fixturenames", ())]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streaming has several tiles in every dimension, and torch's fused kernel for dot products."""
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 30)
