"""Explain the pictures of a batch with a vision tower of CLIP ViT-L/14@336's size, with frozen weights.

Bound: the tower's forward and backward pass down to its input, with SDPA. Published (Chefer et al.): every map stored, one
gradient a layer, the whole N x N product; a second variant takes the gradients of all maps in one backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import vlattn_fast as va
from vlattn_fast.benchmarks._bounds import pairs, softmax_map, tokens, without
from vlattn_fast.benchmarks._measure import Benchmark, Problem, Tensors, Variant, backends, randoms, without_output
from vlattn_fast.benchmarks._workloads import Sizes
from vlattn_lab.timed import towers
from vlattn_lab.timed.workloads import CLIP_TOWER


def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    b, h, n, c, layers = sizes["B"], sizes["H"], tokens(sizes), sizes["C"], sizes["layers"]
    randn, causal = randoms(device, dtype), bool(sizes.get("causal"))
    read_out = n - 1 if causal else 0  # the token that predicts the next, or the class token
    tensors = {"tokens": randn(b, n, c), "aim": randn(c, std=c**-0.5), **towers.weights(sizes, device, dtype)}

    def score(t: Tensors, x: Tensor, attend: towers.Attend) -> Tensor:
        for number in range(layers):
            x = towers.layer(t, number, x, h, attend)
        return (F.layer_norm(x[:, read_out], (c,)) @ t["aim"]).sum()

    def plain(t: Tensors) -> Tensors:
        x = t["tokens"].detach().requires_grad_()
        torch.autograd.grad(score(t, x, partial(F.scaled_dot_product_attention, is_causal=causal)), x)
        return {}

    def ours(backend: str, t: Tensors) -> Tensors:
        x = t["tokens"]
        start = torch.zeros(len(x), 1, n, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        carried_in = torch.zeros_like(start)
        carried_in[:, :, read_out] = 1.0
        carrier = start.requires_grad_()

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            nonlocal carrier
            output, carrier = va.relevancy_attention(query, key, value, carrier, is_causal=causal, backend=backend)
            return output

        total = score(t, x, attend)
        (carried,) = torch.autograd.grad([total, carrier], [start], [torch.ones_like(total), carried_in])
        return {"relevancy": without(carried[:, 0], read_out)}

    def stored(one_backward: bool, t: Tensors) -> Tensors:
        maps: list[Tensor] = []

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            maps.append(softmax_map(query, key, causal))
            return maps[-1] @ value

        total = score(t, t["tokens"].detach().requires_grad_(), attend)
        if one_backward:
            grads: Iterable[Tensor] = torch.autograd.grad(total, maps)
        else:
            grads = (torch.autograd.grad(total, prob, retain_graph=True)[0] for prob in maps)
        relevancy = torch.eye(n, device=maps[0].device).expand(len(maps[0]), n, n)
        for prob, grad in zip(maps, grads, strict=True):
            abar = (grad * prob.detach()).clamp(min=0).mean(dim=1).float()
            relevancy = relevancy + torch.bmm(abar, relevancy)
        return {"relevancy": without(relevancy[:, read_out], read_out)}

    query = torch.zeros(b, h, n, c // h, device=device, dtype=dtype)
    carrier = torch.zeros(b, 1, n, device=device, dtype=torch.promote_types(dtype, torch.float32))
    call = {"query": query, "key": query, "value": query, "carrier": carrier, "is_causal": causal}
    names = [*backends("relevancy_attention", call), "reference"]
    maps = {"reference": 2 * layers}
    variants = {name: Variant(partial(ours, name), maps.get(name, 0)) for name in names}
    variants["maps stored, one backward"] = Variant(lambda t: stored(True, t), 3 * layers)
    variants["published"] = Variant(lambda t: stored(False, t), 2 * layers)
    variants["plain forward+backward"] = Variant(without_output(plain))
    forward = towers.flops(sizes)
    floor = [forward, forward]  # frozen weights: the backward pass has as many products
    return Problem(tensors, variants, "plain forward+backward", variants["reference"].run, _part, pairs(sizes), floor)


def _part(name: str, x: Tensor) -> Tensor:
    return x[:1] if name in ("tokens", "relevancy") else x


BENCHMARKS = [Benchmark(__name__, "relevancy", CLIP_TOWER, build)]
