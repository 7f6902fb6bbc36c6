"""bfloat16 calls whose products take pairs (csrc/cpu/pairs.h), in v4_bf16. A sanitized library has pairs in each instruction set:
so tools/sanitize.py runs this code on any processor."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to, assert_close_to
from tests.helpers.ops import (
    abar_cases,
    congruence_loss_cases,
    map_cases,
    relevancy_cases,
    second_cases,
    stacked_cross_attention_cases,
    tile_edges,
)
from tests.helpers.ops.score_cases import MASKS, SCORES, attention_inputs, check, lay_out
from vlattn_fast.backends.reference.attention_divergence import KINDS as DIVERGENCES
from vlattn_fast.ops.congruence_loss import KINDS

BF16 = torch.bfloat16
SIZES = ((3, 5), (17, 16), (49, 63), (65, 130), (33, 801), (100, 1025))  # numbers of queries and keys: odd, tiles, blocks
FEATURES = ((4, 4), (5, 3), (16, 33), (31, 16), (64, 65))  # of queries and of values: odd, vectors and a rest
LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "expanded")
PLAIN = tuple(MASKS)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).to(BF16)


@pytest.mark.parametrize("size, features, layout, mask", tile_edges.covering(SIZES, FEATURES, LAYOUTS, PLAIN))
def test_layouts_of_pairs(size: tuple[int, int], features: tuple[int, int], layout: str, mask: str) -> None:
    (n, m), (d, dv) = size, features
    inputs = {"query": random(2, 2, n, d), "key": random(2, 2, m, d), "value": random(2, 2, m, dv)}
    inputs = {name: lay_out(x, layout) for name, x in inputs.items()}
    check("cpu", inputs, lambda _: "scaled_dot", cancels=True, **MASKS[mask](n, m))


@pytest.mark.parametrize("rule, n, kv", tile_edges.covering(("gradient", "attention"), (3, 33, 130, 801), (1, 2)))
def test_layouts_of_pairs_beside_relevancy(rule: str, n: int, kv: int) -> None:
    inputs = relevancy_cases.tensors(n, b=2, kv=kv, d=17, dv=33, rows=3, dtype=BF16)
    relevancy_cases.check("cpu", inputs, rule=rule, is_causal=True, key_mask=relevancy_cases.padding(n))


@pytest.mark.parametrize("rule, size, layout", tile_edges.covering(("gradient", "attention"), SIZES, LAYOUTS))
def test_layouts_of_pairs_in_maps(rule: str, size: tuple[int, int], layout: str) -> None:
    (n, m), d, dv = size, 17, 33
    inputs = [lay_out(random(2, 2, *shape), layout) for shape in ((n, d), (m, d), (m, dv), (n, dv))]
    inputs = inputs if rule == "gradient" else inputs[:2]
    ours = va.attention_map(*inputs, rule=rule, backend="cpu")
    exact, formula = (va.reference.attention_map(*(x.to(dtype) for x in inputs), rule=rule) for dtype in (torch.float64, BF16))
    assert_close_to(ours, exact, formula, what=f"{rule} {size} {layout}")


@pytest.mark.parametrize("size, features, mask", tile_edges.covering(SIZES, (16, 17, 64), ("none", "causal", "key", "scale")))
def test_layouts_of_pairs_in_statistics(size: tuple[int, int], features: int, mask: str) -> None:
    n, m = size
    options: dict[str, dict[str, Any]] = {
        "none": {},
        "causal": {"is_causal": True},
        "key": {"key_mask": torch.rand(2, m) > 0.3, "is_causal": True},
        "scale": {"scale": -0.2},
    }
    inputs = as_dtype(map_cases.statistics_inputs(n, m, features, b=2, h=4, kv=2), BF16)
    map_cases.check_statistics("cpu", inputs, enable_gqa=True, **options[mask], **map_cases.groups(m))


@pytest.mark.parametrize("operator, rule, n", tile_edges.covering(("step", "map"), ("gradient", "attention"), (3, 33, 65, 130)))
def test_layouts_of_pairs_in_gradients_of_maps(operator: str, rule: str, n: int) -> None:
    abar_cases.check("cpu", operator, lambda seed: abar_cases.inputs(n, n + 2, d=17, dv=33, seed=seed), BF16, rule=rule)


@pytest.mark.parametrize("size, features, layout", tile_edges.covering(SIZES[:4], FEATURES, LAYOUTS))
def test_layouts_of_pairs_in_second_derivatives(size: tuple[int, int], features: tuple[int, int], layout: str) -> None:
    (n, m), (d, dv) = size, features
    second_cases.check(second_cases.inputs(n, m, b=2, d=d, dv=dv, dtype=BF16), layout=layout, return_lse=True)


@pytest.mark.parametrize("kind, size, d", tile_edges.covering(KINDS, ((17, 16), (49, 63), (100, 33)), (16, 17, 64)))
def test_layouts_of_pairs_in_congruence(kind: str, size: tuple[int, int], d: int) -> None:
    """Text in several tiles, images whose tokens are scattered."""
    length, regions = size
    inputs = as_dtype(congruence_loss_cases.make(length, regions, b=2, d=d, cross=d == 17), BF16)
    congruence_loss_cases.check("cpu", inputs, kind=kind, image_mask=torch.rand(2, regions) > 0.2)


@pytest.mark.parametrize("size, d, kind, layout", tile_edges.covering(SIZES[:5], (5, 16, 65), DIVERGENCES, LAYOUTS))
def test_layouts_of_pairs_in_divergences(size: tuple[int, int], d: int, kind: str, layout: str) -> None:
    shapes = {"query": (size[0], d), "key": (size[1], d), "other_query": (size[0], 31), "other_key": (size[1], 31)}
    inputs = {name: lay_out(random(2, 2, *shape), layout) for name, shape in shapes.items()}
    ours = partial(va.attention_divergence, kind=kind, is_causal=True, backend="cpu")
    formula = partial(va.reference.attention_divergence, kind=kind, is_causal=True)
    assert_all_close_to(ours, formula, inputs, [torch.randn(2, 2, size[0])])


@pytest.mark.parametrize("size, d, layout", tile_edges.covering(SIZES[:5], (5, 16, 65), LAYOUTS))
def test_layouts_of_pairs_in_indexers(size: tuple[int, int], d: int, layout: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {"query": (2, size[0], d), "key": (2, size[1], d), "index_query": (3, size[0], 31)}
    shapes |= {"index_key": (size[1], 31), "index_weights": (3, size[0])}
    inputs = {name: lay_out(random(2, *shape), layout) for name, shape in shapes.items()}
    ours = partial(va.indexer_divergence, is_causal=True, backend="cpu")
    formula = partial(va.reference.indexer_divergence, is_causal=True)
    assert_all_close_to(ours, formula, inputs, [torch.randn(2, size[0])])


@pytest.mark.parametrize("regions, words, d", tile_edges.covering((16, 36, 600), (1, 20, 51), (16, 33, 100)))
def test_layouts_of_pairs_in_stacked_cross_attention(regions: int, words: int, d: int) -> None:
    inputs = stacked_cross_attention_cases.tensors((3, 3), regions, words, d, BF16)
    lengths = {"image_lengths": (regions, 15, regions - 1), "caption_lengths": (words, 1, words)}
    stacked_cross_attention_cases.check("cpu", inputs, **lengths)


@pytest.mark.parametrize("n, m, d", tile_edges.covering((1, 17, 40), (16, 65, 130), (16, 17, 128)))
def test_layouts_of_pairs_in_maxsim(n: int, m: int, d: int) -> None:
    inputs = {"queries": random(5, n, d), "documents": random(3, m, d)}
    masks = {"query_mask": torch.rand(5, n) > 0.1, "document_mask": torch.rand(3, m) > 0.3}
    ours, formula = (partial(fn, **masks) for fn in (partial(va.maxsim, backend="cpu"), va.reference.maxsim))
    assert_all_close_to(ours, formula, inputs, [torch.randn(5, 3)])


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
