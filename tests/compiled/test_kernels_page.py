"""docs/kernels.md is written from the stored table, and the arithmetic behind it."""

from __future__ import annotations

import json

from tests.compiled.kernels_page import CLIP, COUNTS, LLAVA, PAGE, counts, page, per_pair


def test_the_page_is_that_of_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.compiled.kernels_page writes it anew"
    assert json.loads(COUNTS.read_text(encoding="utf-8")) == counts()


def test_pairs_are_those_of_whole_tiles() -> None:
    assert CLIP.padded_pairs(64, 64) == 64 * 16 * 640 * 640
    assert CLIP.padded_pairs(128, 64) == 64 * 16 * 640 * 640
    tiles = sum(-(-min(704, rows) // 64) for rows in range(64, 705, 64))  # below the diagonal, and on it
    assert LLAVA.padded_pairs(64, 64) == 4 * 32 * tiles * 64 * 64


def test_each_pass_counts_its_loop_of_whole_tiles() -> None:
    row = {"tile": "64x64", "warps": 4, "per_pair": 10.0, "loops": [[320, 8, 32], [450, 8, 32], [640, 12, 64]]}
    assert per_pair("score_attention dot bf16 64 _backward_q_kernel sm_90", row, 64) == ((320 + 640) / 32, (32 + 64) / 32)


def test_sums_over_units_count_their_two_loops() -> None:
    row = {"tile": "64x32", "warps": 4, "per_pair": None, "loops": [[693, 0, 96], [295, 0, 32], [540, 2, 20], [360, 0, 32]]}
    scores = (295 * 16 / 16, 32 * 16 / 16)  # four units a turn, sixteen pairs a thread
    key = "score_attention additive bf16 64 {} sm_90"
    assert per_pair(key.format("_forward_kernel"), row, 64) == scores
    gradients = [[40, 0, 0], [380, 0, 18], [310, 0, 18], [430, 0, 48], [160, 0, 0]]  # of two queries and 32 keys a turn
    row["loops"] += gradients
    assert per_pair(key.format("_units_backward_kernel"), row, 64) == (scores[0] + 310 * 128 / 64, scores[1] + 18 * 128 / 64)
    row["loops"] = [[295, 0, 32], *gradients]
    assert per_pair(key.format("_units_backward_kernel").replace("additive", "hadamard_tanh"), row, 64) == (
        3 * scores[0] + 310 * 128 / 64,
        3 * scores[1] + 18 * 128 / 64,
    )
