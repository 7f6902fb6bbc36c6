"""Scores of a prompt's tokens by SnapKV (a window of 32 queries), H2O (all queries) and FastV (the last query).

Bound: plain SDPA, causal, which a decoder runs anyway. Published: the eager formula of each, with its rows of the map stored.
SnapKV and FastV compute the rows of their queries alone, as the authors' SnapKV does.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import vlattn_fast as va
from vlattn_fast.benchmarks import _measure
from vlattn_fast.benchmarks._bounds import pairs, sdpa, standard
from vlattn_fast.benchmarks._formula import whole
from vlattn_fast.benchmarks._measure import Pass, Problem, Tensors, Variant, randoms, without_output
from vlattn_fast.benchmarks._workloads import Sizes

RULES = {"snapkv": 32, "h2o": None, "fastv": 1}  # the queries that each reads


def build(rule: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    tensors = standard(sizes, randoms(device, dtype))

    def ours(backend: str, t: Tensors) -> Tensor:
        return va.token_scores(t["query"], t["key"], rule, backend=backend)

    def formula(t: Tensors) -> Tensor:
        return va.reference.token_scores(t["query"], t["key"], rule)

    names = _measure.backends("attention_statistics", {"query": tensors["query"], "key": tensors["key"], "is_causal": True})
    variants = {name: Variant(_measure.forward(partial(ours, name))) for name in names}
    variants["reference"] = Variant(_measure.forward(formula), 3)
    n = tensors["query"].shape[2]
    variants["published"] = Variant(_measure.forward(partial(_eager, rule)), 3 * (RULES[rule] or n) / n)
    variants["SDPA"] = Variant(without_output(_measure.forward(partial(sdpa, is_causal=True))))
    b, h, rows, d = *tensors["query"].shape[:2], RULES[rule] or n, tensors["query"].shape[3]
    seen = b * h * rows * n / (2 if rows == n else 1)  # the causal half, where all queries are read
    floor = [Pass(2 * seen * d, b * h * (rows + n) * d * dtype.itemsize, seen)]
    return Problem(tensors, variants, "SDPA", _measure.forward(formula), whole, pairs(sizes), floor)


def _eager(rule: str, t: Tensors) -> Tensor:
    n = t["query"].shape[2]
    rows = min(RULES[rule] or n, n)
    logits = t["query"][:, :, -rows:] @ t["key"].mT / t["query"].shape[-1] ** 0.5
    later = torch.ones(rows, n, dtype=torch.bool, device=logits.device).triu(n - rows + 1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    prob = logits.masked_fill(later, -torch.inf).softmax(-1, dtype=wide)
    if rule == "fastv":
        return prob[:, :, -1].mean(1)
    if rule == "h2o":
        return prob.sum(2)
    pooled = F.avg_pool1d(prob[..., :-rows].sum(2), 5, 1, 2) if rows < n else prob[:, :, 0, :0]
    return F.pad(pooled, (0, rows), value=n + 1)
