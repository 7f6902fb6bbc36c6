"""A pre-norm transformer tower in plain torch, with its attention as an argument and its weights as a dict of tensors.

One tower serves every variant of a task, in float64 too, without a model library. Weights are random, normal by fan-in, so that
attention is uneven as in a trained model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast.benchmarks._bounds import tokens
from vlattn_fast.benchmarks._measure import Pass, Tensors, randoms
from vlattn_fast.benchmarks._workloads import Sizes

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def weights(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Tensors:
    randn, c = randoms(device, dtype), sizes["C"]
    shapes = {"qkv": (3 * c, c), "out": (c, c), "up": (4 * c, c), "down": (c, 4 * c)}
    return {f"{n}.{name}": randn(*s, std=s[1] ** -0.5) for n in range(sizes["layers"]) for name, s in shapes.items()}


def project(t: Tensors, n: int, x: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Query, key and value (B, H, N, D) of layer n from its input."""
    packed = F.linear(F.layer_norm(x, x.shape[-1:]), t[f"{n}.qkv"])
    return tuple(packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4))


def layer(t: Tensors, n: int, x: Tensor, heads: int, attend: Attend) -> Tensor:
    x = x + F.linear(attend(*project(t, n, x, heads)).transpose(1, 2).flatten(2), t[f"{n}.out"])
    return x + F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[-1:]), t[f"{n}.up"])), t[f"{n}.down"])


class Training:
    """Steps of AdamW on `weights`, at a rate of 0: the same cost, and all variants see the same weights."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        self.parameters = {name: x.requires_grad_() for name, x in weights(sizes, device, dtype).items()}
        self._optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.0)

    def step(self, t: Tensors, loss: Tensor, x: Tensor) -> Tensor:
        """The gradient of x. There is no step on the copies of `parameters` in float64."""
        grad, *grads = torch.autograd.grad(loss, [x, *(t[name] for name in self.parameters if name in t)])
        if t["0.qkv"] is self.parameters["0.qkv"]:
            for parameter, parameter_grad in zip(self.parameters.values(), grads, strict=True):
                parameter.grad = parameter_grad
            self._optimizer.step()
        return grad


def flops(sizes: Sizes) -> Pass:
    """The matrix products of one forward pass: 12 C C weights a token and layer, and attention."""
    n = tokens(sizes)
    attention = 4 * n * sizes["C"] / (2 if sizes.get("causal") else 1)
    return Pass(sizes["layers"] * sizes["B"] * n * (24 * sizes["C"] ** 2 + attention))
