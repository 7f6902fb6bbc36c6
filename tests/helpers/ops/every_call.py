"""A small call of every kind of every public operator, for tests that ask the same of all of them."""

from typing import Any

import torch
from torch import Tensor

from vlattn_fast.checking.cases import Example, Sizes, examples
from vlattn_fast.ops import OPERATORS


def small(n: int) -> Sizes:
    """Sizes of a call of n tokens."""
    return Sizes(n, n, 8, 6, regions=n, words=5, features=8, images=2, captions=3)


def titles(backend: str = "streaming") -> list[str]:
    """The calls that this backend computes, and those of no backend."""

    def computes(example: Example) -> bool:
        operator = OPERATORS.get(example.operator)
        return operator is None or not operator.refusals(backend, example.arguments(example.tensors))

    return [example.title for example in examples(small(5)) if computes(example)]


def every_call(title: str, n: int) -> Example:
    return next(example for example in examples(small(n)) if example.title == title)


CALLS = titles()
WITH_CPU = titles("cpu")


def outputs_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def gradients(outputs: list[Tensor], inputs: dict[str, Tensor]) -> list[Tensor]:
    """Of the sum of all floating outputs, zeros where there is none; no gradients of a call that has none."""
    if not any(x.requires_grad for x in inputs.values()):
        return []
    total = [x.sum() for x in outputs if x.requires_grad]
    return list(torch.autograd.grad(total, list(inputs.values()), materialize_grads=True, allow_unused=True))


def leaves(every: Example, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Copies of the tensors, by default the call's, that require a gradient where the call has one."""
    copies = {name: x.detach().clone() for name, x in (every.tensors if tensors is None else tensors).items()}
    return {name: x.requires_grad_(every.differentiable and x.is_floating_point()) for name, x in copies.items()}
