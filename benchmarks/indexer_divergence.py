"""The loss of an indexer of sparse attention, row by row, and its gradients; the attention is fixed. Over all keys; over an
eighth of them for each query, beside the same as a mask; with the attention's log-sum-exp; an index key for each four keys.

Bound: plain SDPA of the same shape over all keys. The formula and its compilation hold whole maps of both sides.
"""

from __future__ import annotations

from functools import partial

import torch

import vlattn_fast as va
from vlattn_fast.benchmarks._bounds import pairs, passes, sdpa, standard, tokens
from vlattn_fast.benchmarks._formula import end
from vlattn_fast.benchmarks._measure import (
    QKV,
    Benchmark,
    Problem,
    Variant,
    finished,
    in_bfloat16,
    operator_problem,
    randoms,
    taking,
)
from vlattn_fast.benchmarks._workloads import TOKENS_2048, TOKENS_8192, Sizes

INDEXER = "index_query", "index_key", "index_weights"
HEADS, BLOCK = 4, 4  # of the indexer; keys that share an index key
MAPS = {False: 4, True: 5}  # of the formula at once, for each head of either side; with gradients
KINDS = "all keys", "chosen keys", "given lse", "blocks of keys"


def build(which: str, both: bool, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    randn, batch, n, dim = randoms(device, dtype), sizes["B"], tokens(sizes), sizes["D"]
    block, tensors = BLOCK if which == "blocks of keys" else 1, standard(sizes, randn)
    tensors |= {"index_query": randn(batch, HEADS, n, dim, std=dim**-0.5), "index_key": randn(batch, -(-n // block), dim)}
    tensors |= {"index_weights": randn(batch, HEADS, n, std=HEADS**-0.5)}
    tensors["grad_divergence"] = torch.ones(batch, n, device=device)
    names, baselines = ["query", "key", *INDEXER], dict[str, Variant]()
    finish = finished(both, INDEXER if both else (), ("grad_divergence",))
    if which == "given lse":
        tensors["teacher_lse"] = va.score_attention(*[tensors[name].float() for name in QKV], return_lse=True)[1]
        names.append("teacher_lse")
    if which == "chosen keys":
        tensors["topk_indices"] = randn(batch, n, n).topk(n // 8).indices
        kept = torch.zeros(batch, 1, n, n, dtype=torch.bool, device=device).scatter_(3, tensors["topk_indices"][:, None], True)
        plain = taking(*names)
        baselines["mask"] = Variant(finish(lambda t: va.indexer_divergence(**plain(t), attn_mask=kept)))
        names.append("topk_indices")
    bound = finished(both, QKV, ("grad_output",))(sdpa)
    compared = {**sizes, "M": n // 8} if which == "chosen keys" else sizes
    index = HEADS / sizes["H"] / block  # heads of the indexer for each of the attention
    floor = passes(compared, dtype, (1 + index, 2, 2), (1 + 3 * index, 2, 2))[: 2 if both else 1]
    arguments, maps = taking(*names, key_block=block), MAPS[both] * (1 + index)
    call = "indexer_divergence", arguments, tensors, finish, maps, bound, end, pairs(sizes), floor
    return operator_problem(*call, baselines=baselines)


BENCHMARKS = [
    Benchmark(__name__, f"{which}, {what}", workload, partial(build, which, both))
    for workload, kinds in ((TOKENS_2048, KINDS), (TOKENS_8192, KINDS[:2]))
    for which in kinds
    for what, both in (("forward", False), ("forward+backward", True))
]
BENCHMARKS += in_bfloat16(BENCHMARKS[1], BENCHMARKS[3])
