"""The suites of the operators: each behaviour once, for every backend (backends.py)."""

from pathlib import Path

import pytest

from tests.helpers.ops.backends import INTERPRET, PTX, backend, cuda_library  # noqa: F401  fixtures
from vlattn_fast.backends.streaming import _tiles


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a device only tests that take a backend run, and not the CPU's: the others say nothing about it. On emulated GPUs only
    tests of their kernels run."""
    if not INTERPRET:
        here = Path(__file__).parent
        items[:] = [item for item in items if here not in item.path.parents or _of_device(item)]


def _of_device(item: pytest.Item) -> bool:
    if "backend" not in getattr(item, "fixturenames", ()):
        return False
    name = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    return name == "triton" if PTX else name != "cpu"


@pytest.fixture(autouse=True)
def _tiles_of_the_module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module's TILE_ELEMENTS: so few numbers that streaming has several tiles."""
    if elements := getattr(request.module, "TILE_ELEMENTS", None):
        monkeypatch.setattr(_tiles, "TILE_ELEMENTS", elements)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streaming has several tiles in every dimension, and torch's fused kernel for dot products."""
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 30)
