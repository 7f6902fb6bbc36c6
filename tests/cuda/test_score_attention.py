"""Tile edges and limits of csrc/cuda/score_attention.cu; what it computes otherwise: tests/ops/test_score_attention.py."""

import math
from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to, outputs_and_grads
from tests.helpers.ops import core_cases, tile_edges
from tests.helpers.ops.backends import LOW, arguments_of, assert_refused
from tests.helpers.ops.score_cases import call
from tests.helpers.ops.score_cases import check as check_backend
from vlattn_fast import scores as S
from vlattn_fast.backends.cuda import score_attention
from vlattn_fast.backends.inputs import ScoreAttentionInputs


def additive(p: dict[str, torch.Tensor]) -> S.Additive:
    return S.Additive(p["vector"])


def tensors(n: int, m: int, a: int = 6, dv: int = 5, *, b: int = 1, h: int = 1, kv: int = 1) -> dict[str, torch.Tensor]:
    shapes = {"query": (b, h, n, a), "key": (b, kv, m, a), "value": (b, kv, m, dv), "vector": (h, a)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def check(inputs: dict[str, torch.Tensor], **options: Any) -> None:
    check_backend("cuda", inputs, additive, cancels=True, **options)  # of one key alone, gradients are zero


@pytest.mark.parametrize("dtype", LOW[:2])  # float16 takes the way of bfloat16
@pytest.mark.parametrize("n, m", tile_edges.CUDA)
def test_sizes_either_side_of_a_tile(n: int, m: int, dtype: torch.dtype) -> None:
    check(as_dtype(tensors(n, m, h=2, kv=2), dtype), is_causal=m == 160 or m == 33)


@pytest.mark.parametrize("dtype", LOW[:2], ids=str)  # float16 takes the way of bfloat16
@pytest.mark.parametrize("a, dv", [(1, 64), (5, 1), (33, 72), (64, 5), (65, 64), (128, 128), (3, 128)])
def test_feature_sizes(a: int, dv: int, dtype: torch.dtype) -> None:
    check(as_dtype(tensors(20, 37, a, dv, b=2), dtype))


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("n, m", [(70, 140), (140, 70)])
def test_masks_over_several_tiles(n: int, m: int, causal: bool) -> None:
    inputs = tensors(n, m, b=2)
    mask = torch.randn(2, 1, n, m).masked_fill(torch.rand(2, 1, n, m) < 0.3, -math.inf)
    check(inputs, attn_mask=mask, key_mask=torch.rand(2, m) > 0.2, is_causal=causal)
    check(inputs, attn_mask=mask[:1] > 0.0, is_causal=causal)


@pytest.mark.parametrize("ranges", (1, 2, 3))
def test_blocks_of_keys_in_ranges(ranges: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of keys: all in one range, or divided among two or three, whose sums for the query are added."""
    inputs = tensors(41, 140, 7, h=4, kv=2)  # an odd number of queries and of units
    monkeypatch.setattr(score_attention, "_LARGEST", ranges * inputs["query"].numel())
    check(inputs, is_causal=ranges == 2, enable_gqa=True)


@pytest.mark.parametrize(
    "offset, dtype", [*((x, torch.float32) for x in (8.0, 13.0, 21.0, 30.0, 1000.0)), (13.0, torch.bfloat16)]
)
def test_any_range(offset: float, dtype: torch.dtype) -> None:
    """Exponentials meet as a product, as a clamped product where two share a reciprocal, and not at all beyond e^44."""
    for signs in ((1, -1), (1, 1), (-1, -1)):  # what cancels, and what saturates
        inputs = tensors(40, 70, 7)
        inputs["query"][..., :20, :] += signs[0] * offset  # some tiles of either kind
        inputs["key"][..., :35, ::2] += signs[1] * offset
        inputs["key"][..., :60, 1::2] += offset
        check(as_dtype(inputs, dtype))


def test_saturated_units_of_large_weight() -> None:
    inputs = tensors(5, 40, 8)
    inputs["query"], inputs["key"] = inputs["query"].sign() * 19.0, inputs["key"].sign() * 19.0
    inputs["vector"] *= 1e6
    check(inputs, scale=1e-6)


@pytest.mark.parametrize("heads_k, heads_v", [(2, 4), (4, 2), (1, 2), (2, 1)])
def test_heads_of_key_and_value_differ(heads_k: int, heads_v: int) -> None:
    """Of four query heads: what the kernel takes, the public call makes only some of."""
    inputs = tensors(20, 40, h=4)
    key, value = torch.randn(1, heads_k, 40, 6), torch.randn(1, heads_v, 40, 5)

    def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, vector: torch.Tensor) -> Any:
        given = {"query": query, "key": key, "value": value, "vector": vector, "score": "additive", "dropout_p": 0.0}
        return torch.ops.vlattn.score_attention(*arguments_of(ScoreAttentionInputs, **given, backend="cuda"))

    def formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, vector: torch.Tensor) -> Any:
        shared = (x.repeat_interleave(4 // x.shape[1], 1) for x in (key, value))
        return va.reference.score_attention(query, *shared, score=S.Additive(vector), return_lse=True)

    grads = [torch.randn(1, 4, 20, 5), torch.randn(1, 4, 20)]
    assert_all_close_to(ours, formula, inputs | {"key": key, "value": value}, grads)


def test_small_gradients_of_float16_survive() -> None:
    """Gradients of one pair underflow in float16; their sum over many does not."""
    inputs = as_dtype(tensors(160, 33), torch.float16)
    inputs["vector"] *= 1e-3
    assert_all_close_to(
        call(va.score_attention, additive, backend="cuda"),
        call(va.reference.score_attention, additive),
        inputs,
        [1e-3 * torch.randn(1, 1, 160, 5)],
    )
    grads = outputs_and_grads(call(va.score_attention, additive, backend="cuda"), inputs, [1e-3 * torch.randn(1, 1, 160, 5)])
    assert (grads["grad key"] != 0.0).float().mean() > 0.5


@pytest.mark.parametrize("activation, dtype", [("tanh", torch.float32), ("tanh", torch.bfloat16), ("sigmoid", torch.float32)])
def test_hadamard_scores_of_every_size(activation: str, dtype: torch.dtype) -> None:
    """More rows than a block has, of either side, and odd numbers of units; keys that two heads share."""
    for n, m, a, dv in ((33, 130, 33, 72), (130, 33, 64, 5)):
        inputs = as_dtype(tensors(n, m, a, dv, h=2), dtype)
        check_backend("cuda", inputs, lambda p: S.Hadamard(p["vector"], activation=activation), is_causal=n < m, enable_gqa=True)


@pytest.mark.parametrize("dtype", LOW[:2], ids=str)
@pytest.mark.parametrize("score", ("additive", "hadamard-sigmoid-key"))
def test_relevancy_over_several_blocks(score: str, dtype: torch.dtype) -> None:
    for n, m, rows in ((70, 150, 1), (150, 70, 5)):
        inputs, make = core_cases.made(score, n, m, b=1, rows=rows, dtype=dtype)
        core_cases.check("cuda", inputs, make, is_causal=n < m, row_normalize=rows > 1)


@pytest.mark.parametrize("a, dv, words", [(129, 8, "at most 128 hidden units"), (8, 129, "value sizes of at most 128")])
def test_what_it_cannot_run_is_refused(a: int, dv: int, words: str) -> None:
    inputs = tensors(3, 4, a, dv)
    assert_refused("cuda", words, lambda: call(va.score_attention, additive, backend="cuda")(**inputs))


@pytest.mark.parametrize(
    "score, options, words", [("dot", {}, "exact scores that sum over hidden units"), (None, {"dropout_p": 0.1}, "no dropout")]
)
def test_other_scores_and_dropout_are_refused(score: Any, options: dict[str, Any], words: str) -> None:
    x = torch.randn(1, 1, 3, 8)
    options = {"score": score or S.Additive(torch.randn(8)), "backend": "cuda", **options}
    assert_refused("cuda", words, lambda: va.score_attention(x, x, x, **options))
