"""The page of estimates is made of counts; its arithmetic, on invented counts."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.releases import WITHOUT_PTX

pytest.importorskip("triton")
pytest.importorskip("ptx", reason=WITHOUT_PTX)
from tools.compiled import counts, table
from tools.compiled.counts import LEAST_USED, MOST_CONFLICTS, counted_calls
from tools.compiled.triton import operators
from tools.pages import kernels_page
from tools.pages.cuda_times import PAIRS, estimates
from tools.pages.kernel_entries import CLIP, ENTRIES, FORWARD
from tools.pages.kernel_limits import lines_beyond, reasons_of
from tools.pages.kernel_times import LAUNCH, Entry, floor_of, nearest, rate_of, times_of

CLOCK, SMS = 1.83e9, 132
CALL = "score_attention cosine bf16 64"  # whose kernel computes no scores ahead


def limits(call: str, kernel: str, wavefronts: list[int], sectors: list[int]) -> dict[str, Any]:
    facts = {"architecture": "sm_80", "programs": 2, "grid": 4, "once": [10, 9]}
    return {"call": call, "kernel": kernel, "wavefronts": wavefronts, "sectors": sectors, **facts}


def test_the_limits_by_hand() -> None:
    assert (MOST_CONFLICTS, LEAST_USED) == (0.05, 0.8)
    within = limits("x masked fp32", "_products_backward.a", [100, 96], [100, 80])
    both = limits("x masked fp32", "_products_backward.b", [100, 94], [100, 79])
    unknown = limits("x bf16", "_products_backward.c", [0, 0], [100, 0])
    assert list(reasons_of(within)) == []
    assert [(what, reason.name) for what, reason in reasons_of(both)] == [("conflicts", "float32"), ("sectors", "float masks")]
    assert list(reasons_of(unknown)) == [("sectors", None)]
    assert lines_beyond([within, both, unknown])[-3:] == [
        "| `_products_backward.b` | 1 | sm_80 | 6% |  |  | 50% | float32 |",
        "| `_products_backward.b` | 1 | sm_80 |  | 79% | 90% | 50% | float masks |",
        "| `_products_backward.c` | 1 | sm_80 |  | 0% | 90% | 100% | not known |",
    ]


def row(**facts: Any) -> dict[str, Any]:
    """Of 2 of 80 programs of a call with 16 heads."""
    instructions = {"integer": 1_000_000, "special": 500_000, "move": 7_000_000, "cp.async": 100_000}
    counts = {"instructions": instructions, "flop": 40_000_000, "sectors": [10_000, 9_000], "once": [8_000, 8_000]}
    return {"programs": 2, "grid": 80, "pairs": [16, 577, 577], **counts, **facts}


SIDES = [side for pair in PAIRS for side in (pair.triton, pair.cuda)]
NAMED = sorted({(one.call, kernel) for one in (*ENTRIES, *SIDES) for kernel in one.kernels})


def test_the_page_is_made_of_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each pass and for each kernel."""
    facts = {"architecture": "sm_90", "wavefronts": [100, 96], "triton": "3.9.0"}
    rows = [row(call=call, kernel=f"module.{kernel}", **facts) for call, kernel in NAMED]
    counts.write(tmp_path / "counts.json", rows)
    stored = json.loads((tmp_path / "counts.json").read_text())
    monkeypatch.setattr(kernels_page, "read", lambda: stored)
    compiled = {f"{call} {kernel} sm_90": {"registers": 123, "spills": 4} for call, kernel in NAMED}
    table.write(tmp_path / "table.json", {"3.6.0": {}, "3.9.0": compiled})
    monkeypatch.setattr(kernels_page, "TABLE", tmp_path / "table.json")
    text = kernels_page.page()
    for workload in {entry.workload for entry in ENTRIES}:
        section = text.split(f"## {workload.name}\n")[1].split("\n## ")[0]
        assert [line.split(" | ")[0][2:] for line in section.splitlines() if line.startswith("| ") and "---" not in line] == [
            "µs", *(entry.what for entry in ENTRIES if entry.workload == workload)
        ]  # fmt: skip
    for call, kernel in {(entry.call, kernel) for entry in ENTRIES for kernel in entry.kernels}:
        assert f"| `{call} {kernel}` | " in text and " | 123 | 4 |" in text


def test_the_page_names_calls_that_are_counted() -> None:
    known = {f"{name} {call}" for name in operators() for call in counted_calls(name)}
    assert [call for call, _ in NAMED if call not in known] == []


def test_a_graph_takes_the_launches_off() -> None:
    rows = {named: row() for named in NAMED}
    for pair in PAIRS:
        for side in (pair.triton, pair.cuda):
            with_launches, graph = estimates(pair, side, 16, rows)
            assert with_launches - graph == pytest.approx(1e6 * LAUNCH * (len(side.kernels) + side.further))
            alone = estimates(pair, side, 1, rows)[1]
            assert 0 < alone <= graph <= 17 * alone


DOT = Entry("score_attention, dot, forward", CLIP, CALL, FORWARD, 2, 4)


def test_the_columns_of_a_forward_pass_by_hand() -> None:
    times = times_of(DOT, {(CALL, "_forward_kernel"): row()})
    programs = 80 * 64  # of 1,024 heads
    assert times.issue == pytest.approx(1e6 * programs * 800_000 / (128 * SMS * CLOCK))
    assert times.special == pytest.approx(1e6 * programs * 250_000 / (16 * SMS * CLOCK))
    assert times.products == pytest.approx(1e6 * programs * 20e6 / 790e12)
    assert times.l2 == pytest.approx(1e6 * programs * 5_000 * 32 / 6.65e12)
    assert times.memory == pytest.approx(1e6 * 4 * 1024 * 577 * 64 * 2 / 4.3e12)
    # an SM has 39 programs at most; special functions take longer than instructions, and L2 less than the sum
    program = 1e6 * (700 / CLOCK) + (times.products + times.special) * SMS / programs
    assert times.estimate == pytest.approx(1.3 + 39 * program)
    assert [round(x) for x in (times.issue, times.special, times.products, times.l2, times.memory)] == [132, 331, 130, 123, 70]
    assert round(times.estimate) == 480 and round(floor_of(DOT)) == 110
    assert round(rate_of(DOT, times.estimate)) == 182
    assert nearest(DOT) == (282, 335, 333, 512, False)
