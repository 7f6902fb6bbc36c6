"""A part of `make sanitize` (sanitize.py): edges of tiles, layouts and empty sizes. Under `address` products by tiles have a
stand-in for the instructions; the code that lays out tiles is the processor's, and other kernels are of the set that runs here.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.cases import SOME_CASES
from tools import sanitize, tiles
from tools.building import Missing

CHOSEN = {"address": "layouts or empty or grouped or test_pairs or panels", "thread": "layouts or grouped"}
SETS = {"address": ("amx",), "thread": ()}  # beside the one that runs here
# Threads divide a call by its sizes: one layout that is read where it lies, and one that is copied, have each size.
LEFT_OUT = {"address": "", "thread": " and not (sliced or offset or expanded)"}


def files_with(chosen: str) -> list[str]:
    """The files that have such tests: to collect all, too, takes a sanitizer longer than these tests."""
    named = re.compile(rf"test_\w*({chosen.replace(' or ', '|')})")
    files = [path for folder in sanitize.PATHS for path in sorted((sanitize.ROOT / folder).glob("test_*.py"))]
    return [str(path) for path in files if named.search(path.stem + path.read_text(encoding="utf-8"))]


def folder(kind: str) -> Path:
    try:
        return sanitize.sanitized(kind, sanitize.others_than_amx()[0], *SETS[kind])
    except Missing as missing:
        pytest.skip(str(missing))


def test_no_wrong_address_is_found() -> None:
    _run("address")


def test_no_race_is_found() -> None:
    _run("thread")


def _run(kind: str) -> None:
    chosen = f"{sanitize.CHOSEN} and ({CHOSEN[kind]}){LEFT_OUT[kind]}"
    instruction_set = [sanitize.others_than_amx()[0], *SETS[kind]][-1]
    options = (*SOME_CASES, "-x", *files_with(CHOSEN[kind]), "-k", chosen)
    done = sanitize.run(kind, folder(kind), instruction_set, *options)
    assert done.returncode == 0, done.stdout[-10000:]


def test_the_page_has_the_counts_of_tiles() -> None:
    """docs/reliability.md; the larger call takes longer than a test may."""
    folder("address")  # skips where it cannot be built
    page = (sanitize.ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines()
    assert tiles.HEADER in page
    _, *smaller = tiles.SIZES
    counted = tiles.lines(*smaller)
    if not sanitize.others_than_amx()[0].startswith("v4"):  # the stand-in has the vectors of this processor: fewer rows a tile
        counted = [line for line in counted if tiles.TILES not in line]
    assert counted and not [line for line in counted if line not in page]
