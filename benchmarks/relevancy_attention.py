"""One attention layer that carries relevancy through its backward pass, and the product r Abar by itself, with its gradients or
without.

Bound: plain SDPA, forward and backward (for the product alone: forward). Published (Chefer et al., ICCV 2021): a stored map,
its gradient, and the whole N x N product R + Abar R, of which the carried rows are compared.
"""

from __future__ import annotations

from functools import partial

import torch

from vlattn_fast.benchmarks import _measure
from vlattn_fast.benchmarks._bounds import SDPA_BACKWARD, SDPA_FORWARD, pairs, passes, sdpa, standard, stored_map
from vlattn_fast.benchmarks._formula import end
from vlattn_fast.benchmarks._measure import (
    QKV,
    Benchmark,
    Problem,
    Tensors,
    Variant,
    finished,
    in_bfloat16,
    operator_problem,
    randoms,
)
from vlattn_fast.benchmarks._workloads import CLIP, CLIP_ROWS, CLIP_WIDE, HIGHRES, LLAVA, UNITER, Sizes, Workload

STEP_ALONE, ATTENTION = "step alone", "gradient, forward+backward"


def build(what: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    tensors, causal = standard(sizes, randoms(device, dtype)), bool(sizes.get("causal"))
    b, _, n, _ = tensors["query"].shape
    rows = sizes.get("T", 1)
    read_out = slice(n - rows, n) if causal else slice(rows)
    wide = torch.promote_types(dtype, torch.float32)
    tensors["carrier"] = torch.zeros(b, rows, n, device=device, dtype=wide)
    tensors["relevancy"] = torch.eye(n, device=device, dtype=wide)[read_out].repeat(b, 1, 1)

    def published(t: Tensors) -> Tensors:
        prob, grad, output, gradients = stored_map(t, causal)
        abar = (grad * prob).clamp(min=0).mean(dim=1).to(t["carrier"].dtype)
        relevancy = torch.eye(n, device=device, dtype=abar.dtype).expand(len(abar), n, n)
        relevancy = relevancy + torch.bmm(abar, relevancy)
        return {"output 0": output, **gradients, "gradient of carrier": relevancy[:, read_out]}

    carried, attention = _measure.taking(*QKV, "carrier", is_causal=causal), partial(sdpa, is_causal=causal)
    if what != ATTENTION:
        names, both = _measure.backends("relevancy_attention", carried(tensors)), what != STEP_ALONE
        arguments = _measure.taking(*QKV, "grad_output", "relevancy", is_causal=causal)
        tensors |= {"cotangent": torch.rand_like(tensors["relevancy"])} if both else {}
        finish = finished(both, ("relevancy", *QKV, "grad_output"), ("cotangent",))
        bound, floor = finished(both, QKV, ("grad_output",))(attention), passes(sizes, dtype, (2, 4, 1), (6, 8, 1))[: 1 + both]
        maps = 6 if both else 3
        return operator_problem("relevancy_step", arguments, tensors, finish, maps, bound, end, pairs(sizes), floor, names=names)
    finish = _measure.backward((*QKV, "carrier"), ("grad_output", "relevancy"))
    bound, floor = _measure.backward(QKV, ("grad_output",))(attention), passes(sizes, dtype, SDPA_FORWARD, SDPA_BACKWARD)
    baselines = {"published": Variant(published, 5)}
    return operator_problem(
        "relevancy_attention", carried, tensors, finish, 4, bound, end, pairs(sizes), floor, baselines=baselines
    )


def _declared(what: str, *workloads: Workload) -> list[Benchmark]:
    return [Benchmark(__name__, what, workload, partial(build, what)) for workload in workloads]


BENCHMARKS = [
    *_declared(ATTENTION, CLIP, UNITER, LLAVA, HIGHRES, CLIP_ROWS, CLIP_WIDE),
    *_declared(STEP_ALONE, CLIP, UNITER, LLAVA, CLIP_ROWS),
    *_declared("step, forward+backward", CLIP, UNITER, LLAVA),
    *in_bfloat16(*_declared(ATTENTION, CLIP, UNITER, LLAVA, HIGHRES), *_declared(STEP_ALONE, CLIP, UNITER, LLAVA)),
]
