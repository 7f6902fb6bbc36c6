"""congruence_loss, forward and backward: CACR and both kinds of IAIS.

Bound: plain SDPA over the same text and image tokens. Published (KhoomeiK/CACR and lancopku/IAIS): the four blocks for the whole
batch, then a Python loop over the samples that cuts off the padding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.benchmarks._bounds import pairs, passes, sdpa
from vlattn_fast.benchmarks._measure import (
    Benchmark,
    Pass,
    Problem,
    Tensors,
    Variant,
    backward,
    operator_variants,
    randoms,
    without_output,
)
from vlattn_fast.benchmarks._workloads import UNITER, Sizes
from vlattn_fast.lab.experiments.congruence.official import published_loss

BLOCKS = ("text_query", "text_key", "image_query", "image_key")


def masks(sizes: Sizes, batch: int, device: torch.device) -> Tensors:
    """Masks of uneven captions and pictures, as in a real batch."""
    generator = torch.Generator().manual_seed(1)

    def mask(longest: int) -> Tensor:
        lengths = torch.randint(max(longest // 4, 1), longest + 1, (batch, 1), generator=generator)
        return (torch.arange(longest) < lengths).to(device)

    return {"text_mask": mask(sizes["L"]), "image_mask": mask(sizes["V"])}


def build(kind: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    b, h, n, v, d = (sizes[name] for name in "BHLVD")
    randn = randoms(device, dtype)
    tensors = {name: randn(b, h, n if name.startswith("text") else v, d) for name in BLOCKS}
    tensors |= masks(sizes, b, device)
    tensors["grad_loss"] = torch.full((b,), 1 / b, device=device, dtype=torch.promote_types(dtype, torch.float32))
    whole = {name: randn(b, h, n + v, d) for name in ("query", "key", "value", "grad_output")}

    def arguments(t: Tensors) -> dict[str, Any]:
        text, image = (t["text_query"], t["text_key"]), (t["image_query"], t["image_key"])
        return {
            "text": text,
            "image": image,
            "kind": kind,
            "reduction": "none",
            "text_mask": t["text_mask"],
            "image_mask": t["image_mask"],
        }

    def loop(t: Tensors) -> Tensor:
        return published_loss(t, kind).to(t["grad_loss"].dtype)

    bound = backward(("query", "key", "value"), ("grad_output",))(sdpa)
    variants = operator_variants("congruence_loss", arguments, tensors, backward(BLOCKS, ("grad_loss",)), 5)
    variants["published"] = Variant(backward(BLOCKS, ("grad_loss",))(loop), 5)
    variants["SDPA"] = Variant(without_output(lambda _: bound(whole)))
    return Problem(
        tensors, variants, "SDPA", variants["reference"].run, lambda name, x: x[:1], pairs(sizes), _floor(sizes, dtype)
    )


def _floor(sizes: Sizes, dtype: torch.dtype) -> tuple[Pass, Pass]:
    """Forward: the scores, the change of basis of every head in both directions, two exponentials a pair; backward: 3 times."""
    (once,) = passes(sizes, dtype, (1, 2, 2))
    n, v = sizes["L"], sizes["V"]
    forward = once._replace(flops=once.flops + sizes["B"] * sizes["H"] * 4 * n * v * (n + v))
    return forward, Pass(*(3 * x for x in forward))


BENCHMARKS = [
    Benchmark(__name__, f"{kind}, forward+backward", UNITER, partial(build, kind))
    for kind in ("cacr", "iais_singular", "iais_distributed")
]
