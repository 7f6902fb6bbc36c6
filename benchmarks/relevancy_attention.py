"""One attention layer that carries relevancy through its backward pass, and the product r Abar by itself.

Bound: plain SDPA, forward and backward (for the product: forward). Published (Chefer et al., ICCV 2021): a stored map,
its gradient, and the whole N x N product R + Abar R, of which one row is compared.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.benchmarks._bounds import SDPA_BACKWARD, SDPA_FORWARD, pairs, passes, sdpa, softmax_map, tokens
from vlattn_fast.benchmarks._measure import (
    Benchmark,
    Problem,
    Tensors,
    Variant,
    backends,
    backward,
    call_variants,
    forward,
    operator_variants,
    randoms,
    without_output,
)
from vlattn_fast.benchmarks._workloads import CLIP, HIGHRES, LLAVA, UNITER, Sizes

INPUTS = ("query", "key", "value")


def build(step: bool, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    b, h, n, d = sizes["B"], sizes["H"], tokens(sizes), sizes["D"]
    randn, causal = randoms(device, dtype), bool(sizes.get("causal"))
    read_out = n - 1 if causal else 0
    tensors = {name: randn(b, h, n, d) for name in (*INPUTS, "grad_output")}
    wide = torch.promote_types(dtype, torch.float32)
    tensors["carrier"] = torch.zeros(b, 1, n, device=device, dtype=wide)
    tensors["rows"] = torch.zeros_like(tensors["carrier"])
    tensors["rows"][:, :, read_out] = 1.0

    def arguments(t: Tensors) -> dict[str, Any]:
        named = {name: t[name] for name in (*INPUTS, "grad_output")}
        return {**named, "relevancy": t["rows"], "is_causal": causal}

    def published(t: Tensors) -> Tensors:
        leaves = {name: t[name].detach().requires_grad_() for name in INPUTS}
        prob = softmax_map(leaves["query"], leaves["key"], causal)
        output = prob @ leaves["value"]
        grad, *grads = torch.autograd.grad(output, [prob, *leaves.values()], t["grad_output"])
        abar = (grad * prob.detach()).clamp(min=0).mean(dim=1).to(t["carrier"].dtype)
        relevancy = torch.eye(n, device=device, dtype=abar.dtype).expand(len(abar), n, n)
        relevancy = relevancy + torch.bmm(abar, relevancy)
        gradients = {f"gradient of {name}": x for name, x in zip(INPUTS, grads, strict=True)}
        return {"output 0": output.detach(), **gradients, "gradient of carrier": relevancy[:, read_out, None]}

    def carried(t: Tensors) -> dict[str, Any]:
        return {**{name: t[name] for name in INPUTS}, "carrier": t["carrier"], "is_causal": causal}

    attention = partial(sdpa, is_causal=causal)
    if step:
        names = backends("relevancy_attention", carried(tensors))
        variants = call_variants("relevancy_step", arguments, names, forward, 3)
        variants["SDPA"] = Variant(without_output(forward(attention)))
        floor = passes(sizes, dtype, (2, 4, 1))
    else:
        finish = backward((*INPUTS, "carrier"), ("grad_output", "rows"))
        variants = operator_variants("relevancy_attention", carried, tensors, finish, 4)
        variants["published"] = Variant(published, 5)
        variants["SDPA"] = Variant(without_output(backward(INPUTS, ("grad_output",))(attention)))
        floor = passes(sizes, dtype, SDPA_FORWARD, SDPA_BACKWARD)
    return Problem(tensors, variants, "SDPA", variants["reference"].run, _part, pairs(sizes), floor)


def _part(name: str, x: Tensor) -> Tensor:
    return x[:1]  # all heads: Abar is the mean over heads


BENCHMARKS = [
    *(Benchmark(__name__, "gradient, forward+backward", w, partial(build, False)) for w in (CLIP, UNITER, LLAVA, HIGHRES)),
    *(Benchmark(__name__, "step alone", w, partial(build, True)) for w in (CLIP, UNITER, LLAVA)),
]
