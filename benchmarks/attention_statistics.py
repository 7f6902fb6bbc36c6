"""Mass on text and image, entropy, largest weight and received attention of every head.

Bound: plain SDPA of the same shape. Published (VALUE, ECCV 2020, from the paper's description, as its code is not public): the
maps stored, then one reduction after another.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.benchmarks._bounds import pairs, passes, sdpa, softmax_map, tokens
from vlattn_fast.benchmarks._measure import (
    Benchmark,
    Problem,
    Tensors,
    Variant,
    backward,
    forward,
    operator_variants,
    randoms,
    without_output,
)
from vlattn_fast.benchmarks._workloads import CLIP, UNITER, Sizes

STATISTICS = ("mass", "entropy", "maximum", "received")


def build(both: bool, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    b, h, n, d = sizes["B"], sizes["H"], tokens(sizes), sizes["D"]
    randn, wide = randoms(device, dtype), randoms(device, torch.promote_types(dtype, torch.float32))
    tensors = {name: randn(b, h, n, d) for name in ("query", "key", "value", "grad_output")}
    tensors |= {f"grad_{name}": wide(b, h, n, *([2] if name == "mass" else [])) for name in STATISTICS}
    first = sizes.get("L", 1)  # the text, or the class token alone
    groups = (torch.arange(n, device=device) >= first).long()

    def arguments(t: Tensors) -> dict[str, Any]:
        return {"query": t["query"], "key": t["key"], "key_groups": groups, "num_groups": 2}

    def published(t: Tensors) -> dict[str, Tensor]:
        prob = softmax_map(t["query"], t["key"])
        mass = torch.stack([prob[..., :first].sum(-1), prob[..., first:].sum(-1)], dim=-1)
        entropy = -(prob * prob.clamp(min=torch.finfo(prob.dtype).tiny).log()).sum(-1)
        statistics = (mass, entropy, prob.amax(-1), prob.sum(-2))
        return {name: x.to(t["grad_mass"].dtype) for name, x in zip(STATISTICS, statistics, strict=True)}

    cotangents = tuple(f"grad_{name}" for name in STATISTICS)
    finish = backward(("query", "key"), cotangents) if both else forward
    plain = backward(("query", "key", "value"), ("grad_output",)) if both else forward
    variants = operator_variants("attention_statistics", arguments, tensors, finish, 6 if both else 3)
    variants["published"] = Variant(finish(published), 6 if both else 3)
    variants["SDPA"] = Variant(without_output(plain(sdpa)))
    floor = passes(sizes, dtype, (1, 2, 1), *([(3, 4, 1)] if both else []))
    return Problem(tensors, variants, "SDPA", variants["reference"].run, lambda name, x: x[:1, :2], pairs(sizes), floor)


BENCHMARKS = [
    Benchmark(__name__, "forward+backward" if both else "forward", workload, partial(build, both))
    for workload, both in ((CLIP, False), (UNITER, False), (UNITER, True))
]
