"""The measurement of both explanation tasks: relevancy of a read-out token in a tower with frozen weights.

Bound: the tower's forward and backward pass down to its input, with SDPA. Published (Chefer et al.): every map stored, one
gradient a layer, the whole N x N product; a second variant takes the gradients of all maps in one backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast.benchmarks import _models
from vlattn_fast.benchmarks._bounds import pairs, tokens
from vlattn_fast.benchmarks._measure import Problem, Tensors, Variant, backends, randoms, without_output
from vlattn_fast.benchmarks._workloads import Sizes


def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    b, h, n, c, layers = sizes["B"], sizes["H"], tokens(sizes), sizes["C"], sizes["layers"]
    randn, causal = randoms(device, dtype), bool(sizes.get("causal"))
    read_out = n - 1 if causal else 0  # the token that predicts the next, or the class token
    tensors = {"tokens": randn(b, n, c), "aim": randn(c, std=c**-0.5), **_models.weights(sizes, device, dtype)}

    def score(t: Tensors, x: Tensor, attend: _models.Attend) -> Tensor:
        for number in range(layers):
            x = _models.layer(t, number, x, h, attend)
        return (F.layer_norm(x[:, read_out], (c,)) @ t["aim"]).sum()

    def plain(t: Tensors) -> Tensors:
        x = t["tokens"].detach().requires_grad_()
        torch.autograd.grad(score(t, x, _models.Plain(causal)), x)
        return {}

    def ours(backend: str, t: Tensors) -> Tensors:
        x = t["tokens"]
        start = torch.zeros(len(x), 1, n, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        rows = torch.zeros_like(start)
        rows[:, :, read_out] = 1.0
        attend = _models.Carried(causal, start.requires_grad_(), backend)
        total = score(t, x, attend)
        (carried,) = torch.autograd.grad([total, attend.carrier], [start], [torch.ones_like(total), rows])
        return {"relevancy": _without_read_out(carried[:, 0])}

    def stored(one_backward: bool, t: Tensors) -> Tensors:
        attend = _models.Stored(causal)
        total = score(t, t["tokens"].detach().requires_grad_(), attend)
        grads: Iterable[Tensor] = (
            torch.autograd.grad(total, attend.maps)
            if one_backward
            else (torch.autograd.grad(total, prob, retain_graph=True)[0] for prob in attend.maps)
        )
        return {"relevancy": _without_read_out(_product(attend.maps, grads)[:, read_out])}

    def _without_read_out(row: Tensor) -> Tensor:
        """The row without the entry of the read-out token, which holds the identity that the recursion starts from."""
        return torch.cat([row[:, :read_out], row[:, read_out + 1 :]], dim=1)

    query = torch.zeros(b, h, n, c // h, device=device, dtype=dtype)
    carrier = torch.zeros(b, 1, n, device=device, dtype=torch.promote_types(dtype, torch.float32))
    call = {"query": query, "key": query, "value": query, "carrier": carrier, "is_causal": causal}
    names = [*backends("relevancy_attention", call), "reference"]
    maps = {"reference": 2 * layers}
    variants = {name: Variant(partial(ours, name), maps.get(name, 0)) for name in names}
    variants["maps stored, one backward"] = Variant(lambda t: stored(True, t), 3 * layers)
    variants["published"] = Variant(lambda t: stored(False, t), 2 * layers)
    variants["plain forward+backward"] = Variant(without_output(plain))
    forward = _models.flops(sizes)
    floor = [forward, forward]  # frozen weights: the backward pass has as many products
    return Problem(tensors, variants, "plain forward+backward", variants["reference"].run, _part, pairs(sizes), floor)


def _product(maps: Sequence[Tensor], grads: Iterable[Tensor]) -> Tensor:
    n = maps[0].shape[-1]
    relevancy = torch.eye(n, device=maps[0].device).expand(len(maps[0]), n, n)
    for prob, grad in zip(maps, grads, strict=True):
        abar = (grad * prob.detach()).clamp(min=0).mean(dim=1).float()
        relevancy = relevancy + torch.bmm(abar, relevancy)
    return relevancy


def _part(name: str, x: Tensor) -> Tensor:
    return x[:1] if name in ("tokens", "relevancy") else x
