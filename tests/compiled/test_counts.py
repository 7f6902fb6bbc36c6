"""Counts of kernels: what a row holds, and which kernels are beyond the limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.releases import WITHOUT_PTX, needs_fences

pytest.importorskip("triton")
pytest.importorskip("ptx", reason=WITHOUT_PTX)
from ptx.running.launch import Launch
from ptx.running.reports import Accesses
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
def test_the_stored_rows_are_those_of_the_kernels(tmp_path: Path) -> None:
    """Of one call: `python -m tools.compiled.counts` stores all."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = "stacked_cross_attention --architectures 90 --only scan.bf16 --out".split()
    subprocess.run([sys.executable, "-m", "tools.compiled.counts", *words, tmp_path / "rows.json"], env=environment, check=True)
    names = ("call", "architecture", "kernel", "instructions", "flop", "wavefronts", "sectors", "once", "findings")
    rows, stored = ([[row[name] for name in names] for row in counts.read(*path)] for path in ((tmp_path / "rows.json",), ()))
    assert len(rows) > 5 and [row for row in stored if row[:2] == ["stacked_cross_attention scan bf16", "sm_90"]] == rows


def test_no_stored_row_is_out_of_date() -> None:
    """`python -m tools.compiled.counts --stale` counts those that are, and tools.pages.kernels_page writes the page."""
    assert [f"{row['call']} {row['kernel']} {row['architecture']}" for row in counts.read() if counts.is_stale(row)] == []


def test_a_row_of_another_text_is_out_of_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "_texts", {"3.9.0": {"maxsim bf16 128 _a_kernel sm_90": "1" * 12}}.__getitem__)
    row = {"call": "maxsim bf16 128", "kernel": "maxsim._a_kernel launch 2", "architecture": "sm_90", "triton": "3.9.0"}
    assert not counts.is_stale({**row, "text": "1" * 12}) and counts.is_stale({**row, "text": "2" * 12}) and counts.is_stale(row)
    assert not counts.is_stale({**row, "call": "maxsim causal"}) and not counts.is_stale({"nvcc": "13.0", "call": "cuda"})
