"""congruence_loss, forward and backward: CACR and both kinds of IAIS.

Bound: plain SDPA over the same text and image tokens. Published (KhoomeiK/CACR and lancopku/IAIS): the four blocks for the whole
batch, then a Python loop over the samples that cuts off the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.benchmarks._bounds import pairs, sdpa
from vlattn_fast.benchmarks._formula import end
from vlattn_fast.benchmarks._measure import QKV, Benchmark, Pass, Problem, Tensors, Variant, backward, operator_problem, randoms
from vlattn_fast.benchmarks._published import published_loss, uneven_masks
from vlattn_fast.benchmarks._workloads import UNITER, UNITER_DENSE, Sizes

BLOCKS = ("text_query", "text_key", "image_query", "image_key")
MASKS = ("text_mask", "image_mask")


def masks(sizes: Sizes, batch: int, device: torch.device) -> Tensors:
    return {name: mask.to(device) for name, mask in uneven_masks(sizes["L"], sizes["V"], batch).items()}


def build(kind: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    b, h, n, v, d = (sizes[name] for name in "BHLVD")
    randn = randoms(device, dtype)
    tensors = {name: randn(b, h, n if name.startswith("text") else v, d) for name in BLOCKS}
    tensors |= {} if "dense" in sizes else masks(sizes, b, device)
    tensors["grad_loss"] = torch.full((b,), 1 / b, device=device, dtype=torch.promote_types(dtype, torch.float32))
    whole = {name: randn(b, h, n + v, d) for name in (*QKV, "grad_output")}
    finish, plain = backward(BLOCKS, ("grad_loss",)), backward(QKV, ("grad_output",))(sdpa)

    full = {name: torch.ones(b, size, dtype=torch.bool, device=device) for name, size in zip(MASKS, (n, v), strict=True)}
    real = {name: tensors.get(name, mask) for name, mask in full.items()}
    lengths = list(zip(*(mask.sum(-1).tolist() for mask in real.values()), strict=True))

    def loop(t: Tensors) -> Tensor:
        return published_loss({**real, **t}, kind).to(t["grad_loss"].dtype)

    return operator_problem(
        "congruence_loss", partial(arguments, kind), tensors, finish, 5,
        lambda _: plain(whole), end, pairs(sizes), _floor(kind, lengths, sizes, dtype),
        baselines={"published": Variant(finish(loop), 5)},
    )  # fmt: skip


def arguments(kind: str, t: Tensors) -> dict[str, Any]:
    """The arguments of `congruence_loss`."""
    text, image = (t["text_query"], t["text_key"]), (t["image_query"], t["image_key"])
    return {"text": text, "image": image, "kind": kind, "reduction": "none", **{name: t[name] for name in MASKS if name in t}}


def _floor(kind: str, real: Sequence[tuple[int, int]], sizes: Sizes, dtype: torch.dtype) -> tuple[Pass, Pass]:
    """Forward: the scores, an exponential a pair, and the change of basis of the means over heads; backward: two products of the
    blocks that have gradients, and twice the change of basis. The cross maps of CACR have no gradients: it takes that once.
    `real`: how many text and image tokens each sample has."""
    h, d = sizes["H"], sizes["D"]
    tensor = h * d * dtype.itemsize * sum(n + v for n, v in real)
    all_pairs, within = sum((n + v) ** 2 for n, v in real), sum(n * n + v * v for n, v in real)
    basis = {"cacr": 4, "iais_singular": 0, "iais_distributed": 2}[kind] * sum(n * v * (n + v) for n, v in real)
    again, with_gradients = (2, all_pairs) if kind == "iais_distributed" else (1, within)
    forward = Pass(2 * h * d * all_pairs + basis, 2 * tensor, h * all_pairs)
    return forward, Pass(4 * h * d * with_gradients + again * basis, 4 * tensor)


BENCHMARKS = [
    Benchmark(__name__, f"{kind}, forward+backward", workload, partial(build, kind))
    for workload in (UNITER, UNITER_DENSE)
    for kind in ("cacr", "iais_singular", "iais_distributed")
]
