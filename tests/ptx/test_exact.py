"""Pairs of ways to compute one thing, equal to the bit under FpSan, and calls under ConSan, without a report.

`make ptx` runs all of them, for the architectures that VLATTN_EXACT names; else a tenth of them runs.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.helpers.ptx.exact import ARCHITECTURES, Item, differing, items
from tests.helpers.releases import needs_sanitizers

ALL = os.environ.get("VLATTN_EXACT", "").split()


def drawn(architecture: int, item: Item) -> bool:
    """Whether an item is in the tenth: the same one on every machine, until its title changes."""
    return int(hashlib.sha256(f"{architecture} {item.title}".encode()).hexdigest(), 16) % 10 == 0


ITEMS = [(architecture, item) for architecture in ARCHITECTURES for item in items()]
CHOSEN = [(n, item) for n, item in ITEMS if (str(n) in ALL if ALL else drawn(n, item))]


@pytest.fixture(scope="module")
def compiling() -> Iterator[ProcessPoolExecutor]:
    """The kernels of this process are those of Triton's interpreter (tests/conftest.py)."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=gc.disable) as pool:
        yield pool


@needs_sanitizers
@pytest.mark.parametrize(("architecture", "item"), CHOSEN, ids=[f"sm_{n} {item.title}" for n, item in CHOSEN])
def test_both_ways_are_equal_to_the_bit(architecture: int, item: Item, compiling: ProcessPoolExecutor) -> None:
    assert compiling.submit(differing, item, architecture).result() == {}
