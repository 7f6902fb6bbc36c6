"""score_attention: the streaming backend against the formula, for every score, mask, layout, size and dtype."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from compare import LargestAllocation, as_dtype, assert_all_close_to, assert_close_to, bytes_of, outputs_and_grads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vlattn_fast as va
from vlattn_fast import scores as S
from vlattn_fast.streaming import _tiles

F64 = torch.float64
TORCH_JIT = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own use of it
LOW = (torch.float32, torch.bfloat16, torch.float16)
Params = dict[str, Tensor]
Build = Callable[..., tuple[Params, Callable[[Params], Any]]]


def leaf(*shape: int) -> Tensor:
    return 0.5 * torch.randn(*shape, dtype=F64)


def general(H: int, Dq: int, Dk: int, *, per_head: bool = False, bias: bool = True, projects: str = "key",
            **options: Any) -> tuple[Params, Callable[[Params], Any]]:  # fmt: skip
    rows, columns = (Dq, Dk) if projects == "key" else (Dk, Dq)
    head = (H,) if per_head else ()
    params = {"weight": leaf(*head, rows, columns)}
    if bias:
        params["bias"] = leaf(*head, rows)
    return params, lambda p: S.General(p["weight"], p.get("bias"), projects=projects, **options)


def additive(H: int, Dq: int, Dk: int, *, per_head: bool = False, weights: str = "qk", bias: bool = True,
             **options: Any) -> tuple[Params, Callable[[Params], Any]]:  # fmt: skip
    head = (H,) if per_head else ()
    A = 5 if weights == "qk" else Dq if weights == "k" else Dk
    params = {"vector": leaf(*head, A)}
    if "q" in weights:
        params["query_weight"] = leaf(*head, A, Dq)
    if "k" in weights:
        params["key_weight"] = leaf(*head, A, Dk)
    if bias:
        params["bias"] = leaf(*head, A)
    return params, lambda p: S.Additive(p["vector"], p.get("query_weight"), p.get("key_weight"), p.get("bias"), **options)


def concat(H: int, Dq: int, Dk: int) -> tuple[Params, Callable[[Params], Any]]:
    params = {"vector": leaf(5), "weight": leaf(H, 5, Dq + Dk), "bias": leaf(5)}
    return params, lambda p: S.Additive.concat(p["vector"], p["weight"], p["bias"], query_size=Dq)


def hadamard(H: int, Dq: int, Dk: int, *, per_head: bool = False, weight: bool = True, bias: bool = True,
             projects: str = "key", offset: Any = 0.7, **options: Any) -> tuple[Params, Callable[[Params], Any]]:  # fmt: skip
    size, source = (Dq, Dk) if projects == "key" else (Dk, Dq)
    head = (H,) if per_head else ()
    params = {"vector": leaf(*head, size)}
    if weight:
        params["weight"] = leaf(*head, size, source)
    if bias:
        params["bias"] = leaf(*head, size)
    if offset == "tensor":
        params["offset"] = leaf(1)
    return params, lambda p: S.Hadamard(
        p["vector"], p.get("weight"), p.get("bias"), projects=projects, offset=p.get("offset", offset), **options
    )


@dataclass(frozen=True)
class Case:
    build: Build
    options: dict[str, Any] = field(default_factory=dict)
    same_size: bool = False  # Dq == Dk is required


SCORES: dict[str, Case] = {
    "dot": Case(lambda *_: ({}, lambda p: "dot"), same_size=True),
    "scaled_dot": Case(lambda *_: ({}, lambda p: S.ScaledDot()), same_size=True),
    "cosine": Case(lambda *_: ({}, lambda p: "cosine"), same_size=True),
    # the clamp acts on most pairs, on some only
    "cosine-eps=5": Case(lambda *_: ({}, lambda p: S.Cosine(eps=5.0)), same_size=True),
    "general-key": Case(general, {"bias": False}),
    "general-query": Case(general, {"bias": False, "projects": "query"}),
    # q . b cancels in the softmax, stays in the lse
    "general-key-bias": Case(general),
    "general-key-bias-per_head": Case(general, {"per_head": True}),
    "general-query-bias": Case(general, {"projects": "query"}),
    "general-query-bias-per_head": Case(general, {"per_head": True, "projects": "query"}),
    **{
        f"general-{activation}-{projects}": Case(general, {"activation": activation, "projects": projects})
        for activation in ("relu", "leaky_relu", "tanh", "sigmoid") for projects in ("key", "query")
    },
    "general-tanh-per_head": Case(general, {"activation": "tanh", "per_head": True}),
    # a slope other than the default, negative too
    "general-leaky=0.3": Case(general, {"activation": "leaky_relu", "negative_slope": 0.3}),
    "general-leaky=-0.5": Case(general, {"activation": "leaky_relu", "negative_slope": -0.5}),
    "additive": Case(additive),
    "additive-per_head": Case(additive, {"per_head": True}),
    # query or key already has size A
    "additive-weights=none": Case(additive, {"weights": "", "bias": False}, same_size=True),
    "additive-weights=q": Case(additive, {"weights": "q"}),
    "additive-weights=k": Case(additive, {"weights": "k"}),
    "additive-bias_per_head-weights=none": Case(additive, {"weights": "", "per_head": True}, same_size=True),
    "concat-unequal": Case(concat),
    **{
        f"hadamard-{activation}-{projects}": Case(hadamard, {"activation": activation, "projects": projects})
        for activation in (None, "relu", "leaky_relu", "tanh", "sigmoid") for projects in ("key", "query")
    },
    **{
        f"hadamard-{activation}-per_head": Case(hadamard, {"activation": activation, "per_head": True})
        for activation in (None, "leaky_relu", "tanh")
    },
    "hadamard-weight=none": Case(hadamard, {"weight": False, "bias": False, "activation": "relu"}, same_size=True),
    "hadamard-offset=tensor": Case(hadamard, {"offset": "tensor", "activation": "sigmoid"}),
    "hadamard-none-offset=tensor": Case(hadamard, {"offset": "tensor"}),
    "hadamard-leaky=0.5": Case(hadamard, {"activation": "leaky_relu", "negative_slope": 0.5}),
}  # fmt: skip

B, H, HKV, N, M, D, DV = 2, 4, 2, 5, 7, 6, 3


def attention_inputs(case: Case, *, kv_heads: int = H, n: int = N, m: int = M, dv: int = DV) -> tuple[Params, Callable[..., Any]]:
    """query, key, value and the score's parameters in float64; and the score as a function of them."""
    dk = D if case.same_size else 4
    params, make = case.build(H, D, dk, **case.options)
    inputs = {
        "query": torch.randn(B, H, n, D, dtype=F64), "key": torch.randn(B, kv_heads, m, dk, dtype=F64),
        "value": torch.randn(B, kv_heads, m, dv, dtype=F64),
    }  # fmt: skip
    return {**inputs, **params}, make


def call(operator: Callable[..., Any], make: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The operator as a function of named tensors alone."""
    return lambda query, key, value, **params: operator(query, key, value, score=make(params), **options)


def times(score: Any, *, fused: bool = False) -> float:
    """How often the formula's error is allowed: twice; three times for rank-two features, whose gradients are rounded one by
    one before they are joined (measured at up to 2.7 times); four times for float32 gradients of torch's own fused CPU
    kernel, which takes calls of more than one tile (measured at up to 3.3 times)."""
    rank_two = isinstance(score, S.Hadamard) and score.activation in ("relu", "leaky_relu")
    return (3.0 if rank_two else 2.0) * (2.0 if fused else 1.0)


def bool_mask(*shape: int) -> Tensor:
    """About two thirds visible, the first query row of the first batch and head not at all."""
    mask = torch.rand(*shape) > 0.35
    mask.view(-1, shape[-1])[0] = False
    return mask


def float_mask(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64).masked_fill(~bool_mask(*shape), -torch.inf)


def padding(m: int = M) -> Tensor:
    """(B,M): two tokens of the first sample are padding, all of the second are."""
    mask = torch.ones(B, m, dtype=torch.bool)
    mask[0, -2:] = False
    mask[1] = False
    return mask


MASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "bool": lambda: {"attn_mask": bool_mask(B, 1, N, M)},
    "float": lambda: {"attn_mask": float_mask(1, H, N, M)},
    "key": lambda: {"key_mask": padding()},
    "causal": lambda: {"is_causal": True},
    "all": lambda: {"attn_mask": float_mask(N, M), "key_mask": padding(), "is_causal": True},
}


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
            inputs, cotangents, what=f"lse={lse}", scales=sizes,
        )  # fmt: skip
        assert not any(torch.isnan(x).any() for x in found.values())


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_low_precision_is_as_good_as_the_formula(score: str, dtype: torch.dtype) -> None:
    options = {"key_mask": padding(20)}
    for lse in (True, False):
        runs: dict[str, list[list[Tensor]]] = {}
        for _ in range(4):  # the largest error of a few elements is luck: several problems count as one
            inputs, make = attention_inputs(SCORES[score], n=17, m=20)
            inputs = as_dtype(inputs, dtype)
            cotangents = [torch.randn(B, H, 17, DV), None][: 1 + lse]
            ours = call(va.score_attention, make, return_lse=lse, **options)
            formula = call(va.reference.score_attention, make, return_lse=lse, **options)
            found = outputs_and_grads(ours, inputs, cotangents)
            exact = outputs_and_grads(formula, as_dtype(inputs, F64), cotangents)
            low = outputs_and_grads(formula, inputs, cotangents)
            for name, x in found.items():
                runs.setdefault(name, []).append([x.flatten(), exact[name].flatten(), low[name].flatten()])
        for name, three in runs.items():
            assert_close_to(
                *map(torch.cat, zip(*three, strict=True)), what=f"lse={lse} {name}", times=times(make(inputs))
            )


@pytest.mark.parametrize("kv_heads", (1, 2))
@pytest.mark.parametrize("score", SCORES)
def test_grouped_heads(score: str, kv_heads: int) -> None:
    inputs, make = attention_inputs(SCORES[score], kv_heads=kv_heads)
    for lse in (True, False):
        assert_all_close_to(
            call(va.score_attention, make, return_lse=lse, enable_gqa=True),
            call(va.reference.score_attention, make, return_lse=lse, enable_gqa=True),
            inputs, scales={f"grad {name}": 1.0 for name in ("bias", "offset")},
        )  # fmt: skip


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

BROADCASTS = ((), (1,), (M,), (N, 1), (1, M), (N, M), (1, N, M), (H, 1, M), (H, N, 1), (H, N, M), (B, 1, 1, M), (B, 1, N, 1),
              (1, H, N, M), (B, H, N, M), (1, 1, 1, 1))  # fmt: skip


@pytest.mark.parametrize("kind", ("bool", "float"))
@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
def test_mask_broadcasts(shape: tuple[int, ...], kind: str) -> None:
    """Every rank from 0 to 4, on each way a call can take: SDPA, the fused kernel with lse, tiles."""
    mask = (torch.rand(shape) > 0.4) if kind == "bool" else torch.randn(shape, dtype=F64)
    for score, lse in (("dot", False), ("dot", True), ("general-tanh-key", False)):
        inputs, make = attention_inputs(SCORES[score])
        options = {"attn_mask": mask, "return_lse": lse}
        assert_all_close_to(
            call(va.score_attention, make, **options), call(va.reference.score_attention, make, **options), inputs,
            [torch.randn(B, H, N, DV, dtype=F64), None][: 1 + lse], what=f"{score} lse={lse}",
            scales={"grad query": 1.0, "grad key": 1.0, "grad weight": 1.0, "grad bias": 1.0},
        )  # fmt: skip


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
        "bool": {"attn_mask": visible}, "key": {"key_mask": visible[:, 0, 0]},
        "float": {"attn_mask": torch.zeros(B, 1, N, M).masked_fill(~visible, -torch.inf)},
    }[hide]  # fmt: skip
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


# ------------------------------------------------------------------------------------------------- layouts and sizes

LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "expanded", "offset", "reversed")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """A tensor of x's shape and values in another layout (for "expanded", one batch's values for all)."""
    match layout:
        case "transposed":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "sliced":
            return torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]]
        case "strided":
            return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
        case "expanded":
            return x[:1].expand(x.shape)
        case "offset":
            room = x.new_full((x.numel() + 1,), torch.nan)
            return room[1:].view(x.shape).copy_(x)
        case "reversed":
            return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    return x


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
        for options in ({}, {"attn_mask": torch.ones(n, m, dtype=torch.bool)}, {"key_mask": torch.ones(b, m, dtype=torch.bool)},
                        {"is_causal": True}):  # fmt: skip
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
                torch.testing.assert_close(found["out0"], inputs["value"].mean(2, keepdim=True).expand(b, h, n, dv)) \
                    if not options and empty == "D" else None  # fmt: skip


@pytest.mark.parametrize("n", (1, 15, 17, 577))
def test_sizes_of_real_sequences(n: int) -> None:
    """One row, either side of a power of two, and CLIP ViT-L/14@336's 577; the default tile size."""
    for score in ("scaled_dot", "general-tanh-key", "additive-weights=none") if n < 577 else ("scaled_dot", "general-tanh-key"):
        make = attention_inputs(SCORES[score])[1]
        params = SCORES[score].build(2, 8, 8, **SCORES[score].options)[0]
        inputs = {x: torch.randn(1, 2, n, 8) for x in ("query", "key", "value")} | as_dtype(params, torch.float32)
        assert_all_close_to(
            call(va.score_attention, make, return_lse=True), call(va.reference.score_attention, make, return_lse=True), inputs,
            [torch.randn(1, 2, n, 8), torch.randn(1, 2, n)], what=score,
            times=times(make(inputs), fused=2 * n * n > _tiles.TILE_ELEMENTS),
        )  # fmt: skip


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
            call(va.score_attention, make, return_lse=True), call(va.reference.score_attention, make, return_lse=True), inputs,
            [torch.randn(B, H, N, DV), None], times=times(make(inputs)),
            scales={"out0": 1e3} | {f"grad {name}": 1e5 for name in inputs},  # a logit of 1e3 is known to an ulp of 1e3
        )  # fmt: skip
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
        found = assert_all_close_to(call(va.score_attention, make, return_lse=True),
                                    call(va.reference.score_attention, make, return_lse=True), inputs, sent)  # fmt: skip
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


# ------------------------------------------------------------------------------------------------- dropout


def _recover(p: float, n: int = 40, m: int = 50, score: Any = "dot", seed: int = 3) -> Tensor:
    """A with dropout, by value = I."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, n, 8, dtype=F64), torch.randn(2, 3, m, 8, dtype=F64)
    torch.manual_seed(seed)
    return va.score_attention(query, key, torch.eye(m, dtype=F64).expand(2, 3, m, m), score=score, dropout_p=p)


def test_dropout_keeps_the_expected_share_and_scales_it() -> None:
    whole = _recover(0.0)
    for p in (0.1, 0.9, 0.5):
        dropped = _recover(p)
        kept = dropped != 0
        assert abs(kept.double().mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / kept.numel())
        torch.testing.assert_close(dropped[kept], whole[kept] / (1 - p))
        for axis in range(4):  # no batch, head, row or column is treated otherwise
            others = [d for d in range(4) if d != axis]
            spread = 5 * math.sqrt(p * (1 - p) / (kept.numel() / kept.shape[axis]))
            assert (kept.double().mean(others) - (1 - p)).abs().max() < spread
    for lines in (kept.flatten(0, 2), kept.flatten(0, 2).T):  # no two rows and no two columns have to do with each other
        signs = 2.0 * lines.double() - 1
        assert ((signs @ signs.T) / signs.shape[1]).fill_diagonal_(0.0).abs().max() < 6 / math.sqrt(signs.shape[1])


def test_dropout_is_reproducible_and_tile_free(monkeypatch: pytest.MonkeyPatch) -> None:
    first = _recover(0.3)
    assert torch.equal(first, _recover(0.3))
    assert not torch.equal(first, _recover(0.3, seed=4))
    for elements in (1, 100, 3000):
        monkeypatch.setattr(_tiles, "TILE_ELEMENTS", elements)
        assert torch.equal(first != 0, _recover(0.3) != 0)
    torch.manual_seed(3)
    x = torch.randn(1, 1, 8, 4)
    two = [va.score_attention(x, x, x, dropout_p=0.5) for _ in range(2)]
    assert not torch.equal(*two)  # drawn anew at each call


@pytest.mark.parametrize("score", ("dot", "additive", "general-tanh-key"))
def test_dropout_gradient_uses_the_forward_mask(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 20)
    inputs, make = attention_inputs(SCORES[score], dv=M)
    identity = {**inputs, "value": torch.eye(M, dtype=F64).expand(B, H, M, M)}
    operator = call(va.score_attention, make, dropout_p=0.4, return_lse=True)
    torch.manual_seed(5)
    factor = (operator(**identity)[0] != 0).double() / 0.6

    def explicit(query: Tensor, key: Tensor, value: Tensor, **params: Tensor) -> tuple[Tensor, Tensor]:
        eye = torch.eye(M, dtype=F64).expand(B, H, M, M)
        prob, lse = va.reference.score_attention(query, key, eye, score=make(params), return_lse=True)
        return (prob * factor) @ value, lse

    cotangents = [torch.randn(B, H, N, M, dtype=F64), torch.randn(B, H, N, dtype=F64)]
    torch.manual_seed(5)
    assert_all_close_to(operator, explicit, inputs, cotangents)


# ------------------------------------------------------------------------------------------------- autograd hygiene


@pytest.mark.parametrize(
    "score",
    (
        "dot",
        "scaled_dot",
        "cosine",
        "cosine-eps=5",
        "general-tanh-key",
        "general-leaky=0.3",
        "additive-per_head",
        "hadamard-sigmoid-per_head",
        "hadamard-leaky_relu-key",
    ),
)
def test_gradcheck(score: str) -> None:
    case = (
        Case(SCORES[score].build, SCORES[score].options, SCORES[score].same_size)
        if score in SCORES
        else SCORES["hadamard-tanh-per_head"]
    )
    torch.manual_seed(1)
    inputs, make = attention_inputs(case, n=3, m=4)
    leaves = {name: x[:1].detach().requires_grad_() if x.dim() == 4 else x.requires_grad_() for name, x in inputs.items()}
    mask = bool_mask(1, 1, 3, 4)

    def fn(*xs: Tensor) -> Any:
        out, lse = call(va.score_attention, make, attn_mask=mask, return_lse=True)(**dict(zip(leaves, xs, strict=True)))
        return out, lse[:, :, 1:]  # the first row is -inf

    assert torch.autograd.gradcheck(fn, tuple(leaves.values()))


@pytest.mark.parametrize("score", ("dot", "cosine", "general-relu-key", "additive", "hadamard-tanh-key"))
def test_inputs_are_never_written_and_runs_are_bit_equal(score: str) -> None:
    inputs, make = attention_inputs(SCORES[score], n=33, m=70)
    options = {"attn_mask": float_mask(33, 70), "key_mask": padding(70), "return_lse": True}
    watched = {**inputs, **{k: x for k, x in options.items() if isinstance(x, Tensor)}}
    before = {name: (x.clone(), x._version) for name, x in watched.items()}
    first = outputs_and_grads(call(va.score_attention, make, **options), inputs)
    second = outputs_and_grads(call(va.score_attention, make, **options), inputs)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name
    for name, (copy, version) in before.items():
        assert watched[name]._version == version and torch.equal(watched[name].nan_to_num(), copy.nan_to_num()), name


def test_backward_twice_and_partial_gradients() -> None:
    inputs, make = attention_inputs(SCORES["additive"])
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    out = call(va.score_attention, make)(**leaves)
    first = torch.autograd.grad(out.sum(), list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(out.sum(), list(leaves.values()))
    assert all(map(torch.equal, first, second))
    for name in leaves:  # each alone
        alone = {k: x.detach().requires_grad_(k == name) for k, x in leaves.items()}
        (grad,) = torch.autograd.grad(call(va.score_attention, make)(**alone).sum(), alone[name])
        torch.testing.assert_close(grad, first[list(leaves).index(name)])


@pytest.mark.parametrize(
    "score, words", (("general-tanh-key", "score_attention has no second derivative"), ("dot", "is not implemented"))
)
def test_second_derivative_is_refused(score: str, words: str) -> None:
    inputs, make = attention_inputs(SCORES[score])
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    (grad,) = torch.autograd.grad(call(va.score_attention, make)(**leaves).pow(2).sum(), leaves["query"], create_graph=True)
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(grad.sum(), leaves["key"])


@TORCH_JIT
def test_forward_mode_is_refused() -> None:
    x = torch.randn(1, 1, 3, 4)
    for score in ("dot", S.General(torch.eye(4), activation="tanh")):
        with pytest.raises(ValueError, match="query must not carry a forward-mode tangent"):
            torch.func.jvp(lambda q, score=score: va.score_attention(q, x, x, score=score), (x,), (x,))


def test_what_cancels_has_a_gradient_of_zero_not_none() -> None:
    inputs, make = attention_inputs(SCORES["hadamard-none-offset=tensor"])
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    for grad in torch.autograd.grad(call(va.score_attention, make)(**leaves).sum(), [leaves["bias"], leaves["offset"]]):
        assert not grad.any()


@pytest.mark.parametrize("shape", ((), (1,), (1, 1, 1, 1), (1, 1, 1, 1, 1)), ids=str)
def test_offset_of_any_rank(shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 1, 3, 4)
    for activation in (None, "relu", "tanh"):
        for operator in (va.score_attention, va.reference.score_attention):
            score = S.Hadamard(torch.ones(4), offset=torch.full(shape, 2.0), activation=activation)
            plain = operator(x, x, x, score=S.Hadamard(torch.ones(4), activation=activation), return_lse=True)
            out, lse = operator(x, x, x, score=score, return_lse=True)
            torch.testing.assert_close(out, plain[0])
            torch.testing.assert_close(lse, plain[1] + 2.0)


# ------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("score", ("dot", "cosine", "general-tanh-key", "additive", "hadamard-relu-key", "general-key-bias"))
def test_autocast_does_as_sdpa(score: str, dtype: torch.dtype) -> None:
    inputs, make = attention_inputs(SCORES[score])
    inputs = as_dtype(inputs, torch.float32)
    exact = va.reference.score_attention(
        *(inputs[x].double() for x in ("query", "key", "value")), score=make(as_dtype(inputs, F64))
    )
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    for lse in (False, True):
        with torch.autocast("cpu", dtype):
            out = call(va.score_attention, make, return_lse=lse)(**leaves)
            sdpa = torch.nn.functional.scaled_dot_product_attention(*(torch.randn(1, 1, 2, 4) for _ in range(3)))
        out = out[0] if lse else out
        assert out.dtype == sdpa.dtype == dtype
        assert (out.double() - exact).abs().max() < 64 * torch.finfo(dtype).eps * exact.abs().max()
        for name, grad in zip(leaves, torch.autograd.grad(out.sum(), list(leaves.values())), strict=True):
            assert grad.dtype == torch.float32 and torch.isfinite(grad).all(), name


def test_autocast_leaves_float64_and_takes_mixed_dtypes() -> None:
    x = torch.randn(1, 2, 3, 4, dtype=F64)
    with torch.autocast("cpu", torch.bfloat16):
        for score in ("dot", S.Additive(torch.ones(4, dtype=F64))):
            assert va.score_attention(x, x, x, score=score).dtype == F64
            assert va.score_attention(x, x, x, score=score, return_lse=True)[0].dtype == F64
        out = va.score_attention(x.float(), x.bfloat16(), x.half(), score=S.General(torch.eye(4)))
        assert out.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------- registration and compile

KINDS = {"dot": 0.0, "cosine": 1e-8, "dot_relu": 0.0, "dot_leaky_relu": 0.1, "dot_tanh": 0.0, "dot_sigmoid": 0.0, "additive": 0.0,
         "hadamard_tanh": 0.0, "hadamard_sigmoid": 0.0}  # fmt: skip


@pytest.mark.parametrize("layout", ("contiguous", "transposed", "strided"))
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, layout: str) -> None:
    torch.manual_seed(2)
    dv = 8 if layout == "contiguous" else 3
    query, key, value = (lay_out(torch.randn(s), layout) for s in ((2, 4, 5, 6), (2, 2, 7, 6), (2, 2, 7, dv)))
    vector = torch.randn(4, 6) if kind in ("additive", "hadamard_tanh", "hadamard_sigmoid") else None
    seed = torch.tensor(7) if kind == "dot_tanh" else None
    mask = {"contiguous": (None, None), "transposed": (torch.randn(5, 7), None), "strided": (None, padding())}[layout]
    options = (kind, KINDS[kind], 0.5, 0.25 if seed is not None else 0.0, layout == "transposed", "streaming")
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(torch.ops.vlattn.score_attention, (*leaves, vector, *mask, seed, *options))
    out, lse = torch.ops.vlattn.score_attention(query, key, value, vector, *mask, seed, *options)
    for grad_lse in (None, torch.randn_like(lse)):
        torch.library.opcheck(
            torch.ops.vlattn.score_attention_backward,
            (lay_out(torch.randn_like(out), layout), grad_lse, query, key, value, out, lse, vector, *mask, seed, *options),
        )


@pytest.mark.parametrize(
    "score",
    (
        "scaled_dot",
        "cosine",
        "general-key-bias",
        "general-tanh-per_head",
        "additive",
        "concat-unequal",
        "hadamard-leaky_relu-key",
        "hadamard-offset=tensor",
    ),
)
def test_fullgraph_equals_eager_in_two_graphs_over_ten_lengths(score: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    inputs, make = attention_inputs(SCORES[score])
    names = list(inputs)

    def fn(*xs: Tensor) -> Any:
        return call(va.score_attention, make, return_lse=True)(**dict(zip(names, xs, strict=True)))

    compiled = torch.compile(fn, backend=counter, fullgraph=True)
    for n in range(11, 21):
        for name in ("query", "key", "value"):
            inputs[name] = torch.randn(*inputs[name].shape[:2], n, inputs[name].shape[3], dtype=F64)
        found = outputs_and_grads(lambda **xs: compiled(*xs.values()), inputs)
        wanted = outputs_and_grads(lambda **xs: fn(*xs.values()), inputs)
        for name, x in found.items():
            torch.testing.assert_close(x, wanted[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    assert counter.frame_count <= 2
    torch._dynamo.reset()


@TORCH_JIT
def test_inductor_equals_eager() -> None:
    """A fake layout that differs from the real one shows here: Inductor writes code for the fake's."""
    torch._dynamo.reset()
    score = {"w": torch.randn(6, 6)}
    x = {name: torch.randn(2, 3, 9, 6) for name in ("query", "key")} | {"value": torch.randn(2, 3, 9, 4)} | score

    def fn(query: Tensor, key: Tensor, value: Tensor, w: Tensor) -> Tensor:
        mask = torch.ones(2, 9, dtype=torch.bool).index_fill(1, torch.tensor([8]), False)
        a, lse = va.score_attention(query, key, value, score="dot", return_lse=True, key_mask=mask)
        b = va.score_attention(query, key, value, score=S.General(w, activation="tanh"), key_mask=mask)
        return (a * lse[..., None].sigmoid() + b).transpose(1, 2).reshape(2, 9, 12)

    found = outputs_and_grads(torch.compile(fn, fullgraph=True), x)
    wanted = outputs_and_grads(fn, x)
    for name, got in found.items():
        torch.testing.assert_close(got, wanted[name], msg=lambda m, name=name: f"{name}: {m}")
    torch._dynamo.reset()


def test_dropout_under_compile() -> None:
    torch._dynamo.reset()
    eye = torch.eye(30).expand(1, 2, 30, 30)
    x = torch.randn(1, 2, 40, 4)
    compiled = torch.compile(lambda q, k: va.score_attention(q, k, eye, dropout_p=0.3), backend="aot_eager", fullgraph=True)
    first, second = compiled(x, x[:, :, :30]), compiled(x, x[:, :, :30])
    assert not torch.equal(first, second)
    assert abs((first != 0).double().mean() - 0.7) < 0.05
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------- properties


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    size = st.integers(0, 6)
    kv, group = draw(st.integers(0, 2)), draw(st.integers(1, 3))
    return {
        "sizes": (draw(st.integers(0, 2)), kv, group, draw(size), draw(size), draw(st.integers(0, 4)), draw(st.integers(0, 3))),
        "layouts": tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(4)),
        "score": draw(st.sampled_from(("dot", "cosine", "tanh", "relu", "additive", "hadamard", "hadamard_relu"))),
        "mask": draw(st.sampled_from(("none", "bool", "float", "rank1"))),
        "key_mask": draw(st.booleans()), "causal": draw(st.booleans()), "lse": draw(st.booleans()),
        "dtype": draw(st.sampled_from((F64, torch.float32))), "tile": draw(st.sampled_from((1, 7, 1 << 19))),
        "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


@given(problems())
def test_any_problem_matches_the_formula(problem: dict[str, Any]) -> None:
    b, kv, group, n, m, d, dv = problem["sizes"]
    h = kv * group
    torch.manual_seed(problem["seed"])
    shapes = {"query": (b, h, n, d), "key": (b, kv, m, d), "value": (b, kv, m, dv)}
    inputs = {
        name: lay_out(torch.randn(shape), layout)
        for (name, shape), layout in zip(shapes.items(), problem["layouts"], strict=False)
    }
    inputs |= {"weight": torch.randn(d, d), "vector": torch.randn(h, d)}
    make: Callable[[Params], Any] = {
        "dot": lambda p: "dot", "cosine": lambda p: S.Cosine(eps=0.5),
        "tanh": lambda p: S.General(p["weight"], activation="tanh"),
        "relu": lambda p: S.General(p["weight"], activation="relu", projects="query"),
        "additive": lambda p: S.Additive(p["vector"], p["weight"]) if d else "dot",
        "hadamard": lambda p: S.Hadamard(p["vector"], p["weight"], activation="sigmoid"),
        "hadamard_relu": lambda p: S.Hadamard(p["vector"], activation="relu"),
    }[problem["score"]]  # fmt: skip
    mask = {"none": None, "bool": torch.rand(b, 1, n, m) > 0.4, "float": torch.randn(h, n, m), "rank1": torch.rand(m) > 0.4}[
        problem["mask"]
    ]
    options = {"attn_mask": mask, "key_mask": torch.rand(b, m) > 0.4 if problem["key_mask"] else None,
               "is_causal": problem["causal"], "enable_gqa": True, "return_lse": problem["lse"]}  # fmt: skip
    if kv == 0:
        options["enable_gqa"] = False
    inputs = as_dtype(inputs, problem["dtype"])
    cotangent = lay_out(torch.randn(b, h, n, dv), problem["layouts"][3])
    before = _tiles.TILE_ELEMENTS
    _tiles.TILE_ELEMENTS = problem["tile"]
    try:
        assert_all_close_to(
            call(va.score_attention, make, **options), call(va.reference.score_attention, make, **options), inputs,
            [cotangent, None][: 1 + problem["lse"]], scales={f"grad {name}": 4.0 for name in inputs},
            times=times(make(inputs), fused=problem["dtype"] == torch.float32 and b * h * n * m > problem["tile"]),
        )  # fmt: skip
    finally:
        _tiles.TILE_ELEMENTS = before


@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
def test_no_mask_brings_a_whole_map(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's SDPA falls back to whole maps for masks of three dimensions: they are given to it with four."""
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 1024)
    b, h, n, m = 2, 4, 128, 96
    sizes = {B: b, H: h, N: n, M: m, 1: 1}
    mask = torch.rand(tuple(sizes[s] for s in shape)) > 0.4
    for lse in (False, True):
        q, k, v = (torch.randn(b, h, s, 8, requires_grad=True) for s in (n, m, m))
        with LargestAllocation() as seen:
            out = va.score_attention(q, k, v, attn_mask=mask, return_lse=lse)
            (out[0] if lse else out).sum().backward()
        assert seen.bytes <= max(bytes_of(q), 4 * mask.numel()), (seen.by, seen.bytes)
