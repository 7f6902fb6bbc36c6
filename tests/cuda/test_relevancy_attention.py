"""Tile edges and limits of csrc/cuda/relevancy_attention.cu; the rest is in tests/ops/test_relevancy_attention.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import assert_all_close_to, assert_close_to
from tests.helpers.ops import tile_edges
from tests.helpers.ops.backends import F64, assert_refused
from tests.helpers.ops.relevancy_cases import check, tensors
from vlattn_fast.backends.cuda import relevancy_attention

MANY = 132  # from so many samples on, a block takes all heads of one: _tensors.EMULATED_MULTIPROCESSORS


@pytest.mark.parametrize("n", tile_edges.CUDA_SQUARES)
@pytest.mark.parametrize("causal", (False, True))
def test_sizes_either_side_of_a_slab(causal: bool, n: int) -> None:
    """16 rows a warp, 8 warps a block: beyond 128 rows a warp takes two slabs."""
    if n < 256:  # float32 of that length does not fit into shared memory
        check("cuda", tensors(n, h=1, kv=1, d=3, dv=2, rows=1), is_causal=causal)
    check("cuda", tensors(n, h=1, kv=1, d=8, dv=8, rows=1, dtype=torch.bfloat16), is_causal=causal, row_normalize=True)


@pytest.mark.parametrize("rows", (4, 5, 8, 9, 64))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_number_of_carried_rows(dtype: torch.dtype, rows: int) -> None:
    inputs = tensors(20, rows=rows, dtype=dtype)
    if rows % 2:
        check("cuda", inputs, rule="attention", row_normalize=True, is_causal=True)
    else:
        check("cuda", inputs, residual_weight=torch.rand(1, 20), attention_weight=torch.randn(1, 20))


@pytest.mark.parametrize("d, dv", [(1, 1), (17, 3), (64, 40), (65, 8), (80, 128)])
@pytest.mark.parametrize("rows, dtype", [(1, torch.float32), (5, torch.bfloat16)], ids=str)
def test_head_dims(d: int, dv: int, rows: int, dtype: torch.dtype) -> None:
    check("cuda", tensors(18, h=1, kv=1, d=d, dv=dv, rows=rows, dtype=dtype), row_normalize=True)


HOLES = {"none": [], "first": [0], "in a tile": [20], "after a tile": [32], "in the middle": [50], "last": [69], "two": [33, 64]}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("holes", HOLES)
def test_keys_between_whole_tiles_that_are_not_seen(holes: str, dtype: torch.dtype) -> None:
    """Up to the first of them tiles are whole and have no masks: by 32 keys in the forward pass, by 16 in the backward pass."""
    key_mask = torch.ones(1, 70, dtype=torch.bool)
    key_mask[:, HOLES[holes]] = False
    inputs = tensors(70, h=1, kv=1, d=8, dv=4, rows=1, dtype=dtype)
    check("cuda", inputs, key_mask=key_mask, row_normalize=True)
    check("cuda", inputs, key_mask=key_mask, is_causal=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("scale", (-0.7, 0.0, 0.7))
def test_a_scale_of_either_sign(scale: float, dtype: torch.dtype) -> None:
    """The sign goes to an operand, in whole tiles and at their edges."""
    inputs = tensors(35, d=8, dv=4, dtype=dtype)
    check("cuda", inputs, scale=scale)
    check("cuda", inputs, scale=scale, is_causal=True, key_mask=torch.arange(35)[None] != 3)


@pytest.mark.parametrize("columns, offset", [(8, 0), (6, 0), (7, 0), (8, 1)])
def test_rows_are_read_by_fours_by_pairs_and_one_by_one(columns: int, offset: int) -> None:
    """Of the left operands, by whether the columns and their place allow it."""
    for dtype in (torch.float32, torch.float16):
        inputs = tensors(20, d=columns + 9, dv=columns, dtype=dtype)
        for name in ("query", "key"):
            inputs[name] = inputs[name][..., offset : offset + columns]
        check("cuda", inputs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("n, m", [(3, 130), (130, 3), (70, 65)])
def test_warps_without_queries_or_keys_wait_with_the_others(n: int, m: int, dtype: torch.dtype) -> None:
    """A block has a warp for every 16 of the longer ones, and the shorter ones are copied in chunks of 64."""
    shapes = {"query": (1, 2, n, 8), "key": (1, 1, m, 8), "value": (1, 1, m, 8), "grad_output": (1, 2, n, 8)}
    inputs = {"relevancy": torch.rand(1, 2, n)} | {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    ours, formula = (partial(step, enable_gqa=True) for step in (va.relevancy_step, va.reference.relevancy_step))
    assert_all_close_to(partial(ours, backend="cuda"), formula, inputs, grads=False)


def test_grouped_heads_over_two_slabs_a_warp() -> None:
    check("cuda", tensors(130, h=2, kv=1, d=2, dv=2, rows=5, dtype=torch.float16), is_causal=True)


@pytest.mark.parametrize("rule, row_normalize", [("gradient", False), ("gradient", True), ("attention", True)])
def test_many_samples_are_not_cut_into_ranges_of_heads(rule: str, row_normalize: bool) -> None:
    """One block then takes head after head, here with two warps of which one has less to do."""
    check("cuda", tensors(17, b=MANY, h=2, d=2, dv=3, rows=1), rule=rule, row_normalize=row_normalize, is_causal=True)


@pytest.mark.parametrize("row_normalize", (False, True))
def test_a_block_of_several_warps_takes_several_heads(row_normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warp that is done with a head must not copy the next one over what others still read."""
    monkeypatch.setattr(relevancy_attention, "_parts", lambda *_: 1)
    check("cuda", tensors(40, h=4, kv=2, d=8, dv=8, rows=1), row_normalize=row_normalize)


def test_ranges_of_several_heads_and_of_different_lengths() -> None:
    """100 samples are cut into 3 ranges each, here of 2, 1 and 2 heads."""
    check("cuda", tensors(3, b=100, h=5, kv=5, d=2, dv=2, rows=2), row_normalize=True)
    check("cuda", tensors(3, b=100, h=5, kv=5, d=2, dv=2, rows=2))


@pytest.mark.parametrize(
    "batch, key_heads, multiprocessors, parts",
    [(0, 8, 132, 1), (1, 8, 132, 8), (64, 12, 132, 5), (131, 12, 132, 3), (132, 12, 132, 1), (64, 12, 46, 1), (40, 12, 46, 3)],
)
def test_samples_are_cut_for_the_multiprocessors_there_are(batch: int, key_heads: int, multiprocessors: int, parts: int) -> None:
    assert relevancy_attention._parts(batch, key_heads, multiprocessors) == parts


def test_an_lse_far_from_zero_is_taken_as_it_is() -> None:
    """All keys that count most are elsewhere: these here have next to nothing left."""
    query, key, _, r = tensors(20, dtype=torch.bfloat16).values()
    got = va.relevancy_step(r, query, key, rule="attention", lse=torch.full((1, 2, 20), 1e5), backend="cuda")
    assert torch.equal(got, torch.zeros(1, 2, 20))


@pytest.mark.parametrize(
    "n, d, dv, rows, dtype, words",
    [
        (257, 8, 8, 1, torch.float16, "at most 256 queries and keys"),
        (3, 130, 8, 1, torch.float16, "a head_dim of at most 128"),
        (3, 8, 130, 1, torch.float32, "a head_dim of at most 128"),
        (200, 64, 8, 1, torch.float32, "shared memory"),
        (200, 8, 65, 1, torch.bfloat16, "shared memory"),
        (3, 8, 8, 65, torch.float32, "at most 64 carried rows"),
        (3, 8, 8, 1, F64, "float16, bfloat16 and float32"),
    ],
)
def test_what_it_cannot_run_is_refused(n: int, d: int, dv: int, rows: int, dtype: torch.dtype, words: str) -> None:
    inputs = tensors(n, d=d, dv=dv, rows=rows, dtype=dtype)
    assert_refused("cuda", words, lambda: va.relevancy_attention(**inputs, backend="cuda"))
    query, key, value, r = inputs.values()
    grad = query.new_zeros(1, 2, n, dv)
    assert_refused("cuda", words, lambda: va.relevancy_step(r, query, key, value, grad, backend="cuda"))


@pytest.mark.parametrize("n, d, dtype", [(176, 64, torch.float32), (176, 128, torch.float16), (80, 128, torch.float32)], ids=str)
def test_the_largest_that_fits_into_shared_memory(n: int, d: int, dtype: torch.dtype) -> None:
    """It starts: the step of few keys has queries as long, and as many carried rows, as any call; a block may have 99 KB."""
    query, key, r = torch.randn(1, 1, n, d, dtype=dtype), torch.randn(1, 1, 3, d, dtype=dtype), torch.rand(1, 9, n)
    got = va.relevancy_step(r, query, key, rule="attention", backend="cuda")
    exact = va.reference.relevancy_step(r.double(), query.double(), key.double(), rule="attention")
    assert_close_to(got, exact, va.reference.relevancy_step(r, query, key, rule="attention"), what="step")
