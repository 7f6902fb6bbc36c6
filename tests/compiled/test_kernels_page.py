"""docs/kernels.md is written from the stored table, and the arithmetic behind it."""

from __future__ import annotations

import json

import pytest

from tools.pages import kernel_times
from tools.pages.kernel_times import (
    Entry,
    Turn,
    carries_scores,
    floor_of,
    forward_configuration,
    last_end,
    programs_of,
    published,
    rate_of,
    seconds_of,
    times_of,
    turns_of,
)
from tools.pages.kernels_page import CLIP, COUNTS, ENTRIES, FORWARD, HIGHRES, LLAVA, OF_A_MAP, PAGE, UNITER, counts, newest, page

CLOCK, SMS = 1.83e9, 132


def test_the_page_is_that_of_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tools.pages.kernels_page writes it anew"
    assert json.loads(COUNTS.read_text(encoding="utf-8")) == counts()


def test_programs_go_over_the_tiles_that_hold_pairs() -> None:
    assert CLIP.programs(64, 64, None, by_key=False) == [(10, 0)] * 10
    assert CLIP.programs(128, 64, None, by_key=False) == [(10, 0)] * 5
    assert CLIP.programs(128, 64, 16, by_key=False) == [(9, 1)] * 5  # 577 keys are nine tiles of 64 and one of 16
    assert CLIP.programs(64, 128, 16, by_key=True) == [(9, 1)] * 5
    assert LLAVA.programs(64, 64, 64, by_key=False) == [(i, 1) for i in range(11)]  # below the diagonal and on it
    assert LLAVA.programs(64, 64, 64, by_key=True) == [(i, 0) for i in range(11, 0, -1)]
    assert LLAVA.programs(128, 64, 64, by_key=False) == [(0, 2), (2, 2), (4, 2), (6, 2), (8, 2), (10, 1)]
    assert LLAVA.programs(64, 128, 64, by_key=True) == [(i, 0) for i in (11, 9, 7, 5, 3, 1)]


DOT = {"tile": "128x64", "warps": 8, "edge": 16, "per_pair": 9.9, "cp_async": True, "loops": [[317, 8, 34], [213, 5, 10]]}


def test_the_columns_of_a_forward_pass_by_hand() -> None:
    entry = Entry("score_attention, dot, forward", CLIP, "score_attention dot bf16 64", FORWARD, 2, 4)
    times = times_of(entry, {"score_attention dot bf16 64 _forward_kernel sm_90": DOT})
    programs, keys = 1024 * 5, 9 * 64 + 16
    assert times.issue == pytest.approx(1e6 * programs * 256 * (9 * 317 + 213) / (128 * SMS * CLOCK))
    assert times.special == pytest.approx(1e6 * programs * 256 * (9 * 34 + 10) / (16 * SMS * CLOCK))
    assert times.products == pytest.approx(1e6 * programs * 2 * 2 * 64 * 128 * keys / 790e12)
    assert times.l2 == pytest.approx(1e6 * programs * 2 * keys * 64 * 2 / 6.65e12)
    assert times.memory == pytest.approx(1e6 * 4 * 1024 * 577 * 64 * 2 / 4.3e12)
    # an SM has 39 programs at most; instructions take longer than exponentials, and L2 less than the sum
    program = 1e6 * (700 / CLOCK) + (times.products + times.issue) * SMS / programs
    assert times.estimate == pytest.approx(1.3 + 39 * program)
    assert [round(x) for x in (times.issue, times.special, times.products, times.l2, times.memory)] == [130, 107, 126, 117, 70]
    assert round(times.estimate) == 273 and round(floor_of(entry)) == 110
    assert round(rate_of(entry, times.estimate)) == 319
    assert published(entry) == (333, 512, False)


def test_a_kernel_takes_no_less_than_l2_and_memory_and_waits_for_l2_without_asynchronous_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = Entry("score_attention, dot, forward", CLIP, "score_attention dot bf16 64", FORWARD, 2, 4)
    key = "score_attention dot bf16 64 _forward_kernel sm_90"
    first = times_of(entry, {key: DOT})
    waits = times_of(entry, {key: DOT | {"cp_async": False}})
    assert waits.estimate == pytest.approx(first.estimate + first.l2)
    for name in ("L2", "MEMORY"):
        with monkeypatch.context() as changed:
            changed.setattr(kernel_times, name, 1e11)
            slow = times_of(entry, {key: DOT})
        assert slow.estimate == pytest.approx(1.3 + (slow.l2 if name == "L2" else slow.memory)) and slow.estimate > 2000


def test_scores_ahead_run_beside_the_softmax() -> None:
    product = 2 * 128 * 128 * 64 * SMS / 790e12  # of 128 features
    many, few = Turn(128 * 4000, 0, 128 * 64), Turn(0, 16 * 10, 128 * 64)  # clocks of an SM: more and fewer than a product takes
    first = 700 / CLOCK
    assert seconds_of([(3, many)], 2, 128, ahead=False) == pytest.approx(first + 3 * (2 * product + 4000 / CLOCK))
    assert seconds_of([(3, many)], 2, 128, ahead=True) == pytest.approx(first + 3 * (product + 4000 / CLOCK))
    assert seconds_of([(3, few)], 2, 128, ahead=False) == pytest.approx(first + 3 * (2 * product + 10 / CLOCK))
    assert seconds_of([(3, few)], 2, 128, ahead=True) == pytest.approx(first + 3 * 2 * product)
    at_the_edge = 2 * (2 * product + 4000 / CLOCK)
    assert seconds_of([(3, few), (2, many)], 2, 128, ahead=True) == pytest.approx(first + 3 * 2 * product + at_the_edge)


def test_the_configuration_says_which_scores_are_ahead() -> None:
    carrying = {(entry.what, entry.workload) for entry in ENTRIES for kernel in entry.kernels if carries_scores(entry, kernel)}
    assert carrying == {("score_attention, dot, forward", workload) for workload in (LLAVA, HIGHRES)}
    _, table = newest()
    for entry in (entry for entry in ENTRIES if "_forward_kernel" in entry.kernels):
        config, row = forward_configuration(entry), table[f"{entry.call} _forward_kernel sm_90"]
        assert (f"{config['BLOCK_Q']}x{config['BLOCK_KV']}", config["num_warps"]) == (row["tile"], row["warps"])


def test_programs_go_to_the_sm_that_is_free_first() -> None:
    assert last_end([1.0] * SMS) == 1.0
    assert last_end([1.0] * (SMS + 1)) == 2.0
    assert last_end([3.0] + [1.0] * (SMS - 1) * 3) == 3.0
    assert last_end([1.0] * SMS * 2 + [3.0]) == 5.0


def test_a_program_of_a_map_has_a_tile_of_all_heads() -> None:
    row = {"tile": "128x128", "warps": 8, "edge": None, "per_pair": 5.2, "cp_async": True, "loops": [[332, 4, 64]]}
    key = "attention_map attention lse bf16 577 64 _map_kernel sm_90"
    assert programs_of(key, row, CLIP) == ([[(16, Turn(332 * 256, 64 * 256, 128 * 128))]] * 25, 64)
    entry = Entry("attention_map, attention, lse given", CLIP, key.removesuffix(" _map_kernel sm_90"), OF_A_MAP, 1, 2)
    times = times_of(entry, {key: row})
    assert times.l2 == pytest.approx(1e6 * 64 * 25 * 16 * (128 + 128) * 64 * 2 / 6.65e12)
    assert times.memory == pytest.approx(1e6 * (2 * 1024 * 577 * 64 * 2 + 64 * 577 * 577 * 4) / 4.3e12)


def test_published_rates_are_the_nearest_and_of_dot_products_alone() -> None:
    rates = {(entry.what, entry.workload): published(entry) for entry in ENTRIES}
    assert {key: rate for key, rate in rates.items() if rate} == {
        ("score_attention, dot, forward", CLIP): (333, 512, False),
        ("score_attention, dot, backward", CLIP): (272, 512, False),
        ("score_attention, dot, forward", UNITER): (333, 512, False),
        ("score_attention, dot, backward", UNITER): (272, 512, False),
        ("score_attention, dot, forward", LLAVA): (292, 512, True),
        ("score_attention, dot, backward", LLAVA): (316, 512, False),
        ("score_attention, dot, forward", HIGHRES): (616, 16384, True),
        ("score_attention, dot, backward", HIGHRES): (561, 16384, False),
    }


def test_no_estimate_is_below_its_floor() -> None:
    _, table = newest()
    assert [entry.what for entry in ENTRIES if times_of(entry, table).estimate < floor_of(entry)] == []


def test_each_pass_counts_its_loop_of_whole_tiles_and_that_of_the_edge() -> None:
    loops = [[320, 8, 32], [450, 8, 32], [640, 12, 34]]
    row = {"tile": "64x32", "warps": 4, "edge": 32, "per_pair": 10.0, "loops": loops}
    key = "score_attention dot bf16 64 _backward_q_kernel sm_90"
    assert turns_of(key, row, 64) == (Turn((320 + 640) * 128, (32 + 34) * 128, 64 * 32), Turn(0, 0, 64 * 32))
    row |= {"edge": 16, "loops": [loops[0], [200, 8, 10], loops[2], [300, 9, 18]]}
    edge = Turn((200 + 300) * 128, (10 + 18) * 128, 64 * 16)
    assert turns_of(key, row, 64) == (Turn((320 + 640) * 128, (32 + 34) * 128, 64 * 32), edge)
    assert turns_of(key.replace("_q_", "_kv_"), row, 64)[1].pairs == 16 * 32


def test_sums_over_units_count_their_two_loops() -> None:
    loops = [[693, 0, 98], [295, 0, 34], [540, 2, 20], [360, 0, 34]]
    row = {"tile": "64x32", "warps": 4, "edge": 32, "per_pair": None, "loops": loops}
    issue, special = 295 * 16 * 128, 34 * 16 * 128  # four units a turn, sixteen pairs a thread, and two weights' reciprocals
    key = "score_attention additive bf16 64 {} sm_90"
    assert turns_of(key.format("_forward_kernel"), row, 64)[0] == Turn(issue, special, 64 * 32)
    # of two queries and 32 keys a turn, of which there are two groups
    gradients = [[380, 0, 18], [310, 0, 18], [430, 0, 48]]
    row["loops"] += [[40, 0, 0], *gradients, [160, 0, 0]]
    key = key.format("_units_backward_kernel")
    whole = Turn(issue + 310 * 128 * 32, special + 18 * 128 * 32, 64 * 32)
    assert turns_of(key, row, 64) == (whole, Turn(0, 0, 0))
    for queries, times in ((1, 2), (4, 2), (5, 4), (63, 32)):  # each group takes two at a time
        turn = Turn(issue + 310 * 128 * times, special + 18 * 128 * times, 64 * 32)
        assert turns_of(key, row, 64, queries) == (turn, Turn(0, 0, 0))
    of_the_edge = [[160, 0, 16], [190, 0, 16], [350, 0, 48], *([n // 2, 0, m] for n, _, m in gradients)]
    row |= {"edge": 16, "loops": row["loops"] + of_the_edge}
    edge = Turn(160 * 16 * 128 + 155 * 128 * 32, 16 * 16 * 128 + 18 * 128 * 32, 64 * 16)
    assert turns_of(key, row, 64) == (whole, edge)
    row["loops"] = [[295, 0, 34], gradients[1]]
    turn = Turn(2 * issue + 310 * 128 * 32, 2 * special + 18 * 128 * 32, 64 * 32)
    assert turns_of(key.replace("additive", "hadamard_tanh"), row, 64)[0] == turn


def test_a_pass_over_units_counts_the_tiles_of_both_edges() -> None:
    gradients = [[n, 0, 34] for n in (510, 511, 512)]
    row = {"tile": "64x64", "warps": 4, "edge": None, "per_pair": None, "loops": [[531, 0, 64]] * 3 + gradients}
    key = "score_attention additive bf16 64 _units_backward_kernel sm_90"
    scores, slopes = 531 * 16 * 128, 510 * 128  # of a tile, and of a turn
    (head,), copies = programs_of(key, row, CLIP)
    assert copies == 1024
    assert [(count, turn.issue) for count, turn in head if count] == [
        (9 * 10, scores + 32 * slopes),  # 577 queries are nine tiles and one of a single query
        (10, scores + 2 * slopes),
    ]
    row |= {"edge": 16, "loops": row["loops"] + [[160, 0, 16]] * 3 + [[150, 0, 10]] * 3}
    few = 160 * 16 * 128, 150 * 128
    assert [(count, turn.issue) for count, turn in programs_of(key, row, CLIP)[0][0]] == [
        (9 * 9, scores + 32 * slopes),
        (9, few[0] + 32 * few[1]),
        (9, scores + 2 * slopes),
        (1, few[0] + 2 * few[1]),
    ]
