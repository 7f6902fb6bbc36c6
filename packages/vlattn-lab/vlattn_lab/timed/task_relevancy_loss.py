"""A training step of ViT-B/16's encoder with a loss on its relevancy: forward, cross-entropy of two classes plus the share of the
relevancy outside of a mask, backward, AdamW.

Bound: the same step without the loss on relevancy. Published (Chefer et al., NeurIPS 2022): every map stored, one gradient a
layer, the whole product, and a backward pass through all of it; a second variant takes the gradients of all maps at once, and
one row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlattn_fast as va
from vlattn_fast.benchmarks._bounds import pairs, softmax_map, without
from vlattn_fast.benchmarks._formula import CAPTURE
from vlattn_fast.benchmarks._measure import Benchmark, Pass, Problem, Tensors, Variant, randoms, without_output
from vlattn_fast.benchmarks._workloads import Sizes
from vlattn_fast.interpret.relevancy.methods.registry import published
from vlattn_lab.timed import towers
from vlattn_lab.timed.workloads import VIT_STEPS

WEIGHT = 0.8  # of the loss on relevancy


class _Layer(nn.Module):
    def __init__(self, t: Tensors, number: int, heads: int, attend: towers.Attend) -> None:
        super().__init__()
        self.run = partial(towers.layer, t, number, heads=heads, attend=attend)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    b, n, c, layers = sizes["B"], sizes["N"], sizes["C"], sizes["layers"]
    randn = randoms(device, dtype)
    training = towers.Training(sizes, device, dtype)
    tensors = {"tokens": randn(b, n, c), "aim": randn(c, std=c**-0.5), "mask": randn(b, n) > 0, **training.parameters}
    outside = va.nn.RelevancyLoss("inside", prefix=1)

    def encoder(t: Tensors, attend: towers.Attend) -> nn.Module:
        return nn.Sequential(*(_Layer(t, number, sizes["H"], attend) for number in range(layers)))

    def scores_of(t: Tensors, x: Tensor) -> Tensor:
        return F.layer_norm(x[:, 0], (c,)) @ t["aim"]

    def finish(t: Tensors, x: Tensor, scores: Tensor, relevancy: Tensor | None) -> Tensors:
        total = F.softplus(-scores).sum() / b
        if relevancy is not None:
            total = total + WEIGHT * outside(relevancy, t["mask"]) * len(x) / b
        rows = {} if relevancy is None else {"relevancy": without(relevancy.detach(), 0)}
        return {**rows, "gradient of tokens": training.step(t, total, x)}

    def plain(t: Tensors) -> Tensors:
        x = t["tokens"].detach().requires_grad_()
        return finish(t, x, scores_of(t, encoder(t, F.scaled_dot_product_attention)(x)), None)

    def ours(t: Tensors) -> Tensors:
        x, model = t["tokens"].detach().requires_grad_(), encoder(t, F.scaled_dot_product_attention)
        with va.nn.capture_relevancy(model, method=published("gradient")) as captured:
            scores = scores_of(t, model(x))
        relevancy = captured.relevancy(scores.sum(), position="cls")
        assert isinstance(relevancy, Tensor)
        return finish(t, x, scores, relevancy)

    def stored(row_of: Callable[[Tensor, list[Tensor]], Tensor], t: Tensors) -> Tensors:
        maps: list[Tensor] = []

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            maps.append(softmax_map(query, key))
            return maps[-1] @ value

        x = t["tokens"].detach().requires_grad_()
        scores = scores_of(t, encoder(t, attend)(x))
        return finish(t, x, scores, row_of(scores.sum(), maps))

    whole = {"maps stored, one backward": Variant(partial(stored, _row), 5 * layers)}
    whole["published"] = Variant(partial(stored, _published), 5 * layers)
    variants = {CAPTURE: Variant(ours), **whole, "no loss on relevancy": Variant(without_output(plain))}
    forward = towers.flops(sizes)
    floor = [forward, Pass(2 * forward.flops)]
    truth = whole["maps stored, one backward"].run
    return Problem(tensors, variants, "no loss on relevancy", truth, _part, pairs(sizes), floor)


def _abar(prob: Tensor, grad: Tensor) -> Tensor:
    return (prob * grad).clamp(min=0).mean(dim=1)


def _row(score: Tensor, maps: list[Tensor]) -> Tensor:
    """The first row (B, N) of the product."""
    grads = torch.autograd.grad(score, maps, retain_graph=True)
    row = F.one_hot(torch.zeros(len(maps[0]), 1, dtype=torch.int64, device=score.device), maps[0].shape[-1]).to(score.dtype)
    for prob, grad in zip(reversed(maps), reversed(grads), strict=True):
        row = row + row @ _abar(prob, grad)
    return row[:, 0]


def _published(score: Tensor, maps: list[Tensor]) -> Tensor:
    """The same from the whole product, and from one gradient a layer."""
    relevancy = torch.eye(maps[0].shape[-1], dtype=score.dtype, device=score.device).expand(len(maps[0]), -1, -1)
    for prob in maps:
        (grad,) = torch.autograd.grad(score, prob, retain_graph=True)
        relevancy = relevancy + _abar(prob, grad) @ relevancy
    return relevancy[:, 0]


def _part(name: str, x: Tensor) -> Tensor:
    return x[:1] if name in ("tokens", "mask", "relevancy", "gradient of tokens") else x


BENCHMARKS = [Benchmark(__name__, "relevancy loss", workload, build) for workload in VIT_STEPS]
