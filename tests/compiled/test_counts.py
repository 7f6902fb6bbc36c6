"""Counts of kernels: what a row holds, and which kernels are beyond the limits."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.releases import WITHOUT_PTX

pytest.importorskip("triton")
pytest.importorskip("ptx", reason=WITHOUT_PTX)
from ptx.running.launch import Launch
from ptx.running.reports import Accesses
from ptx.testing import needs_fences
from tools.compiled import counts

SHAPES = {"x.q.p": (2, 3, 5, 8), "x.k.p": (2, 1, 7, 8), "p_out": (2, 3, 5, 8)}


def launch(**facts: Any) -> Launch:
    return Launch("file.kernel", (10, 1, 1), lanes={"float": 420, "mma": 0}, **facts)


def test_a_row_has_the_programs_that_ran() -> None:
    row = counts._row(launch(accesses=Accesses(20, 19, 4, 3), once=(3, 2), flop=7), 2)
    assert (row["programs"], row["grid"], row["instructions"], row["flop"]) == (2, 10, {"float": 420}, 7)
    assert counts.conflicts(row) == pytest.approx(0.05) and counts.used(row) == 0.75 and counts.used_once(row) == 2 / 3
    assert counts._row(launch(), 20)["programs"] == counts._row(launch(), 0)["programs"] == 10
    row = counts._row(launch(), 2)
    assert (counts.conflicts(row), counts.used(row), counts.used_once(row)) == (0, 1, 1) and not counts.beyond(row)


def test_pairs_are_heads_queries_and_keys() -> None:
    assert counts._pairs(launch(shapes=SHAPES)) == (6, 5, 7)
    assert counts._pairs(launch()) is None


@pytest.mark.parametrize(
    ("conflicting", "sectors", "numbers"),
    [(4, 80, []), (6, 100, ["conflicts"]), (0, 79, ["sectors"]), (6, 79, ["conflicts", "sectors"])],
)
def test_the_limits(conflicting: int, sectors: int, numbers: list[str]) -> None:
    assert counts.beyond({"wavefronts": (100, 100 - conflicting), "sectors": (100, sectors)}) == numbers


@needs_fences
@pytest.mark.slow
def test_a_call_is_counted(tmp_path: Path) -> None:
    """Each of its kernels; --missing then counts nothing anew."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = "stacked_cross_attention --architectures 90 --only scan.bf16 --missing --out".split()
    command = [sys.executable, "-m", "tools.compiled.counts", *words, tmp_path / "rows.json"]
    for printed in (True, False):
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        assert bool(done.stdout) is printed
    rows = counts.read(tmp_path / "rows.json")
    assert {row["call"] for row in rows} == {"stacked_cross_attention scan bf16"} and len({row["kernel"] for row in rows}) > 5
    for row in rows:
        assert row["findings"] == 0 and sum(row["instructions"].values()) > 0 and row["sectors"][0] >= row["sectors"][1] > 0
