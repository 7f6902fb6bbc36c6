"""One map for all heads: mean_h A, and mean_h relu(A * dA); and its gradients.

Bound: plain SDPA, forward (with gradients: and backward). Published: for A the reference (output_attentions, then the mean over
heads); for relu(A * dA) a stored map and its gradient by autograd.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from vlattn_fast.benchmarks._bounds import keys, pairs, passes, sdpa, softmax_map, standard
from vlattn_fast.benchmarks._formula import end
from vlattn_fast.benchmarks._measure import QKV, Benchmark, Problem, Tensors, Variant, finished, operator_problem, randoms, taking
from vlattn_fast.benchmarks._workloads import CLIP, FEW_QUERIES, LLAVA, ONE_QUERY, UNITER, Sizes


def build(rule: str, differentiates: bool, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    randn = randoms(device, dtype)
    causal, tensors = bool(sizes.get("causal")), standard(sizes, randn)
    names = ("query", "key") if rule == "attention" else tuple(tensors)
    arguments = taking(*names, rule=rule, is_causal=causal)

    def published(t: Tensors) -> Tensors:
        prob = softmax_map(t["query"].detach().requires_grad_(), t["key"], causal)
        (grad,) = torch.autograd.grad(prob @ t["value"], [prob], t["grad_output"])
        return {"output": (grad * prob.detach()).clamp(min=0).mean(dim=1)}

    products = 1 if rule == "attention" else 2
    n, attention = tensors["query"].shape[2], partial(sdpa, is_causal=causal)
    tensors |= {"cotangent": randn(sizes["B"], n, n).float()} if differentiates else {}
    bound, finish = finished(differentiates, QKV, ("grad_output",))(attention), finished(differentiates, names, ("cotangent",))
    baselines = {"published": Variant(published, 4)} if rule == "gradient" and not differentiates else {}
    maps = (2 if rule == "attention" else 3) * (2 if differentiates else 1)
    terms = [(products, 2 * products, 1), (3 * products, 4 * products, 1)][: 1 + differentiates]
    floor = passes(sizes, dtype, *terms, extra_bytes=4 * sizes["B"] * n * keys(sizes))
    return operator_problem(
        "attention_map", arguments, tensors, finish, maps, bound, end, pairs(sizes), floor, baselines=baselines
    )


def _declared(rule: str, *workloads: Any, differentiates: bool = False) -> list[Benchmark]:
    what = f"{rule}, forward+backward" if differentiates else rule
    return [Benchmark(__name__, what, workload, partial(build, rule, differentiates)) for workload in workloads]


BENCHMARKS = [
    *_declared("attention", CLIP, UNITER, ONE_QUERY, FEW_QUERIES),
    *_declared("gradient", CLIP, LLAVA, FEW_QUERIES),
    *_declared("attention", CLIP, differentiates=True),
    *_declared("gradient", CLIP, LLAVA, differentiates=True),
]
