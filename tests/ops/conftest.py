"""The suites of the operators: each behaviour once, for every backend (backends.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.ops.backends import DEVICE, INTERPRET, PTX, backend, cuda_library  # noqa: F401  fixtures
from vlattn_fast.backends.streaming import _tiles

# `make gpu` asks for no more than pytest: what needs hypothesis lies in files of this name
collect_ignore_glob = [] if DEVICE == "cpu" else ["*_properties.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a device only what takes a backend runs, and not the CPU's: the rest says nothing about it. Of emulated GPUs only what
    runs on their kernels."""
    if not INTERPRET:
        here = Path(__file__).parent
        items[:] = [item for item in items if item.path.parent != here or _of_device(item)]


def _of_device(item: pytest.Item) -> bool:
    if "backend" not in getattr(item, "fixturenames", ()):
        return False
    name = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    return name == "triton" if PTX else name != "cpu"


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streaming has several tiles in every dimension, and torch's fused kernel for dot products."""
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 30)
