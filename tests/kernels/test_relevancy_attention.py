"""The Triton kernels of relevancy_attention in the interpreter against the formula: outputs, gradients, r Abar; step alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import LargestAllocation, as_dtype, assert_all_close_to, assert_close_to, outputs_and_grads
from torch import Tensor
from vlattn_fast.kernels import relevancy_attention as kernels

import vlattn_fast as va
from tests.ops.score_cases import LAYOUTS, lay_out
from vlattn_fast.streaming import relevancy_attention as streaming

F64 = torch.float64
RULES = list(itertools.product(("gradient", "attention"), (False, True)))


def tensors(
    n: int, *, b: int = 1, h: int = 2, kv: int = 2, d: int = 6, dv: int = 5, rows: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The carrier stays float32."""
    shapes = {"query": (b, h, n, d), "key": (b, kv, n, d), "value": (b, kv, n, dv)}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()} | {"carrier": torch.rand(b, rows, n)}


def cotangents(inputs: dict[str, Tensor]) -> list[Tensor]:
    b, h, n, _ = inputs["query"].shape
    return [torch.randn(b, h, n, inputs["value"].shape[3]), torch.rand(inputs["carrier"].shape)]


def call(operator: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda query, key, value, carrier: operator(query, key, value, carrier, **options)


def check(inputs: dict[str, Tensor], sent: list[Tensor | None] | None = None, **options: Any) -> dict[str, Tensor]:
    """Queries and keys have gradients that cancel: they are held to the size of what was summed."""
    options["enable_gqa"] = inputs["key"].shape[1] != inputs["query"].shape[1]
    return assert_all_close_to(
        call(va.relevancy_attention, backend="triton", **options),
        call(va.reference.relevancy_attention, **options),
        inputs,
        cotangents(inputs) if sent is None else sent,
        scales={"grad query": 1.0, "grad key": 1.0},
    )


def some(n: int, m: int | None = None) -> Tensor:
    """(N,M) About two thirds visible, the second row not at all."""
    mask = torch.rand(n, m or n) > 0.35
    mask[1] = False
    return mask


def padding(n: int) -> Tensor:
    """(B,N): some tokens of the first sample are padding, early ones too; all of the second are."""
    mask = (torch.arange(n) % 5 != 1).repeat(2, 1)
    mask[1] = False
    return mask


WEIGHTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "none": lambda n: {},
    "numbers": lambda n: {"residual_weight": 0.0, "attention_weight": 2},
    "tensors": lambda n: {"residual_weight": torch.rand(1, n), "attention_weight": torch.randn(1, n)},
}
MASKS: dict[str, Callable[[int], dict[str, Any]]] = {
    "bool": lambda n: {"attn_mask": torch.stack([some(n), some(n)])[:, None]},
    "float": lambda n: {"attn_mask": torch.randn(1, 2, n, n).masked_fill(~some(n), -torch.inf)},
    "key": lambda n: {"key_mask": padding(n)},
    "causal": lambda n: {"is_causal": True},
    "causal key": lambda n: {"is_causal": True, "key_mask": padding(n)},
    "all": lambda n: {"attn_mask": torch.randn(n, n).masked_fill(~some(n), -torch.inf), **MASKS["causal key"](n)},
    "nothing": lambda n: {"attn_mask": torch.zeros(n, n, dtype=torch.bool)},
}


@pytest.mark.parametrize("rule, row_normalize", RULES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_rules_and_weights(weights: str, rule: str, row_normalize: bool) -> None:
    check(tensors(37), rule=rule, row_normalize=row_normalize, **WEIGHTS[weights](37))


@pytest.mark.parametrize("rule, row_normalize", [("gradient", True), ("attention", False)])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, rule: str, row_normalize: bool) -> None:
    inputs = tensors(40, b=2, rows=1 if row_normalize else 2)
    found = check(inputs, rule=rule, row_normalize=row_normalize, **MASKS[mask](40))
    assert all(torch.isfinite(x).all() for x in found.values())


@pytest.mark.parametrize("n", (1, 15, 17, 63, 65, 100, 160))
@pytest.mark.parametrize("causal", (False, True))
def test_sizes_either_side_of_a_tile(causal: bool, n: int) -> None:
    check(tensors(n, h=1, kv=1, d=3, rows=2), is_causal=causal)
    check(tensors(n, d=8, dv=8, rows=1, dtype=torch.bfloat16), is_causal=causal, row_normalize=True)


@pytest.mark.parametrize("mask", ("bool", "causal", "causal key"))
def test_masks_over_several_tiles(mask: str) -> None:
    """16-bit tiles are 64 to 128 long."""
    check(tensors(150, b=2, d=8, rows=1, dtype=torch.float16), row_normalize=True, **MASKS[mask](150))


def test_many_tokens() -> None:
    check(tensors(577, h=1, kv=1, rows=1, dtype=torch.bfloat16))


@pytest.mark.parametrize("rows", (0, 1, 3, 16, 17, 64, 70, 130))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_number_of_rows(dtype: torch.dtype, rows: int) -> None:
    inputs = tensors(40, rows=rows, dtype=dtype)
    if rows % 2:
        check(inputs, rule="attention", row_normalize=True, is_causal=True)
    else:
        check(inputs, residual_weight=torch.rand(1, 40), attention_weight=torch.randn(1, 40))


@pytest.mark.parametrize("d, dv", [(1, 1), (17, 3), (64, 40), (80, 128), (130, 72), (24, 256)])
def test_head_sizes(d: int, dv: int) -> None:
    for rows, dtype in ((1, torch.float32), (20, torch.bfloat16)):
        check(tensors(24, h=1, kv=1, d=d, dv=dv, rows=rows, dtype=dtype), row_normalize=True)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("rule, row_normalize", RULES)
@pytest.mark.parametrize("rows", (1, 3))
def test_half_precision(rows: int, rule: str, row_normalize: bool, dtype: torch.dtype) -> None:
    found = check(tensors(70, d=16, dv=16, rows=rows, dtype=dtype), rule=rule, row_normalize=row_normalize)
    assert found["grad carrier"].dtype == torch.float32


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_small_relevancy_does_not_underflow(dtype: torch.dtype) -> None:
    """relu(A * dA) of a small gradient: float16 itself would hold none of it."""
    for rows in (1, 3):
        inputs = tensors(60, rows=rows, dtype=dtype)
        sent = [x.to(dtype).float() for x in (6e-6 * torch.randn(1, 2, 60, 5), torch.rand(1, rows, 60))]
        found = outputs_and_grads(call(va.relevancy_attention, backend="triton", residual_weight=0.0), inputs, sent)
        exact = outputs_and_grads(
            call(va.reference.relevancy_attention, residual_weight=0.0), as_dtype(inputs, F64), [x.double() for x in sent]
        )
        torch.testing.assert_close(found["grad carrier"].double(), exact["grad carrier"], rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("rows", (1, 3, 70))
@pytest.mark.parametrize("h, kv", [(3, 1), (4, 2)])
def test_grouped_heads(h: int, kv: int, rows: int) -> None:
    inputs = tensors(40, h=h, kv=kv, rows=rows)
    check(inputs, is_causal=rows != 3, row_normalize=kv == 2)


@pytest.mark.parametrize("rule, row_normalize", RULES)
def test_what_nobody_asked_for_is_not_computed(rule: str, row_normalize: bool) -> None:
    """Every combination of cotangents and need_inputs gives what streaming gives, and None where that does."""
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value, carrier = tensors(40, dtype=dtype).values()
        masks, options = (None, None), (rule, row_normalize, 0.3, True)
        out, _, lse = kernels.forward(query, key, value, carrier, None, None, *masks, *options)
        sent = (None, torch.randn_like(out)), (None, torch.rand_like(carrier)), (False, True)
        for grad_out, r, need in itertools.product(*sent):
            args = (grad_out, r, query, key, value, out, lse, None, torch.rand(1, 40), *masks, *options, need)
            ours, theirs = kernels.backward(*args), streaming.backward(*args)
            for x, y in zip(ours, theirs, strict=True):
                assert (x is None) == (y is None)
                if x is not None and y is not None:
                    assert x.dtype == y.dtype
                    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
                    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule, row_normalize", RULES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_frozen_inputs(dtype: torch.dtype, rule: str, row_normalize: bool) -> None:
    """The carrier alone requires a gradient, and out's is sent through another path."""
    query, key, value, carrier = tensors(50, dtype=dtype).values()
    _, r = cotangents(dict(query=query, value=value, carrier=carrier))
    grad_out = torch.randn(1, 2, 50, 5, dtype=dtype)

    def run(dt: torch.dtype | None, operator: Callable[..., Any]) -> Tensor:
        q, k, v, g = (x if dt is None else x.to(dt) for x in (query, key, value, grad_out))
        return operator(r if dt is None else r.to(dt), q, k, v, g, rule=rule, row_normalize=row_normalize)

    out, _, lse = kernels.forward(query, key, value, carrier, None, None, None, None, rule, row_normalize, 6**-0.5, False)
    got = kernels.backward(
        grad_out, r, query, key, value, out, lse, torch.zeros(1, 1), None, None, None, rule, row_normalize, 6**-0.5, False, False
    )
    assert got[:3] == (None, None, None)
    formula = run(None, va.reference.relevancy_step)
    assert_close_to(got[3], run(F64, va.reference.relevancy_step), formula, what="frozen")


@pytest.mark.parametrize(
    "rule, row_normalize, weighted",
    [
        ("gradient", False, False),
        ("gradient", True, True),
        ("gradient", False, True),
        ("attention", True, False),
        ("attention", False, True),
    ],
)
def test_rows_of_the_full_product_over_layers(rule: str, row_normalize: bool, weighted: bool) -> None:
    """R = (a_L + b_L Abar_L) ... (a_1 + b_1 Abar_1) from stored maps; one backward pass gives its rows."""
    layers, b, h, n, d, rows = 3, 1, 2, 40, 8, 3
    projections = [[torch.randn(h, d, d) / d**0.5 for _ in range(3)] for _ in range(layers)]
    weights = [(torch.rand(b, n), torch.rand(b, n)) if weighted else (None, None) for _ in range(layers)]
    x0, readout, seed = torch.randn(b, h, n, d), torch.randn(b, h, n, d), torch.rand(b, rows, n)

    x, start = x0.clone().requires_grad_(), torch.zeros(b, rows, n, requires_grad=True)
    carrier: Tensor = start
    for projection, (a, c) in zip(projections, weights, strict=True):
        out, carrier = va.relevancy_attention(
            *(x @ w for w in projection),
            carrier,
            rule=rule,
            row_normalize=row_normalize,
            residual_weight=a,
            attention_weight=c,
            backend="triton",
        )
        x = x + out
    (got,) = torch.autograd.grad([(x * readout).sum(), carrier], [start], [torch.tensor(1.0), seed])

    def by_maps(dtype: torch.dtype) -> Tensor:
        z, maps = x0.to(dtype).requires_grad_(), []
        for projection in projections:
            q, k, v = (z @ w.to(dtype) for w in projection)
            prob = torch.softmax(q @ k.mT / d**0.5, -1)
            prob.retain_grad()
            maps.append(prob)
            z = z + prob @ v
        (z * readout.to(dtype)).sum().backward()
        relevancy = torch.eye(n, dtype=dtype).expand(b, n, n)
        for prob, (a, c) in zip(maps, weights, strict=True):
            assert prob.grad is not None
            abar = ((prob * prob.grad).clamp(min=0) if rule == "gradient" else prob).mean(1).detach()
            abar = abar / (abar.sum(-1, keepdim=True) if row_normalize else 1.0)
            kept = relevancy if a is None else a[..., None].to(dtype) * relevancy
            relevancy = kept + (1.0 if c is None else c[..., None].to(dtype)) * (abar @ relevancy)
        return seed.to(dtype) @ relevancy

    assert_close_to(got, by_maps(F64), by_maps(torch.float32), what="rows")


# ------------------------------------------------------------------------------------------------- relevancy_step


def lse_of(query: Tensor, key: Tensor, options: dict[str, Any]) -> Tensor:
    """As an attention in float64 gives it."""
    _, lse = va.reference.score_attention(query.double(), key.double(), key.double(), return_lse=True, enable_gqa=True, **options)
    return lse


@pytest.mark.parametrize("given", ("none", "float32", "float64"))
@pytest.mark.parametrize(
    "h, kv, n, m, rows, options",
    [
        (4, 2, 33, 70, 3, dict),
        (2, 1, 40, 40, 70, lambda: {"is_causal": True}),
        (2, 2, 40, 33, 1, lambda: {"key_mask": padding(33)[:1], "attn_mask": some(40, 33), "is_causal": True}),
    ],
)
@pytest.mark.parametrize("rule, row_normalize", RULES)
def test_step(rule: str, row_normalize: bool, h: int, kv: int, n: int, m: int, rows: int, options: Any, given: str) -> None:
    """Cross attention, grouped heads, with the attention's own lse, its empty rows -inf or +inf, or without."""
    masks = options()
    inputs = {"relevancy": torch.rand(1, rows, n), "query": torch.randn(1, h, n, 6), "key": torch.randn(1, kv, m, 6)}
    inputs |= {"value": torch.randn(1, kv, m, 5), "grad_output": torch.randn(1, h, n, 5)}
    chosen = {"rule": rule, "row_normalize": row_normalize, "enable_gqa": True, **masks}

    def step(**x: Tensor) -> Tensor:
        exact = lse_of(x["query"], x["key"], masks)
        infinite = torch.where(torch.isneginf(exact), torch.inf, exact)
        lse = {"none": None, "float32": exact.float(), "float64": infinite}[given]
        return va.relevancy_step(**x, lse=lse, backend="triton", **chosen)

    assert_all_close_to(step, partial(va.reference.relevancy_step, **chosen), inputs, what="step", grads=False)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("rule, row_normalize", RULES)
def test_step_in_half_precision(rule: str, row_normalize: bool, dtype: torch.dtype) -> None:
    shapes = {"query": (1, 2, 70, 16), "key": (1, 2, 150, 16), "value": (1, 2, 150, 8), "grad_output": (1, 2, 70, 8)}
    inputs = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    chosen = {"rule": rule, "row_normalize": row_normalize}
    for rows, like in ((1, torch.float32), (3, dtype), (70, torch.float32)):
        inputs["relevancy"] = torch.rand(1, rows, 70).to(like)
        ours = partial(va.relevancy_step, backend="triton", **chosen)
        assert_all_close_to(ours, partial(va.reference.relevancy_step, **chosen), inputs, what=f"{rows} rows", grads=False)


def test_a_given_lse_is_taken_as_it_is() -> None:
    """It may count keys that are not here, and an infinite one empties the row, whatever the masks here say."""
    query, grad, r = torch.randn(1, 2, 40, 6), torch.randn(1, 2, 40, 5), torch.rand(1, 2, 40)
    key, value = torch.randn(1, 2, 90, 6), torch.randn(1, 2, 90, 5)
    lse = lse_of(query, key, {}).float()
    for rule, row_normalize in RULES:
        whole = va.relevancy_step(r, query, key, value, grad, rule=rule, lse=lse, backend="triton")
        part = va.relevancy_step(r, query, key[:, :, :50], value[:, :, :50], grad, rule=rule, lse=lse, backend="triton")
        torch.testing.assert_close(part, whole[:, :, :50], rtol=1e-6, atol=0.0)
        for infinite in (torch.inf, -torch.inf):
            lse[:, :, 3] = infinite
            lse[:, 1, 4] = infinite
            options = {"rule": rule, "row_normalize": row_normalize, "lse": lse}
            got = va.relevancy_step(r, query, key[:, :, :50], value[:, :, :50], grad, backend="triton", **options)
            wanted = va.relevancy_step(r, query, key[:, :, :50], value[:, :, :50], grad, backend="streaming", **options)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_step_behind_a_foreign_attention_by_a_hook() -> None:
    query, key, value, carrier = (x.requires_grad_() for x in tensors(40).values())
    r, sent, found = torch.rand(1, 2, 40), torch.randn(1, 2, 40, 5), []
    out = F.scaled_dot_product_attention(query, key, value)
    given = (x.detach() for x in (query, key, value))
    out.register_hook(lambda g: found.append(r + va.relevancy_step(r, *given, g, backend="triton")))
    torch.autograd.grad(out, query, sent)
    (wanted,) = torch.autograd.grad(va.relevancy_attention(query, key, value, carrier, backend="triton"), carrier, [sent, r])
    torch.testing.assert_close(found[0], wanted)


# ------------------------------------------------------------------------------------------------- edges


def test_no_partial_sum_is_larger_than_the_output_where_there_are_many_rows() -> None:
    rows, n, h = 130, 40, 8
    query, key, value, _ = tensors(n, h=h, kv=h, d=3, dv=3).values()
    with LargestAllocation() as largest:
        kernels.step(torch.rand(1, rows, n), query, key, value, value, None, None, None, "gradient", False, 1.0, False)
    assert largest.bytes <= 4 * rows * n


def test_garbage_in_padding_stays_there() -> None:
    inputs, mask = tensors(40, b=2), padding(40)
    sent = cotangents(inputs)
    run = call(va.relevancy_attention, key_mask=mask, row_normalize=True, backend="triton")
    clean = outputs_and_grads(run, inputs, sent)
    for name in ("key", "value"):
        inputs[name] = inputs[name].masked_fill(~mask[:, None, :, None], torch.nan)
    dirty = outputs_and_grads(run, inputs, sent)
    for name, x in clean.items():
        assert torch.equal(x, dirty[name]), name


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # of the interpreter's numpy
def test_an_lse_far_below_zero() -> None:
    """exp(0 - lse) overflows in the columns of a tile where no key stands, or a hidden one: none of it gets out."""
    inputs = tensors(20, b=2, rows=3)
    inputs["query"] = -8.0 * inputs["query"].abs() - 8.0
    inputs["key"] = inputs["key"].abs() + 4.0
    inputs = as_dtype(inputs, torch.bfloat16) | {"carrier": inputs["carrier"]}
    found = check(inputs, key_mask=padding(20), row_normalize=True, scale=1.0)
    assert all(torch.isfinite(x).all() for x in found.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    inputs = {name: lay_out(x, layout) for name, x in tensors(20, b=2).items() if name != "carrier"}
    inputs["carrier"] = torch.rand(20, 3, 2).permute(2, 1, 0)
    sent = [lay_out(x, layout) if x.dim() == 4 else x for x in cotangents(inputs)]
    check(inputs, sent, row_normalize=True)
    options = {"backend": "triton"}
    summed = outputs_and_grads(call(va.relevancy_attention, **options), inputs)  # gradients of stride 0
    ones = outputs_and_grads(call(va.relevancy_attention, **options), inputs, [torch.ones_like(x) for x in sent])
    assert all(torch.equal(x, ones[name]) for name, x in summed.items())


@pytest.mark.parametrize("empty", ("b", "h", "n", "d", "dv", "rows"))
def test_empty_sizes(empty: str) -> None:
    sizes = {"n": 3, "b": 2, "rows": 2, empty: 0} | ({"kv": 0} if empty == "h" else {})
    inputs = tensors(**sizes)
    for rule, row_normalize in RULES:
        run = call(va.relevancy_attention, rule=rule, row_normalize=row_normalize, backend="triton")
        found = outputs_and_grads(run, inputs, cotangents(inputs))
        for name, x in inputs.items():
            assert found[f"grad {name}"].shape == x.shape and torch.isfinite(found[f"grad {name}"]).all()
        r, query, key, value = inputs["carrier"], inputs["query"], inputs["key"], inputs["value"]
        for keys in (0, 3):
            key, value = key[:, :, :keys], value[:, :, :keys]
            moved = va.relevancy_step(
                r,
                query,
                key,
                value,
                torch.zeros(*query.shape[:3], value.shape[3]),
                rule=rule,
                row_normalize=row_normalize,
                backend="triton",
            )
            assert moved.shape == (*r.shape[:2], key.shape[2]) and torch.isfinite(moved).all()


def test_runs_are_bit_equal_and_write_no_input() -> None:
    inputs = tensors(40, b=2, h=4)
    options = {"residual_weight": torch.rand(2, 40), "enable_gqa": True, "row_normalize": True, "backend": "triton"}
    options |= MASKS["all"](40)
    watched = inputs | {name: x for name, x in options.items() if isinstance(x, Tensor)}
    before = {name: (x.clone(), x._version) for name, x in watched.items()}
    sent = cotangents(inputs)
    first, second = (outputs_and_grads(call(va.relevancy_attention, **options), inputs, sent) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(watched[name], x) and watched[name]._version == version for name, (x, version) in before.items())


def test_opcheck() -> None:
    """Schema and layouts that the operators promise."""
    query, key, value, carrier = tensors(20, b=2, h=4).values()
    checks = ("test_schema", "test_faketensor")
    masks, options = (None, padding(20)), ("gradient", True, 0.5, False)
    torch.library.opcheck(
        torch.ops.vlattn.relevancy_attention,
        (query, key, value, carrier, None, None, *masks, *options, "triton"),
        test_utils=checks,
    )
    out, _, lse = torch.ops.vlattn.relevancy_attention(query, key, value, carrier, None, None, *masks, *options, "triton")
    for rows in (carrier, None, torch.rand(2, 70, 20)):
        torch.library.opcheck(
            torch.ops.vlattn.relevancy_attention_backward,
            (out, rows, query, key, value, out, lse, None, None, *masks, *options, True, "triton"),
            test_utils=checks,
        )
    torch.library.opcheck(
        torch.ops.vlattn.relevancy_step, (carrier, query, key, value, out, lse, *masks, *options, "triton"), test_utils=checks
    )


@pytest.mark.parametrize(
    "d, dv, dtype, words",
    [
        (8, 8, F64, "float16, bfloat16 and float32"),
        (257, 8, torch.float32, "head_dim of at most 256"),
        (8, 257, torch.float32, "head_dim of at most 256"),
    ],
)
def test_what_it_cannot_run_is_refused(d: int, dv: int, dtype: torch.dtype, words: str) -> None:
    inputs = as_dtype(tensors(3, d=d, dv=dv), dtype)
    with pytest.raises(ValueError, match=words):
        va.relevancy_attention(**inputs, backend="triton")
    query, key, value, r = inputs.values()
    with pytest.raises(ValueError, match=words):
        va.relevancy_step(r, query, key, value, torch.zeros_like(value), backend="triton")
