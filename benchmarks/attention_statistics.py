"""Mass on text and image, entropy, largest weight and received attention of every head.

Bound: plain SDPA of the same shape. Published (VALUE, ECCV 2020, from the paper's description, as its code is not public): the
maps stored, then one reduction after another. The scores of `token_scores` are made of them: _token_scores.py.

"received" alone, the sums of weights by which caches choose keys, has FlexAttention beside it, which takes two calls.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from vlattn_fast.benchmarks import _token_scores
from vlattn_fast.benchmarks._bounds import pairs, passes, sdpa, softmax_map, standard
from vlattn_fast.benchmarks._formula import ends
from vlattn_fast.benchmarks._measure import (
    QKV,
    Benchmark,
    Problem,
    Tensors,
    Variant,
    compile_later,
    finished,
    operator_problem,
    randoms,
    taking,
)
from vlattn_fast.benchmarks._workloads import CLIP, LLAVA, LONG_LLAVA, UNITER, Sizes

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


def build_received(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    tensors, n = standard(sizes, randoms(device, dtype)), sizes["N"]
    arguments = taking("query", "key", statistics=("received",), is_causal=True)
    before = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device=device.type)
    after = create_block_mask(lambda b, h, j, i: i >= j, None, None, n, n, device=device.type)

    def lse(*args: Any) -> Tensor:
        found: Any = flex_attention(*args, return_aux=AuxRequest(lse=True))[1].lse
        return found

    def twice(t: Tensors) -> dict[str, Tensor]:
        """received_j = sum_i exp(s_ij - lse_i): the exponential of the lse of a second call, with queries and keys exchanged."""
        rows = lse(t["query"], t["key"], t["value"], None, before)
        return {"received": lse(t["key"], t["query"], t["value"], lambda s, b, h, j, i: s - rows[b, h, i], after).exp()}

    def received(t: Tensors) -> dict[str, Tensor]:
        return {"received": softmax_map(t["query"], t["key"], is_causal=True).sum(-2)}

    # On a CPU a compiled FlexAttention returns no lse, and one that is not compiled stores the map, as `published` does.
    baselines = {"published": Variant(received, 3)}
    if device.type == "cuda":
        baselines["FlexAttention"] = Variant(compile_later(twice), compiled=True)
    floor, bound = passes(sizes, dtype, (1, 2, 1)), finished(False, QKV, ())(partial(sdpa, is_causal=True))
    return operator_problem(
        "attention_statistics", arguments, tensors, finished(False, (), ()), 3, bound,
        lambda name, x: ends(x, 2), pairs(sizes), floor, baselines=baselines,
    )  # fmt: skip


BENCHMARKS = [
    Benchmark(__name__, "forward+backward" if both else "forward", workload, partial(build, both))
    for workload, both in ((CLIP, False), (UNITER, False), (UNITER, True))
]
BENCHMARKS += [
    Benchmark(__name__, f"token_scores, {rule}", LLAVA, partial(_token_scores.build, rule)) for rule in _token_scores.RULES
]
BENCHMARKS += [Benchmark(__name__, "received, forward", workload, build_received) for workload in LONG_LLAVA]
