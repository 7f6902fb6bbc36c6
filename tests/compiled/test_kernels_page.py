"""docs/kernels.md is written from the stored table, and the arithmetic behind it."""

from __future__ import annotations

import json

from tools.pages.kernels_page import CLIP, COUNTS, LLAVA, PAGE, Turn, counts, page, tiles_of, turns_of


def test_the_page_is_that_of_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tools.pages.kernels_page writes it anew"
    assert json.loads(COUNTS.read_text(encoding="utf-8")) == counts()


def test_tiles_are_those_that_hold_pairs() -> None:
    assert CLIP.tiles(64, 64, None, by_key=False) == (100, 0)
    assert CLIP.tiles(128, 64, None, by_key=False) == (50, 0)
    assert CLIP.tiles(128, 64, 16, by_key=False) == (45, 5)  # 577 keys are nine tiles of 64 and one of 16
    assert CLIP.tiles(64, 128, 16, by_key=True) == (45, 5)
    below_the_diagonal_and_on_it = sum(range(1, 12))
    assert LLAVA.tiles(64, 64, 64, by_key=False) == LLAVA.tiles(64, 64, 64, by_key=True) == (below_the_diagonal_and_on_it, 0)


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
    assert [(count, turn.issue) for count, turn in tiles_of(key, row, CLIP) if count] == [
        (9 * 10, scores + 32 * slopes),  # 577 queries are nine tiles and one of a single query
        (10, scores + 2 * slopes),
    ]
    row |= {"edge": 16, "loops": row["loops"] + [[160, 0, 16]] * 3 + [[150, 0, 10]] * 3}
    few = 160 * 16 * 128, 150 * 128
    assert [(count, turn.issue) for count, turn in tiles_of(key, row, CLIP)] == [
        (9 * 9, scores + 32 * slopes),
        (9, few[0] + 32 * few[1]),
        (9, scores + 2 * slopes),
        (1, few[0] + 2 * few[1]),
    ]
