"""torch's own attention as a backend: what it refuses and what "auto" takes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import LargestAllocation, bytes_of
from vlattn_fast import scores as S
from vlattn_fast.backends import native
from vlattn_fast.checking import verify
from vlattn_fast.dispatch.call import CallShape
from vlattn_fast.dispatch.choice import select
from vlattn_fast.ops import OPERATORS
from vlattn_fast.ops.score_attention import BACKENDS, OPERATOR

Q, K, V = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 5)
KEYS = torch.tensor([[True] * 9, [False, True, True, False] + [True] * 5])
PAIRS = torch.rand(6, 9) > 0.4
SERIES = S.Additive(torch.randn(8), method="series", tolerance=1e-3)
DOT_PRODUCTS = {
    "dot": "dot",
    "scaled dot": "scaled_dot",
    "general": S.General(torch.randn(8, 8), torch.randn(8)),
    "hadamard": S.Hadamard(torch.randn(8)),
    "hadamard relu": S.Hadamard(torch.randn(8), activation="relu"),
    "hadamard leaky relu": S.Hadamard(torch.randn(8), activation="leaky_relu"),
    "distance": S.Distance(torch.tensor(2.0)),
    "series": SERIES,
}
OTHERS = {
    "cosine": "cosine",
    "general tanh": S.General(torch.randn(8, 8), activation="tanh"),
    "additive": S.Additive(torch.randn(8)),
    "hadamard tanh": S.Hadamard(torch.randn(8), activation="tanh"),
}


def describe(query: Tensor = Q, key: Tensor = K, value: Tensor = V, **options: Any) -> CallShape:
    return OPERATOR.describe(query=query, key=key, value=value, **options)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an install without a C++ compiler."""
    monkeypatch.setattr(native, "library", native.library._replace(exists=False))


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("score", DOT_PRODUCTS.values(), ids=DOT_PRODUCTS)
def test_without_our_kernels_auto_takes_it_for_dot_products(score: Any) -> None:
    assert select(BACKENDS, describe(score=score), "auto") == "sdpa"
    got = va.score_attention(Q, K, V, score=score, backend="sdpa")
    exact = va.reference.score_attention(*(x.double() for x in (Q, K, V)), score=_in_float64(score))
    assert (got.double() - exact).abs().max() < (1e-2 if score is SERIES else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_on_the_cpu_auto_takes_our_kernels_before_it(dtype: torch.dtype, requires_grad: bool) -> None:
    """Whatever the length, and with or without gradients: stored rows have them ahead."""
    short = [x.to(dtype, copy=True).requires_grad_(requires_grad) for x in (Q, K, V)]
    long = [torch.empty(1, 2, 4096, 8, dtype=dtype, requires_grad=requires_grad)] * 3
    for tensors in (short, long):
        call = describe(*tensors)
        assert select(BACKENDS, call, "auto") == "cpu" and select(BACKENDS, call, "sdpa") == "sdpa"
        assert select(BACKENDS, describe(*(x.to("meta") for x in tensors)), "auto") == "sdpa"
    assert select(BACKENDS, describe(*(x.double() for x in short)), "auto") == "sdpa"


def test_grouped_heads_are_not_copied() -> None:
    """One token over a cache that eight query heads share."""
    for dtype in (torch.float32, torch.float64):
        query, cache = torch.randn(1, 16, 1, 32, dtype=dtype), torch.randn(1, 2, 512, 32, dtype=dtype)
        for backend in ("auto", "sdpa"):
            with LargestAllocation() as seen:
                va.score_attention(query, cache, cache, enable_gqa=True, backend=backend)
            assert seen.bytes < bytes_of(cache), (backend, seen.by, seen.bytes)


@pytest.mark.parametrize(
    "options, words",
    [
        *(({"score": score}, "dot product of features") for score in OTHERS.values()),
        ({"return_lse": True}, "log-sum-exp"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"attn_mask": torch.zeros(6, 9)}, "attn_mask"),
        ({"attn_mask": PAIRS}, "attn_mask"),
        ({"key_mask": KEYS, "is_causal": True}, "key_mask or is_causal"),
        ({"is_causal": True, "scale": 0.0}, "scale of at most 0"),
        ({"is_causal": True}, "fewer than 16 keys"),
    ],
)
def test_what_it_cannot_run_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"backend='sdpa' cannot run score_attention.*{words}"):
        va.score_attention(Q, K, V, backend="sdpa", **options)
    assert select(BACKENDS, describe(**options), "auto") == "cpu"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dtype": torch.float64, "device_type": "cuda"}, "float64 on the CPU only"),
        ({"sizes": {"keys": 0}}, "empty"),
        ({"flags": {"positive_scale": False}, "device_type": "cuda"}, "scale of at most 0"),
    ],
)
def test_limits_asked_without_a_tensor(change: dict[str, Any], words: str) -> None:
    call = describe()
    assert BACKENDS["sdpa"].refusals(call._replace(device_type="cuda")) == []
    change = {name: {**getattr(call, name), **x} if isinstance(x, dict) else x for name, x in change.items()}
    (reason,) = BACKENDS["sdpa"].refusals(call._replace(**change))
    assert words in reason


def test_float64_for_gradients_alone() -> None:
    """In float32 torch's CPU kernel gives gradients less exact than the formula's, and outputs as exact."""
    value = torch.randn(2, 2, 9, 8)  # of the size of keys, so that nothing is padded
    narrow = F.scaled_dot_product_attention(Q, K, value)
    wide = F.scaled_dot_product_attention(Q.double(), K.double(), value.double()).float()
    assert not torch.equal(narrow, wide)
    assert torch.equal(va.score_attention(Q, K, value, backend="sdpa"), narrow)
    for i in range(3):
        inputs = [x.clone().requires_grad_(n == i) for n, x in enumerate((Q, K, value))]
        assert torch.equal(va.score_attention(*inputs, backend="sdpa"), wide)
        with torch.no_grad():
            assert torch.equal(va.score_attention(*inputs, backend="sdpa"), narrow)


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "score_attention"])
def test_other_operators_refuse_it(operator: str) -> None:
    case = verify.cases(operators=[operator])[0]
    with pytest.raises(ValueError, match=f"backend='sdpa' cannot run {operator}.*the operator has no backend 'sdpa'"):
        case.run(case.in_dtype(torch.float32), backend="sdpa")


def test_a_named_backend_never_runs_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only "sdpa", and "auto" where it takes it, call torch's public attention."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return sdpa(*args, **kwargs)

    sdpa: Callable[..., Tensor] = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    for score in DOT_PRODUCTS.values():
        va.score_attention(Q, K, V, score=score, backend="streaming")
        va.score_attention(Q, K, V, score=score, backend="reference") if score is not SERIES else None
    assert calls == []
    va.score_attention(Q, K, V, backend="sdpa")
    va.score_attention(Q.double(), K.double(), V.double())
    assert calls == [1, 1]


@pytest.mark.parametrize("change", ({}, {"dtype": torch.float32}, {"mask": True}, {"value_dim": 16}, {"keys": 9}, {"dim": 200}))
def test_what_the_fused_kernels_of_a_gpu_take(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention shares heads: 16 bit, no mask, one head_dim, as many keys as queries under the causal flag. The other fused
    kernel shares none; both take rows of whole 16 bytes. Whatever else comes torch computes with whole maps."""
    taken: list[tuple[Tensor, ...]] = []

    def kept(*args: Tensor, **options: Any) -> Tensor:
        taken.append(args)
        assert options["enable_gqa"] == (args[0].shape[1] != args[1].shape[1])
        return sdpa(*args, **options)

    sdpa: Callable[..., Tensor] = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", kept)
    dtype, dim, keys = change.get("dtype", torch.bfloat16), change.get("dim", 24), change.get("keys", 6)
    made = torch.empty(2, 4, dim, 6, dtype=dtype), torch.empty(2, 2, dim, keys, dtype=dtype)
    query, key = (x.to("meta").mT for x in made)
    value = torch.empty(2, 2, keys, change.get("value_dim", dim), dtype=dtype, device="meta")
    key_mask = torch.ones(2, keys, dtype=torch.bool, device="meta") if "mask" in change else None
    options = {"key_mask": key_mask, "is_causal": "mask" not in change, "enable_gqa": True, "backend": "sdpa"}
    assert va.score_attention(query, key, value, **options).shape == (2, 4, 6, value.shape[3])
    va.score_attention(query[..., 3:], key[..., 3:], value[..., :-2], **options)
    for args in taken:
        assert all(x.stride(3) == 1 and x.shape[3] % 8 == 0 for x in args)
    # under a mask of keys the query heads that share a key head are queries of one
    assert {args[1].shape[1] for args in taken} == ({2} if not change or "mask" in change else {4})


def test_where_cudnn_loses_gradients_under_a_mask_it_is_refused() -> None:
    """On sm_90 torch prefers cuDNN. With keys 64 beyond a multiple of 128 its backward pass counts keys that are not there."""

    def on_hopper(keys: int, dtype: torch.dtype = torch.bfloat16, major: int = 9, **options: Any) -> CallShape:
        query, key = torch.empty(2, 2, 6, 8, dtype=dtype), torch.empty(2, 2, keys, 8, dtype=dtype)
        return describe(query, key, key, **options)._replace(device_type="cuda", capability=(major, 0))

    mask = {"key_mask": torch.ones(2, 192, dtype=torch.bool)}
    (reason,) = BACKENDS["sdpa"].refusals(on_hopper(192, **mask))
    assert "NaN" in reason and select(BACKENDS, on_hopper(192, **mask), "auto") == "triton"
    with torch.no_grad():
        assert BACKENDS["sdpa"].refusals(on_hopper(192, **mask)) == []
    for others in ({"dtype": torch.float32}, {"major": 8}):
        assert BACKENDS["sdpa"].refusals(on_hopper(192, **others, **mask)) == []
    with torch.autocast("cpu", torch.bfloat16):
        assert BACKENDS["sdpa"].refusals(on_hopper(192, torch.float32, **mask)) == [reason]
    for keys in (128, 256, 577):
        assert BACKENDS["sdpa"].refusals(on_hopper(keys, key_mask=torch.ones(2, keys, dtype=torch.bool))) == []
    assert BACKENDS["sdpa"].refusals(on_hopper(192, is_causal=True)) == []


def test_joined_masks_bring_no_head_axis() -> None:
    """In float64, which runs on streaming, where torch's fused kernel gets them as one."""
    query, key, value = (torch.randn(2, 16, 256, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    key_mask = torch.rand(2, 256) > 0.2
    with LargestAllocation() as seen:
        va.score_attention(query, key, value, key_mask=key_mask, is_causal=True).sum().backward()
    assert seen.bytes <= bytes_of(query), (seen.by, seen.bytes)


def _in_float64(score: Any) -> Any:
    if isinstance(score, str):
        return score
    tensors = {
        name: getattr(score, name).double()
        for name in ("vector", "weight", "bias")
        if isinstance(getattr(score, name, None), Tensor)
    }
    return replace(score, **tensors, **({"method": "exact", "tolerance": None} if score is SERIES else {}))
