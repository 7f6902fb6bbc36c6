"""A part of `make aarch64` (tools/aarch64.py): every operator with its masks, dtypes and layouts, on emulated ARM."""

from __future__ import annotations

import pytest

from tests.helpers.cases import SOME_CASES
from tools import aarch64, building

WIDEST = aarch64.SETS[0]  # whose sources are those of the other, but for products of bfloat16
CHOSEN = "masks or grouped or layouts or precision or dtypes or every_score or directions or matches"


def test_every_operator_is_its_formula() -> None:
    try:
        folder = aarch64.build(WIDEST)
    except building.Missing as missing:
        pytest.skip(str(missing))
    operators = {path.stem.split("_")[0] for path in (building.ROOT / "vlattn_fast/backends/cpu").glob("[!_]*.py")}
    files = [str(path) for name in sorted(operators) for path in (building.ROOT / "tests/ops").glob(f"test_{name}*.py")]
    done = aarch64.run(folder, WIDEST, *SOME_CASES, "-x", *files, "-k", f"{aarch64.CHOSEN} and ({CHOSEN})")
    assert done.returncode == 0, done.stdout[-10000:]
