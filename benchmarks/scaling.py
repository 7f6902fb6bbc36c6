"""Each operator over the length: time over the pairs of queries and keys, and memory over the length, should be flat.
 B 1, H 1 on a CPU. The bound is plain SDPA of the same length. The baselines of the operators' benchmarks run until their whole
maps need more than half of the free memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from vlattn_fast.benchmarks import (
    attention_map,
    attention_statistics,
    congruence_loss,
    relevancy_attention,
    score_attention,
    stacked_cross_attention,
)
from vlattn_fast.benchmarks._measure import Benchmark, Problem
from vlattn_fast.benchmarks._workloads import Sizes, Workload

LENGTHS = tuple(2**n for n in range(8, 15))
LONGEST = {"congruence_loss": 4096}  # text and image tokens: its change of basis grows with the cube of the length
Build = Callable[[Sizes, torch.device, torch.dtype], Problem]


def tokens(n: int) -> Sizes:
    return {"B": 1, "H": 16, "N": n, "D": 64}


def halves(n: int) -> Sizes:
    """Text and image tokens, N in all."""
    return {"B": 1, "H": 16, "L": n // 2, "V": n // 2, "D": 64}


def regions(n: int) -> Sizes:
    """N regions an image."""
    return {"images": 4, "captions": 4, "R": n, "T": 32, "D": 256}


# name, builder, and sizes at a length
OPERATORS: dict[str, tuple[Build, Callable[[int], Sizes]]] = {
    "score_attention, additive, forward+backward": (partial(score_attention.build, "additive", True), tokens),
    "relevancy_attention, forward+backward": (partial(relevancy_attention.build, relevancy_attention.ATTENTION), tokens),
    "attention_map, attention": (partial(attention_map.build, "attention", False), tokens),
    "attention_statistics, forward+backward": (partial(attention_statistics.build, True), tokens),
    "congruence_loss, cacr, forward+backward": (partial(congruence_loss.build, "cacr"), halves),
    "stacked_cross_attention, DAMSM, forward+backward": (partial(stacked_cross_attention.build, "DAMSM", True), regions),
}


def _workload(n: int, sizes: Callable[[int], Sizes]) -> Workload:
    full, quick = sizes(n), sizes(n // 32)
    return Workload(f"n{n}", f"length {n}", full, {"H": 1} if "H" in full else {}, {**quick, "H": 1} if "H" in full else quick)


BENCHMARKS = [
    Benchmark(__name__, operator, _workload(n, sizes), build, torch.bfloat16 if sizes is not regions else torch.float32)
    for operator, (build, sizes) in OPERATORS.items()
    for n in LENGTHS
    if n <= LONGEST.get(operator.split(",")[0], n)
]
