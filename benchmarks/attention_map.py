"""One map for all heads: mean_h A, and mean_h relu(A * dA).

Bound: plain SDPA, forward. Published: for A the reference (output_attentions, then the mean over heads); for relu(A * dA) a
stored map and its gradient by autograd.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from vlattn_fast.benchmarks._bounds import pairs, passes, sdpa, softmax_map, standard
from vlattn_fast.benchmarks._measure import Benchmark, Problem, Tensors, Variant, forward, operator_problem, randoms, taking
from vlattn_fast.benchmarks._workloads import CLIP, LLAVA, UNITER, Sizes


def build(rule: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    causal, tensors = bool(sizes.get("causal")), standard(sizes, randoms(device, dtype))
    names = ("query", "key") if rule == "attention" else tuple(tensors)
    arguments = taking(*names, rule=rule, is_causal=causal)

    def published(t: Tensors) -> Tensors:
        prob = softmax_map(t["query"].detach().requires_grad_(), t["key"], causal)
        (grad,) = torch.autograd.grad(prob @ t["value"], [prob], t["grad_output"])
        return {"output": (grad * prob.detach()).clamp(min=0).mean(dim=1)}

    products = 1 if rule == "attention" else 2
    n = tensors["query"].shape[2]
    floor = passes(sizes, dtype, (products, 2 * products, 1), extra_bytes=4 * sizes["B"] * n * n)
    bound, part = forward(partial(sdpa, is_causal=causal)), lambda name, x: x[:1]
    rivals = {"published": Variant(published, 4)} if rule == "gradient" else {}
    maps = 2 if rule == "attention" else 3
    return operator_problem("attention_map", arguments, tensors, forward, maps, bound, part, pairs(sizes), floor, rivals=rivals)


def _declared(rule: str, *workloads: Any) -> list[Benchmark]:
    return [Benchmark(__name__, rule, workload, partial(build, rule)) for workload in workloads]


BENCHMARKS = [*_declared("attention", CLIP, UNITER), *_declared("gradient", CLIP, LLAVA)]
