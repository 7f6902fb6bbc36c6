"""Every product with derivatives of a call, by each transform that gives it, and the same of the formula."""

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import grad, jvp

from tests.helpers.ops.derivative_formulas import FORMULAS, Outputs, carrier_gradient, carrier_gradients_of_residual
from vlattn_fast.checking.cases import Example

Tensors = tuple[Tensor, ...]


class Function:
    """A call as a function of its tensors. `loss` is a sum over its outputs; `gradient`, that of the loss by all tensors."""

    def __init__(self, example: Example, backend: str, **options: Any) -> None:
        """`backend`: "" for the formula; else `options` belong to the call."""
        self.example, self.backend, self.options = example, backend, options
        self.carries = any("carrier" in name for name in example.tensors)
        self.numbers = tuple(range(len(example.tensors)))

    def __call__(self, *x: Tensor) -> Outputs:
        named = dict(zip(self.example.tensors, x, strict=True))
        if not self.backend:
            return FORMULAS[self.example.operator](**self.example.arguments(named), **self.options)
        if "dropout_p" in self.example.options:
            torch.manual_seed(3)
        made = self.example.run(named, backend=self.backend, **self.options)
        outputs = [made] if isinstance(made, Tensor) else [y for y in made if y is not None and y.is_floating_point()]
        return tuple([torch.where(torch.isneginf(y), torch.zeros_like(y), y) for y in outputs])

    def loss(self, *x: Tensor) -> Tensor:
        return sum(y.sin().sum() for y in self(*x))  # type: ignore[return-value]

    def gradient(self, *x: Tensor) -> Tensors:
        if self.backend or not self.carries:
            return grad(self.loss, self.numbers)(*x)
        arguments = self.example.arguments(dict(zip(self.example.tensors, x, strict=True)))
        out, carrier = self(*x)
        by_name = dict(zip(self.example.tensors, grad(self.loss, self.numbers)(*x), strict=True))
        if self.example.operator == "relevancy_attention":
            by_name["carrier"] = carrier_gradient(out.cos(), carrier.cos(), **arguments)
        else:
            made = carrier_gradients_of_residual(out.cos(), carrier.cos(), **arguments)
            by_name["residual_carrier"], by_name["branch_carrier"] = made
        return tuple(by_name.values())

    def of_jvp(self, *xu: Tensor) -> Tensor:
        """Of a tangent and its primal; not of a carrier, whose backward pass is a rule."""
        half = len(xu) // 2
        outputs, tangents = jvp(self.__call__, xu[:half], xu[half:])
        pairs = list(zip(outputs, tangents, strict=True))
        return sum((y * t.sin()).sum() for y, t in (pairs[:1] if self.carries else pairs))  # type: ignore[return-value]


def forward(f: Function, x: Tensors, u: Tensors) -> Any:
    return jvp(f, x, u)


def forward_over_reverse(f: Function, x: Tensors, u: Tensors) -> Any:
    return jvp(f.gradient, x, u)


def reverse_over_forward(f: Function, x: Tensors, u: Tensors) -> Any:
    return grad(f.of_jvp, tuple(range(2 * len(x))))(*x, *u)


def reverse_over_reverse(f: Function, x: Tensors, u: Tensors) -> Any:
    """Not by a carrier, whose rule would be applied twice."""
    numbers = tuple(n for n, name in enumerate(f.example.tensors) if "carrier" not in name)
    return grad(lambda *y: sum((g * t).sum() for g, t in zip(f.gradient(*y), u, strict=True)), numbers)(*x)


def each_alone(f: Function, x: Tensors, u: Tensors) -> Any:
    """The derivatives of each gradient by itself: what is left out where others are None shows here."""
    numbers = tuple(n for n, name in enumerate(f.example.tensors) if "carrier" not in name)
    return [grad(lambda *y, n=n: (f.gradient(*y)[n] * u[n]).sum(), numbers)(*x) for n in range(len(x))]


def dual_level(f: Function, x: Tensors, u: Tensors) -> Any:
    """Without functorch; the backward pass comes after the level."""
    leaves = [y.clone().requires_grad_() for y in x]
    if not f.backend:  # the same numbers
        return jvp(f, x, u)[1], torch.autograd.grad(f.of_jvp(*leaves, *u), leaves, allow_unused=True, materialize_grads=True)
    with forward_ad.dual_level():
        duals = [forward_ad.unpack_dual(y) for y in f(*map(forward_ad.make_dual, leaves, u))]
        pairs = [(y.primal, y.tangent) for y in duals]
        loss = sum((y * t.sin()).sum() for y, t in (pairs[:1] if f.carries else pairs))
    return tuple(t for _, t in pairs), torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def jacobian(f: Function, x: Tensors, u: Tensors) -> Any:
    return torch.func.jacfwd(lambda y: f(y, *x[1:])[0])(x[0])


def hessian(f: Function, x: Tensors, u: Tensors) -> Any:
    return torch.func.jacfwd(lambda y: f.gradient(y, *x[1:])[0])(x[0])


def batched(f: Function, x: Tensors, u: Tensors) -> Any:
    """vmap of forward, gradient and hvp; the second tensor is one for all samples."""
    dims = tuple(None if n == 1 else n % 2 * min(1, y.dim()) for n, y in enumerate(x))
    many = tuple(y if dim is None else torch.stack([y, 0.9 * y], dim) for y, dim in zip(x, dims, strict=True))
    each = [lambda *y: f(*y), lambda *y: f.gradient(*y), lambda *y: jvp(f.gradient, y, u)[1]]
    if f.backend:
        return tuple(torch.vmap(run, in_dims=dims, randomness="same")(*many) for run in each)
    samples = [tuple(y if dim is None else y.select(dim, n) for y, dim in zip(many, dims, strict=True)) for n in range(2)]
    return tuple(tuple(map(torch.stack, zip(*[run(*y) for y in samples], strict=True))) for run in each)


PRODUCTS: dict[str, Callable[[Function, Tensors, Tensors], Any]] = {
    each.__name__: each
    for each in (
        forward,
        forward_over_reverse,
        reverse_over_forward,
        reverse_over_reverse,
        each_alone,
        dual_level,
        jacobian,
        hessian,
        batched,
    )
}
