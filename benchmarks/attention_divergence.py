"""The divergence of two attentions, row by row, and its gradients: those of both sides, or of a student whose teacher is fixed.

Bound: plain SDPA of the same shape, of which a divergence has two. The formula and its compilation hold whole maps of both sides.
"""

from __future__ import annotations

from functools import partial

import torch

from vlattn_fast.benchmarks._bounds import pairs, passes, sdpa, standard
from vlattn_fast.benchmarks._formula import ends
from vlattn_fast.benchmarks._measure import QKV, Benchmark, Problem, finished, in_bfloat16, operator_problem, randoms, taking
from vlattn_fast.benchmarks._workloads import TOKENS_2048, TOKENS_8192, VIDEO, Sizes

SIDES = {"both sides": ("query", "key", "other_query", "other_key"), "a student": ("query", "key")}
MAPS = {0: 10, 2: 20, 4: 29}  # of the formula at once, with gradients of so many tensors


def build(kind: str, leaves: tuple[str, ...], sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    randn, causal = randoms(device, dtype), bool(sizes.get("causal"))
    tensors = standard(sizes, randn)
    tensors |= {f"other_{name}": randn(*tensors[name].shape) for name in ("query", "key")}
    tensors["grad_divergence"] = torch.ones(tensors["query"].shape[:3], device=device)
    arguments = taking("query", "key", "other_query", "other_key", kind=kind, is_causal=causal)
    bound = finished(bool(leaves), QKV, ("grad_output",))(partial(sdpa, is_causal=causal))
    finish = finished(bool(leaves), leaves, ("grad_divergence",))
    floor = passes(sizes, dtype, (2, 4, 2), (2 + len(leaves), 4 + len(leaves), 2))[: 2 if leaves else 1]
    return operator_problem(
        "attention_divergence", arguments, tensors, finish, MAPS[len(leaves)], bound,
        lambda name, x: ends(x, 2), pairs(sizes), floor,
    )  # fmt: skip


BENCHMARKS = [
    Benchmark(__name__, f"{kind}, {side}, forward+backward", workload, partial(build, kind, leaves))
    for workload in (TOKENS_2048, TOKENS_8192)
    for kind in ("kl", "js")
    for side, leaves in SIDES.items()
]
BENCHMARKS += [Benchmark(__name__, "kl, forward", workload, partial(build, "kl", ())) for workload in (TOKENS_2048, TOKENS_8192)]
BENCHMARKS += in_bfloat16(BENCHMARKS[0])
BENCHMARKS += [
    Benchmark(__name__, "kl, both sides, forward+backward", VIDEO, partial(build, "kl", SIDES["both sides"]), once=True)
]
