"""A training step of a UNITER-size encoder: forward, matching loss plus the congruence loss of the last layer, backward, AdamW.

Every third sample has the congruence loss: the matched pairs among hard negatives. Bound: the same step without the loss.
Published: the loss as a Python loop over samples. `python -m vlattn_fast.benchmarks task_cacr_training` runs it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import vlattn_fast as va
from vlattn_fast.benchmarks._bounds import pairs
from vlattn_fast.benchmarks._measure import Benchmark, Pass, Problem, Tensors, Variant, backends, randoms, without_output
from vlattn_fast.benchmarks._published import published_loss
from vlattn_fast.benchmarks._workloads import Sizes
from vlattn_fast.benchmarks.congruence_loss import BLOCKS, MASKS, arguments, masks
from vlattn_lab.timed import towers
from vlattn_lab.timed.workloads import UNITER_ENCODER


def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    b, h, words, c, every = sizes["B"], sizes["H"], sizes["L"], sizes["C"], sizes["every"]
    randn, last = randoms(device, dtype), sizes["layers"] - 1
    training = towers.Training(sizes, device, dtype)
    tensors = {
        "tokens": randn(b, words + sizes["V"], c),
        "aim": randn(c, std=c**-0.5),
        **training.parameters,
        **masks(sizes, b, device),
    }

    def blocks(query: Tensor, key: Tensor) -> Tensors:
        text, image = ((query[:, :, part], key[:, :, part]) for part in (slice(words), slice(words, None)))
        return dict(zip(BLOCKS, (*text, *image), strict=True))

    def step(congruence: Callable[[Tensors], Tensor] | None, t: Tensors) -> Tensors:
        x = t["tokens"].detach().requires_grad_()
        stream, loss = x, x.new_zeros(())
        for number in range(last + 1):
            if number == last and congruence is not None:
                query, key, _ = towers.project(t, last, stream[::every], h)
                loss = congruence(blocks(query, key) | {name: t[name][::every] for name in MASKS})
            stream = towers.layer(t, number, stream, h, F.scaled_dot_product_attention)
        matching = F.softplus(-(stream[:, 0] @ t["aim"]))
        total = matching.sum() / b + loss.sum() * every / b
        return {"loss": loss.detach(), "gradient of tokens": training.step(t, total, x)}

    def ours(backend: str) -> Variant:
        return Variant(lambda t: step(lambda tensors: va.congruence_loss(**arguments("cacr", tensors), backend=backend), t))

    positives = -(-b // every)
    empty = torch.zeros(positives, h, words + sizes["V"], c // h, device=device, dtype=dtype)
    example = blocks(empty, empty) | masks(sizes, positives, device)
    variants = {name: ours(name) for name in [*backends("congruence_loss", arguments("cacr", example)), "reference"]}
    variants["published"] = Variant(lambda t: step(lambda tensors: published_loss(tensors, "cacr"), t))
    variants["no congruence loss"] = Variant(without_output(lambda t: step(None, t)))
    forward = towers.flops(sizes)
    floor = [forward, Pass(2 * forward.flops)]
    return Problem(tensors, variants, "no congruence loss", variants["reference"].run, _part, pairs(sizes), floor)


def _part(name: str, x: Tensor) -> Tensor:
    return x[:1] if name in ("tokens", "text_mask", "image_mask", "loss", "gradient of tokens") else x


BENCHMARKS = [Benchmark(__name__, "step", UNITER_ENCODER, build)]
