"""Counts of kernels: what a pair is, and which launches are listed."""

from __future__ import annotations

import pytest

from ptx.reports import Accesses, Launch

pytest.importorskip("triton")
from ptx import counts  # noqa: E402

SHAPES = {"x.q.p": (2, 3, 5, 8), "x.k.p": (2, 1, 7, 8), "p_out": (2, 3, 5, 8)}


def launch(**facts: object) -> Launch:
    return Launch("file.kernel", (10, 1, 1), lanes={"float": 420, "mma": 0}, **facts)  # type: ignore[arg-type]


def test_a_few_programs_stand_for_all() -> None:
    row = counts._row(launch(shapes=SHAPES, accesses=Accesses(20, 19, 4, 3)), 2, counts._pairs(launch(shapes=SHAPES)))
    assert row["programs"] == "2 of 10" and row["by_kind"] == {"float": 10.0} and row["instructions"] == 10.0  # 42 of 210 pairs
    assert row["shared_conflicts"] == 0.05 and row["sectors_used"] == 0.75 and row["instructions_of"] == "a pair"
    row = counts._row(launch(), 20, counts._pairs(launch()))
    assert row["programs"] == "10 of 10" and row["instructions"] == 42.0 and row["instructions_of"] == "a program"
    assert row["shared_conflicts"] is None is row["sectors_used"]


def test_what_is_beyond_the_limits_is_listed() -> None:
    facts = {"call": "a call", "kernel": "a kernel", "architecture": "sm_90"}
    rows = [{**facts, "shared_conflicts": x, "sectors_used": y} for x, y in ((0.05, 0.8), (None, None), (0.06, 1.0), (0.0, 0.79))]
    assert list(counts.beyond(rows)) == [
        "a call, a kernel on sm_90: conflicts 6.0%, sectors used 100.0%",
        "a call, a kernel on sm_90: conflicts 0.0%, sectors used 79.0%",
    ]
