"""Attention knockout of image -> last in one layer of a decoder, and the attribution of all edges between three groups of tokens.

Bound: plain SDPA, which neither cuts nor attributes. Published (Geva et al., EMNLP 2023): stored maps in eager attention, with an
edited mask. SDPA with a dense mask takes the same mask. The attribution is the gradient of a bias of 3 x 3 groups a head: by
stored maps A (dA - sum_j A dA), summed over the pairs of each two groups, and by SDPA the gradient of a mask for every head.
Rivals make their masks in the call: a model makes one for all layers of a knockout, and one a layer for an attribution.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast.benchmarks import _measure
from vlattn_fast.benchmarks._bounds import SDPA_BACKWARD, SDPA_FORWARD, pairs, passes, sdpa, standard, stored_map
from vlattn_fast.benchmarks._formula import ends
from vlattn_fast.benchmarks._measure import QKV, Benchmark, Problem, Tensors, Variant, finished, operator_problem, randoms
from vlattn_fast.benchmarks._workloads import KNOCKOUTS, Sizes

IMAGE, TEXT, LAST = range(3)
DENSE = "SDPA, dense mask"


def _groups(n: int, device: torch.device) -> Tensor:
    """int64 (N,): nine elevenths of a prompt are its image, behind the first token."""
    groups = torch.full((n,), TEXT, device=device)
    groups[1 : 1 + n * 9 // 11] = IMAGE
    groups[-1] = LAST
    return groups


def build(both: bool, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    tensors = standard(sizes, randoms(device, dtype))
    b, h, n, _ = tensors["query"].shape
    groups = _groups(n, device)
    wide = torch.promote_types(dtype, torch.float32)
    tensors["group_bias"] = torch.zeros(b, h, 3, 3, device=device, dtype=wide)
    if not both:
        tensors["group_bias"][:, :, LAST, IMAGE] = -torch.inf
    constants = {"query_groups": groups, "key_groups": groups, "is_causal": True}
    arguments = _measure.taking(*QKV, "group_bias", **constants)
    finish = finished(both, (*QKV, "group_bias"), ("grad_output",))
    bound = finished(both, QKV, ("grad_output",))(partial(sdpa, is_causal=True))
    baselines = (
        {
            "maps stored, one backward": Variant(partial(_stored, groups), 5),
            DENSE: Variant(finish(partial(_dense_bias, groups)), 4),
        }
        if both
        else {
            "published": Variant(finish(partial(_edited, groups)), 3),
            DENSE: Variant(finish(partial(_dense, groups)), 1 / (b * h)),
        }
    )
    floor = passes(sizes, dtype, SDPA_FORWARD, SDPA_BACKWARD)[: 1 + both]
    maps = 6 if both else 3
    return operator_problem(
        "score_attention", arguments, tensors, finish, maps, bound, _part, pairs(sizes), floor, baselines=baselines
    )


def _visible(groups: Tensor, cut: bool) -> Tensor:
    """bool (N, N), a causal mask, without image -> last where these are cut."""
    causal = torch.ones(len(groups), len(groups), dtype=torch.bool, device=groups.device).tril()
    return causal & ~((groups == LAST)[:, None] & (groups == IMAGE)) if cut else causal


def _edited(groups: Tensor, t: Tensors) -> Tensor:
    scores = t["query"] @ t["key"].mT * t["query"].shape[-1] ** -0.5
    return torch.softmax(scores.masked_fill(~_visible(groups, cut=True), -torch.inf), dim=-1) @ t["value"]


def _dense(groups: Tensor, t: Tensors) -> Tensor:
    query, key, value = (t[name] for name in QKV)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=_visible(groups, cut=True))


def _dense_bias(groups: Tensor, t: Tensors) -> Tensor:
    members = F.one_hot(groups, 3).to(t["query"])
    bias = members @ t["group_bias"].to(members.dtype) @ members.mT
    mask = bias.masked_fill(~_visible(groups, cut=False), -torch.inf)
    query, key, value = (t[name] for name in QKV)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _stored(groups: Tensor, t: Tensors) -> Tensors:
    prob, grad, output, gradients = stored_map(t, is_causal=True)
    members = F.one_hot(groups, 3).to(prob.dtype)
    logits = prob * (grad - (prob * grad).sum(-1, keepdim=True))
    return {"output": output, **gradients, "gradient of group_bias": members.mT @ logits @ members}


def _part(name: str, x: Tensor) -> Tensor:
    return ends(x, 2)


BENCHMARKS = [
    Benchmark(__name__, what, workload, partial(build, both))
    for workload in KNOCKOUTS
    for what, both in (("image -> last cut, forward", False), ("attribution, forward+backward", True))
]
