"""Tangents and second derivatives of congruence_loss, stacked_cross_attention and maxsim, against the formulas in float64.

For outputs F(x), tangents u and gradients h, `jvp` is DF(x) u and `second` is (D^2 F(x)[u])^T h. The formulas give both by
backward passes alone: <u, DF(x)^T h> has the gradients jvp by h and second by x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from inspect import signature
from typing import Any, NamedTuple

import pytest
import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from tests.helpers.compare import LargestAllocation, as_dtype, assert_close_to
from tests.helpers.ops.congruence_loss_cases import call, make, masks, prefix
from vlattn_fast import reference
from vlattn_fast.backends import inputs as types
from vlattn_fast.backends.reference.congruence_loss import KINDS
from vlattn_fast.backends.reference.stacked_cross_attention import AGGREGATIONS, FIRST_NORMS
from vlattn_fast.backends.streaming import _tiles, congruence_loss, maxsim, stacked_cross_attention

F64 = torch.float64


class Case(NamedTuple):
    """A formula of the tensors, and a streaming backend with the inputs of its `jvp` and `second` but tensors."""

    formula: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    backend: Any
    kinds: tuple[Any, Any]
    options: dict[str, Any]


def congruence(
    kind: str = "iais_distributed", masked: str = "", direction: str = "both", sizes: Sequence[int] = (3, 2, 6, 9)
) -> Case:
    b, h, text, image = sizes
    tensors, given = make(text, image, b=b, h=h, d=4, cross=True), masks(masked) if masked else {}
    options = {"kind": kind, "direction": direction, "scale": 0.5, "gradients": torch.empty(0)}
    formula = call(reference.congruence_loss, kind=kind, direction=direction, scale=0.5, **given)
    kinds = types.CongruenceLossJvpInputs, types.CongruenceLossSecondInputs
    return Case(formula, tensors, congruence_loss, kinds, {"text_mask": None, "image_mask": None} | options | given)


def stacked(ragged: bool = False, sizes: Sequence[int] = (3, 6, 4, 7), **options: Any) -> Case:
    features = 4 if options.get("direction") == "i2t" else 8  # fewer or more than contexts, which makes Gram matrices
    tensors = {name: torch.randn(*two, features, dtype=F64) for name, two in {"images": sizes[:2], "captions": sizes[2:]}.items()}
    lengths = {"caption_lengths": torch.tensor([7, 0, 3, 1]), "image_lengths": torch.tensor([6, 2, 4])} if ragged else {}
    defaults = {"direction": "t2i", "first_norm": "clipped_l2norm", "smooth": 4.0, "aggregation": "logsumexp", "lambda_lse": 6.0}
    every = defaults | {"caption_lengths": None, "image_lengths": None} | lengths | options

    def formula(images: Tensor, captions: Tensor) -> Tensor:
        return reference.stacked_cross_attention(images, captions, **every)

    kinds = types.StackedCrossAttentionJvpInputs, types.StackedCrossAttentionSecondInputs
    return Case(formula, tensors, stacked_cross_attention, kinds, every | {"features": 0})


def late(masked: bool = False, sizes: Sequence[int] = (3, 4, 2, 6)) -> Case:
    tensors = {name: torch.randn(*two, 5, dtype=F64) for name, two in {"queries": sizes[:2], "documents": sizes[2:]}.items()}
    of_tokens = (prefix(4, 4, 2, 0), prefix(6, 3, 6)) if masked else (None, None)
    filled = [x if mask is None else x * mask[..., None] for x, mask in zip(tensors.values(), of_tokens, strict=True)]
    _, places = maxsim.forward(types.MaxsimInputs(*filled, *of_tokens, saves=True, backend="streaming"))

    def formula(queries: Tensor, documents: Tensor) -> Tensor:
        return reference.maxsim(queries, documents, *of_tokens)

    return Case(formula, tensors, maxsim, (types.MaxsimJvpInputs, types.MaxsimSecondInputs), {"places": places})


SIZES = {make_case: signature(make_case).parameters["sizes"].default for make_case in (congruence, stacked, late)}
CASES: dict[str, Callable[[], Case]] = {
    **{f"congruence_loss, {kind}": lambda kind=kind: congruence(kind) for kind in KINDS},
    **{f"congruence_loss, {kind}, scattered": lambda kind=kind: congruence(kind, "scattered", "text") for kind in KINDS},
    **{f"congruence_loss, {kind}, empty samples": lambda kind=kind: congruence(kind, "empty samples", "image") for kind in KINDS},
    **{f"stacked_cross_attention, {norm}": lambda norm=norm: stacked(first_norm=norm) for norm in FIRST_NORMS},
    **{
        f"stacked_cross_attention, {norm}, ragged": lambda norm=norm: stacked(True, first_norm=norm, direction="i2t")
        for norm in FIRST_NORMS
    },
    **{f"stacked_cross_attention, {each}": lambda each=each: stacked(True, aggregation=each) for each in AGGREGATIONS[1:]},
    "maxsim": late,
    "maxsim, masked": lambda: late(True),
}
ONE_OF_EACH = (
    "congruence_loss, iais_distributed, scattered",
    "stacked_cross_attention, clipped_l2norm, ragged",
    "maxsim, masked",
)


class Point(NamedTuple):
    """A case with tangents of its tensors and gradients of its output."""

    case: Case
    tangents: dict[str, Tensor]
    grad: Tensor

    def in_dtype(self, dtype: torch.dtype) -> Point:
        case = self.case._replace(tensors=as_dtype(self.case.tensors, dtype))
        return Point(case, as_dtype(self.tangents, dtype), self.grad.to(dtype))

    def of_backend(self) -> dict[str, Tensor]:
        """What `jvp` and `second` of the backend give."""
        tangents = {f"{name}_tangent": x for name, x in self.tangents.items()}
        grads = dict.fromkeys(("grad_loss", "grad_similarity"), self.grad)
        named = {"backend": "streaming"} | tangents | grads | self.case.tensors | self.case.options
        jvp, second = (kind(*[named.get(name) for name in kind._fields]) for kind in self.case.kinds)
        gradients = self.case.backend.second(second)
        fields = [name.removesuffix("_tangent") for name in second._fields[: len(gradients)]]
        none = {name: torch.zeros_like(x) for name, x in self.case.tensors.items()}
        made = {name: x for name, x in zip(fields, gradients, strict=True) if x is not None}
        return {"jvp": self.case.backend.jvp(jvp)[0], **none, **made}

    def of_formula(self) -> dict[str, Tensor]:
        leaves = {name: x.clone().requires_grad_() for name, x in self.case.tensors.items()}
        output = self.case.formula(**leaves)
        grad = self.grad.to(output.dtype, copy=True).requires_grad_()
        grads = torch.autograd.grad(output, list(leaves.values()), grad, create_graph=True, materialize_grads=True)
        product = sum((x * u).sum() for x, u in zip(grads, self.tangents.values(), strict=True))
        jvp, *made = torch.autograd.grad(product, [grad, *leaves.values()], materialize_grads=True)
        return {"jvp": jvp, **dict(zip(leaves, made, strict=True))}


def point(name: str) -> Point:
    return at_random(CASES[name]())


def at_random(case: Case) -> Point:
    tangents = {name: torch.randn_like(x) for name, x in case.tensors.items()}
    return Point(case, tangents, torch.randn_like(case.formula(**case.tensors)))


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


# ------------------------------------------------------------------ streaming


@pytest.mark.parametrize("elements", [_tiles.TILE_ELEMENTS, 60])
@pytest.mark.parametrize("name", CASES)
def test_streaming(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", elements)
    at = point(name)
    expected = at.of_formula()
    assert expected["jvp"].abs().max() > 1e-4 and sum(x.abs().max() > 1e-4 for x in expected.values()) >= 3
    assert_equal(at.of_backend(), expected)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_without_some_tangents(name: str) -> None:
    at = point(name)
    for zero in at.tangents:
        without = at._replace(tangents={**at.tangents, zero: torch.zeros_like(at.tangents[zero])})
        none = at._replace(tangents={key: x for key, x in at.tangents.items() if key != zero})
        assert_equal(none.of_backend(), without.of_formula())
    none = at._replace(tangents={})
    assert not any(x.any() for x in none.of_backend().values())


@pytest.mark.parametrize("make_case", [congruence, stacked, late])
def test_sizes_of_zero(make_case: Callable[..., Case]) -> None:
    for empty in range(len(SIZES[make_case])):
        sizes = [0 if n == empty else size for n, size in enumerate(SIZES[make_case])]
        at = at_random(make_case(sizes=sizes))
        assert_equal(at.of_backend(), at.of_formula())


@pytest.mark.parametrize("caller", ["an operator", "a level", "an operator in a level"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_where_callers_are(name: str, caller: str) -> None:
    """In an operator, below autograd; and where a level of forward mode is open, of which there is but one."""
    at = point(name)
    expected = at.of_formula()
    with ExitStack() as stack:
        if "level" in caller:
            stack.enter_context(forward_ad.dual_level())
        if "operator" in caller:
            stack.enter_context(_C._AutoDispatchBelowAutograd())
            stack.enter_context(forward_ad._set_fwd_grad_enabled(False))
        got = at.of_backend()
        assert all(forward_ad.unpack_dual(x).tangent is None for x in got.values())
    assert_equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_rounding(name: str, dtype: torch.dtype) -> None:
    at = point(name).in_dtype(dtype)
    ours, exact, formula = at.of_backend(), at.in_dtype(F64).of_formula(), at.of_formula()
    for key, x in ours.items():
        assert_close_to(x, exact[key], formula[key], what=key)


@pytest.mark.parametrize("kind", KINDS)
def test_no_map_of_each_head(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 1000)
    case = congruence(kind)._replace(tensors=as_dtype(make(24, 30, b=2, h=8, d=4, cross=True), torch.float32))
    tangents = {name: torch.randn_like(x) for name, x in case.tensors.items()}
    with LargestAllocation() as largest:
        Point(case, tangents, torch.randn(2)).of_backend()
    assert largest.bytes <= 4 * 2 * 8 * 30 * 4, largest.by  # a gradient; a sample's map of each head has 28,800


# ------------------------------------------------------------------ the formulas


@pytest.mark.parametrize("name", CASES)
def test_formulas_have_every_mode(name: str) -> None:
    at = point(name)
    formula, names, grad = at.case.formula, list(at.case.tensors), at.grad
    x, u = tuple(at.case.tensors.values()), tuple(at.tangents.values())
    expected = at.of_formula()

    def run(*tensors: Tensor) -> Tensor:
        return formula(**dict(zip(names, tensors, strict=True)))

    def jvp(*tensors: Tensor) -> Tensor:
        return torch.func.jvp(run, tensors, u)[1]

    def check(tangent: Tensor | None, gradients: tuple[Tensor, ...]) -> None:
        made = {} if tangent is None else {"jvp": tangent}
        given = {"jvp": expected["jvp"]} if tangent is None else {}
        assert_equal(made | given | dict(zip(names, gradients, strict=True)), expected)

    arguments = tuple(range(len(x)))
    check(jvp(*x), torch.func.grad(lambda *y: (grad * jvp(*y)).sum(), arguments)(*x))  # reverse over forward
    check(None, torch.func.jvp(lambda *y: torch.func.vjp(run, *y)[1](grad), x, u)[1])  # forward over reverse
    leaves = [y.clone().requires_grad_() for y in x]
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(run(*[forward_ad.make_dual(y, v) for y, v in zip(leaves, u, strict=True)])).tangent
        gradients = torch.autograd.grad(tangent, leaves, grad, materialize_grads=True)
        check(tangent.detach(), gradients)
    two = torch.func.vmap(lambda *v: torch.func.jvp(run, x, v)[1])(*[torch.stack([v, -2 * v]) for v in u])
    torch.testing.assert_close(two, torch.stack([expected["jvp"], -2 * expected["jvp"]]), rtol=1e-9, atol=1e-12)
