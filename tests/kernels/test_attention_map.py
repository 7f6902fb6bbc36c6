"""The Triton kernels of attention_map in the interpreter against the formula."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from compare import LargestAllocation, as_dtype, assert_all_close_to, bytes_of
from torch import Tensor

import vlattn_fast as va
from tests.kernels.map_cases import B, H, M, N, bool_mask, float_mask, key_mask
from tests.ops.score_cases import LAYOUTS, lay_out
from vlattn_fast.ops.attention_map import HEAD_REDUCTIONS, RULES

# the interpreter's numpy tells of Inf on its way, of which nothing arrives
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning")


def tensors(
    rule: str, n: int = N, m: int = M, d: int = 5, dv: int = 3, *, b: int = B, h: int = H, kv: int = 2
) -> dict[str, Tensor]:
    shapes = {"query": (b, h, n, d), "key": (b, kv, m, d)}
    if rule == "gradient":
        shapes |= {"value": (b, kv, m, dv), "grad_output": (b, h, n, dv)}
    return {name: 1.5 * torch.randn(shape) for name, shape in shapes.items()}


MASKS: dict[str, Any] = {
    "none": lambda n, m: {},
    "bool": lambda n, m: {"attn_mask": bool_mask(n, m)},
    "float": lambda n, m: {"attn_mask": float_mask(m)},
    "each pair": lambda n, m: {"attn_mask": torch.randn(B, 2, n, m)},
    "key": lambda n, m: {"key_mask": key_mask(m)},
    "causal": lambda n, m: {"is_causal": True},
    "all": lambda n, m: {"attn_mask": float_mask(m), "key_mask": key_mask(m), "is_causal": True, "scale": -0.6},
}


def check(inputs: dict[str, Tensor], what: str = "", **fixed: Any) -> Tensor:
    fixed = {"enable_gqa": True, **fixed}
    ours, formula = partial(va.attention_map, **fixed, backend="triton"), partial(va.reference.attention_map, **fixed)
    found = assert_all_close_to(ours, formula, inputs, what=f"{what} {fixed}", grads=False)["out0"]
    assert found.is_contiguous() and found.isfinite().all()
    return found


@pytest.mark.parametrize("n, m", [(7, 20), (33, 70)])  # whole rows in a tile, two passes
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mask", MASKS)
def test_rules_reductions_and_masks(mask: str, rule: str, n: int, m: int) -> None:
    inputs, masks = tensors(rule, n, m, h=2), MASKS[mask](n, m)
    for head_reduction in HEAD_REDUCTIONS:
        for row_normalize in (False, True) if mask in ("none", "all") else (head_reduction == "max",):
            check(inputs, mask, rule=rule, head_reduction=head_reduction, row_normalize=row_normalize, **masks)


@pytest.mark.parametrize("n, m", [(1, 1), (15, 17), (63, 65), (65, 63), (100, 128), (33, 160), (2, 257)])
@pytest.mark.parametrize("causal", (False, True))
def test_sizes_either_side_of_a_tile(causal: bool, n: int, m: int) -> None:
    for rule in RULES:
        inputs = tensors(rule, n, m, b=1, h=2)
        found = check(inputs, rule=rule, is_causal=causal, head_reduction="min" if causal else "mean")
        if causal:
            assert (found[0].triu(1) == 0).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("n, m", [(20, 60), (70, 128), (60, 160), (100, 257)])  # each its own tile
def test_half_precision(n: int, m: int, dtype: torch.dtype) -> None:
    for rule in RULES:
        for masks in ({}, {"attn_mask": torch.rand(n, m) > 0.2, "key_mask": key_mask(m)}):
            inputs = as_dtype(tensors(rule, n, m, 16, 16, h=2, kv=1), dtype)
            found = check(inputs, rule=rule, row_normalize=True, head_reduction="max", **masks)
            assert found.dtype == torch.float32


def test_clip_rows() -> None:
    check(as_dtype(tensors("attention", 40, 577, 64, b=1, h=2), torch.bfloat16))
    check(tensors("gradient", 33, 577, 8, 8, b=1, h=2), rule="gradient")


@pytest.mark.parametrize("d, dv", [(1, 1), (16, 17), (64, 40), (128, 200), (256, 256)])
def test_head_sizes(d: int, dv: int) -> None:
    wide = max(d, dv) > 64
    check(tensors("gradient", 20, 37, d, dv, h=2), rule="gradient")
    for dtype in (torch.bfloat16,) if wide else (torch.float32, torch.bfloat16):
        check(as_dtype(tensors("gradient", 20, 70, d, dv, b=1, h=1, kv=1), dtype), rule="gradient")


@pytest.mark.parametrize("kv", (1, 2, 4))
def test_grouped_heads(kv: int) -> None:
    for rule in RULES:
        for m in (9, 70):
            check(tensors(rule, 5, m, kv=kv), rule=rule, head_reduction="max")


def test_large_logits() -> None:
    """Sharp rows far from zero, past what exp2 holds; the hidden keys' logits are the largest, in one of them infinite."""
    for m in (20, 100):
        inputs = tensors("gradient", 7, m, h=2)
        inputs["query"], inputs["key"] = 10 * inputs["query"].abs(), 10 * inputs["key"].abs() * torch.linspace(-1, 1, m)[:, None]
        mask = torch.ones(B, m, dtype=torch.bool)
        mask[:, m // 2 :] = False
        for rule in RULES:
            given = inputs if rule == "gradient" else {name: inputs[name] for name in ("query", "key")}
            check(given, rule=rule, key_mask=mask, scale=1.0)
            check(given, rule=rule, is_causal=True, scale=1.0)
            check(given, rule=rule, attn_mask=mask[:, None, None], scale=1.0)


def test_what_stands_in_padding_reaches_nothing() -> None:
    for m in (9, 100):
        clean, mask = tensors("gradient", m=m), key_mask(m)
        hidden = ~mask[:, None, :, None]
        dirty = clean | {name: clean[name].masked_fill(hidden, bad) for name, bad in (("key", torch.nan), ("value", torch.inf))}
        fixed: dict[str, Any] = {"rule": "gradient", "key_mask": mask, "enable_gqa": True, "backend": "triton"}
        found = va.attention_map(**dirty, **fixed)
        assert torch.equal(found, va.attention_map(**clean, **fixed))
        assert (found.masked_select(~mask[:, None, :].expand_as(found)) == 0).all() and (found[1] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    for m in (9, 70):
        inputs = {name: lay_out(x, layout) for name, x in tensors("gradient", m=m).items()}
        check(inputs, rule="gradient", attn_mask=lay_out(torch.rand(B, H, N, m), layout) > 0.3, key_mask=key_mask(m))


@pytest.mark.parametrize("empty", ("b", "n", "m", "d", "dv"))
def test_empty_sizes(empty: str) -> None:
    for rule in RULES:
        inputs = tensors(rule, **{empty: 0})
        found = va.attention_map(**inputs, rule=rule, enable_gqa=True, scale=1.0, backend="triton")
        want = va.reference.attention_map(**inputs, rule=rule, enable_gqa=True, scale=1.0)
        torch.testing.assert_close(found, want)


def test_runs_are_bit_equal_write_no_input_and_hold_no_map_of_a_head() -> None:
    inputs, mask = tensors("gradient", 20, 100, b=1, h=8), torch.rand(20, 100)
    before = {name: x.clone() for name, x in inputs.items()}
    fixed: dict[str, Any] = {"rule": "gradient", "attn_mask": mask, "enable_gqa": True, "row_normalize": True}
    first = check(inputs, **fixed)
    with LargestAllocation() as memory:
        assert torch.equal(first, va.attention_map(**inputs, **fixed, backend="triton"))
    assert memory.bytes == bytes_of(first), memory.by
    assert all(torch.equal(x, before[name]) for name, x in inputs.items())


def test_what_it_cannot_run_is_refused() -> None:
    q = torch.randn(1, 1, 3, 8)
    with pytest.raises(ValueError, match="float16, bfloat16 and float32"):
        va.attention_map(q.double(), q.double(), backend="triton")
    wide = torch.randn(1, 1, 3, 257)
    for inputs in ((wide, wide), (q, q, wide, wide)):
        with pytest.raises(ValueError, match="head sizes of at most 256"):
            va.attention_map(*inputs, rule="gradient" if len(inputs) == 4 else "attention", backend="triton")
