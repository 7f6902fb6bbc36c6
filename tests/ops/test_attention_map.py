"""attention_map: the formula by hand, and every backend against the formula."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.compare import LargestAllocation, as_dtype, assert_all_close_to, bytes_of
from tests.helpers.ops.backends import DEVICE, F64, finest, on
from tests.helpers.ops.map_cases import B, M, N, check_map, map_inputs, sharp
from tests.helpers.ops.masks import COMMON, masks_of, visible
from vlattn_fast.backends import reference
from vlattn_fast.backends.reference.attention_map import attention_map as formula
from vlattn_fast.backends.streaming import _tiles
from vlattn_fast.ops.attention_map import HEAD_REDUCTIONS, RULES, attention_map

FAST = ("streaming", "cpu", "triton")
LOG2, LOG3 = math.log(2.0), math.log(3.0)

# the interpreter's numpy warns of Inf in numbers that no result takes
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning")
TILE_ELEMENTS = 3 * M  # streaming crosses many tiles


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


# Two heads over two keys: A = [[1/2, 1/2], [1/4, 3/4]] and [[2/3, 1/3], [0, 1]]; the third query is masked throughout
LOGITS = torch.tensor([[[0.0, 0.0], [0.0, LOG3], [1.0, 1.0]], [[LOG2, 0.0], [0.0, 0.0], [1.0, 1.0]]], dtype=F64)
VISIBLE = torch.tensor([[[1, 1], [1, 1], [0, 0]], [[1, 1], [0, 1], [0, 0]]], dtype=torch.bool)
BY_HAND: dict[tuple[str, str], list[list[float]]] = {
    ("attention", "mean"): [[7 / 12, 5 / 12], [1 / 8, 7 / 8], [0, 0]],
    ("attention", "max"): [[2 / 3, 1 / 2], [1 / 4, 1], [0, 0]],
    ("attention", "min"): [[1 / 2, 1 / 3], [0, 3 / 4], [0, 0]],
    # dA = [[2, -6], [4, -12], ..] in head 1 and [[3, 1], [-3, -1], ..] in head 2
    ("gradient", "mean"): [[(1 + 2) / 2, 1 / 6], [1 / 2, 0], [0, 0]],
    ("gradient", "max"): [[2, 1 / 3], [1, 0], [0, 0]],
    ("gradient", "min"): [[1, 0], [0, 0], [0, 0]],
}


@on("reference", "streaming")
@pytest.mark.parametrize(("rule", "head_reduction"), BY_HAND)
def test_by_hand(rule: str, head_reduction: str, backend: str) -> None:
    tensors = {"query": torch.zeros(1, 2, 3, 1), "key": torch.zeros(1, 2, 2, 1)}
    if rule == "gradient":
        tensors["value"] = torch.tensor([[[[1.0], [-3.0]], [[3.0], [1.0]]]])
        tensors["grad_output"] = torch.tensor([[[[2.0], [4.0], [5.0]], [[1.0], [-1.0], [5.0]]]])
    tensors = as_dtype(tensors, F64)
    mask = LOGITS.masked_fill(~VISIBLE, -torch.inf).to(DEVICE)
    run = partial(attention_map, **tensors, rule=rule, head_reduction=head_reduction, attn_mask=mask, backend=backend)
    want = torch.tensor(BY_HAND[rule, head_reduction], dtype=F64)
    torch.testing.assert_close(run()[0], want, rtol=0, atol=1e-15)
    total = want.sum(-1, keepdim=True)
    want = torch.where(total > 0, want / total, 0.0)
    torch.testing.assert_close(run(row_normalize=True)[0], want, rtol=0, atol=1e-15)


@on(*FAST)
@pytest.mark.parametrize("row_normalize", (False, True))
@pytest.mark.parametrize("head_reduction", HEAD_REDUCTIONS)
def test_head_reductions_and_row_normalize(head_reduction: str, row_normalize: bool, backend: str) -> None:
    mask = visible(B, 1, N, M)
    for rule in RULES:
        tensors = as_dtype(map_inputs(rule), finest(backend))
        check_map(backend, tensors, rule=rule, head_reduction=head_reduction, row_normalize=row_normalize, attn_mask=mask)


@on(*FAST)
def test_scale_0(backend: str) -> None:
    check_map(backend, as_dtype(map_inputs("gradient"), finest(backend)), rule="gradient", scale=0.0)


@on(*FAST)
def test_sharp_rows_far_from_zero(backend: str) -> None:
    """Logits past what exp2 holds; those of the masked keys are the largest."""
    tensors, keys = sharp(as_dtype(map_inputs("gradient"), torch.float32))
    for masks in ({"key_mask": keys}, {"is_causal": True}, {"attn_mask": keys[:, None, None]}):
        check_map(backend, tensors, rule="gradient", scale=1.0, **masks)
        check_map(backend, {name: tensors[name] for name in ("query", "key")}, scale=1.0, **masks)


def lse_of(query: Tensor, key: Tensor, **masks: Any) -> Tensor:
    """(B, H, N) in float64, as an attention gives it."""
    key = key.double()
    return reference.score_attention(query.double(), key, key, return_lse=True, **masks)[1]


def check_with_lse(
    backend: str, tensors: dict[str, Tensor], masks: dict[str, Any], dtype: torch.dtype, sign: float = -1.0, **options: Any
) -> None:
    """With the lse of these very logits in `dtype`; `sign` is that of its infinity for a fully masked row."""

    def run(**drawn: Tensor) -> Tensor:
        lse = lse_of(drawn["query"], drawn["key"], **masks).to(dtype)
        lse = torch.where(torch.isneginf(lse), sign * torch.inf, lse)
        return attention_map(**drawn, lse=lse, backend=backend, **masks, **options)

    assert_all_close_to(run, partial(formula, **masks, **options), tensors, grads=False)


@on(*FAST)
@pytest.mark.parametrize("mask", ("none", *COMMON))
def test_with_the_lse_of_the_attention(mask: str, backend: str) -> None:
    options = masks_of(mask, N, M)
    for rule, sign in zip(RULES, (-1.0, 1.0), strict=True):
        tensors = as_dtype(map_inputs(rule), finest(backend))
        for row_normalize in (False, True):
            check_with_lse(backend, tensors, options, F64, sign, rule=rule, row_normalize=row_normalize)


@on(*FAST)
def test_with_an_lse_and_more_tiles(backend: str) -> None:
    """As an attention gives it for 16-bit and float32 inputs."""
    tensors = as_dtype(map_inputs("gradient", 9, 150), torch.float32)
    for masks, reduction in (({}, "min"), ({"is_causal": True}, "mean"), ({"attn_mask": torch.randn(9, 150)}, "max")):
        check_with_lse(backend, tensors, masks, torch.float32, rule="gradient", head_reduction=reduction)


@on(*FAST)
@pytest.mark.parametrize("rule", RULES)
def test_an_lse_is_taken_as_it_is(rule: str, backend: str) -> None:
    """It may count keys that are not here, and an infinite one makes a fully masked row, whatever the masks here say."""
    tensors = as_dtype(map_inputs(rule, 20, 150), torch.float32)
    for masks in ({}, {"attn_mask": torch.randn(20, 150)}):
        lse = lse_of(tensors["query"], tensors["key"], **masks).float()
        here = tensors | {name: tensors[name][:, :, :70] for name in ("key", "value") if name in tensors}
        masks_here = {name: x[:, :70] for name, x in masks.items()}
        whole = attention_map(**tensors, rule=rule, lse=lse, backend=backend, **masks)
        part = attention_map(**here, rule=rule, lse=lse, backend=backend, **masks_here)
        torch.testing.assert_close(part, whole[:, :, :70], rtol=1e-5, atol=1e-7)
        lse[:, :, 3] = torch.inf
        lse[:, :, 4] = -torch.inf
        part = attention_map(**here, rule=rule, row_normalize=True, lse=lse, backend=backend, **masks_here)
        assert not part[:, 3:5].any() and part[:, 5].any() and part.isfinite().all()
        far = attention_map(**tensors, rule=rule, lse=torch.full_like(lse, 1e3), backend=backend, **masks)
        assert not far.any()  # all that counts is elsewhere


@on(*FAST)
@pytest.mark.parametrize("size", (1.0, 2.0**20))  # the second has no digits for the logarithm of a sum
@pytest.mark.parametrize("name", ("key_mask", "attn_mask", "float mask"))
def test_rows_that_see_keys_elsewhere_alone(name: str, size: float, backend: str) -> None:
    tensors = as_dtype(map_inputs("attention", 20, 70, b=2), torch.float32)
    seen = torch.ones(2, 1, 20, 70, dtype=torch.bool)
    seen[1, :, slice(None) if name == "key_mask" else slice(5, 9)] = False
    masks = {"key_mask": seen[:, 0, 0]} if name == "key_mask" else {"attn_mask": seen}
    if name == "float mask":
        masks = {"attn_mask": torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)}
    lse = torch.full(tensors["query"].shape[:3], size)
    found = attention_map(**tensors, rule="attention", lse=lse, backend=backend, **masks)
    assert found.isfinite().all() and not found[~seen.any(-1)[:, 0]].any()
    assert size > 1 or found[seen.any(-1)[:, 0]].any(-1).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("head_reduction", HEAD_REDUCTIONS)
def test_streaming_holds_the_map_and_a_few_tiles(rule: str, head_reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 1 << 12)
    for length in (128, 256):
        tensors = as_dtype(map_inputs(rule, length, length, 8, 8, b=1, h=4, kv=4), torch.float32)
        with LargestAllocation() as memory:
            found = attention_map(**tensors, rule=rule, head_reduction=head_reduction, row_normalize=True, backend="streaming")
        assert memory.bytes == bytes_of(found) == 4 * length**2, memory.by
        assert memory.peak <= bytes_of(found) + 16 * 4 * (1 << 12)


GRADIENT = {"rule": "gradient", "value": double(2, 4, 9, 3), "grad_output": double(2, 4, 6, 3)}
BAD_INPUT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": double(2, 0, 6, 5), "key": double(2, 0, 9, 5)}, ValueError, "query must have at least one head"),
    ({"lse": torch.zeros(2, 2, 1)}, ValueError, r"lse must be float32 or float64 of shape \(B, H, N\) ="),
    (GRADIENT | {"value": None}, ValueError, "value must be given for rule='gradient'"),
    (GRADIENT | {"grad_output": None}, ValueError, "grad_output must be given for rule='gradient'"),
    (GRADIENT | {"rule": "attention"}, ValueError, "value must not be given for rule='attention'"),
    ({"grad_output": GRADIENT["grad_output"]}, ValueError, "grad_output must not be given for rule='attention'"),
    (GRADIENT | {"value": torch.zeros(2, 4, 9, 3)}, TypeError, "value must have the dtype of query"),
]


@pytest.mark.parametrize(("changed", "error", "words"), BAD_INPUT, ids=[words[:44] for *_, words in BAD_INPUT])
def test_bad_input(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        attention_map(**{"query": double(2, 4, 6, 5), "key": double(2, 4, 9, 5)} | changed)
