"""bfloat16 dot products by packed panels of keys (csrc/cpu/panels.h, backward_panels.h), which the instruction set `amx` takes.

On other processors tools/sanitize.py runs these tests with a stand-in for the products of tiles, and test_tiles.py with the
machine code; in the set that runs here they test the other passes.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.ops import relevancy_cases, score_cases, tile_edges
from tests.helpers.ops.masks import COMMON, masks_of

BF16 = torch.bfloat16
# Query rows come in tiles of 32, two strips of 16; up to 8 queries are a case apart, and backwards eight tiles are a block. Up to
# 768 keys are one panel, more are equal panels of at most 512, beyond 64 features of at most 1,024; backwards all panels have at
# most 512, beyond 64 features 256, in chunks of 64. Keys and features fill tiles up to multiples of 32 and 16.
SIZES = ((9, 16), (17, 31), (31, 33), (33, 64), (48, 65), (65, 130), (257, 40), (40, 513), (65, 577), (40, 769), (20, 1025))
FEATURES = ((16, 16), (17, 33), (33, 17), (64, 64), (80, 40), (128, 96))


def inputs(n: int, m: int, d: int = 16, dv: int = 16, b: int = 2, h: int = 2, kv: int = 2) -> dict[str, Tensor]:
    shapes = {"query": (b, h, n, d), "key": (b, kv, m, d), "value": (b, kv, m, dv)}
    return {name: torch.randn(shape).to(BF16) for name, shape in shapes.items()}


def cotangents(tensors: dict[str, Tensor]) -> list[Tensor]:
    rows = tensors["query"].shape[:3]
    return [torch.randn(*rows, tensors["value"].shape[3]).to(BF16), torch.randn(rows)]


def results(tensors: dict[str, Tensor], grads: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Both outputs, and the gradients of `grads`."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    out, lse = va.score_attention(**leaves, return_lse=True, backend="cpu", **options)
    found = dict(zip(leaves, torch.autograd.grad((out, lse), list(leaves.values()), grads), strict=True))
    return {"out": out.detach(), "lse": lse.detach(), **found}


def check(tensors: dict[str, Tensor], **options: Any) -> None:
    """Outputs and gradients against the formula."""
    score_cases.check("cpu", tensors, lambda _: "scaled_dot", cancels=True, **options)


@pytest.mark.parametrize("size, features, mask", tile_edges.covering(SIZES, FEATURES, ("none", *COMMON)))
def test_edges_of_panels(size: tuple[int, int], features: tuple[int, int], mask: str) -> None:
    check(inputs(*size, *features), **masks_of(mask, *size))


@pytest.mark.parametrize("m, visible", [(513, n) for n in (256, 257, 288, 289, 1)] + [(1025, n) for n in (352, 353, 384, 385)])
def test_a_panel_of_one_key(m: int, visible: int) -> None:
    """1,025 keys are three panels of 352, backwards 513 are two of 288, and padding ends where it likes."""
    check(inputs(20, m), key_mask=(torch.arange(m) < visible).expand(2, m))


@pytest.mark.parametrize("heads, n, is_causal", ((72, 33, False), (5, 70, True), (3, 1100, True)))
def test_sweeps_over_heads_and_rows(heads: int, n: int, is_causal: bool) -> None:
    """More than 64 tiles of rows, of many query heads or of one, that share a key head; backwards a block of rows of several
    query heads, of which those under the causal mask see more keys than the next head's first ones."""
    check(inputs(n, 70, b=1, h=heads, kv=1), enable_gqa=True, is_causal=is_causal)


@pytest.mark.parametrize("scale", (-20.0, -0.3, 0.0, 2.0, 20.0))
def test_scales_of_panels(scale: float) -> None:
    tensors = inputs(33, 800)
    relevancy_cases.assert_all_close_to(
        lambda **x: va.score_attention(**x, scale=scale, return_lse=True, backend="cpu"),
        lambda **x: va.reference.score_attention(**x, scale=scale, return_lse=True),
        tensors,
        cotangents(tensors),
        scales={f"grad {name}": 1.0 for name in tensors},
    )


@pytest.mark.parametrize("rule, row_normalize, n", tile_edges.covering(("gradient", "attention"), (False, True), (31, 130, 600)))
@pytest.mark.parametrize("rows", (1, 3))
def test_relevancy_beside_panels(rule: str, row_normalize: bool, n: int, rows: int) -> None:
    tensors = relevancy_cases.tensors(n, b=2, h=4, kv=2, d=17, dv=33, rows=rows, dtype=BF16)
    relevancy_cases.check("cpu", tensors, rule=rule, row_normalize=row_normalize, is_causal=n == 130)


@pytest.mark.parametrize("offset", (64.0, 4096.0, 2.0**20))
def test_logits_far_from_zero(offset: float) -> None:
    """A feature adds the same number to all logits of a row. So the products are exact, and the log-sum-exp has this number."""
    tensors = inputs(20, 800, 17)
    for name in ("query", "key"):
        tensors[name] = torch.randint(-2, 3, tensors[name].shape).to(BF16)
    tensors["key"][..., 0] = 1
    tensors["query"][..., 0] = offset
    out, lse = va.score_attention(**tensors, scale=1.0, return_lse=True, backend="cpu")
    in_float64 = {name: x.double() for name, x in tensors.items()}
    exact, exact_lse = va.reference.score_attention(**in_float64, scale=1.0, return_lse=True)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=2**-8)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-4)


def test_large_logits_that_are_rounded() -> None:
    """The backward pass rounds them before it subtracts the log-sum-exp, and its weights still add up to 1."""
    tensors = {name: torch.zeros(1, 1, n, 16, dtype=BF16) for name, n in (("query", 20), ("key", 800), ("value", 800))}
    tensors["query"][..., 0], tensors["key"][:, :, 0, 0] = 1020, 1004
    grads = [torch.ones(1, 1, 20, 16, dtype=BF16), torch.zeros(1, 1, 20)]
    grad = results(tensors, grads, scale=0.3)["value"]  # 307,224.01, of which float32 holds 307,224
    assert (grad[:, :, 0] == 20).all() and (grad[:, :, 1:] == 0).all()


def test_logits_whose_sum_is_found_again() -> None:
    """A bias of 2^30 leaves no digits of the log-sum-exp: rows with it attend to their keys as rows without it do."""
    tensors, bias = inputs(40, 520), torch.zeros(40, 1)
    bias[5], bias[20:] = 2.0**30, -(2.0**30)
    tensors["key"][:] = 0  # beside the bias no logit has a digit
    grads = [cotangents(tensors)[0], torch.zeros(2, 2, 40)]
    shifted, plain = (results(tensors, grads, attn_mask=x.expand(40, 520)) for x in (bias, torch.zeros(40, 1)))
    assert plain["value"].abs().max() > 0
    del shifted["lse"], plain["lse"]
    torch.testing.assert_close(shifted, plain, rtol=2**-7, atol=2**-10)


def test_rows_that_see_nothing() -> None:
    """Of a mask and of padding: zeros, also where the other strip of the tile has rows that see all."""
    tensors, mask = inputs(40, 800), torch.ones(40, 800, dtype=torch.bool)
    mask[3], mask[16:32], mask[33, :700] = False, False, False
    found, masked = results(tensors, cotangents(tensors), attn_mask=mask), ~mask.any(-1)
    assert torch.equal(found["lse"] == -torch.inf, masked.expand(2, 2, 40)) and found["lse"][:, :, ~masked].isfinite().all()
    for name in ("out", "query"):
        assert torch.equal((found[name] != 0).any(-1), ~masked.expand(2, 2, 40)), name
    found = results(tensors, cotangents(tensors), key_mask=torch.zeros(2, 800, dtype=torch.bool))
    assert (found.pop("lse") == -torch.inf).all() and not any(x.any() for x in found.values())


def test_a_weight_of_zero_is_exact() -> None:
    """Also beside the largest value, and 90 below the largest logit: nothing subnormal is left."""
    tensors = inputs(20, 40)
    tensors["query"][:] = 1
    tensors["key"][:] = 0
    tensors["key"][:, :, 0], tensors["key"][:, :, 5] = 8, -torch.inf
    tensors["value"][:, :, 1:] = 2.0**127
    out = va.score_attention(**tensors, scale=1.0, backend="cpu")  # logits 128, 0 and -Inf
    assert torch.equal(out, tensors["value"][:, :, :1].expand_as(out))


def test_nan_stays_in_its_row_or_head() -> None:
    tensors = inputs(40, 800, 17)
    tensors["query"][0, 0, 3, 16] = torch.nan
    tensors["key"][0, 1, 799, 0] = torch.nan
    tensors["value"][1, 0, 700, 2] = torch.nan
    out, lse = va.score_attention(**tensors, return_lse=True, backend="cpu")
    expected = torch.zeros(2, 2, 40, 16, dtype=torch.bool)
    expected[0, 0, 3] = expected[0, 1] = expected[1, 0, :, 2] = True
    assert torch.equal(out.isnan(), expected)
    assert torch.equal(lse.isnan(), expected.all(-1))


def test_nan_stays_in_its_rows_gradient() -> None:
    """NaN of a query is in its row and in all keys of its head; that of a cotangent in the head's values, too."""
    tensors = inputs(40, 520, 17)
    grads = cotangents(tensors)
    tensors["query"][0, 0, 3, 16] = torch.nan
    grads[0][1, 1, 39, 2] = torch.nan
    found = {name: x.isnan() for name, x in results(tensors, grads).items()}
    rows = torch.zeros(2, 2, 40, 17, dtype=torch.bool)
    rows[0, 0, 3] = rows[1, 1, 39] = True
    assert torch.equal(found["query"], rows)
    assert torch.equal(found["key"].all((2, 3)), rows.any((2, 3))) and torch.equal(found["key"].any((2, 3)), rows.any((2, 3)))
    value = found["value"]
    assert value[0, 0].all() and value[1, 1, :, 2].all() and not value[1, 1, :, 3].any() and not value[0, 1].any()


def test_panels_do_not_read_padding() -> None:
    tensors, key_mask = inputs(33, 800, 17), torch.arange(800).expand(2, 800) % 3 != 1
    grads = cotangents(tensors)
    for name in ("key", "value"):
        tensors[name].masked_fill_(~key_mask[:, None, :, None], 0.0)
    zeros = results(tensors, grads, key_mask=key_mask)
    for name in ("key", "value"):
        tensors[name].masked_fill_(~key_mask[:, None, :, None], torch.nan)
        assert (zeros[name][:, :, 1::3] == 0).all() and (zeros[name][:, :, ::3] != 0).any()
    nans = results(tensors, grads, key_mask=key_mask)
    assert all(torch.equal(x, nans[name]) for name, x in zeros.items())


@pytest.mark.usefixtures("threads")
def test_same_bits_of_panels() -> None:
    """Of outputs and of queries' gradients on any number of threads, whose tasks cut sweeps and blocks elsewhere; of all
    gradients of a sample alone and in a batch on one thread."""
    tensors = inputs(300, 800, b=3, h=4, kv=2)
    grads, options = cotangents(tensors), {"is_causal": True, "enable_gqa": True}
    torch.set_num_threads(1)
    whole = results(tensors, grads, **options)
    for threads, samples in ((2, slice(0, 3)), (5, slice(0, 3)), (8, slice(1, 3)), (1, slice(2, 3)), (1, slice(1, 3))):
        torch.set_num_threads(threads)
        part = results({name: x[samples] for name, x in tensors.items()}, [x[samples] for x in grads], **options)
        for name in whole if threads == 1 else ("out", "lse", "query"):
            assert torch.equal(part[name], whole[name][samples]), (threads, samples, name)
