"""csrc/score_attention.cu against the formula: outputs, log-sum-exp, every gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compare import as_dtype, assert_all_close_to, outputs_and_grads

import vlattn_fast as va
from tests.ops.score_cases import LAYOUTS, LOW, MASKS, SCORES, B, H, attention_inputs, call, lay_out, padding
from vlattn_fast import scores as S


def additive(p: dict[str, torch.Tensor]) -> S.Additive:
    return S.Additive(p["vector"])


def tensors(n: int, m: int, a: int = 6, dv: int = 5, *, b: int = 1, h: int = 1, kv: int = 1) -> dict[str, torch.Tensor]:
    shapes = {"query": (b, h, n, a), "key": (b, kv, m, a), "value": (b, kv, m, dv), "vector": (h, a)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def check(inputs: dict[str, torch.Tensor], make: Any = additive, *, lse: bool = True, **options: Any) -> None:
    b, h, n = inputs["query"].shape[:3]
    sent = [torch.randn(b, h, n, inputs["value"].shape[3]), torch.randn(b, h, n) if lse else None]
    assert_all_close_to(
        call(va.score_attention, make, return_lse=True, backend="cuda", **options),
        call(va.reference.score_attention, make, return_lse=True, **options),
        inputs,
        sent,
        scales={f"grad {name}": 1.0 for name in inputs},  # a row with one key has gradients of zero
    )


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    "n, m",
    [
        (1, 1),
        (15, 17),
        (16, 31),
        (17, 32),
        (31, 33),
        (32, 63),
        (33, 64),
        (63, 65),
        (64, 16),
        (65, 1),
        (100, 15),
        (160, 40),
        (40, 160),
    ],
)
def test_sizes_either_side_of_a_tile(n: int, m: int, dtype: torch.dtype) -> None:
    check(as_dtype(tensors(n, m, h=2, kv=2), dtype), is_causal=m == 160 or m == 33)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("a, dv", [(1, 64), (5, 1), (33, 72), (64, 5), (65, 64), (128, 128), (3, 128)])
def test_feature_sizes(a: int, dv: int, dtype: torch.dtype) -> None:
    check(as_dtype(tensors(20, 37, a, dv, b=2), dtype))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, dtype: torch.dtype) -> None:
    inputs, _ = attention_inputs(SCORES["dot"])
    inputs["vector"] = torch.randn(H, 6)
    check(as_dtype(inputs, dtype), **MASKS[mask]())


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("n, m", [(70, 140), (140, 70)])
def test_masks_over_several_tiles(n: int, m: int, causal: bool) -> None:
    inputs = tensors(n, m, b=2, h=2, kv=2)
    mask = torch.randn(2, 1, n, m).masked_fill(torch.rand(2, 1, n, m) < 0.3, -math.inf)
    check(inputs, attn_mask=mask, key_mask=torch.rand(2, m) > 0.2, is_causal=causal)
    check(inputs, attn_mask=mask[:1] > 0.0, is_causal=causal)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("scale", (0.0, -1.3))
def test_scale_of_either_sign(scale: float, dtype: torch.dtype) -> None:
    check(as_dtype(tensors(9, 40), dtype), scale=scale)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("offset", (8.0, 13.0, 21.0, 30.0, 1000.0))
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


def test_nan_and_infinity_are_not_hidden() -> None:
    inputs = tensors(5, 6, h=2, kv=2)
    inputs["query"][0, 0, 1, 2] = math.nan
    inputs["query"][0, 1, 2] = math.inf
    inputs["key"][0, 1, 3] = -math.inf
    inputs["query"][0, 1, 2, 0] = 0.0
    inputs["key"][0, 1, 3, 1:] = 0.0
    ours, formula = (
        outputs_and_grads(call(function, additive, **more), inputs)
        for function, more in ((va.score_attention, {"backend": "cuda"}), (va.reference.score_attention, {}))
    )
    for name, x in ours.items():
        torch.testing.assert_close(x, formula[name], equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")
    assert torch.isnan(ours["out0"][0, 0, 1]).all() and not torch.isnan(ours["out0"][0, 1]).any()


@pytest.mark.parametrize("dtype", LOW)
def test_garbage_in_padding_stays_there(dtype: torch.dtype) -> None:
    mask = padding(40)
    inputs = as_dtype(tensors(9, 40, b=B, h=2, kv=2), dtype)
    bad = {name: x.clone() for name, x in inputs.items()}
    for name in ("key", "value"):
        bad[name][~mask[:, None].expand(B, 2, 40)] = math.nan
    ours = call(va.score_attention, additive, key_mask=mask, return_lse=True, backend="cuda")
    clean, dirty = outputs_and_grads(ours, inputs), outputs_and_grads(ours, bad)
    for name, x in clean.items():
        assert torch.equal(x, dirty[name]), name
    assert not clean["out0"][1].any() and torch.isneginf(clean["out1"][1]).all() and not clean["grad query"][1].any()
    assert not clean["grad key"][1].any() and not clean["grad value"][1].any()


@pytest.mark.parametrize("dtype", LOW)
def test_either_gradient_alone(dtype: torch.dtype) -> None:
    inputs = as_dtype(tensors(20, 40), dtype)
    check(inputs, lse=False)
    ours, formula = (
        call(f, additive, return_lse=True, **more)
        for f, more in ((va.score_attention, {"backend": "cuda"}), (va.reference.score_attention, {}))
    )
    assert_all_close_to(ours, formula, inputs, [None, torch.randn(1, 1, 20)], scales={"grad value": 1.0})


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("kv", (1, 2, 4))
def test_grouped_heads(kv: int, dtype: torch.dtype) -> None:
    check(as_dtype(tensors(40, 70, b=2, h=4, kv=kv), dtype), enable_gqa=True, is_causal=kv == 2)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kv", (1, 2))
def test_keys_with_more_heads_than_values(kv: int, dtype: torch.dtype) -> None:
    """A weight per query head makes a key for each; the values stay shared."""
    inputs, make = attention_inputs(SCORES["additive-per_head"], kv_heads=kv)
    check(as_dtype(inputs, dtype), make, enable_gqa=True)


@pytest.mark.parametrize("heads_k, heads_v", [(2, 4), (4, 2), (1, 2), (2, 1)])
def test_heads_of_key_and_value_differ(heads_k: int, heads_v: int) -> None:
    """Of four query heads: what the kernel takes, the public call makes only some of."""
    inputs = tensors(20, 40, h=4)
    key, value = torch.randn(1, heads_k, 40, 6), torch.randn(1, heads_v, 40, 5)

    def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, vector: torch.Tensor) -> Any:
        options = ("additive", 0.0, 1.0, 0.0, False, "cuda")
        return torch.ops.vlattn.score_attention(query, key, value, vector, None, None, None, *options)

    def formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, vector: torch.Tensor) -> Any:
        shared = (x.repeat_interleave(4 // x.shape[1], 1) for x in (key, value))
        return va.reference.score_attention(query, *shared, score=S.Additive(vector), return_lse=True)

    sent = [torch.randn(1, 4, 20, 5), torch.randn(1, 4, 20)]
    assert_all_close_to(ours, formula, inputs | {"key": key, "value": value}, sent)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    inputs = as_dtype(tensors(9, 40, 8, 8, b=B, h=2, kv=2), dtype)
    inputs |= {name: lay_out(inputs[name], layout) for name in ("query", "key", "value")}
    check(inputs, attn_mask=lay_out(torch.randn(B, 2, 9, 40), layout))
    ours, formula = (
        call(f, additive, **more) for f, more in ((va.score_attention, {"backend": "cuda"}), (va.reference.score_attention, {}))
    )
    assert_all_close_to(ours, formula, inputs)  # summed: gradients of stride 0


@pytest.mark.parametrize("empty", ("b", "h", "n", "m", "a", "dv"))
def test_empty_sizes(empty: str) -> None:
    inputs = tensors(**{"n": 3, "m": 4, "h": 2, "kv": 2, empty: 0} | ({"kv": 0} if empty == "h" else {}))
    if empty == "h":
        inputs["vector"] = torch.randn(6)
    check(inputs)


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


@pytest.mark.parametrize("dtype", LOW)
def test_runs_are_bit_equal_and_write_no_input(dtype: torch.dtype) -> None:
    inputs = as_dtype(tensors(40, 70, h=2), dtype)
    before = {name: x.clone() for name, x in inputs.items()}
    run = call(va.score_attention, additive, return_lse=True, enable_gqa=True, backend="cuda")
    first, second = (outputs_and_grads(run, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(x, before[name]) for name, x in inputs.items())


@pytest.mark.parametrize(
    "score, dtype, dv, options, words",
    [
        (S.Additive(torch.randn(8).double()), torch.float64, 8, {}, "float16, bfloat16 and float32"),
        (S.Additive(torch.randn(129)), torch.float32, 8, {}, "at most 128 hidden units"),
        (S.Additive(torch.randn(8)), torch.float32, 129, {}, "value sizes of at most 128"),
        (S.Additive(torch.randn(8)), torch.float32, 8, {"dropout_p": 0.1}, "no dropout"),
        (S.Additive(torch.randn(8), method="series", tolerance=0.1), torch.float32, 8, {}, "exact additive scores"),
        (S.Hadamard(torch.randn(8), activation="tanh"), torch.float32, 8, {}, "exact additive scores"),
        ("dot", torch.float32, 8, {}, "exact additive scores"),
    ],
    ids=("float64", "A=129", "DV=129", "dropout", "series", "hadamard", "dot"),
)
def test_what_it_cannot_run_is_refused(score: Any, dtype: torch.dtype, dv: int, options: dict[str, Any], words: str) -> None:
    size = 8 if isinstance(score, str) else score.vector.shape[0]
    q, k, v = (torch.randn(1, 1, rows, columns, dtype=dtype) for rows, columns in ((3, size), (4, size), (4, dv)))
    with pytest.raises(ValueError, match=words):
        va.score_attention(q, k, v, score=score, return_lse=True, backend="cuda", **options)
