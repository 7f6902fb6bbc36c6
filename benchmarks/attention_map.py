"""One map for all heads: mean_h A, and mean_h relu(A * dA).

Bound: plain SDPA, forward. Published: for A the reference (output_attentions, then the mean over heads); for relu(A * dA) a
stored map and its gradient by autograd.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from vlattn_fast.benchmarks._bounds import pairs, passes, sdpa, softmax_map, tokens
from vlattn_fast.benchmarks._measure import (
    Benchmark,
    Problem,
    Tensors,
    Variant,
    forward,
    operator_variants,
    randoms,
    without_output,
)
from vlattn_fast.benchmarks._workloads import CLIP, LLAVA, UNITER, Sizes


def build(rule: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    b, h, n, d = sizes["B"], sizes["H"], tokens(sizes), sizes["D"]
    randn, causal = randoms(device, dtype), bool(sizes.get("causal"))
    tensors = {name: randn(b, h, n, d) for name in ("query", "key", "value", "grad_output")}
    names = ("query", "key") if rule == "attention" else tuple(tensors)

    def arguments(t: Tensors) -> dict[str, Any]:
        return {**{name: t[name] for name in names}, "rule": rule, "is_causal": causal}

    def published(t: Tensors) -> Tensors:
        prob = softmax_map(t["query"].detach().requires_grad_(), t["key"], causal)
        (grad,) = torch.autograd.grad(prob @ t["value"], [prob], t["grad_output"])
        return {"output": (grad * prob.detach()).clamp(min=0).mean(dim=1)}

    variants = operator_variants("attention_map", arguments, tensors, forward, 2 if rule == "attention" else 3)
    if rule == "gradient":
        variants["published"] = Variant(published, 4)
    variants["SDPA"] = Variant(without_output(forward(partial(sdpa, is_causal=causal))))
    products = 1 if rule == "attention" else 2
    floor = passes(sizes, dtype, (products, 2 * products, 1), extra_bytes=4 * b * n * n)
    return Problem(tensors, variants, "SDPA", variants["reference"].run, lambda name, x: x[:1], pairs(sizes), floor)


def _declared(rule: str, *workloads: Any) -> list[Benchmark]:
    return [Benchmark(__name__, rule, workload, partial(build, rule)) for workload in workloads]


BENCHMARKS = [*_declared("attention", CLIP, UNITER), *_declared("gradient", CLIP, LLAVA)]
