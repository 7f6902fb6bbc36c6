"""Tile edges and limits of csrc/cuda/relevancy_attention.cu; the rest is in tests/ops/test_relevancy_attention.py."""

from functools import partial

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import assert_all_close_to, assert_close_to
from tests.helpers.ops import tile_edges
from tests.helpers.ops.backends import F64, assert_refused
from tests.helpers.ops.relevancy_cases import check, tensors


@pytest.mark.parametrize("n", tile_edges.CUDA_SQUARES)
@pytest.mark.parametrize("causal", (False, True))
def test_sizes_either_side_of_a_slab(causal: bool, n: int) -> None:
    """16 rows a warp, 8 warps a block: beyond 128 rows a warp takes two slabs."""
    if n < 256:  # float32 of that length does not fit into shared memory
        check("cuda", tensors(n, h=1, kv=1, d=3, dv=2, rows=1), is_causal=causal)
    check("cuda", tensors(n, h=1, kv=1, d=8, dv=8, rows=1, dtype=torch.bfloat16), is_causal=causal, row_normalize=True)


@pytest.mark.parametrize("rows", (3, 4, 5, 64))
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


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("scale", (-0.7, 0.0, 0.7))
def test_a_scale_of_either_sign(scale: float, dtype: torch.dtype) -> None:
    inputs = tensors(35, d=8, dv=4, dtype=dtype)
    check("cuda", inputs, scale=scale)
    check("cuda", inputs, scale=scale, is_causal=True, key_mask=torch.arange(35)[None] != 3)


@pytest.mark.parametrize("columns, offset", [(8, 0), (6, 0), (7, 0), (8, 1)])
def test_rows_are_read_by_fours_by_pairs_and_one_by_one(columns: int, offset: int) -> None:
    """Of the left operands, by whether the columns and their place allow it: in float32 by fours, in 16 bits by pairs."""
    for dtype in (torch.float32, torch.float16):
        inputs = tensors(20, d=columns + 9, dv=columns, dtype=dtype)
        for name in ("query", "key"):
            inputs[name] = inputs[name][..., offset : offset + columns]
        check("cuda", inputs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("n, m", [(3, 130), (130, 3), (70, 65)])
def test_warps_without_queries_or_keys_wait_with_the_others(n: int, m: int, dtype: torch.dtype) -> None:
    """A block has a warp for every 16 of the longer ones, and the shorter ones leave some without work."""
    shapes = {"query": (1, 2, n, 8), "key": (1, 1, m, 8), "value": (1, 1, m, 8), "grad_output": (1, 2, n, 8)}
    inputs = {"relevancy": torch.rand(1, 2, n)} | {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    ours, formula = (partial(step, enable_gqa=True) for step in (va.relevancy_step, va.reference.relevancy_step))
    assert_all_close_to(partial(ours, backend="cuda"), formula, inputs, grads=False)


def test_grouped_heads_over_two_slabs_a_warp() -> None:
    check("cuda", tensors(130, h=2, kv=1, d=2, dv=2, rows=5, dtype=torch.float16), is_causal=True)


@pytest.mark.parametrize("rule", ("gradient", "attention"))
def test_rows_are_normalized_over_all_heads(rule: str) -> None:
    """Their sums come from a launch of its own, which has blocks for two key heads of three heads each."""
    check("cuda", tensors(40, h=6, kv=2, d=8, dv=8), rule=rule, row_normalize=True, attention_weight=torch.rand(1, 40))


def test_an_lse_far_from_zero_is_taken_as_it_is() -> None:
    """All keys that count most are elsewhere: these here have next to nothing left."""
    query, key, _, r = tensors(20, dtype=torch.bfloat16).values()
    got = va.relevancy_step(r, query, key, rule="attention", lse=torch.full((1, 2, 20), 1e5), backend="cuda")
    assert torch.equal(got, torch.zeros(1, 2, 20))


@pytest.mark.parametrize(
    "n, d, dv, rows, dtype, words",
    [
        (3, 130, 8, 1, torch.float16, "a head_dim of at most 128"),
        (3, 8, 130, 1, torch.float32, "a head_dim of at most 128"),
        (200, 64, 8, 1, torch.float32, "shared memory"),
        (200, 8, 65, 1, torch.bfloat16, "shared memory"),
        (3, 8, 8, 65, torch.float32, "at most 64 relevancy vectors"),
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
    query, key, r = torch.randn(1, 1, n, d, dtype=dtype), torch.randn(1, 1, 3, d, dtype=dtype), torch.rand(1, 4, n)
    got = va.relevancy_step(r, query, key, rule="attention", backend="cuda")
    exact = va.reference.relevancy_step(r.double(), query.double(), key.double(), rule="attention")
    assert_close_to(got, exact, va.reference.relevancy_step(r, query, key, rule="attention"), what="step")
