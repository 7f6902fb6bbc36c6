"""A toy operator in one file: whoever goes through the operators finds it, without a line elsewhere.

`row_products(left, right)` has a formula and streaming alone, no argument that is a number, and no benchmark.
"""

import random
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.helpers.ops import every_call
from tests.helpers.ops.properties import Turn
from tests.ops import test_edited_outputs, test_foreign_tensors, test_host_cost
from tests.ops.properties import test_empty_sizes, test_options_and_sizes
from tools import cliffs, host
from vlattn_fast.backends import reference
from vlattn_fast.checking import fuzz, info, verify
from vlattn_fast.checking.cases import Example, Sizes
from vlattn_fast.checking.cases._dice import DIMS, LENGTHS, Dice
from vlattn_fast.dispatch.call import CallShape, call_shape
from vlattn_fast.dispatch.choice import launcher, select
from vlattn_fast.dispatch.operator import Operator
from vlattn_fast.dispatch.table import table
from vlattn_fast.ops import OPERATORS
from vlattn_fast.ops._registration import Saved, define, differentiable, once_differentiable

CPU = torch.device("cpu")

BACKENDS = table(streaming := ModuleType("row_products"))


def formula(left: Tensor, right: Tensor) -> Tensor:
    """Products of the rows of (B, N, D): (B, N)."""
    return (left * right).sum(-1)


class RowProductsInputs(NamedTuple):
    left: Tensor
    right: Tensor
    backend: str


class RowProductsBackwardInputs(NamedTuple):
    grad: Tensor
    left: Tensor
    right: Tensor
    backend: str


def forward(inputs: RowProductsInputs) -> Tensor:
    return torch.einsum("bnd,bnd->bn", inputs.left, inputs.right)


def backward(inputs: RowProductsBackwardInputs) -> tuple[Tensor, Tensor]:
    grad = inputs.grad[..., None]
    return grad * inputs.right, grad * inputs.left


def row_products(left: Tensor, right: Tensor, *, backend: str = "auto") -> Tensor:
    backend = select(BACKENDS, describe_call(left, right), backend)
    if backend == "reference":
        return formula(left, right)
    out: Tensor = _forward_op(RowProductsInputs(left, right, backend))
    return out


def describe_call(left: Tensor, right: Tensor) -> CallShape:
    for name, x in (("left", left), ("right", right)):
        if x.is_nested or x.layout != torch.strided or type(x).__name__ == "DTensor":
            raise TypeError(f"{name} must be a dense torch.Tensor (B, N, D); got another")
    if right.dtype != left.dtype:
        raise TypeError(f"right must have the dtype of left; got {right.dtype}")
    return call_shape("row_products", left, {"rows": left.shape[1], "features": left.shape[2]}, {})


_forward_op = define(
    "row_products", RowProductsInputs, "Tensor", launcher(BACKENDS, forward), lambda x: x.left.new_empty(x.left.shape[:2])
)
_backward_op = define(
    "row_products_backward",
    RowProductsBackwardInputs,
    "(Tensor, Tensor)",
    launcher(BACKENDS, backward),
    lambda x: (x.left.new_empty(x.left.shape), x.right.new_empty(x.right.shape)),
)
_saved = Saved(RowProductsInputs, RowProductsBackwardInputs, grads=["grad"])


def tangent(inputs: RowProductsInputs, tangents: Any, outputs: Any) -> Tensor:
    """Of products: linear in each factor."""
    given = {name: x for name in ("left", "right") if (x := tangents[name]) is not None}
    return sum(_forward_op(inputs._replace(**{name: x})) for name, x in given.items())  # type: ignore[no-any-return]


differentiable(
    "row_products",
    lambda ctx, grad: dict(zip(("left", "right"), _backward_op(_saved.inputs(ctx, grad)), strict=True)),
    lambda ctx, inputs, output: _saved.save(ctx, inputs),
    tangent,
)
once_differentiable("row_products_backward")
OPERATOR = Operator(row_products, describe_call, BACKENDS)


class Cases(ModuleType):
    """vlattn_fast/checking/cases/row_products.py."""

    @staticmethod
    def examples(sizes: Sizes) -> Iterator[Example]:
        shape = sizes.batch, sizes.queries, sizes.head_dim
        yield Example(row_products, "", {"left": torch.randn(shape), "right": torch.randn(shape)})

    @staticmethod
    def verify(generator: torch.Generator, sizes: Sizes) -> Iterator[Example]:
        shape = 2, sizes.queries, sizes.head_dim
        left, right = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        yield Example(row_products, "rows", {"left": left, "right": right})

    @staticmethod
    def draw(dice: Dice, dtype: torch.dtype) -> Example:
        shape = dice.pick("B", (0, 1, 2)), dice.pick("N", LENGTHS), dice.pick("D", DIMS)
        tensors = {name: dice.laid_out(name, dice.randn(*shape), dtype) for name in ("left", "right")}
        return Example(row_products, "", tensors)

    host = examples


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if its parts were files of the package."""
    monkeypatch.setattr(reference, "row_products", formula, raising=False)
    vars(streaming).update(forward=forward, backward=backward)
    monkeypatch.setitem(sys.modules, "vlattn_fast.checking.cases.row_products", Cases("row_products"))
    monkeypatch.setitem(OPERATORS, "row_products", OPERATOR)


def test_verify() -> None:
    results = {result.backend: result for result in verify.verify(dtypes=(torch.float32,), operators=["row_products"])}
    assert set(results) == set(verify.BACKENDS)
    assert results["streaming"].checks == 4 and results["streaming"].passed
    for backend in ("cpu", "triton", "cuda"):
        assert results[backend].reasons == (f"the operator has no backend {backend!r}",)
    assert "row_products" in {case.operator for case in verify.cases()}


def test_verify_sees_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "forward", lambda inputs: 1.001 * forward(inputs))
    (result,) = verify.verify(("streaming",), (torch.float32,), operators=["row_products"])
    assert not result.passed and result.worst == "rows: output 0"


def test_the_fuzzer() -> None:
    assert "row_products" in {fuzz.drawn(number)[0] for number in range(100)}
    outcomes = list(fuzz.fuzz(5, operators=["row_products"], backends=("streaming", "auto")))
    assert all(outcome.passed and not outcome.refused for outcome in outcomes), outcomes
    assert outcomes[0].repro().startswith("vlattn verify row_products")


def test_info_tells_the_truth() -> None:
    lines = list(info.lines())
    on_cpu, on_cuda = (line.split("  ") for line in lines if line.startswith("row_products"))
    notes = dict(re.findall(r"^\[(\d+)\] +(.*)$", "\n".join(lines), re.M))
    for cells in (on_cpu, on_cuda):
        assert cells[-1].strip() == "streaming"  # "auto"
        reasons = [notes[number] for cell in cells for number in re.findall(r"\[(\d+)\]", cell)]
        assert [reason for reason in reasons if "the operator has no backend 'cpu'" in reason]
    assert not any("take a head_dim" in note and "row_products" in note for note in notes.values())


def test_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no kernel, streaming is timed."""
    example = host.examples(CPU, "streaming")["row_products"]
    assert set(host.passes(example)) == {"forward", "forward+backward"}
    for run in host.passes(example).values():
        run()
    assert "row_products" not in host.examples(CPU, "triton") and "streaming" in host.backends_on(CPU)
    for name in [name for name in OPERATORS if "streaming" in host.timed_backends(name)]:
        monkeypatch.delitem(OPERATORS, name)
    assert "streaming" not in host.backends_on(CPU)


def test_cliffs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cliffs, "WORK", 1 << 12)
    example, facts = cliffs.draw("row_products", random.Random(0), CPU)
    variants = cliffs.runs(example, both=True)
    assert set(variants) == {"auto", "reference"} and "mask" not in facts
    for run in variants.values():
        run()


def of_streaming(test: Callable[..., None], **options: Any) -> Callable[[str], None]:
    return lambda operator: test("streaming", operator, **options)


TESTS: dict[str, Callable[[str], None]] = {
    "empty": of_streaming(test_empty_sizes.test_as_the_formula, turn=Turn(test_empty_sizes.EMPTY, None)),
    "layouts": of_streaming(test_options_and_sizes.test_layouts, turn=Turn(("fused", "heads last"), None)),
    "bits": of_streaming(test_options_and_sizes.test_equal_bits),
    "edited outputs": partial(test_edited_outputs.test_outputs_are_edited_in_place, backend="streaming"),
    "saved tensors": partial(test_edited_outputs.test_saved_tensors_come_back_in_another_layout, backend="streaming"),
    "meta": partial(test_foreign_tensors.test_meta_tensors, backend="streaming"),
    "fake": partial(test_foreign_tensors.test_fake_tensors, backend="streaming"),
    "autocast": test_foreign_tensors.test_float64_beside_float32_under_autocast,
    "no dispatcher": partial(test_host_cost.test_plain_tensors_do_without_the_dispatcher, backend="streaming"),
    "watched": test_host_cost.test_whoever_watches_sees_the_operator,
}


@pytest.mark.parametrize("test", TESTS)
def test_the_tests_of_every_call(test: str) -> None:
    assert "row_products" in every_call.titles()
    TESTS[test]("row_products")


@pytest.mark.parametrize("dynamic", [False, True])
def test_without_a_number_among_its_arguments(dynamic: bool) -> None:
    """No twin for numbers that vary, compiled and in the backward pass."""
    assert not hasattr(torch.ops.vlattn, "row_products_symbolic")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: row_products(x, y), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    x, y = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    out = compiled(x, y)
    torch.testing.assert_close(out, formula(x, y))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (x, y)), (y.detach(), x.detach()))
