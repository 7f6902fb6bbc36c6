"""relevancy_attention on every backend: the row form in one backward pass against the whole maps.

relevancy_step, which takes r Abar alone: test_relevancy_step.py. Edges of tiles: tests/kernels/ and tests/cuda/.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_close_to, outputs_and_grads
from tests.helpers.ops.backends import F64, HALVES, LOW, each, finest, on
from tests.helpers.ops.masks import masks_of, real_keys
from tests.helpers.ops.relevancy_cases import BACKENDS, RULES, WEIGHTS, call, check, cotangents, tensors
from tests.helpers.ops.tile_edges import covering
from vlattn_fast.backends.inputs import RelevancyAttentionBackwardInputs, RelevancyAttentionInputs, schema_of
from vlattn_fast.backends.reference.relevancy_attention import head_mean
from vlattn_fast.backends.streaming import relevancy_attention as streaming
from vlattn_fast.dispatch.choice import load
from vlattn_fast.ops.relevancy_attention import BACKENDS as TABLE


def t(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=F64)


# One head, N = 2. Equal queries and keys of zeros: A = 1/2 everywhere. value = [1], [3] and grad_out = [2], [-1]:
# dA = grad_out value^T = [2, 6], [-1, -3]; relu(A dA) = [1, 3], [0, 0].
ZEROS, VALUE, GRAD = torch.zeros(1, 1, 2, 4, dtype=F64), t([1], [3])[None, None], t([2], [-1])[None, None]
BY_HAND = {
    # name: options, r -> r * a + (r * b) Abar for r = [1, 10]
    "gradient": ({}, t([1 + 1, 10 + 3])),
    "attention": ({"rule": "attention"}, t([1 + 5.5, 10 + 5.5])),
    "rollout": ({"rule": "attention", "residual_weight": 0.5, "attention_weight": 0.5}, t([0.5 + 2.75, 5 + 2.75])),
    "row_normalize": ({"row_normalize": True}, t([1 + 0.25, 10 + 0.75])),  # the second row is zero and stays zero
    "no residual": ({"residual_weight": 0.0}, t([1, 3])),
    "no attention": ({"attention_weight": 0}, t([1, 10])),
    "weights": ({"residual_weight": t([2, 3]), "attention_weight": t([4, 5])}, t([2 + 4, 30 + 12])),
    "causal": ({"is_causal": True}, t([1 + 2, 10])),  # A = [1, 0], [1/2, 1/2]
    "key_mask": ({"key_mask": torch.tensor([[False, True]])}, t([1, 10 + 6])),  # A = [0, 1], [0, 1]
    "fully masked row": ({"attn_mask": torch.tensor([[False, False], [True, True]])}, t([1, 10])),
}


@on("reference", *BACKENDS)
@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str, backend: str) -> None:
    dtype, device = finest(backend), torch.get_default_device()
    options, expected = BY_HAND[name]
    options = {
        key: x.to(device, dtype if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x
        for key, x in options.items()
    }
    zeros, value, grad, r = (x.to(device, dtype) for x in (ZEROS, VALUE, GRAD, t([1, 10])[None]))
    value = value.clone().requires_grad_()  # otherwise no gradient of the output arrives, and rule "gradient" has nothing to take
    start = torch.zeros(1, 1, 2, dtype=dtype, requires_grad=True)
    out, carrier = va.relevancy_attention(zeros, zeros, value, start, backend=backend, **options)
    assert torch.equal(carrier, start)
    relevancy, _ = torch.autograd.grad([out, carrier], [start, value], [grad, r])
    torch.testing.assert_close(relevancy[0], expected.to(relevancy))


def test_relu_comes_before_the_mean_over_heads() -> None:
    """Eq. 5 clamps each head before heads are averaged: with opposite heads the other order would give zero."""
    prob, grad = torch.ones(1, 2, 1, 1, dtype=F64), t([[[1.0]], [[-1.0]]])
    assert head_mean(prob, grad.view(1, 2, 1, 1), False).item() == 0.5


EVERY, PAIRS = (combine(WEIGHTS, ("gradient", "attention"), (False, True)) for combine in (itertools.product, covering))


@each("case", streaming=(*EVERY,), cpu=PAIRS, triton=PAIRS)
def test_rules_and_weights(backend: str, case: tuple[str, str, bool]) -> None:
    weights, rule, row_normalize = case
    inputs = tensors(9, b=2, dtype=finest(backend))
    check(backend, inputs, rule=rule, row_normalize=row_normalize, **WEIGHTS[weights](9))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, in the interpreter: finfo.min log2(e)
@each("mask", **{backend: ("float", "finite numbers over a row", "keys") for backend in BACKENDS})
def test_masks_of_float32_under_16_bit(backend: str, mask: str) -> None:
    options = masks_of(mask, 20, 20)
    if mask == "float":
        options["attn_mask"] = 40.0 + options["attn_mask"]  # where bfloat16 has a spacing of 1/4
    check(backend, tensors(20, b=2, dtype=torch.bfloat16), row_normalize=True, **options)


@on(*BACKENDS)
@pytest.mark.parametrize("scale", (-0.4, 0.0))
def test_scale(scale: float, backend: str) -> None:
    check(backend, tensors(9, dtype=finest(backend)), scale=scale, is_causal=scale < 0.0)


def backward_inputs(inputs: RelevancyAttentionInputs, **new: Any) -> RelevancyAttentionBackwardInputs:
    """Those of the backward operator behind a forward pass on `inputs`."""
    shared = {name: x for name, x in inputs._asdict().items() if name != "carrier"}
    return RelevancyAttentionBackwardInputs(**shared, grad_lse=None, grad_behind_sink=None, **new)


def unmasked_inputs(made: dict[str, torch.Tensor], **options: Any) -> RelevancyAttentionInputs:
    absent = dict.fromkeys(("vector", "attn_mask", "key_mask", "row_bias", "key_groups", "sink"))
    arguments = made | absent | {"score": "dot", "parameter": 0.0} | options
    inputs: RelevancyAttentionInputs = schema_of(RelevancyAttentionInputs).from_named(arguments)
    return inputs


@each("dtype", cpu=LOW[:2], triton=LOW[:2])
@pytest.mark.parametrize("rule, row_normalize", RULES)
def test_what_nobody_asked_for_is_not_computed(rule: str, row_normalize: bool, backend: str, dtype: torch.dtype) -> None:
    """Every combination of cotangents and need_inputs gives what streaming gives, and None where that does."""
    module = load(TABLE, backend)
    made = tensors(20, dtype=dtype)
    carrier = made["carrier"]
    weight = torch.rand(1, 20, dtype=carrier.dtype)
    options = {"rule": rule, "row_normalize": row_normalize, "scale": 0.3, "is_causal": True, "backend": backend}
    forward = unmasked_inputs(made, residual_weight=None, attention_weight=weight, **options)
    out, lse = module.forward(forward)
    grads = (None, torch.randn_like(out)), (None, torch.rand_like(carrier)), (False, True)
    for grad_out, r, need in itertools.product(*grads):
        inputs = backward_inputs(forward, grad_out=grad_out, grad_carrier=r, out=out, lse=lse, need_inputs=need)
        ours, theirs = module.backward(inputs), streaming.backward(inputs._replace(lse=lse.to(carrier.dtype)))
        assert (ours[0] is None) == (grad_out is None or not need) and (ours[3] is None) == (r is None)
        for x, y in zip(ours, theirs, strict=True):
            assert (x is None) == (y is None)
            if x is not None and y is not None:
                assert x.dtype == y.dtype
                tolerance = 3e-2 if dtype in HALVES else 1e-5
                torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@each("dtype", streaming=(F64,), cpu=LOW[:2], triton=LOW[:2])
@pytest.mark.parametrize("rule, row_normalize", RULES)
def test_frozen_inputs(rule: str, row_normalize: bool, backend: str, dtype: torch.dtype) -> None:
    """The carrier alone requires a gradient, and the output's gradient comes by another path."""
    module, scale = load(TABLE, backend), 6**-0.5
    made = tensors(36, dtype=dtype)
    query, key, value, carrier = made.values()
    r, grad_out = torch.rand_like(carrier), torch.randn(1, 2, 36, 5, dtype=dtype)
    options = {"rule": rule, "row_normalize": row_normalize}
    weights = {"residual_weight": torch.zeros(1, 1, dtype=carrier.dtype), "attention_weight": None}
    inputs = unmasked_inputs(made, **weights, scale=scale, is_causal=False, backend=backend, **options)
    out, lse = module.forward(inputs)
    got = module.backward(backward_inputs(inputs, grad_out=grad_out, grad_carrier=r, out=out, lse=lse, need_inputs=False))
    assert got[:3] == (None, None, None)
    exact = va.reference.relevancy_step(*(x.double() for x in (r, query, key, value, grad_out)), **options)
    assert_close_to(got[3], exact, va.reference.relevancy_step(r, query, key, value, grad_out, **options), what="frozen")


@each("dtype", **{backend: (torch.float32, torch.float16) for backend in BACKENDS})
def test_small_relevancy_does_not_underflow(backend: str, dtype: torch.dtype) -> None:
    """relu(A * dA) of a small gradient: float16 itself would hold none of it."""
    for rows, row_normalize in ((1, False), (3, True)):
        inputs = tensors(40, rows=rows, dtype=dtype)
        grads = [x.to(dtype).float() for x in (6e-6 * torch.randn(1, 2, 40, 5), torch.rand(1, rows, 40))]
        options = {"residual_weight": 0.0, "row_normalize": row_normalize}
        found = outputs_and_grads(call(va.relevancy_attention, backend=backend, **options), inputs, grads)
        formula = call(va.reference.relevancy_attention, **options)
        exact = outputs_and_grads(formula, as_dtype(inputs, F64), [x.double() for x in grads])
        torch.testing.assert_close(found["grad carrier"].double(), exact["grad carrier"], rtol=1e-3, atol=0.0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
@on(*BACKENDS)
@pytest.mark.parametrize("where", ("query", "key", "value", "grad_out"))
@pytest.mark.parametrize("rule", ("gradient", "attention"))
def test_nan_comes_out(rule: str, where: str, backend: str) -> None:
    """NaN in one token of one head: no maximum and no clamp makes a number of what is none in the formula."""
    inputs = tensors(20, dtype=finest(backend))
    grads = cotangents(inputs)
    (grads[0] if where == "grad_out" else inputs[where])[0, 1, 5, 2] = torch.nan
    found = outputs_and_grads(call(va.relevancy_attention, backend=backend, rule=rule), inputs, grads)
    formula = outputs_and_grads(call(va.reference.relevancy_attention, rule=rule), inputs, grads)
    for name, x in found.items():
        assert torch.equal(torch.isnan(x), torch.isnan(formula[name])), name


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # NumPy's, in the interpreter
@on(*BACKENDS)
def test_an_lse_far_below_zero(backend: str) -> None:
    """exp(0 - lse) overflows in the columns of a tile where no key stands, or a masked one: none of it gets out."""
    inputs = tensors(20, b=2, rows=3)
    inputs["query"] = -8.0 * inputs["query"].abs() - 8.0
    inputs["key"] = inputs["key"].abs() + 4.0
    inputs = as_dtype(inputs, torch.bfloat16) | {"carrier": inputs["carrier"]}
    found = check(backend, inputs, key_mask=real_keys(2, 20), row_normalize=True, scale=1.0)
    assert all(torch.isfinite(x).all() for x in found.values())
