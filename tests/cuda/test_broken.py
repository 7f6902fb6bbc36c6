"""Kernels broken on purpose: the tests of this folder must catch every one of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.cuda.building import changed, run_tests


class Break(NamedTuple):
    operator: str
    what: str
    file: str
    old: str
    new: str
    tests: str  # pytest's -k


BARRIER = "__syncthreads();"
WAIT = "wait_for_copies<0>();"
BREAKS = [
    Break(
        "score_attention",
        "the last of an odd number of units left out",
        "additive_scores.h",
        "pairs = (A + 1) / 2;",
        "pairs = A / 2;",
        "feature_sizes",
    ),
    Break("relevancy_attention", "no wait for the last copies", "relevancy_attention.cu", WAIT, "", "either_side_of_a_slab"),
    Break(
        "congruence_loss",
        "no barrier before the divergence",
        "congruence_loss.cu",
        f"{BARRIER}\n        const float loss = divergence(",
        "const float loss = divergence(",
        "kinds_and_directions",
    ),
]


@pytest.mark.parametrize("change", BREAKS, ids=lambda change: f"{change.operator}: {change.what}")
def test_a_broken_kernel_is_caught(change: Break, tmp_path: Path) -> None:
    library = changed(f"{change.operator}.cu", change.file, change.old, change.new, tmp_path)
    status, written = run_tests({change.operator: change.tests}, {**os.environ, "VLATTN_CUDA_LIBRARY": str(library)})
    assert status == 1 and " failed" in written, written
