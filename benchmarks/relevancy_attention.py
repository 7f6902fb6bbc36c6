"""One attention layer that carries relevancy through its backward pass, and the product r Abar by itself, with its gradients or
without.

Bound: plain SDPA, forward and backward (for the product alone: forward). Published (Chefer et al., ICCV 2021): a stored map,
its gradient, and the whole N x N product R + Abar R, of which the carried rows are compared.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vlattn_fast.benchmarks import _measure
from vlattn_fast.benchmarks._bounds import SDPA_BACKWARD, SDPA_FORWARD, pairs, passes, sdpa, softmax_map, standard
from vlattn_fast.benchmarks._formula import ends
from vlattn_fast.benchmarks._measure import (
    QKV,
    Benchmark,
    Finish,
    Problem,
    Tensors,
    Variant,
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
        leaves = {name: t[name].detach().requires_grad_() for name in QKV}
        prob = softmax_map(leaves["query"], leaves["key"], causal)
        output = prob @ leaves["value"]
        grad, *grads = torch.autograd.grad(output, [prob, *leaves.values()], t["grad_output"])
        abar = (grad * prob.detach()).clamp(min=0).mean(dim=1).to(t["carrier"].dtype)
        relevancy = torch.eye(n, device=device, dtype=abar.dtype).expand(len(abar), n, n)
        relevancy = relevancy + torch.bmm(abar, relevancy)
        gradients = {f"gradient of {name}": x for name, x in zip(QKV, grads, strict=True)}
        return {"output 0": output.detach(), **gradients, "gradient of carrier": relevancy[:, read_out]}

    carried, attention = _measure.taking(*QKV, "carrier", is_causal=causal), partial(sdpa, is_causal=causal)
    if what != ATTENTION:
        names = _measure.backends("relevancy_attention", carried(tensors))
        bound, floor = _measure.forward(attention), passes(sizes, dtype, (2, 4, 1))
        arguments = _measure.taking(*QKV, "grad_output", "relevancy", is_causal=causal)
        finish: Finish = _measure.forward
        maps = 3
        if what != STEP_ALONE:
            tensors["cotangent"] = torch.rand_like(tensors["relevancy"])
            finish, maps = _measure.backward(("relevancy", *QKV, "grad_output"), ("cotangent",)), 6
            bound, floor = _measure.backward(QKV, ("grad_output",))(attention), passes(sizes, dtype, (2, 4, 1), (6, 8, 1))
        return operator_problem(
            "relevancy_step", arguments, tensors, finish, maps, bound, _part, pairs(sizes), floor, names=names
        )
    finish = _measure.backward((*QKV, "carrier"), ("grad_output", "relevancy"))
    bound, floor = _measure.backward(QKV, ("grad_output",))(attention), passes(sizes, dtype, SDPA_FORWARD, SDPA_BACKWARD)
    rivals = {"published": Variant(published, 5)}
    return operator_problem("relevancy_attention", carried, tensors, finish, 4, bound, _part, pairs(sizes), floor, rivals=rivals)


def _part(name: str, x: Tensor) -> Tensor:
    return ends(x)  # all heads: Abar is the mean over heads


def _declared(what: str, *workloads: Workload) -> list[Benchmark]:
    return [Benchmark(__name__, what, workload, partial(build, what)) for workload in workloads]


BENCHMARKS = [
    *_declared(ATTENTION, CLIP, UNITER, LLAVA, HIGHRES, CLIP_ROWS, CLIP_WIDE),
    *_declared(STEP_ALONE, CLIP, UNITER, LLAVA, CLIP_ROWS),
    *_declared("step, forward+backward", CLIP, UNITER, LLAVA),
    *in_bfloat16(*_declared(ATTENTION, CLIP, UNITER, LLAVA, HIGHRES), *_declared(STEP_ALONE, CLIP, UNITER, LLAVA)),
]
