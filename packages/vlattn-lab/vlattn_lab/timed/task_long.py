"""One layer of a decoder at lengths where stored maps fit no machine: 16 video frames, and 131,072 tokens of text.

The shapes are those of Qwen2.5-VL-7B: 28 heads of 128 numbers over 4 key heads, 28 layers, in bfloat16. A user of it asks for the
maps of 16 frames (Qwen3-VL, issue 1464), and one product of one layer asks for 97.12 GiB: at 2 bytes a number and 28 heads these
are 43,152 tokens. On a CPU one key head is measured with its seven query heads, or with one of these: a layer has 4 such parts,
or 28. Heads add up one after the other, so a layer takes that many times as long.

Bound: SDPA, forward alone. Published (Chefer et al., ICCV 2021): the map and its gradient stored; where they do not fit, their
bytes are computed. Longer inputs than 8,192 tokens run once, so that time and memory are of one run, without a warm one. The
formula in float64 would take hours there, so errors are those of the shortest length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import vlattn_fast as va
from vlattn_fast.benchmarks import _measure
from vlattn_fast.benchmarks._bounds import SDPA_BACKWARD, SDPA_FORWARD, pairs, passes, stored_map
from vlattn_fast.benchmarks._formula import end
from vlattn_fast.benchmarks._measure import QKV, Benchmark, Problem, Tensors, Variant, randoms, without_output
from vlattn_fast.benchmarks._workloads import Sizes
from vlattn_fast.checking import blocks
from vlattn_lab.timed.isolated import measure
from vlattn_lab.timed.workloads import LONG

SHORT = 8192  # tokens
INPUTS = (*QKV, "carrier")


def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    b, h, shared, n, d = (sizes[name] for name in ("B", "H", "Hkv", "N", "D"))
    randn = randoms(device, dtype)
    tensors = {"query": randn(b, h, n, d), "key": randn(b, shared, n, d), "value": randn(b, shared, n, d)}
    tensors["grad_output"] = randn(b, h, n, d)
    wide = torch.promote_types(dtype, torch.float32)
    tensors["carrier"] = torch.zeros(b, 1, n, device=device, dtype=wide)
    tensors["relevancy"] = torch.zeros_like(tensors["carrier"])
    tensors["relevancy"][:, :, -1] = 1.0
    arguments = _measure.taking(*INPUTS, is_causal=True, enable_gqa=True)
    finish = _measure.backward(INPUTS, ("grad_output", "relevancy"))

    def sdpa(t: Tensors) -> Tensor:
        query, key, value = (t[name] for name in QKV)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def ours(name: str) -> Variant:
        return Variant(finish(lambda t: va.relevancy_attention(**arguments(t), backend=name)))

    names = _measure.backends("relevancy_attention", arguments(tensors))
    short = n <= SHORT or names == ["streaming"]
    variants = {name: ours(name) for name in names if short or name != "streaming"}
    variants["maps stored, one backward"] = Variant(_stored, 5)
    variants["SDPA, forward+backward"] = Variant(_measure.backward(QKV, ("grad_output",))(sdpa))
    variants["SDPA"] = Variant(without_output(_measure.forward(sdpa)))
    truth = finish(lambda t: blocks.formula("relevancy_attention")(**arguments(t)))
    floor = passes(sizes, dtype, SDPA_FORWARD, SDPA_BACKWARD)
    return Problem(tensors, variants, "SDPA", truth, end, pairs(sizes), floor, in_blocks=True)


def _stored(t: Tensors) -> Tensors:
    prob, grad, output, gradients = stored_map(t, is_causal=True)
    abar = (grad * prob).clamp(min=0).mean(dim=1).to(t["carrier"].dtype)
    relevancy = t["relevancy"] + t["relevancy"] @ abar
    return {"output 0": output, **gradients, "gradient of carrier": relevancy}


BENCHMARKS = [
    Benchmark(
        __name__,
        "one layer with relevancy, forward+backward",
        workload,
        build,
        cpu_dtype=torch.bfloat16,
        isolated=measure,
        once=workload.full["N"] > SHORT,
    )
    for workload in LONG
]
