"""A residual sum that weights relevancy, forward and backward, with the weights by contributions.

Bound: the sum alone, whose gradients are the gradient at the sum itself: no work. So this measures the weights.
"""

from __future__ import annotations

import torch

from vlattn_fast.benchmarks._formula import end
from vlattn_fast.benchmarks._measure import (
    Benchmark,
    Pass,
    Problem,
    Variant,
    backward,
    in_bfloat16,
    operator_problem,
    randoms,
    taking,
    without_output,
)
from vlattn_fast.benchmarks._workloads import CLIP_STREAM, VIT_STREAM, Sizes

TERMS, CARRIERS = ("residual", "branch"), ("residual_carrier", "branch_carrier")
BOUND = "sum alone"


def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    b, n, c = sizes["B"], sizes["N"], sizes["C"]
    randn, wide = randoms(device, dtype), torch.promote_types(dtype, torch.float32)
    tensors = {name: randn(b, n, c) for name in (*TERMS, "grad")}
    tensors |= {name: torch.rand(b, 1, n, device=device, dtype=wide) for name in (*CARRIERS, "relevancy")}
    finish = backward((*TERMS, *CARRIERS), ("grad", "relevancy"))
    plain = backward(TERMS, ("grad",))(lambda t: t["residual"] + t["branch"])
    read = 3 * b * n * c * dtype.itemsize
    least = [Pass(b * n * c, read), Pass(4 * b * n * c, read)]
    problem = operator_problem("relevancy_residual", taking(*TERMS, *CARRIERS), tensors, finish, 0, plain, end, 0, least)
    variants = {name: variant for name, variant in problem.variants.items() if name != "SDPA"}
    return problem._replace(variants=variants | {BOUND: Variant(without_output(plain))}, bound=BOUND)


BENCHMARKS = [Benchmark(__name__, "forward+backward", workload, build) for workload in (CLIP_STREAM, VIT_STREAM)]
BENCHMARKS += in_bfloat16(*BENCHMARKS)
