"""Mass on text and image, entropy, largest weight and received attention of every head.

Bound: plain SDPA of the same shape. Published (VALUE, ECCV 2020, from the paper's description, as its code is not public): the
maps stored, then one reduction after another. The scores of `token_scores` are made of them: _token_scores.py.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vlattn_fast.benchmarks import _token_scores
from vlattn_fast.benchmarks._bounds import pairs, passes, sdpa, softmax_map, standard
from vlattn_fast.benchmarks._formula import ends
from vlattn_fast.benchmarks._measure import QKV, Benchmark, Problem, Tensors, Variant, finished, operator_problem, randoms, taking
from vlattn_fast.benchmarks._workloads import CLIP, LLAVA, UNITER, Sizes

STATISTICS = ("mass", "entropy", "maximum", "received")


def build(both: bool, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    tensors = standard(sizes, randoms(device, dtype))
    wide, (b, h, n, _) = randoms(device, torch.promote_types(dtype, torch.float32)), tensors["query"].shape
    tensors |= {f"grad_{name}": wide(b, h, n, *([2] if name == "mass" else [])) for name in STATISTICS}
    first = sizes.get("L", 1)  # the text, or the class token alone
    groups = (torch.arange(n, device=device) >= first).long()
    arguments = taking("query", "key", key_groups=groups, num_groups=2)

    def published(t: Tensors) -> dict[str, Tensor]:
        prob = softmax_map(t["query"], t["key"])
        mass = torch.stack([prob[..., :first].sum(-1), prob[..., first:].sum(-1)], dim=-1)
        entropy = -(prob * prob.clamp(min=torch.finfo(prob.dtype).tiny).log()).sum(-1)
        statistics = (mass, entropy, prob.amax(-1), prob.sum(-2))
        return {name: x.to(t["grad_mass"].dtype) for name, x in zip(STATISTICS, statistics, strict=True)}

    finish = finished(both, ("query", "key"), [f"grad_{name}" for name in STATISTICS])
    plain, maps = finished(both, QKV, ("grad_output",)), 6 if both else 3
    floor = passes(sizes, dtype, (1, 2, 1), (3, 4, 1))[: 1 + both]
    baselines, part = {"published": Variant(finish(published), maps)}, lambda name, x: ends(x, 2)
    return operator_problem(
        "attention_statistics", arguments, tensors, finish, maps, plain(sdpa), part, pairs(sizes), floor, baselines=baselines
    )


BENCHMARKS = [
    Benchmark(__name__, "forward+backward" if both else "forward", workload, partial(build, both))
    for workload, both in ((CLIP, False), (UNITER, False), (UNITER, True))
]
BENCHMARKS += [
    Benchmark(__name__, f"token_scores, {rule}", LLAVA, partial(_token_scores.build, rule)) for rule in _token_scores.RULES
]
