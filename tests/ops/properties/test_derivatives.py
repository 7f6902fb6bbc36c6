"""Tangents and second derivatives against those of the formula, at the edges of tiles, under masks, in each dtype and layout."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from tests.helpers.compare import assert_all_close_to
from tests.helpers.ops.choices import CHOICES, Choice, chosen, laid_out
from tests.helpers.ops.properties import every, floating
from tests.helpers.ops.score_cases import TORCH_JIT
from vlattn_fast.checking.cases import Example
from vlattn_fast.checking.cases._dice import lay_out
from vlattn_fast.ops import OPERATORS

pytestmark = TORCH_JIT
WITHOUT = {"paged_attention_statistics": "it has no gradients"}


def made(operator: str, backend: str, choice: Choice) -> list[Example]:
    return [call for call in chosen(operator, backend, choice) if call.differentiable]


def of(call: Example, backend: str) -> Any:
    """The call as a function of its tensors; of their tangents, too, its own; where outputs are -Inf, 0."""
    names = [name for name in call.tensors]

    def run(*x: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, x, strict=True))
        made = call.run(named, backend=backend) if backend else OPERATORS[call.operator].formula(**call.arguments(named))
        return tuple([torch.where(y.isneginf(), 0.0, y) for y in floating(made)])

    def tangents(**x: Tensor) -> tuple[Tensor, ...]:
        given = tuple([x[name] for name in names]), tuple([x[f"{name}'"] for name in names])
        return tuple(jvp(run, *given)[1])

    return tangents


QUICK = ("maxsim", "relevancy_residual")


@every(*CHOICES, without=WITHOUT)
@pytest.mark.slow("triton", *(name for name in OPERATORS if name not in QUICK))
def test_tangents(backend: str, operator: str) -> None:
    for n, choice in enumerate(CHOICES[backend]):
        some = made(operator, backend, choice)
        call, tensors = laid_out(some[n % len(some)], choice)
        tangents = {f"{name}'": torch.where(x.isneginf(), 0.0, torch.randn_like(x)) for name, x in tensors.items()}
        what = f"{backend} {call.title} {choice}"
        scales = {f"out{n}": 1.0 for n in range(8)}  # where a tangent cancels, what is summed is about 1
        assert_all_close_to(of(call, backend), of(call, ""), {**tensors, **tangents}, what=what, scales=scales, grads=False)


def gradients(call: Example, backend: str) -> Any:
    """The call's gradients as a function of its tensors and of the cotangents, which have their outputs' names."""

    def run(**x: Tensor) -> tuple[Tensor, ...]:
        named = {name: x[name].requires_grad_() for name in call.tensors}
        outputs = floating(call.run(named, backend=backend))
        cotangents = [x[f"out{n}"].to(y.dtype) for n, y in enumerate(outputs)]
        return torch.autograd.grad(outputs, [*named.values()], cotangents, create_graph=True)

    return run


@pytest.mark.parametrize("backend", ("streaming", "cpu"), indirect=True)
@pytest.mark.parametrize("n", range(5))
def test_second_derivatives_of_attention(backend: str, n: int) -> None:
    """By gradients of gradients, all of each at once; those of a row with one key are zero."""
    for choice in CHOICES[backend][n::5]:
        some = [call for call in made("score_attention", backend, choice) if "score" not in call.arguments(call.tensors)]
        call, tensors = laid_out(some[n % len(some)], choice)
        outputs = floating(call.run(tensors, backend="reference"))
        given = {**tensors, **{f"out{k}": torch.randn_like(x) for k, x in enumerate(outputs)}}
        cotangents = [lay_out(torch.randn_like(x), choice.layout) for x in tensors.values()]
        scales = {name: 1.0 for name in (*(f"out{k}" for k in range(8)), *(f"grad {name}" for name in given))}
        what = f"{backend} {call.title} {choice}"
        assert_all_close_to(gradients(call, backend), gradients(call, "reference"), given, cotangents, what=what, scales=scales)
