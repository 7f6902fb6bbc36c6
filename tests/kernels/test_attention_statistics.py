"""The Triton kernels of attention_statistics in the interpreter against the formulas: every statistic, every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import LargestAllocation, as_dtype, assert_all_close_to, bytes_of, outputs_and_grads
from torch import Tensor

import vlattn_fast as va
from tests.kernels.map_cases import B, H, M, N, bool_mask, float_mask, key_mask
from tests.ops.score_cases import LAYOUTS, lay_out

# the interpreter's numpy tells of Inf on its way, of which nothing arrives
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning")
G = 3
DIFFERENTIABLE = ("mass", "entropy", "maximum", "received")


def tensors(n: int = N, m: int = M, d: int = 5, *, b: int = B, h: int = H, kv: int = 2) -> dict[str, Tensor]:
    shapes = {"query": (b, h, n, d), "key": (b, kv, m, d)}
    return {name: 1.5 * torch.randn(shape) for name, shape in shapes.items()} | {"row_weight": torch.randn(b, n)}


MASKS: dict[str, Any] = {
    "none": lambda n, m: {},
    "bool": lambda n, m: {"attn_mask": bool_mask(n, m)},
    "float": lambda n, m: {"attn_mask": float_mask(m)},
    "key": lambda n, m: {"key_mask": key_mask(m)},
    "causal": lambda n, m: {"is_causal": True},
    "scale 0": lambda n, m: {"scale": 0.0},
    "negative scale": lambda n, m: {"scale": -0.6},
    "all": lambda n, m: {"attn_mask": float_mask(m), "key_mask": key_mask(m), "is_causal": True, "scale": 0.3},
}


def groups(m: int, num_groups: int = G) -> dict[str, Any]:
    return {"key_groups": torch.randint(-1, num_groups, (m,)), "num_groups": num_groups}


def but_argmax(function: Any, **fixed: Any) -> Any:
    """The operator as compare.py wants it: floating outputs only."""

    def call(**given: Tensor) -> tuple[Tensor, ...]:
        found = function(**given, **fixed)
        return tuple(getattr(found, name) for name in DIFFERENTIABLE)

    return call


def check(given: dict[str, Tensor], only: str | None = None, **fixed: Any) -> None:
    """Outputs and gradients; `only` names the statistic that sends a gradient. A gradient that cancels has the size of what
    was summed."""
    fixed = {"enable_gqa": True, **fixed}
    want = va.reference.attention_statistics(**given, **fixed)
    sent = [torch.randn(getattr(want, name).shape) if only in (None, name) else None for name in DIFFERENTIABLE]
    assert_all_close_to(
        but_argmax(va.attention_statistics, backend="triton", **fixed),
        but_argmax(va.reference.attention_statistics, **fixed),
        given,
        sent,
        what=f"{only}",
        scales={"grad query": 0.1, "grad key": 0.1},
    )
    if given["query"].dtype == torch.float32:  # in halves many weights of the formula tie
        assert torch.equal(va.attention_statistics(**given, **fixed, backend="triton").argmax, want.argmax)


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str) -> None:
    check(tensors(33, 40, h=2), **MASKS[mask](33, 40), **groups(40))
    given, fixed = tensors(h=2), MASKS[mask](N, M) | groups(M)
    for only in (None, *DIFFERENTIABLE) if mask in ("none", "bool", "all") else (None,):
        check(given, only, **fixed)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("n, m", [(1, 1), (15, 17), (63, 65), (65, 31), (100, 32), (33, 160), (2, 257)])
def test_sizes_either_side_of_a_tile(n: int, m: int, causal: bool) -> None:
    check(tensors(n, m, b=1, h=2), is_causal=causal, **groups(m))


def test_clip_rows() -> None:
    for n, m in ((20, 577), (577, 20)):
        check(as_dtype(tensors(n, m, 16, b=1, h=1, kv=1), torch.bfloat16), **groups(m))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("num_groups", (2, 20))
def test_half_precision(num_groups: int, dtype: torch.dtype) -> None:
    for masks in ({}, {"attn_mask": torch.rand(70, 90) > 0.2, "key_mask": key_mask(90)}):
        check(as_dtype(tensors(70, 90, 16, h=2, kv=1), dtype), **masks, **groups(90, num_groups))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("num_groups", (0, 1, 4, 5, 17, 70))
def test_any_number_of_groups(num_groups: int, dtype: torch.dtype) -> None:
    """Chosen one by one up to four, beyond as a product, from 64 on in more than one program."""
    given = as_dtype(tensors(9, 40, b=2, h=1, kv=1), dtype)
    check(given, key_groups=torch.randint(-1, num_groups, (2, 40)), num_groups=num_groups)
    check(given, "mass", key_groups=torch.arange(40) % (num_groups + 1) - 1, num_groups=num_groups)


def test_no_groups_and_no_weight() -> None:
    given = tensors(20, 40)
    check(given)
    check(given | {"row_weight": given["row_weight"][0]}, "received")
    check({name: given[name] for name in ("query", "key")}, **groups(40))


def test_a_group_out_of_range_is_none() -> None:
    """What the public call leaves unread under torch.compile and CUDA graph capture."""
    from vlattn_fast.kernels import attention_statistics as kernels

    given = tensors(7, 12, kv=4)
    query, key, weight = given.values()
    index = torch.tensor([0, 1, 2, 3, -1, -7, 2**32, 2**32 + 1, 1 - 2**32, 1, 0, 2]).expand(B, -1)
    clean = torch.where((index >= 0) & (index < 3), index, -1)
    found, want = (kernels.forward(query, key, x, weight, None, None, 3, 0.5, False) for x in (index, clean))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    sent = (torch.randn_like(want[0]), None, None, None)
    got, wanted = (kernels.backward(*sent, query, key, want[3], x, weight, None, None, 3, 0.5, False) for x in (index, clean))
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1]) and not got[2].any()


def test_first_of_equal_keys_is_the_maximum() -> None:
    """Small integers, so that every order of summation gives the same logits; ties within a tile and across tiles."""
    query, key = torch.randint(-1, 2, (1, 1, 40, 8)).float(), torch.randint(-1, 2, (1, 1, 90, 8)).float()
    for dtype in (torch.float32, torch.bfloat16):
        for fixed in ({}, {"is_causal": True}, {"scale": -1.0}, {"attn_mask": torch.rand(40, 90) > 0.3}):
            found = va.attention_statistics(query.to(dtype), key.to(dtype), backend="triton", **fixed)
            assert torch.equal(found.argmax, va.reference.attention_statistics(query.double(), key.double(), **fixed).argmax)
    check({"query": query, "key": key, "row_weight": torch.ones(40)}, "maximum")


@pytest.mark.parametrize("d", (1, 16, 64, 128, 256))
def test_head_sizes(d: int) -> None:
    check(tensors(20, 37, d, b=1, h=2), **groups(37))
    check(as_dtype(tensors(20, 70, d, b=1, h=1, kv=1), torch.bfloat16), **groups(70))


@pytest.mark.parametrize("kv", (1, 2, 4))
def test_grouped_heads(kv: int) -> None:
    check(tensors(5, 40, kv=kv), is_causal=True, **groups(40))


def test_sharp_attention_far_from_zero() -> None:
    """Logits in the hundreds, the hidden ones the largest: weights underflow, the entropy is of the order of its rounding."""
    given = tensors(7, 40, h=2)
    given["query"], given["key"] = 8 * given["query"].abs(), 8 * given["key"].abs() * torch.linspace(-1, 1, 40)[:, None]
    mask = (torch.arange(40) < 20).expand(B, -1)
    for masks in ({"key_mask": mask}, {"is_causal": True}, {"attn_mask": mask[:, None, None]}):
        check(given, scale=1.0, **masks, **groups(40))
    found = va.attention_statistics(**given, key_mask=mask, enable_gqa=True, scale=1.0, backend="triton")
    assert float(found.maximum.max()) == 1.0 and (found.entropy >= 0).all()


def test_a_sharp_row_has_the_entropy_of_its_small_weights() -> None:
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([20.0, 0.0, 0.0]).view(1, 1, 3, 1)
    check({"query": query, "key": key}, "entropy", scale=1.0)


def test_what_stands_in_padding_reaches_nothing() -> None:
    clean, mask = tensors(m=40), key_mask(40)
    hidden = ~mask[:, None, :, None].expand_as(clean["key"])
    dirty = clean | {"key": clean["key"].masked_fill(hidden, torch.nan)}
    fixed: dict[str, Any] = {"key_mask": mask, "enable_gqa": True, "backend": "triton", **groups(40)}
    assert torch.equal(va.attention_statistics(**clean, **fixed).argmax, va.attention_statistics(**dirty, **fixed).argmax)
    want, got = (outputs_and_grads(but_argmax(va.attention_statistics, **fixed), x) for x in (clean, dirty))
    assert all(torch.equal(got[name], x) and x.isfinite().all() for name, x in want.items())
    assert (got["grad key"][hidden] == 0).all() and (got["grad key"] != 0).any()
    found = va.attention_statistics(**clean, **fixed)
    assert (found.argmax[1] == -1).all() and all((getattr(found, name)[1] == 0).all() for name in DIFFERENTIABLE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    given = tensors(9, 40)
    given |= {name: lay_out(given[name], layout) for name in ("query", "key")}
    given["row_weight"] = lay_out(given["row_weight"][None, None], layout)[0, 0]
    index = lay_out(torch.randint(-1, G, (1, 1, B, 40)), layout)[0, 0] if layout not in ("sliced", "strided", "offset") else None
    fixed: dict[str, Any] = {"attn_mask": lay_out(torch.rand(B, H, 9, 40), layout) > 0.3, "enable_gqa": True}
    if index is not None:
        fixed |= {"key_groups": index, "num_groups": G}
    call, want = (
        but_argmax(va.attention_statistics, backend="triton", **fixed),
        but_argmax(va.reference.attention_statistics, **fixed),
    )
    assert_all_close_to(call, want, given, scales={"grad query": 1.0, "grad key": 1.0})  # summed: gradients of stride 0
    check(given, **fixed)


@pytest.mark.parametrize("empty", ("b", "h", "n", "m", "d"))
def test_empty_sizes(empty: str) -> None:
    given = tensors(**{empty: 0} | ({"kv": 0} if empty == "h" else {}))
    m = given["key"].shape[2]
    check(given, enable_gqa=empty != "h", scale=1.0, key_groups=torch.zeros(m, dtype=torch.int64), num_groups=2)


def test_runs_are_bit_equal_write_no_input_and_hold_no_map_of_a_head() -> None:
    given = tensors(60, 100, b=1, h=2)
    fixed: dict[str, Any] = {"attn_mask": torch.rand(60, 100), "enable_gqa": True, "backend": "triton", **groups(100)}
    before = {name: x.clone() for name, x in (given | fixed).items() if isinstance(x, Tensor)}
    first = outputs_and_grads(but_argmax(va.attention_statistics, **fixed), given)
    with LargestAllocation() as memory:
        second = outputs_and_grads(but_argmax(va.attention_statistics, **fixed), given)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert memory.bytes <= bytes_of(fixed["attn_mask"]), memory.by  # the interpreter copies the mask
    assert all(torch.equal((given | fixed)[name], x) for name, x in before.items())


def test_what_it_cannot_run_is_refused() -> None:
    q = torch.randn(1, 1, 3, 8)
    with pytest.raises(ValueError, match="float16, bfloat16 and float32"):
        va.attention_statistics(q.double(), q.double(), backend="triton")
    with pytest.raises(ValueError, match="head sizes of at most 256"):
        va.attention_statistics(torch.randn(1, 1, 3, 257), torch.randn(1, 1, 3, 257), backend="triton")
