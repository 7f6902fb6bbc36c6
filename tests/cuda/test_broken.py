"""Kernels broken on purpose: the tests of the operators on this backend catch each of them, by its numbers or by what the
emulator finds (tools/barriers.py removes every barrier)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.cuda import test_relevancy_attention, test_score_attention
from tests.helpers.cuda.building import changed
from tests.helpers.ops import backends
from tests.ops import test_congruence_loss


class Break(NamedTuple):
    operator: str
    what: str
    file: str
    old: str
    new: str
    caught_by: Callable[[], None]
    words: str  # of the failure


BARRIER = "__syncthreads();"
WAIT = "wait_for_copies<0>();"
BREAKS = [
    Break(
        "score_attention",
        "the last of an odd number of units left out",
        "additive_scores.h",
        "pairs = (A + 1) / 2;",
        "pairs = A / 2;",
        lambda: test_score_attention.test_feature_sizes(5, 1, torch.float32),
        "of what is allowed|must hold in",
    ),
    Break(
        "relevancy_attention",
        "no wait for the last copies",
        "relevancy_attention.cu",
        WAIT,
        "",
        lambda: test_relevancy_attention.test_sizes_either_side_of_a_slab(False, 17),
        "copies in flight at the end",
    ),
    Break(
        "congruence_loss",
        "no barrier before the divergence",
        "congruence_loss.cu",
        f"{BARRIER}\n        const float loss = divergence(",
        "const float loss = divergence(",
        lambda: test_congruence_loss.test_kinds_and_directions("cuda", (torch.float32, "cacr", "both")),
        "race in global memory: read after write",
    ),
]


@pytest.mark.parametrize("change", BREAKS, ids=lambda change: f"{change.operator}: {change.what}")
def test_a_broken_kernel_is_caught(change: Break, tmp_path: Path) -> None:
    change.caught_by()
    library = changed(change.operator, change.file, change.old, change.new, tmp_path)
    with backends.ready("cuda", library), pytest.raises(AssertionError, match=change.words):
        change.caught_by()
