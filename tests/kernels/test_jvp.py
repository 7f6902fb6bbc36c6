"""The Triton kernel of score_attention's tangents against torch.func.jvp of the formula: functions of products, groups, digits,
and what is read."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.ops import score_cases
from tests.helpers.ops.interpreter import reads_outside
from tests.helpers.ops.jvp_cases import BF16, F32, FP16, TANGENT, by_formula, check, ours, tensors
from tests.helpers.ops.masks import hidden
from vlattn_fast.kernels import score_attention

pytestmark = score_cases.TORCH_JIT


@pytest.mark.parametrize("score", ("dot_tanh", "dot_relu", "dot_leaky_relu", "dot_sigmoid", "dot_softcap"))
@pytest.mark.parametrize("dtype", (F32, BF16))
def test_functions_of_products(dtype: torch.dtype, score: str) -> None:
    check(score_attention, tensors(20, 37, dtype=dtype), score=score, is_causal=True)


@pytest.mark.parametrize("dtype", (F32, BF16))
def test_dropout(dtype: torch.dtype) -> None:
    check(score_attention, tensors(35, 70, b=2, dtype=dtype), dropout_p=0.4, seed=torch.tensor(5), is_causal=dtype == F32)


def groups_of(m: int, groups: int, how: str) -> Tensor:
    """(1, M), with keys without a group: runs, or a group for each key at random."""
    numbers = torch.arange(m) * (groups + 1) // m - 1 if how == "runs" else torch.randint(-1, groups + 1, (m,))
    return numbers[None]


@pytest.mark.parametrize("how", ("runs", "mixed"))
@pytest.mark.parametrize("groups, dtype, options", [
    (3, F32, {}), (3, BF16, {}), (20, BF16, {}), (3, BF16, {"is_causal": True}), (3, F32, {"attn_mask": True}),
    (3, FP16, {"attn_mask": True}), (3, BF16, {"key_mask": True}), (3, BF16, {"constant": True}),
])  # fmt: skip
def test_bias_of_groups(groups: int, dtype: torch.dtype, options: dict[str, Any], how: str) -> None:
    """A product adds that of up to eight groups in 16 bit. Tangents of pairs that it masks are NaN."""
    n, m = 40, 200
    masks = {"attn_mask": hidden(n, m), "key_mask": torch.arange(m)[None] < 150}
    given = tensors(n, m, h=1, groups=groups, dtype=dtype)
    if options.pop("constant", False):
        del given["row_bias" + TANGENT]
    else:
        given["row_bias"][:, :, :25, 1] = -torch.inf
        given["row_bias" + TANGENT][:, :, :25, 1] = torch.nan
    options = {name: masks.get(name, value) for name, value in options.items()}
    check(score_attention, given, key_groups=groups_of(m, groups, how), **options)


@pytest.mark.parametrize("by", ("query", "row_bias"))
def test_what_tangents_of_a_row_have_in_common_costs_no_digits(by: str) -> None:
    """1,000 in all tangents of the logits: of sums that are not centred the error is 2e-4 and more."""
    given = tensors(33, 200, groups=1)
    if by == "query":
        given["key"][..., 0] = 1.0
        given["query" + TANGENT][..., 0] = 1000.0
    else:
        given["row_bias" + TANGENT] += 1000.0
    options = {"key_groups": torch.zeros(1, 200, dtype=torch.int64), "scale": 1.0}
    got, exact = ours(score_attention, given, **options), by_formula({name: x.double() for name, x in given.items()}, **options)
    assert (got[0] - exact[0]).abs().max() < 6e-5
    assert (got[1] - exact[1]).abs().max() < 3e-4  # three digits behind the point is what float32 has of 1,000


@pytest.mark.parametrize("dtype", (F32, BF16))
def test_what_masked_keys_have_reaches_no_tangent(dtype: torch.dtype) -> None:
    """Padding, and keys of a causal or a bool mask, whose own numbers are finite."""
    n, m = 35, 60
    given = tensors(n, m, b=2, dtype=dtype)
    padding = torch.arange(m) >= 50
    hidden = torch.rand(m) > 0.7
    hidden[n:] = False
    options = {"key_mask": ~padding.expand(2, m), "attn_mask": (~hidden).expand(n, m), "is_causal": True}
    clean = ours(score_attention, given, **options)
    for name in ("key", "value", "key" + TANGENT, "value" + TANGENT):
        given[name][:, :, padding] = torch.nan
    given["key" + TANGENT][:, :, hidden] = torch.inf
    given["key" + TANGENT][:, :, n:50] = torch.nan
    for one, two in zip(clean, ours(score_attention, given, **options), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", (F32, BF16))
def test_rows_without_keys_have_no_tangent(dtype: torch.dtype) -> None:
    given = tensors(35, 40, dtype=dtype)
    mask = torch.ones(35, 40, dtype=torch.bool)
    mask[3:20] = False
    given["query" + TANGENT][:, :, 3:20] = torch.nan
    for x in ours(score_attention, given, attn_mask=mask):
        assert (x[:, :, 3:20] == 0).all() and x.isfinite().all()
    assert not any(x.any() for x in ours(score_attention, tensors(3, 0, dtype=dtype)))


def test_a_row_of_one_large_number_attends_evenly() -> None:
    """A mask of -1e9 for all keys of a row: its log-sum-exp does not hold the sum of 50 keys, and scores vanish in it."""
    mask = torch.zeros(20, 50)
    mask[5] = -1e9
    given = tensors(20, 50)
    check(score_attention, given, attn_mask=mask)
    out, _ = ours(score_attention, given, attn_mask=mask)
    x = 0.3 * (given["query_tangent"][:, :, 5:6] @ given["key"].mT + given["query"][:, :, 5:6] @ given["key_tangent"].mT)
    exact = ((x - x.mean(-1, keepdim=True)) @ given["value"] + given["value_tangent"].sum(2, keepdim=True)) / 50
    torch.testing.assert_close(out[:, :, 5:6], exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", (F32, BF16))
def test_tangents_are_read_as_they_lie(dtype: torch.dtype) -> None:
    """Rows of heads side by side, expanded ones, and rows of 8 that begin anywhere; and nothing around them."""
    given = tensors(35, 41, h=2, d=8, dv=8, dtype=dtype)
    given["key" + TANGENT] = given["key" + TANGENT][:, :, :1].expand(-1, -1, 41, -1)
    plain = ours(score_attention, given)
    rooms = {name: torch.full((1, x.shape[2] + 128, 2, 9), torch.nan, dtype=dtype) for name, x in given.items()}
    laid = {name: rooms[name][:, 64:-64, :, 1:].copy_(x.transpose(1, 2)).transpose(1, 2) for name, x in given.items()}
    laid["key" + TANGENT] = given["key" + TANGENT]
    for one, two in zip(plain, ours(score_attention, laid), strict=True):
        assert torch.equal(one, two)
    room = torch.full((3, 200, 8), torch.nan, dtype=dtype)
    inside = [
        room[i, 64 : 64 + x.shape[2]] for i, x in enumerate(given[f"{name}{TANGENT}"] for name in ("query", "key", "value"))
    ]
    for x in inside:
        x.normal_()
    one_head = {name: x[:, :1] for name, x in given.items()}
    one_head |= {f"{name}{TANGENT}": x[None, None] for name, x in zip(("query", "key", "value"), inside, strict=True)}
    with reads_outside(room, *inside) as found:
        ours(score_attention, one_head)
    assert found == []
