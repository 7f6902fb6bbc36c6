"""Parts that operators' benchmarks share: plain SDPA of the same shape as the bound, the plain map, the floors of attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._ground.tensors import expand_heads
from vlattn_fast.benchmarks._measure import QKV, Pass, Tensors
from vlattn_fast.benchmarks._workloads import Sizes


def sdpa(tensors: Tensors, is_causal: bool = False) -> Tensor:
    query, key, value = (tensors[name] for name in QKV)
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


def softmax_map(query: Tensor, key: Tensor, is_causal: bool = False) -> Tensor:
    """A (B, H, N, M) as models compute A in eager mode."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1), -torch.inf)
    return torch.softmax(scores, dim=-1)


def stored_map(t: Tensors, is_causal: bool) -> tuple[Tensor, Tensor, Tensor, Tensors]:
    """Attention whose map A (B, H, N, M) is stored: A, its gradient dA, the output, and the gradients of the inputs by name."""
    leaves = {name: t[name].detach().requires_grad_() for name in QKV}
    key, value = (expand_heads(leaves[name], t["query"].shape[1]) for name in QKV[1:])
    prob = softmax_map(leaves["query"], key, is_causal)
    output = prob @ value
    grad, *grads = torch.autograd.grad(output, [prob, *leaves.values()], t["grad_output"])
    gradients = {f"gradient of {name}": x for name, x in zip(QKV, grads, strict=True)}
    return prob.detach(), grad, output.detach(), gradients


def pairs(sizes: Sizes) -> int:
    """B H N M, or the pairs of words and regions."""
    if "R" in sizes:
        return sizes["images"] * sizes["captions"] * sizes["R"] * sizes["T"]
    return sizes["B"] * sizes["H"] * tokens(sizes) * keys(sizes)


def tokens(sizes: Sizes) -> int:
    """N, text and image together where a workload has both; R, the regions, where it has those."""
    return sizes.get("R") or sizes.get("N") or sizes["L"] + sizes["V"]


def keys(sizes: Sizes) -> int:
    """M where a workload has it; else each token is a key."""
    return sizes.get("M") or tokens(sizes)


def standard(sizes: Sizes, randn: Callable[..., Tensor]) -> Tensors:
    """query and grad_output (B, H, N, D), key and value (B, H, M, D)."""
    lengths = dict(zip((*QKV, "grad_output"), (tokens(sizes), keys(sizes), keys(sizes), tokens(sizes)), strict=True))
    return {name: randn(sizes["B"], sizes["H"], length, sizes["D"]) for name, length in lengths.items()}


def without(carried: Tensor, token: int) -> Tensor:
    """`carried` (B, ..., N) without the entry of `token`, which may hold the identity that the recursion starts from."""
    return torch.cat([carried[..., :token], carried[..., token + 1 :]], dim=-1)


def passes(sizes: Sizes, dtype: torch.dtype, *terms: tuple[float, float, float], extra_bytes: float = 0.0) -> tuple[Pass, ...]:
    """One pass for each (matrix products over the pairs, tensors of B H N D read or written, exponentials a pair)."""
    per_tensor = sizes["B"] * sizes["H"] * (tokens(sizes) + keys(sizes)) // 2 * sizes["D"] * dtype.itemsize
    seen = pairs(sizes) / (2 if sizes.get("causal") else 1)
    return tuple(
        Pass(2 * products * seen * sizes["D"], count * per_tensor + extra_bytes, exps * seen) for products, count, exps in terms
    )


SDPA_FORWARD, SDPA_BACKWARD = (2, 4, 1), (5, 8, 1)
