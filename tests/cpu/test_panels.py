"""The forward pass of bfloat16 dot products by packed panels of keys (csrc/cpu/panels.h), which the instruction set `amx` takes.

On other processors tools/sanitize.py runs these tests with a stand-in for the products of tiles, and test_tiles.py with the
machine code; in the set that runs here they test the other forward pass.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import assert_all_close_to
from tests.helpers.ops import tile_edges
from tests.helpers.ops.masks import COMMON, masks_of

BF16 = torch.bfloat16
# Query rows come in tiles of 32, two strips of 16; up to 8 queries are a case apart. Up to 768 keys are one panel, more are equal
# panels of at most 512, beyond 64 features of at most 1,024. Keys and features fill tiles up to multiples of 32 and 16.
SIZES = ((9, 16), (17, 31), (31, 33), (33, 64), (48, 65), (65, 577), (40, 769), (20, 1025))
FEATURES = ((16, 16), (17, 33), (33, 17), (64, 64), (80, 40), (128, 96))


def inputs(n: int, m: int, d: int, dv: int, b: int = 2, h: int = 2, kv: int = 2) -> dict[str, Tensor]:
    shapes = {"query": (b, h, n, d), "key": (b, kv, m, d), "value": (b, kv, m, dv)}
    return {name: torch.randn(shape).to(BF16) for name, shape in shapes.items()}


def attention(tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    return va.score_attention(**tensors, return_lse=True, backend="cpu", **options)


def check(tensors: dict[str, Tensor], **options: Any) -> None:
    """Outputs and the log-sum-exp against the formula."""
    options["return_lse"] = True
    assert_all_close_to(
        lambda **x: va.score_attention(**x, backend="cpu", **options),
        lambda **x: va.reference.score_attention(**x, **options),
        tensors,
        grads=False,
    )


@pytest.mark.parametrize("size, features, mask", tile_edges.covering(SIZES, FEATURES, ("none", *COMMON)))
def test_edges_of_panels(size: tuple[int, int], features: tuple[int, int], mask: str) -> None:
    check(inputs(*size, *features), **masks_of(mask, *size))


@pytest.mark.parametrize("visible", (352, 353, 384, 385, 1))
def test_a_panel_of_one_key(visible: int) -> None:
    """1,025 keys are three panels of 352, and padding ends where it likes."""
    key_mask = (torch.arange(1025) < visible).expand(2, 1025)
    check(inputs(20, 1025, 16, 16), key_mask=key_mask)


@pytest.mark.parametrize("heads, n", ((72, 33), (3, 1100)))
def test_sweeps_over_heads_and_rows(heads: int, n: int) -> None:
    """More than 64 tiles of rows, of many query heads or of one, that share a key head."""
    check(inputs(n, 20, 16, 16, b=1, h=heads, kv=1), enable_gqa=True)


@pytest.mark.parametrize("scale", (-20.0, -0.3, 0.0, 20.0))
def test_scales_of_panels(scale: float) -> None:
    check(inputs(33, 800, 16, 16), scale=scale)


@pytest.mark.parametrize("offset", (64.0, 4096.0, 2.0**20))
def test_logits_far_from_zero(offset: float) -> None:
    """A feature adds the same number to all logits of a row. So the products are exact, and the log-sum-exp has this number."""
    tensors = inputs(20, 800, 17, 16)
    for name in ("query", "key"):
        tensors[name] = torch.randint(-2, 3, tensors[name].shape).to(BF16)
    tensors["key"][..., 0] = 1
    tensors["query"][..., 0] = offset
    out, lse = attention(tensors, scale=1.0)
    exact, exact_lse = va.reference.score_attention(
        **{name: x.double() for name, x in tensors.items()}, scale=1.0, return_lse=True
    )
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=2**-8)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-4)


def test_large_logits_that_are_rounded() -> None:
    """The backward pass rounds them before it subtracts the log-sum-exp, and its weights still add up to 1."""
    tensors = {name: torch.zeros(1, 1, n, 16, dtype=BF16) for name, n in (("query", 20), ("key", 800), ("value", 800))}
    tensors["query"][..., 0], tensors["key"][:, :, 0, 0] = 1020, 1004
    tensors["value"].requires_grad_()
    out, _ = attention(tensors, scale=0.3)  # 307,224.01, of which float32 holds 307,224
    (grad,) = torch.autograd.grad(out, tensors["value"], torch.ones_like(out))
    assert (grad[:, :, 0] == 20).all() and (grad[:, :, 1:] == 0).all()


def test_rows_that_see_nothing() -> None:
    """Of a mask, of padding, and of logits that are -Inf: zeros, also where the other strip of the tile has rows that see all."""
    tensors, mask = inputs(40, 800, 16, 16), torch.ones(40, 800, dtype=torch.bool)
    mask[3], mask[16:32], mask[33, :700] = False, False, False
    out, lse = attention(tensors, attn_mask=mask)
    masked = ~mask.any(-1)
    assert (out[:, :, masked] == 0).all() and (lse[:, :, masked] == -torch.inf).all()
    assert torch.isfinite(lse[:, :, ~masked]).all() and (out[:, :, ~masked] != 0).any(-1).all()
    out, lse = attention(tensors, key_mask=torch.zeros(2, 800, dtype=torch.bool))
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_a_weight_of_zero_is_exact() -> None:
    """Also beside the largest value, and 90 below the largest logit: nothing subnormal is left."""
    tensors = inputs(20, 40, 16, 16)
    tensors["query"][:] = 1
    tensors["key"][:] = 0
    tensors["key"][:, :, 0], tensors["key"][:, :, 5] = 8, -torch.inf
    tensors["value"][:, :, 1:] = 2.0**127
    out, _ = attention(tensors, scale=1.0)  # logits 128, 0 and -Inf
    assert torch.equal(out, tensors["value"][:, :, :1].expand_as(out))


def test_nan_stays_in_its_row_or_head() -> None:
    tensors = inputs(40, 800, 17, 16)
    tensors["query"][0, 0, 3, 16] = torch.nan
    tensors["key"][0, 1, 799, 0] = torch.nan
    tensors["value"][1, 0, 700, 2] = torch.nan
    out, lse = attention(tensors)
    expected = torch.zeros(2, 2, 40, 16, dtype=torch.bool)
    expected[0, 0, 3] = expected[0, 1] = expected[1, 0, :, 2] = True
    assert torch.equal(out.isnan(), expected)
    assert torch.equal(lse.isnan(), expected.all(-1))


def test_panels_do_not_read_padding() -> None:
    tensors, key_mask = inputs(33, 800, 17, 16), torch.arange(800).expand(2, 800) % 3 != 1

    def results(fill: float) -> tuple[Tensor, Tensor]:
        filled = {name: tensors[name].masked_fill(~key_mask[:, None, :, None], fill) for name in ("key", "value")}
        return attention({**tensors, **filled}, key_mask=key_mask)

    assert all(torch.equal(x, y) for x, y in zip(results(0.0), results(torch.nan), strict=True))


@pytest.mark.usefixtures("threads")
def test_same_bits_of_panels() -> None:
    """On each number of threads, and for a sample alone: tasks cut sweeps elsewhere."""
    tensors = inputs(100, 800, 16, 16, b=3, h=4, kv=2)
    torch.set_num_threads(1)
    whole = attention(tensors, is_causal=True, enable_gqa=True)
    for threads, samples in ((2, slice(0, 3)), (5, slice(0, 3)), (8, slice(1, 3)), (1, slice(2, 3)), (3, slice(1, 2))):
        torch.set_num_threads(threads)
        part = attention({name: x[samples] for name, x in tensors.items()}, is_causal=True, enable_gqa=True)
        assert all(torch.equal(x, y[samples]) for x, y in zip(part, whole, strict=True)), (threads, samples)
