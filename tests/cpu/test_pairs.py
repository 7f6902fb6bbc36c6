"""bfloat16 calls whose products take pairs (csrc/cpu/pairs.h), in v4_bf16. A sanitized library has pairs in each instruction set:
so tools/sanitize.py runs this code on any processor."""

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype
from tests.helpers.ops import stacked_cross_attention_cases, tile_edges
from tests.helpers.ops.score_cases import SCORES, attention_inputs, check

BF16 = torch.bfloat16


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).to(BF16)


@pytest.mark.parametrize("regions, words, d", tile_edges.covering((16, 36, 600), (1, 20, 51), (16, 33, 100)))
def test_layouts_of_pairs_in_stacked_cross_attention(regions: int, words: int, d: int) -> None:
    inputs = stacked_cross_attention_cases.tensors((3, 3), regions, words, d, BF16)
    lengths = {"image_lengths": (regions, 15, regions - 1), "caption_lengths": (words, 1, words)}
    stacked_cross_attention_cases.check("cpu", inputs, **lengths)


@pytest.mark.parametrize("score", ("general-relu-key", "general-tanh-key", "general-sigmoid-key"))
def test_activations_of_pairs(score: str) -> None:
    inputs, make = attention_inputs(SCORES[score], n=65, m=801)
    check("cpu", as_dtype(inputs, BF16), make, cancels=True)


def test_padding_is_not_read() -> None:
    """Also where a pair has one visible key."""
    query, key, value = random(2, 2, 20, 6), random(2, 2, 21, 6), random(2, 2, 21, 6)
    key_mask = torch.arange(21).expand(2, 21) % 3 != 1

    def results(fill: float) -> list[Tensor]:
        inputs = [query, *(x.masked_fill(~key_mask[:, None, :, None], fill) for x in (key, value))]
        leaves = [x.requires_grad_() for x in inputs]
        out = va.score_attention(*leaves, key_mask=key_mask, backend="cpu")
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    assert all(torch.equal(x, y) for x, y in zip(results(0.0), results(float("nan")), strict=True))


@pytest.mark.parametrize("n", (15, 16, 17))
def test_lanes_behind_an_odd_row(n: int) -> None:
    """A key of -Inf has no weight in any row, and NaN behind the last one: no gradient of its value is NaN."""
    query, key, value = random(1, 1, n, 6).abs(), random(1, 1, 20, 6), random(1, 1, 20, 6).requires_grad_()
    key[:, :, 3] = -torch.inf
    out = va.score_attention(query, key, value, backend="cpu")
    (grad,) = torch.autograd.grad(out, value, torch.ones_like(out))
    assert torch.isfinite(out).all() and torch.isfinite(grad).all() and (grad[:, :, 3] == 0).all()
