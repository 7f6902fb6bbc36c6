"""The loss of an indexer of sparse attention, row by row, and its gradients; the attention is fixed. Over all keys, and over an
eighth of them for each query.

Bound: plain SDPA of the same shape over all keys. The formula and its compilation hold whole maps of both sides.
"""

from __future__ import annotations

from functools import partial

import torch

from vlattn_fast.benchmarks._bounds import pairs, passes, sdpa, standard, tokens
from vlattn_fast.benchmarks._formula import end
from vlattn_fast.benchmarks._measure import QKV, Benchmark, Problem, finished, in_bfloat16, operator_problem, randoms, taking
from vlattn_fast.benchmarks._workloads import TOKENS_2048, TOKENS_8192, Sizes

INDEXER = "index_query", "index_key", "index_weights"
HEADS = 4  # of the indexer
MAPS = {False: 4, True: 5}  # of the formula at once, for each head of either side; with gradients


def build(chooses: bool, both: bool, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    randn, batch, n, dim = randoms(device, dtype), sizes["B"], tokens(sizes), sizes["D"]
    tensors = standard(sizes, randn)
    tensors |= {"index_query": randn(batch, HEADS, n, dim, std=dim**-0.5), "index_key": randn(batch, n, dim)}
    tensors |= {"index_weights": randn(batch, HEADS, n, std=HEADS**-0.5)}
    tensors["grad_divergence"] = torch.ones(batch, n, device=device)
    if chooses:
        tensors["topk_indices"] = randn(batch, n, n).topk(n // 8).indices
    names = "query", "key", *INDEXER, *(["topk_indices"] if chooses else [])
    bound = finished(both, QKV, ("grad_output",))(sdpa)
    finish = finished(both, INDEXER if both else (), ("grad_divergence",))
    compared = {**sizes, "M": n // 8} if chooses else sizes
    index = HEADS / sizes["H"]  # heads of the indexer for each of the attention
    floor = passes(compared, dtype, (1 + index, 2, 2), (1 + 3 * index, 2, 2))[: 2 if both else 1]
    return operator_problem(
        "indexer_divergence", taking(*names), tensors, finish, MAPS[both] * (1 + index), bound, end, pairs(sizes), floor
    )


BENCHMARKS = [
    Benchmark(__name__, f"{which}, {what}", workload, partial(build, chooses, both))
    for workload in (TOKENS_2048, TOKENS_8192)
    for which, chooses in (("all keys", False), ("chosen keys", True))
    for what, both in (("forward", False), ("forward+backward", True))
]
BENCHMARKS += in_bfloat16(BENCHMARKS[1], BENCHMARKS[3])
