"""score_attention against its formula: every score, masks, layouts, sizes, values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from compare import LargestAllocation, as_dtype, assert_all_close_to, assert_close_to, bytes_of, outputs_and_grads

import vlattn_fast as va
from tests.ops.score_cases import (
    DV,
    F64,
    LAYOUTS,
    LOW,
    MASKS,
    SCORES,
    B,
    D,
    H,
    M,
    N,
    attention_inputs,
    call,
    float_mask,
    lay_out,
    leaf,
    padding,
)
from vlattn_fast import scores as S
from vlattn_fast.sdpa import score_attention as sdpa
from vlattn_fast.streaming import _tiles


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("score", SCORES)
def test_matches_formula_in_float64(score: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 30)  # several tiles in every dimension
    inputs, make = attention_inputs(SCORES[score])
    options = MASKS[mask]()
    sizes = {f"grad {name}": 1.0 for name in ("bias", "vector", "offset")}  # some cancel to zero
    for lse in (True, False):  # with an lse the operator runs itself, without one torch's SDPA may
        cotangents = [torch.randn(B, H, N, DV, dtype=F64), torch.randn(B, H, N, dtype=F64)][: 1 + lse]
        found = assert_all_close_to(
            call(va.score_attention, make, return_lse=lse, **options),
            call(va.reference.score_attention, make, return_lse=lse, **options),
            inputs,
            cotangents,
            what=f"lse={lse}",
            scales=sizes,
        )
        assert not any(torch.isnan(x).any() for x in found.values())


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_low_precision_is_as_good_as_the_formula(score: str, dtype: torch.dtype) -> None:
    options = {"key_mask": padding(20)}
    for lse in (True, False):
        inputs, make = attention_inputs(SCORES[score], n=17, m=20)
        assert_all_close_to(
            call(va.score_attention, make, return_lse=lse, **options),
            call(va.reference.score_attention, make, return_lse=lse, **options),
            as_dtype(inputs, dtype),
            [torch.randn(B, H, 17, DV), None][: 1 + lse],
            what=f"lse={lse}",
        )


@pytest.mark.parametrize("kv_heads", (1, 2))
@pytest.mark.parametrize("score", SCORES)
def test_grouped_heads(score: str, kv_heads: int) -> None:
    inputs, make = attention_inputs(SCORES[score], kv_heads=kv_heads)
    for lse in (True, False):
        assert_all_close_to(
            call(va.score_attention, make, return_lse=lse, enable_gqa=True),
            call(va.reference.score_attention, make, return_lse=lse, enable_gqa=True),
            inputs,
            scales={f"grad {name}": 1.0 for name in ("bias", "offset")},
        )


@pytest.mark.parametrize("lse", (False, True))
@pytest.mark.parametrize("score", ("dot", "additive-weights=none"))
def test_grouped_heads_map_one_to_one(score: str, lse: bool) -> None:
    """Query head h reads key head h // (H / Hkv), seen by writing the key head's number into its values."""
    make = attention_inputs(SCORES[score])[1]
    params = {"vector": torch.ones(D, dtype=F64)} if "additive" in score else {}
    value = torch.arange(3.0, dtype=F64)[None, :, None, None].expand(1, 3, M, 1)
    query, key = torch.randn(1, 6, N, D, dtype=F64), torch.randn(1, 3, M, D, dtype=F64)
    out = va.score_attention(query, key, value, score=make(params), enable_gqa=True, return_lse=lse)
    out = out[0] if lse else out
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([0, 0, 1, 1, 2, 2], dtype=F64))


# ------------------------------------------------------------------------------------------------- masks

BROADCASTS = (
    (),
    (1,),
    (M,),
    (N, 1),
    (1, M),
    (N, M),
    (1, N, M),
    (H, 1, M),
    (H, N, 1),
    (H, N, M),
    (B, 1, 1, M),
    (B, 1, N, 1),
    (1, H, N, M),
    (B, H, N, M),
    (1, 1, 1, 1),
)


@pytest.mark.parametrize("kind", ("bool", "float"))
@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
def test_mask_broadcasts(shape: tuple[int, ...], kind: str) -> None:
    """Every rank from 0 to 4, on each way a call can take: SDPA, the fused kernel with lse, tiles."""
    mask = (torch.rand(shape) > 0.4) if kind == "bool" else torch.randn(shape, dtype=F64)
    for score, lse in (("dot", False), ("dot", True), ("general-tanh-key", False)):
        inputs, make = attention_inputs(SCORES[score])
        options = {"attn_mask": mask, "return_lse": lse}
        assert_all_close_to(
            call(va.score_attention, make, **options),
            call(va.reference.score_attention, make, **options),
            inputs,
            [torch.randn(B, H, N, DV, dtype=F64), None][: 1 + lse],
            what=f"{score} lse={lse}",
            scales={"grad query": 1.0, "grad key": 1.0, "grad weight": 1.0, "grad bias": 1.0},
        )


@pytest.mark.parametrize("score", ("dot", "cosine", "general-tanh-key", "additive", "hadamard-sigmoid-key"))
@pytest.mark.parametrize("garbage", (math.nan, math.inf, -math.inf))
def test_garbage_in_padding_stays_there(score: str, garbage: float) -> None:
    inputs, make = attention_inputs(SCORES[score])
    mask = padding()
    bad = {name: x.clone() for name, x in inputs.items()}
    for name in ("key", "value"):
        bad[name][~mask[:, None].expand(B, H, M)] = garbage
    for lse in (False, True):
        clean = outputs_and_grads(call(va.score_attention, make, key_mask=mask, return_lse=lse), inputs)
        dirty = outputs_and_grads(call(va.score_attention, make, key_mask=mask, return_lse=lse), bad)
        for name, x in clean.items():
            assert torch.equal(x, dirty[name]), name
        for name in ("grad key", "grad value"):
            assert not dirty[name][~mask[:, None].expand(B, H, M)].any(), f"{name}: the gradient of padding must be zero"


@pytest.mark.parametrize("dtype", (F64, *LOW), ids=str)
@pytest.mark.parametrize("score", ("dot", "cosine", "general-tanh-key", "additive", "hadamard-relu-key"))
@pytest.mark.parametrize("hide", ("bool", "float", "key"))
def test_row_without_keys_is_zero(score: str, hide: str, dtype: torch.dtype) -> None:
    inputs, make = attention_inputs(SCORES[score])
    inputs = as_dtype(inputs, dtype)
    visible = torch.ones(B, 1, N, M, dtype=torch.bool)
    visible[0, :, 2] = False
    if hide == "key":
        visible[0] = False
    options = {
        "bool": {"attn_mask": visible},
        "key": {"key_mask": visible[:, 0, 0]},
        "float": {"attn_mask": torch.zeros(B, 1, N, M).masked_fill(~visible, -torch.inf)},
    }[hide]
    for lse in (True, False):
        found = outputs_and_grads(call(va.score_attention, make, return_lse=lse, **options), inputs)
        assert not found["out0"][0, :, 2].any() and not found["grad query"][0, :, 2].any()
        assert not any(torch.isnan(x).any() for x in found.values())
        if lse:
            assert torch.isneginf(found["out1"][0, :, 2]).all() and torch.isfinite(found["out1"][1]).all()


@pytest.mark.parametrize("query_dtype", (F64, *LOW), ids=str)
@pytest.mark.parametrize("mask_dtype", (F64, *LOW), ids=str)
def test_a_large_finite_mask_is_no_infinity(query_dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    """finfo.min is added, so a row full of it still attends; only -inf hides (pytorch#110213)."""
    mask = torch.zeros(N, M, dtype=mask_dtype)
    mask[0] = torch.finfo(mask_dtype).min
    mask[1, 2:] = torch.finfo(mask_dtype).min
    for score, lse in itertools.product(("dot", "general-tanh-key"), (True, False)):
        inputs, make = attention_inputs(SCORES[score])
        found = outputs_and_grads(call(va.score_attention, make, attn_mask=mask, return_lse=lse), as_dtype(inputs, query_dtype))
        assert not any(torch.isnan(x).any() for x in found.values())
        value = inputs["value"]
        out = found["out0"].double()
        assert (out[:, :, 0] - value.mean(2)).abs().max() < 4.0 and out[:, :, 0].abs().min() > 0  # not hidden
        two = va.reference.score_attention(
            inputs["query"][:, :, 1:2], inputs["key"][:, :, :2], value[:, :, :2], score=make(inputs)
        )
        torch.testing.assert_close(out[:, :, 1], two[:, :, 0], rtol=0.0, atol=64 * torch.finfo(query_dtype).eps)


def test_causal_is_top_left_for_unequal_lengths() -> None:
    """Query i sees keys j <= i whatever M is, as SDPA (flash-attention counts from the bottom right)."""
    for score, n, m in itertools.product(("dot", "additive"), (3, 9), (5, 1)):
        inputs, make = attention_inputs(SCORES[score], n=n, m=m)
        options = {"is_causal": True, "return_lse": True}
        assert_all_close_to(
            call(va.score_attention, make, **options),
            call(va.reference.score_attention, make, **options),
            inputs,
            scales={"grad query": 1.0, "grad query_weight": 1.0, "grad bias": 1.0, "grad vector": 1.0},
        )
        first = va.score_attention(*(inputs[x] for x in ("query", "key", "value")), score=make(inputs), is_causal=True)[:, :, 0]
        torch.testing.assert_close(first, inputs["value"][:, :, 0])


@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
def test_no_mask_brings_a_whole_map(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's SDPA falls back to whole maps for masks of three dimensions: they are given to it with four."""
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 1024)
    monkeypatch.setattr(sdpa, "FLOAT64_PAIRS", 1024)
    b, h, n, m = 2, 4, 128, 96
    sizes = {B: b, H: h, N: n, M: m, 1: 1}
    mask = torch.rand(tuple(sizes[s] for s in shape)) > 0.4
    for lse in (False, True):
        q, k, v = (torch.randn(b, h, s, 8, requires_grad=True) for s in (n, m, m))
        with LargestAllocation() as seen:
            out = va.score_attention(q, k, v, attn_mask=mask, return_lse=lse)
            (out[0] if lse else out).sum().backward()
        assert seen.bytes <= max(bytes_of(q), 4 * mask.numel()), (seen.by, seen.bytes)


# ------------------------------------------------------------------------------------------------- layouts and sizes


@pytest.mark.parametrize("dtype", (F64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    """Each tensor, the gradient too, in each layout; the result is that of contiguous tensors."""
    mask = float_mask(B, H, N, M).to(dtype)
    for score, lse in (("dot", False), ("dot", True), ("additive", True), ("general-relu-key", False)):
        inputs, make = attention_inputs(SCORES[score])
        inputs = as_dtype(inputs, dtype)
        given = {k: lay_out(x, layout) if x.dim() == 4 else x for k, x in inputs.items()}
        cotangents = [torch.randn(B, H, N, DV, dtype=dtype), torch.randn(B, H, N)][: 1 + lse]
        there = [lay_out(cotangents[0], layout), *cotangents[1:]]
        plain = {name: x.contiguous() for name, x in given.items()}
        wanted = outputs_and_grads(
            call(va.score_attention, make, attn_mask=lay_out(mask, layout).contiguous(), return_lse=lse),
            plain,
            [x.contiguous() for x in there],
        )
        found = outputs_and_grads(call(va.score_attention, make, attn_mask=lay_out(mask, layout), return_lse=lse), given, there)
        for name, x in found.items():
            assert_close_to(
                x.double(),
                wanted[name].double(),
                None,
                what=f"{score} {name}",
                scale=1e10 * torch.finfo(dtype).eps * float(1 + wanted[name].nan_to_num(0, 0, 0).abs().max()),
            )


@pytest.mark.parametrize("empty", ("B", "H", "N", "M", "D", "Dv", "A"))
def test_empty_sizes(empty: str) -> None:
    """Shapes are kept and gradients are zeros; without keys every row is a row without visible keys."""
    b, h, n, m, d, dv, a = (
        0 if empty == name else size for name, size in zip("B H N M D Dv A".split(), (2, 3, 4, 5, 6, 2, 4), strict=True)
    )
    kinds = {
        "dot": ({}, lambda p: "dot"),
        "scaled": ({}, lambda p: "scaled_dot"),
        "cosine": ({}, lambda p: "cosine"),
        "tanh": ({"weight": leaf(d, d)}, lambda p: S.General(p["weight"], activation="tanh")),
        "additive": (
            {"vector": leaf(a), "wq": leaf(a, d), "wk": leaf(a, d)},
            lambda p: S.Additive(p["vector"], p["wq"], p["wk"]),
        ),
        "hadamard": ({"vector": leaf(d)}, lambda p: S.Hadamard(p["vector"], activation="relu")),
        "series": ({"vector": leaf(d)}, lambda p: S.Additive(p["vector"], method="series", tolerance=0.1)),
    }
    for (name, (params, make)), lse in itertools.product(kinds.items(), (False, True)):
        inputs = {"query": leaf(b, h, n, d), "key": leaf(b, h, m, d), "value": leaf(b, h, m, dv), **params}
        for options in (
            {},
            {"attn_mask": torch.ones(n, m, dtype=torch.bool)},
            {"key_mask": torch.ones(b, m, dtype=torch.bool)},
            {"is_causal": True},
        ):
            found = outputs_and_grads(call(va.score_attention, make, return_lse=lse, **options), inputs)
            assert found["out0"].shape == (b, h, n, dv)
            for key, x in inputs.items():
                assert found[f"grad {key}"].shape == x.shape, (name, key)
            assert all(torch.isfinite(x).all() for key, x in found.items() if key != "out1")
            if empty == "M":
                assert not any(x.any() for key, x in found.items() if key != "out1")
            if lse:
                assert found["out1"].shape == (b, h, n)
                assert torch.isneginf(found["out1"]).all() if empty == "M" else torch.isfinite(found["out1"]).all()
            if empty in "D A" and "M" != empty and name in ("dot", "cosine"):
                torch.testing.assert_close(
                    found["out0"], inputs["value"].mean(2, keepdim=True).expand(b, h, n, dv)
                ) if not options and empty == "D" else None


@pytest.mark.parametrize("n", (1, 15, 17, 577))
def test_sizes_of_real_sequences(n: int) -> None:
    """One row, either side of a power of two, and CLIP ViT-L/14@336's 577; the default tile size."""
    for score in ("scaled_dot", "general-tanh-key", "additive-weights=none") if n < 577 else ("scaled_dot", "general-tanh-key"):
        make = attention_inputs(SCORES[score])[1]
        params = SCORES[score].build(2, 8, 8, **SCORES[score].options)[0]
        inputs = {x: torch.randn(1, 2, n, 8) for x in ("query", "key", "value")} | as_dtype(params, torch.float32)
        assert_all_close_to(
            call(va.score_attention, make, return_lse=True),
            call(va.reference.score_attention, make, return_lse=True),
            inputs,
            [torch.randn(1, 2, n, 8), torch.randn(1, 2, n)],
            what=score,
        )


@pytest.mark.parametrize("elements", (1, 8, 64, 10**6))
def test_tiling_changes_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", elements)
    for score in ("cosine-eps=5", "general-tanh-key", "additive", "hadamard-sigmoid-key"):
        inputs, make = attention_inputs(SCORES[score])
        options = {"attn_mask": float_mask(B, H, N, M), "is_causal": True, "return_lse": True}
        assert_all_close_to(
            call(va.score_attention, make, **options),
            call(va.reference.score_attention, make, **options),
            inputs,
            scales={f"grad {name}": 1.0 for name in inputs},
        )


# ------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", (F64, torch.float32), ids=str)
@pytest.mark.parametrize("score", ("dot", "cosine", "general-key-bias", "general-tanh-key", "additive", "hadamard-relu-key"))
def test_large_and_constant_values(score: str, dtype: torch.dtype) -> None:
    """Logits of +-1e3 and more (one key takes all), and constants (all keys share)."""
    for factor in (20.0, 0.0):
        inputs, make = attention_inputs(SCORES[score])
        for name in ("query", "key"):
            inputs[name] = inputs[name] * factor if factor else torch.full_like(inputs[name], 30.0)
        inputs = as_dtype(inputs, dtype)
        found = assert_all_close_to(
            call(va.score_attention, make, return_lse=True),
            call(va.reference.score_attention, make, return_lse=True),
            inputs,
            [torch.randn(B, H, N, DV), None],
            scales={"out0": 1e3} | {f"grad {name}": 1e5 for name in inputs},  # a logit of 1e3 is known to an ulp of 1e3
        )
        assert all(torch.isfinite(x).all() for x in found.values())


@pytest.mark.parametrize(
    "score", ("scaled_dot", "cosine", "general-tanh-key", "additive", "hadamard-tanh-key", "hadamard-none-offset=tensor")
)
@pytest.mark.parametrize("scale", (0.0, -1.3, 0.25, 2))
def test_scale(score: str, scale: float) -> None:
    inputs, make = attention_inputs(SCORES[score])
    options = {"scale": scale, "return_lse": True}
    found = assert_all_close_to(
        call(va.score_attention, make, **options),
        call(va.reference.score_attention, make, **options),
        inputs,
        [torch.randn(B, H, N, DV, dtype=F64), torch.randn(B, H, N, dtype=F64)],
        scales={f"grad {name}": 1.0 for name in inputs},
    )
    if scale == 0.0:
        torch.testing.assert_close(found["out0"], inputs["value"].mean(2, keepdim=True).expand(B, H, N, DV))
        torch.testing.assert_close(found["out1"], torch.full((B, H, N), math.log(M), dtype=F64))


@pytest.mark.parametrize("scale", (0.0, -1.3))
def test_scale_of_either_sign_under_causal(scale: float) -> None:
    """torch's fused CPU kernel multiplies its causal -inf by the scale: +inf, or NaN."""
    inputs, make = attention_inputs(SCORES["dot"])
    for lse in (False, True):
        options = {"scale": scale, "is_causal": True, "return_lse": lse}
        assert_all_close_to(
            call(va.score_attention, make, **options),
            call(va.reference.score_attention, make, **options),
            inputs,
            scales={f"grad {name}": 1.0 for name in inputs},
        )


def test_default_scale_belongs_to_scaled_dot_alone() -> None:
    query, key = torch.randn(B, H, N, D, dtype=F64), torch.randn(B, H, M, D, dtype=F64)
    for score, scale in (("dot", 1.0), ("scaled_dot", D**-0.5), (S.General(torch.eye(D, dtype=F64)), 1.0)):
        _, lse = va.score_attention(query, key, key, score=score, return_lse=True)
        torch.testing.assert_close(lse, torch.logsumexp(scale * query @ key.mT, -1))


def test_gradient_through_lse_alone() -> None:
    """d lse / d logits is the attention itself; value gets nothing."""
    for score in ("scaled_dot", "additive", "general-key-bias"):
        inputs, make = attention_inputs(SCORES[score])
        sent = [None, torch.randn(B, H, N, dtype=F64)]
        found = assert_all_close_to(
            call(va.score_attention, make, return_lse=True),
            call(va.reference.score_attention, make, return_lse=True),
            inputs,
            sent,
        )
        assert not found["grad value"].any()


def test_lse_dtype() -> None:
    for dtype, wanted in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (F64, F64),
    ):
        x = torch.randn(1, 1, 3, 4, dtype=dtype)
        for score in (
            "dot",
            S.Additive(torch.ones(4, dtype=dtype)),
            S.General(torch.eye(4, dtype=dtype), torch.ones(4, dtype=dtype)),
        ):
            out, lse = va.score_attention(x, x, x, score=score, return_lse=True)
            assert (out.dtype, lse.dtype) == (dtype, wanted)
