"""The page of estimates is made of counts; its arithmetic, on invented counts."""

from __future__ import annotations

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
from tools.pages import kernel_times, kernels_page
from tools.pages.cuda_times import PAIRS, estimates
from tools.pages.kernel_entries import CLIP, ENTRIES, FORWARD, HIGHRES, LLAVA, UNITER, VIT
from tools.pages.kernel_limits import lines_beyond, reasons_of
from tools.pages.kernel_times import LAUNCH, Entry, Workload, floor_of, nearest, rate_of, share_under_softmax, times_of
from vlattn_fast.benchmarks._rates import H200

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


def test_a_kernel_takes_no_less_than_l2_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {(CALL, "_forward_kernel"): row()}
    for name, slow_one in (("L2", 1e11), ("H200", H200._replace(memory=1e11))):
        with monkeypatch.context() as changed:
            changed.setattr(kernel_times, name, slow_one)
            slow = times_of(DOT, rows)
        assert slow.estimate == pytest.approx(1.3 + (slow.l2 if name == "L2" else slow.memory)) and slow.estimate > 2000


def test_without_asynchronous_copies_a_kernel_waits_for_l2_and_has_a_sector_once() -> None:
    first = times_of(DOT, {(CALL, "_forward_kernel"): row()})
    waits = times_of(DOT, {(CALL, "_forward_kernel"): row(instructions={"integer": 1_100_000, "special": 500_000})})
    assert (waits.issue, waits.special, waits.products) == (first.issue, first.special, first.products)
    assert waits.l2 == pytest.approx(first.l2 * 0.8)
    assert waits.estimate == pytest.approx(first.estimate + waits.l2)


def test_more_tokens_than_the_call_has_take_more_programs_and_longer_ones() -> None:
    twice = Entry(DOT.what, Workload("twice", 64, 16, 2 * 577, 64), CALL, FORWARD, 2, 4)
    rows = {(CALL, "_forward_kernel"): row()}
    first, second = times_of(DOT, rows), times_of(twice, rows)
    for name in ("issue", "special", "products", "l2"):
        assert getattr(second, name) == pytest.approx(4 * getattr(first, name))
    assert second.memory == pytest.approx(2 * first.memory)
    program = 1e6 * (700 / CLOCK) + 2 * (first.products + first.special) * SMS / (80 * 64)
    assert second.estimate == pytest.approx(1.3 + 78 * program)


def test_scores_ahead_overlap_the_softmax_and_causal_programs_fill_the_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    causal = Entry(DOT.what, Workload("causal", 64, 16, 577, 64, causal=True), CALL, FORWARD, 2, 4)
    rows = {(CALL, "_forward_kernel"): row()}
    programs = 80 * 64 / SMS  # of an SM
    monkeypatch.setattr(kernel_times, "causal_time", lambda blocks, heads, work, elements: programs * 700 / CLOCK + work / SMS)
    for special, beside in ((500_000, 0.0), (50_000, 0.5)):  # longer and shorter than half of the products
        rows = {(CALL, "_forward_kernel"): row(instructions={"special": special, "cp.async": 1})}
        times = times_of(causal, rows)
        assert times.estimate == pytest.approx(1.3 + 1e6 * programs * 700 / CLOCK + times.products + times.special)
        with monkeypatch.context() as changed:
            changed.setattr(kernel_times, "share_under_softmax", lambda entry, kernel: 0.5)
            ahead = times_of(causal, rows).estimate
        assert ahead == pytest.approx(times.estimate - (times.special if beside else times.products / 2))


def test_causal_programs_end_by_the_order_of_their_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three SMs and three heads. Blocks take 3, 3, 3, 2, 2, 2, 1, 1, 1 seconds where all heads are in the cache together. Else
    they take 3, 2, 1 of one head after the other: then the last head's first block begins after 4 seconds."""
    monkeypatch.setattr(kernel_times, "SMS", 3)
    monkeypatch.setattr(kernel_times, "FIRST", 0.0)
    cached = kernel_times.CACHED.value
    assert kernel_times.causal_time(3, 3, 18.0, cached // 6) == pytest.approx(6.0)
    assert kernel_times.causal_time(3, 3, 18.0, cached // 2) == pytest.approx(7.0)
    monkeypatch.setattr(kernel_times, "FIRST", 0.5)  # a program
    assert kernel_times.causal_time(3, 3, 18.0, cached // 6) == pytest.approx(7.5)


def test_blocks_that_add_in_turns_wait_for_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of 128 keys, on SMs of their own, and a second for each tile of queries, which a block passes on half a second
    later. Without a mask both begin with the first tile: the second block ends 1.5 seconds later. With the causal mask the block
    of the last keys has two tiles, and passes them on before the other block comes to them."""
    monkeypatch.setattr(kernel_times, "FIRST", 0.0)
    full, causal = (Workload("two blocks", 1, 1, 256, 128, causal) for causal in (False, True))
    assert kernel_times.turns_time(full, 8.0) == pytest.approx(4 + 1.5)
    assert kernel_times.turns_time(causal, 6.0) == pytest.approx(4)


def test_a_map_is_memory_too() -> None:
    entry = Entry("attention_map, attention, lse given", CLIP, CALL, {"_map_kernel": 2}, 1, 2)
    times = times_of(entry, {(CALL, "_map_kernel"): row()})
    assert times.memory == pytest.approx(1e6 * (2 * 1024 * 577 * 64 * 2 + 64 * 577 * 577 * 4) / 4.3e12)


def test_the_configuration_says_which_scores_are_ahead() -> None:
    """Those of more than 64 features and up to 1,024 tokens."""
    carrying = {
        (entry.what, entry.workload) for entry in ENTRIES for kernel in entry.kernels if share_under_softmax(entry, kernel)
    }
    assert carrying == {("score_attention, dot, forward", LLAVA)}


def test_published_rates_are_the_nearest_and_of_dot_products_alone() -> None:
    rates = {(entry.what, entry.workload): nearest(entry) for entry in ENTRIES}
    assert {key: rate[2:] for key, rate in rates.items() if rate} == {
        ("score_attention, dot, forward", CLIP): (333, 512, False),
        ("score_attention, dot, backward", CLIP): (272, 512, False),
        ("score_attention, dot, forward", UNITER): (333, 512, False),
        ("score_attention, dot, backward", UNITER): (272, 512, False),
        ("score_attention, dot, forward", VIT): (333, 512, False),
        ("score_attention, dot, backward", VIT): (272, 512, False),
        ("score_attention, dot, forward", LLAVA): (292, 512, True),
        ("score_attention, dot, backward", LLAVA): (316, 512, False),
        ("score_attention, dot, forward", HIGHRES): (616, 16384, True),
        ("score_attention, dot, backward", HIGHRES): (561, 16384, False),
    }
