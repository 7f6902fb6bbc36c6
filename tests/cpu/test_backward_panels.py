"""The backward pass of bfloat16 dot products by packed panels of keys (csrc/cpu/backward_panels.h), which the set `amx` takes.

On other processors tools/sanitize.py runs these tests with a stand-in for the products of tiles, and test_tiles.py with the
machine code; in the set that runs here they test the other backward pass.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.ops import relevancy_cases, tile_edges
from tests.helpers.ops.masks import COMMON, masks_of
from tests.helpers.ops.score_cases import check

BF16 = torch.bfloat16
# Query rows come in tiles of 32, two strips of 16, and eight tiles are a block. Keys are equal panels of at most 512, beyond 64
# features of at most 256, and come in chunks of 64. Keys and features fill tiles up to multiples of 32 and 16.
SIZES = ((16, 16), (17, 31), (31, 33), (33, 64), (48, 65), (65, 130), (257, 40), (40, 513))
FEATURES = ((16, 16), (17, 33), (33, 17), (64, 64), (80, 40), (128, 96))


def inputs(n: int, m: int, d: int, dv: int, b: int = 2, h: int = 2, kv: int = 2) -> dict[str, Tensor]:
    shapes = {"query": (b, h, n, d), "key": (b, kv, m, d), "value": (b, kv, m, dv)}
    return {name: torch.randn(shape).to(BF16) for name, shape in shapes.items()}


def gradients(tensors: dict[str, Tensor], grads: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Of both outputs' cotangents."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    outputs = va.score_attention(**leaves, return_lse=True, backend="cpu", **options)
    return dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), grads), strict=True))


def cotangents(tensors: dict[str, Tensor]) -> list[Tensor]:
    rows = tensors["query"].shape[:3]
    return [torch.randn(*rows, tensors["value"].shape[3]).to(BF16), torch.randn(rows)]


def formula(tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    check("cpu", tensors, lambda _: "scaled_dot", cancels=True, **options)


@pytest.mark.parametrize("size, features, mask", tile_edges.covering(SIZES, FEATURES, ("none", *COMMON)))
def test_edges_of_panels_in_gradients(size: tuple[int, int], features: tuple[int, int], mask: str) -> None:
    formula(inputs(*size, *features), masks_of(mask, *size))


@pytest.mark.parametrize("visible", (256, 257, 288, 289, 1))
def test_a_panel_of_one_key_in_gradients(visible: int) -> None:
    """513 keys are two panels of 288, and padding ends where it likes."""
    formula(inputs(20, 513, 16, 16), {"key_mask": (torch.arange(513) < visible).expand(2, 513)})


@pytest.mark.parametrize("heads, n, is_causal", ((72, 33, False), (5, 70, True), (2, 1100, True)))
def test_blocks_over_heads_and_rows(heads: int, n: int, is_causal: bool) -> None:
    """More than 64 tiles of rows, or a block of rows of several query heads, of which those under the causal mask see more keys
    than the next head's first ones."""
    formula(inputs(n, 70, 16, 16, b=1, h=heads, kv=1), {"enable_gqa": True, "is_causal": is_causal})


@pytest.mark.parametrize("scale", (-20.0, -0.3, 0.0, 2.0))
def test_scales_of_panels_in_gradients(scale: float) -> None:
    tensors, grads = inputs(33, 300, 16, 16), [torch.randn(2, 2, 33, 16), torch.randn(2, 2, 33)]
    relevancy_cases.assert_all_close_to(
        lambda **x: va.score_attention(**x, scale=scale, return_lse=True, backend="cpu"),
        lambda **x: va.reference.score_attention(**x, scale=scale, return_lse=True),
        tensors,
        grads,
        scales={f"grad {name}": 1.0 for name in tensors},
    )


@pytest.mark.parametrize("rule, row_normalize, n", tile_edges.covering(("gradient", "attention"), (False, True), (31, 130, 600)))
@pytest.mark.parametrize("rows", (1, 3))
def test_relevancy_beside_panels(rule: str, row_normalize: bool, n: int, rows: int) -> None:
    tensors = relevancy_cases.tensors(n, b=2, h=4, kv=2, d=17, dv=33, rows=rows, dtype=BF16)
    relevancy_cases.check("cpu", tensors, rule=rule, row_normalize=row_normalize, is_causal=n == 130)


def test_logits_whose_sum_is_found_again() -> None:
    """A bias of 2^30 leaves no digits of the log-sum-exp: rows with it attend to their keys as rows without it do."""
    tensors, bias = inputs(40, 520, 16, 16), torch.zeros(40, 1)
    bias[5], bias[20:] = 2.0**30, -(2.0**30)
    tensors["key"][:] = 0  # beside the bias no logit has a digit
    grads = [cotangents(tensors)[0], torch.zeros(2, 2, 40)]
    shifted, plain = (gradients(tensors, grads, attn_mask=x.expand(40, 520)) for x in (bias, torch.zeros(40, 1)))
    assert plain["value"].abs().max() > 0
    torch.testing.assert_close(shifted, plain, rtol=2**-7, atol=2**-10)


def test_rows_that_see_nothing_have_no_gradient() -> None:
    tensors, mask = inputs(40, 520, 16, 16), torch.ones(40, 520, dtype=torch.bool)
    mask[3], mask[16:32], mask[33, :500] = False, False, False
    grads = gradients(tensors, cotangents(tensors), attn_mask=mask)
    masked = ~mask.any(-1)
    assert (grads["query"][:, :, masked] == 0).all() and (grads["query"][:, :, ~masked] != 0).any(-1).all()
    grads = gradients(tensors, cotangents(tensors), key_mask=torch.zeros(2, 520, dtype=torch.bool))
    assert all((x == 0).all() for x in grads.values())


def test_nan_stays_in_its_rows_gradient() -> None:
    """NaN of a query is in its row and in all keys of its head; that of a cotangent in the head's values, too."""
    tensors, grads = inputs(40, 520, 17, 16), []
    grads = cotangents(tensors)
    tensors["query"][0, 0, 3, 16] = torch.nan
    grads[0][1, 1, 39, 2] = torch.nan
    of_query, of_key, of_value = (x.isnan() for x in gradients(tensors, grads).values())
    rows = torch.zeros(2, 2, 40, 17, dtype=torch.bool)
    rows[0, 0, 3] = rows[1, 1, 39] = True
    assert torch.equal(of_query, rows)
    assert torch.equal(of_key.all((2, 3)), rows.any((2, 3))) and torch.equal(of_key.any((2, 3)), rows.any((2, 3)))
    assert of_value[0, 0].all() and of_value[1, 1, :, 2].all() and not of_value[1, 1, :, 3].any() and not of_value[0, 1].any()


def test_gradients_of_panels_do_not_read_padding() -> None:
    tensors, key_mask = inputs(33, 520, 17, 16), torch.arange(520).expand(2, 520) % 3 != 1
    grads = cotangents(tensors)

    def results(fill: float) -> dict[str, Tensor]:
        filled = {name: tensors[name].masked_fill(~key_mask[:, None, :, None], fill) for name in ("key", "value")}
        return gradients({**tensors, **filled}, grads, key_mask=key_mask)

    zeros, nans = results(0.0), results(torch.nan)
    assert all(torch.equal(x, nans[name]) for name, x in zeros.items())
    assert all((zeros[name][:, :, 1::3] == 0).all() and (zeros[name][:, :, ::3] != 0).any() for name in ("key", "value"))


@pytest.mark.usefixtures("threads")
def test_same_bits_of_gradients_of_panels() -> None:
    """Of a sample alone and in a batch on one thread, and of queries on any number of threads, whose tasks cut blocks."""
    tensors = inputs(300, 300, 16, 16, b=3, h=4, kv=2)
    grads, options = cotangents(tensors), {"is_causal": True, "enable_gqa": True}
    torch.set_num_threads(1)
    whole = gradients(tensors, grads, **options)
    for threads, samples in ((2, slice(0, 3)), (5, slice(0, 3)), (8, slice(1, 3)), (1, slice(2, 3)), (1, slice(1, 3))):
        torch.set_num_threads(threads)
        part = gradients({name: x[samples] for name, x in tensors.items()}, [x[samples] for x in grads], **options)
        same = whole if threads == 1 else {"query": whole["query"]}
        assert all(torch.equal(part[name], x[samples]) for name, x in same.items()), (threads, samples)
