"""relevancy_step on every backend: r Abar of one attention, without its output, against the whole maps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import assert_close_to, draws
from tests.helpers.ops.backends import F64, finest, on
from tests.helpers.ops.masks import real_keys, visible
from tests.helpers.ops.relevancy_cases import BACKENDS, RULES, tensors


def t(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=F64)


@on("reference", *BACKENDS)
def test_by_hand(backend: str) -> None:
    """One head, A = 1/2 everywhere, dA = [2, 6], [-1, -3]: relu(A dA) = [1, 3], [0, 0]. And two heads of opposite dA, whose mean
    is taken after the clamp."""
    to = {"device": torch.get_default_device(), "dtype": finest(backend)}
    r, zeros = t([1, 10])[None].to(**to), torch.zeros(1, 1, 2, 4, dtype=to["dtype"])
    inputs = (r, zeros, zeros, t([1], [3])[None, None].to(**to), t([2], [-1])[None, None].to(**to))
    torch.testing.assert_close(va.relevancy_step(*inputs, backend=backend)[0], t([1, 3]).to(**to))
    torch.testing.assert_close(va.relevancy_step(*inputs, row_normalize=True, backend=backend)[0], t([0.25, 0.75]).to(**to))
    torch.testing.assert_close(va.relevancy_step(*inputs[:3], rule="attention", backend=backend)[0], t([5.5, 5.5]).to(**to))
    query, value = torch.zeros(1, 2, 1, 3, dtype=to["dtype"]), t([[1.0]], [[-1.0]])[None].to(**to)
    got = va.relevancy_step(r[:, :, :1], query, query, value, torch.ones_like(value), backend=backend)
    assert got.item() == 0.5


def step_tensors(
    n: int, m: int, *, h: int = 2, kv: int = 2, rows: int = 2, d: int = 6, dv: int = 5, dtype: torch.dtype
) -> list[Tensor]:
    """relevancy, which is float32 for 16-bit inputs, query, key, value and the gradient of the output."""
    wide = torch.promote_types(dtype, torch.float32)
    shapes = ((1, h, n, d), (1, kv, m, d), (1, kv, m, dv), (1, h, n, dv))
    return [torch.rand(1, rows, n, dtype=wide), *(torch.randn(shape, dtype=dtype) for shape in shapes)]


def check(
    backend: str, inputs: list[Tensor], *, lse: Callable[[dict[str, Tensor]], Tensor | None] | None = None, **options: Any
) -> None:
    """Against the formula, in several draws where the result has few numbers; `lse` gives the argument of that name."""
    names = ("relevancy", "query", "key", "value", "grad_output")
    pools: list[list[Tensor]] = [[], [], []]
    for (drawn,) in draws(dict(zip(names, inputs, strict=True)), most=1 if inputs[0].dtype == F64 else 3):
        given = None if lse is None else lse(drawn)
        pools[0].append(va.relevancy_step(**drawn, lse=given, backend=backend, **options))
        pools[1].append(va.reference.relevancy_step(**{name: x.double() for name, x in drawn.items()}, **options))
        pools[2].append(va.reference.relevancy_step(**drawn, **options))
    assert_close_to(*pools, what=f"{backend} {options}", scale=1e-3)


def lse_of(query: Tensor, key: Tensor, options: dict[str, Any]) -> Tensor:
    """As an attention in float64 gives it."""
    _, lse = va.reference.score_attention(query.double(), key.double(), key.double(), return_lse=True, enable_gqa=True, **options)
    return lse


@on(*BACKENDS)
@pytest.mark.parametrize("given", ("none", "float32", "float64"))
@pytest.mark.parametrize(
    "h, kv, n, m, rows, masks",
    [
        (4, 2, 9, 14, 3, dict),
        (2, 1, 10, 10, 9, lambda: {"is_causal": True}),
        (2, 2, 14, 9, 1, lambda: {"key_mask": real_keys(2, 9)[:1], "attn_mask": visible(14, 9), "is_causal": True}),
    ],
    ids=("cross", "causal", "masks"),
)
def test_matches_the_formula(h: int, kv: int, n: int, m: int, rows: int, masks: Any, given: str, backend: str) -> None:
    """Cross attention, grouped heads, with the attention's own lse, -inf or +inf in fully masked rows, or without."""
    masks = masks()

    def lse(drawn: dict[str, Tensor]) -> Tensor | None:
        exact = lse_of(drawn["query"], drawn["key"], masks)
        infinite = torch.where(torch.isneginf(exact), torch.inf, exact)
        return {"none": None, "float32": exact.float(), "float64": infinite}[given]

    for rule, row_normalize in RULES if given != "float32" else ():
        inputs = step_tensors(n, m, h=h, kv=kv, rows=rows, dtype=finest(backend))
        check(backend, inputs, lse=lse, rule=rule, row_normalize=row_normalize, enable_gqa=True, **masks)
    if given == "float32":  # an lse of the dtype of sums, as attention gives it for 16-bit and float32 inputs
        check(backend, step_tensors(n, m, h=h, kv=kv, rows=rows, dtype=torch.float32), lse=lse, enable_gqa=True, **masks)


@on(*BACKENDS)
@pytest.mark.parametrize("rule, row_normalize", RULES)
def test_an_lse_is_taken_as_it_is(rule: str, row_normalize: bool, backend: str) -> None:
    """It may count keys that are not here, and an infinite one makes a fully masked row, whatever the masks here say."""
    r, query, key, value, grad = step_tensors(20, 60, dtype=torch.float32)
    here = (key[:, :, :35], value[:, :, :35], grad)
    lse = lse_of(query, key, {}).float()
    whole = va.relevancy_step(r, query, key, value, grad, rule=rule, lse=lse, backend=backend)
    part = va.relevancy_step(r, query, *here, rule=rule, lse=lse, backend=backend)
    torch.testing.assert_close(part, whole[:, :, :35], rtol=1e-5, atol=1e-7)
    for infinite in (torch.inf, -torch.inf):
        lse[:, :, 3] = infinite
        options = {"rule": rule, "row_normalize": row_normalize, "lse": lse, "backend": backend}
        got = va.relevancy_step(r, query, *here, **options)
        without = va.relevancy_step(r.index_fill(2, torch.tensor([3]), 0.0), query, *here, **options)
        torch.testing.assert_close(got, without, rtol=1e-6, atol=0.0)
    far = va.relevancy_step(r, query, key, rule="attention", lse=torch.full_like(lse, 1e3), backend=backend)
    assert torch.equal(far, torch.zeros_like(far))  # all that counts is elsewhere


@on(*BACKENDS)
def test_behind_a_foreign_attention_by_a_hook(backend: str) -> None:
    """F.scaled_dot_product_attention with a tensor hook that takes one step gives relevancy_attention's numbers."""
    query, key, value, carrier = (x.requires_grad_() for x in tensors(20, dtype=finest(backend)).values())
    r, grad, found = torch.rand_like(carrier), torch.randn(1, 2, 20, 5, dtype=query.dtype), []
    out = F.scaled_dot_product_attention(query, key, value)
    inputs = [x.detach() for x in (query, key, value)]
    out.register_hook(lambda g: found.append(r + va.relevancy_step(r, *inputs, g, backend=backend)))
    torch.autograd.grad(out, query, grad)
    (relevancy,) = torch.autograd.grad(va.relevancy_attention(query, key, value, carrier, backend=backend), carrier, [grad, r])
    torch.testing.assert_close(found[0], relevancy)


def test_a_refusal_names_the_call() -> None:
    relevancy, query = torch.ones(1, 1, 3), torch.ones(1, 1, 3, 4)
    with pytest.raises(ValueError, match=r"cannot run relevancy_step\("):
        va.relevancy_step(relevancy, query, query, query, query, backend="sdpa")
