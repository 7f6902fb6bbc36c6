"""A part of `make sanitize` (sanitize.py), with the instruction set that runs here: edges of tiles, layouts and empty sizes."""

from __future__ import annotations

import pytest

from tests.helpers.cpu.building import KINDS, sanitized
from tools import sanitize
from vlattn_fast.backends import native

CHOSEN = {"address": "layouts or empty or grouped", "thread": "layouts or grouped"}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_found(kind: str) -> None:
    widest = native._available()[0]
    chosen = f"{sanitize.CHOSEN} and ({CHOSEN[kind]})"
    done = sanitize.run(kind, sanitized(kind, widest), widest, "-x", *sanitize.PATHS, "-k", chosen)
    assert done.returncode == 0, done.stdout[-10000:]
