"""The Triton kernels of stacked_cross_attention in the interpreter against the formula: similarity and both gradients."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from compare import as_dtype, assert_all_close_to, outputs_and_grads
from torch import Tensor
from vlattn_fast.kernels import stacked_cross_attention as kernels

import vlattn_fast as va
from tests.ops.score_cases import lay_out
from vlattn_fast.ops.stacked_cross_attention import AGGREGATIONS, DIRECTIONS, FIRST_NORMS

RAGGED = {"caption_lengths": (9, 1, 0, 5), "image_lengths": (7, 0, 3)}


def tensors(
    sets: tuple[int, int], regions: int, words: int, size: int = 16, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    images, captions = torch.randn(sets[0], regions, size), torch.randn(sets[1], words, size)
    unit = partial(torch.nn.functional.normalize, dim=-1)
    return as_dtype({"images": unit(images), "captions": unit(captions)}, dtype)


def check(inputs: dict[str, Tensor], similarity: str = "stacked_cross_attention", **options: Any) -> dict[str, Tensor]:
    """Against the formula, with a random cotangent."""
    options = {name: torch.tensor(x) if isinstance(x, tuple) else x for name, x in options.items()}
    return assert_all_close_to(
        partial(getattr(va, similarity), **options, backend="triton"),
        partial(getattr(va.reference, similarity), **options),
        inputs,
        [torch.randn(len(inputs["images"]), len(inputs["captions"]))],
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("first_norm", FIRST_NORMS)
def test_first_norms(first_norm: str | None, direction: str) -> None:
    check(tensors((3, 4), 7, 9, 12), first_norm=first_norm, direction=direction, smooth=4.0, **RAGGED)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations(aggregation: str, direction: str) -> None:
    check(tensors((3, 4), 7, 9), aggregation=aggregation, direction=direction, lambda_lse=3.0)
    check(tensors((3, 4), 7, 9), aggregation=aggregation, direction=direction, lambda_lse=3.0, **RAGGED)


# one block of rows, contexts or features, and several; 289 regions are AttnGAN's
@pytest.mark.parametrize(
    "queries, contexts, size",
    [
        (1, 1, 1),
        (15, 17, 3),
        (33, 63, 17),
        (63, 65, 64),
        (17, 100, 70),
        (100, 33, 65),
        (160, 20, 5),
        (64, 289, 20),
        (289, 64, 20),
    ],
)
def test_sizes_either_side_of_a_tile(queries: int, contexts: int, size: int) -> None:
    check(tensors((1, 2), contexts, queries, size), caption_lengths=(queries, queries // 2))
    words = (max(1, contexts - 3),)
    check(tensors((2, 1), queries, contexts, size), first_norm="softmax", direction="i2t", caption_lengths=words)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_half_precision_is_computed_in_float32(direction: str, dtype: torch.dtype) -> None:
    for regions, words in ((36, 20), (66, 68)):  # one block of contexts, and two
        inputs = tensors((1, 2), regions, words, 72, dtype)
        got = check(inputs, direction=direction, caption_lengths=(words, 7))
        assert got["out0"].dtype == torch.float32 and got["grad images"].dtype == dtype
    tiny = {name: x * 2.0**-11 for name, x in tensors((2, 1), 9, 7, 40, dtype).items()}  # where float16 has few bits
    check(tiny, direction=direction, first_norm=None, smooth=1e5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_short_attended_vectors(dtype: torch.dtype) -> None:
    """Contexts around zero, weights nearly uniform: |a| is |c| / 1000, so what is summed to it has to be accurate."""
    regions = (36, 9, 5)
    for image, real in enumerate(regions):  # each by itself, or the worst would hide the others
        inputs = tensors((1, 4), 36, 8, 64)
        inputs["images"][0, :real] -= inputs["images"][0, :real].mean(0)
        check(as_dtype(inputs, dtype), image_lengths=(regions[image],), first_norm=None, smooth=0.01)


@pytest.mark.parametrize("first_norm", FIRST_NORMS)
def test_zero_vectors(first_norm: str | None) -> None:
    inputs = tensors((2, 4), 4, 3, 12)
    inputs["images"][0], inputs["images"][1, 2], inputs["captions"][1], inputs["captions"][2, 0] = 0, 0, 0, 0
    inputs["captions"][3, 0] *= 1e-10  # not zero, but below the cosine's 1e-8
    for direction in DIRECTIONS:
        check(inputs, direction=direction, first_norm=first_norm)


def test_the_best_queries_share_the_gradient() -> None:
    """Equal words, and as many regions as make every product exact: equal cosines, whatever the order of sums."""
    inputs = tensors((2, 3), 4, 8)
    inputs = {name: (4.0 * x).round() / 4.0 for name, x in inputs.items()}
    inputs["captions"][:, 1:4] = inputs["captions"][:, :1] = 1.0
    run = partial(va.stacked_cross_attention, aggregation="max", backend="triton")
    for dtype in (torch.float32, torch.bfloat16):
        grad = outputs_and_grads(run, as_dtype(inputs, dtype))["grad captions"]
        assert torch.equal(grad[:, 1:4], grad[:, :1].expand_as(grad[:, 1:4]))
    check(inputs, aggregation="max")


def test_damsm() -> None:
    check(tensors((2, 3), 20, 9, 16), "damsm_similarity", gamma1=4.0, gamma2=5.0, caption_lengths=(9, 4, 1))


@pytest.mark.parametrize("smooth, aggregation", [(0.0, "logsumexp"), (-3.0, "max"), (1e4, "mean")])
def test_any_smooth(smooth: float, aggregation: str) -> None:
    check(tensors((2, 3), 5, 6), smooth=smooth, aggregation=aggregation, first_norm="clipped")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_padding_reaches_nothing(direction: str) -> None:
    inputs = tensors((3, 4), 7, 9)
    lengths = {name: torch.tensor(x) for name, x in RAGGED.items()}
    run = partial(va.stacked_cross_attention, direction=direction, **lengths, backend="triton")
    want = outputs_and_grads(run, inputs)
    for side, garbage in (("image", math.inf), ("caption", math.nan)):
        for row, length in zip(inputs[f"{side}s"], RAGGED[f"{side}_lengths"], strict=True):
            row[length:] = garbage
    got = outputs_and_grads(run, inputs)
    assert all(torch.equal(got[name], x) for name, x in want.items())
    assert (got["out0"][1] == 0).all() and (got["out0"][:, 2] == 0).all()
    for side in ("image", "caption"):
        assert all((got[f"grad {side}s"][i, length:] == 0).all() for i, length in enumerate(RAGGED[f"{side}_lengths"]))


@pytest.mark.parametrize("elements", (1, 200, 700))
def test_chunks_add_up(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of few elements: one pair at a time, and several sets of either side."""
    monkeypatch.setattr(kernels, "MAP_ELEMENTS", elements)
    for ragged in ({}, {"caption_lengths": (9, 1, 0, 5, 7), "image_lengths": (7, 0, 3)}):
        check(tensors((3, 5), 7, 9), **ragged)
    pairs = torch.zeros(3, 5)
    for x, tiles_y in kernels._chunks((torch.empty(3, 7, 2), None), (torch.empty(5, 9, 2), None)):
        for y in tiles_y:
            pairs[x, y] += 1
            assert pairs[x, y].numel() * 7 * 9 <= max(elements, 63)
    assert (pairs == 1).all()


@pytest.mark.parametrize("layout", ("sliced", "strided", "expanded", "reversed"))
def test_layouts(layout: str) -> None:
    inputs = {name: lay_out(x[:, None], layout)[:, 0] for name, x in tensors((3, 4), 5, 6).items()}
    check(inputs)
    run = partial(assert_all_close_to, inputs=inputs)  # summed: gradients of stride 0
    run(
        partial(va.stacked_cross_attention, direction="i2t", backend="triton"),
        partial(va.reference.stacked_cross_attention, direction="i2t"),
    )


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 3, 0, 4, 5), (2, 3, 4, 0, 5), (2, 3, 4, 5, 0)])
def test_empty_sizes(sizes: tuple[int, ...]) -> None:
    for direction in DIRECTIONS:
        for lengths in ({}, {"caption_lengths": (sizes[3],) * sizes[1]} if sizes[1] > 0 else {}):
            check(tensors(sizes[:2], *sizes[2:]), direction=direction, **lengths)
    check(tensors(sizes[:2], *sizes[2:], torch.bfloat16))


def test_runs_are_bit_equal_and_write_no_input() -> None:
    inputs = tensors((3, 4), 40, 9)
    lengths = torch.tensor([9, 1, 0, 5])
    before = {name: x.clone() for name, x in inputs.items()}
    run = partial(va.stacked_cross_attention, caption_lengths=lengths, backend="triton")
    first, second = (outputs_and_grads(run, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(x, before[name]) for name, x in inputs.items()) and lengths.tolist() == [9, 1, 0, 5]


@pytest.mark.parametrize(
    "dtype, regions, direction, words",
    [(torch.float64, 3, "t2i", "float16, bfloat16 and float32"), (torch.float32, 4097, "t2i", "at most 4096 contexts")],
)
def test_what_it_cannot_run_is_refused(dtype: torch.dtype, regions: int, direction: str, words: str) -> None:
    images, captions = torch.randn(1, regions, 4, dtype=dtype), torch.randn(1, 3, 4, dtype=dtype)
    with pytest.raises(ValueError, match=words):
        va.stacked_cross_attention(images, captions, direction=direction, backend="triton")
