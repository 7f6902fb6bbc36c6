"""The forward pass that cuDNN computes for long dot products, on a stand-in for torch's operator."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import assert_all_close_to
from vlattn_fast.backends.inputs import ScoreAttentionInputs, schema_of
from vlattn_fast.kernels import _configurations, _cudnn

BF16 = torch.bfloat16
N, D = 80, 72


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The scales of calls of the stand-in, which takes tensors on a CPU from 64 tokens on."""
    seen: list[float] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: None, wants_lse: bool, *, is_causal: bool, scale: float) -> Any:
        assert bias is None and wants_lse
        for x in (query, key, value):  # as cuDNN takes them
            assert x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in x.stride()[:3])
        seen.append(scale)
        logits = query.double() @ key.double().mT * scale
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1) & is_causal, -math.inf)
        lse = logits.logsumexp(-1, keepdim=True)
        out = torch.empty_like(query).copy_((logits - lse).exp() @ value.double())  # in the layout of the query, as cuDNN's is
        return out, lse.float(), *[None] * 7

    monkeypatch.setattr(_cudnn, "attend", attend)
    monkeypatch.setattr(_cudnn, "can_use_cudnn_attention", lambda parameters: True)
    monkeypatch.setattr(_cudnn, "_on_gpu", lambda _: True)
    monkeypatch.setattr(_cudnn, "_version", lambda: 91501)
    monkeypatch.setattr(_configurations, "TARGET", "sm_90")
    measured = {f"score_attention cudnn {causal} 128": {"FROM": tokens} for causal, tokens in ((True, 64), (False, 72))}
    monkeypatch.setattr(_configurations, "MEASURED", {"sm_90": measured})
    yield seen


def sides(rows_first: bool = True, **change: Any) -> dict[str, Tensor]:
    """Query, key and value of two samples and two heads."""

    def side() -> Tensor:
        shape = (2, change.get("tokens", N), 2, change.get("size", D))
        x = torch.randn(shape, dtype=change.get("dtype", BF16)).transpose(1, 2)
        return x if rows_first else x.contiguous()

    return {name: side() for name in ("query", "key", "value")}


@pytest.mark.parametrize("rows_first", (True, False))
@pytest.mark.parametrize("dtype", (BF16, torch.float16))
def test_score_attention(calls: list[float], rows_first: bool, dtype: torch.dtype) -> None:
    """Output, log-sum-exp and gradients, whatever the layout."""

    def call(function: Any, **tensors: Tensor) -> Any:
        return function(**tensors, score="dot", scale=0.2, is_causal=True, return_lse=True)

    ours, formula = partial(va.score_attention, backend="triton"), va.reference.score_attention
    tensors = sides(rows_first, dtype=dtype)
    cotangents = [torch.randn(2, 2, N, D), torch.randn(2, 2, N)]
    assert_all_close_to(partial(call, ours), partial(call, formula), tensors, cotangents)
    assert set(calls) == {0.2}
    out, lse = call(ours, **tensors)
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous() and lse.shape == (2, 2, N)


@pytest.mark.parametrize("is_causal, tokens, expected", [(True, 64, 1), (True, 63, 0), (False, 72, 1), (False, 71, 0)])
def test_lengths_of_the_table(calls: list[float], is_causal: bool, tokens: int, expected: int) -> None:
    tensors = sides(tokens=tokens)
    got = va.score_attention(**tensors, is_causal=is_causal, return_lse=True, backend="triton")
    want = va.reference.score_attention(**{name: x.double() for name, x in tensors.items()}, is_causal=is_causal, return_lse=True)
    for x, exact in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), exact, rtol=2e-2, atol=2e-2)
    assert len(calls) == expected


@pytest.mark.parametrize("cut", (slice(1, None), slice(None, -1), slice(None, None, 2)), ids=str)
def test_addresses_and_strides(calls: list[float], cut: slice) -> None:
    """Rows that begin anywhere, or have gaps, are copied."""
    size = {"size": 2 * D if cut.step else D + 1}
    tensors = {name: x[..., cut] for name, x in sides(**size).items()}
    got = va.score_attention(**tensors, is_causal=True, backend="triton")
    want = va.score_attention(**{name: x.contiguous() for name, x in tensors.items()}, is_causal=True, backend="triton")
    assert len(calls) == 2 and torch.equal(got, want)


def test_relevancy_attention(calls: list[float]) -> None:
    def call(function: Any, **tensors: Tensor) -> Any:
        return function(**tensors, is_causal=True)

    ours, formula = partial(va.relevancy_attention, backend="triton"), va.reference.relevancy_attention
    tensors = {**sides(), "carrier": torch.rand(2, 1, N)}
    assert_all_close_to(partial(call, ours), partial(call, formula), tensors, [torch.randn(2, 2, N, D), torch.rand(2, 1, N)])
    assert calls


def test_compiled(calls: list[float]) -> None:
    """The operator has the layout that its fake declares."""
    tensors = sides(False)
    make = partial(va.score_attention, score="dot", is_causal=True, return_lse=True, backend="triton")
    compiled = torch.compile(lambda **x: make(**x)[0].transpose(1, 2).reshape(2, N, -1) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**tensors), make(**tensors)[0].transpose(1, 2).reshape(2, N, -1) + 1)
    assert len(calls) == 2


LEFT: dict[str, dict[str, Any]] = {  # calls that stay with the Triton kernel
    "not causal": {"is_causal": False, **sides(tokens=71)},
    "a scale of zero": {"scale": 0.0},
    "a negative scale": {"scale": -0.5},
    "padding": {"key_mask": torch.ones(2, N, dtype=torch.bool)},
    "a mask": {"attn_mask": torch.ones(N, N, dtype=torch.bool)},
    "dropout": {"seed": torch.zeros((), dtype=torch.int64), "dropout_p": 0.5},
    "another score": {"score": "additive", "vector": torch.ones(2, D, dtype=BF16)},
    "a bias of groups": {"row_bias": torch.zeros(2, 2, N, 3), "key_groups": torch.zeros(2, N, dtype=torch.int64)},
    "float32": sides(dtype=torch.float32),
    "few tokens": sides(tokens=63),
    "64 features": sides(size=64),
    "160 features": sides(size=160),
    "fewer key heads": {name: x if name == "query" else x[:, :1] for name, x in sides().items()},
    "more keys": {name: x for name, x in sides(tokens=96).items() if name != "query"},
    "a smaller value": {"value": sides(size=68)["value"]},
}


def inputs(**change: Any) -> ScoreAttentionInputs:
    absent = dict.fromkeys(("vector", "attn_mask", "key_mask", "row_bias", "key_groups", "seed", "sink"))
    plain = {"score": "dot", "parameter": 0.0, "scale": 0.2, "dropout_p": 0.0, "is_causal": True, "backend": "triton"}
    made: ScoreAttentionInputs = schema_of(ScoreAttentionInputs).from_named({**absent, **plain, **sides(), **change})
    return made


@pytest.mark.parametrize("name", LEFT)
def test_what_stays_with_the_triton_kernel(calls: list[float], name: str) -> None:
    assert _cudnn.out_and_lse(inputs()) is not None
    assert _cudnn.out_and_lse(inputs(**LEFT[name])) is None
    assert len(calls) == 1


def test_more_elements_than_32_bits_count_stay_with_the_triton_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_configurations, "TARGET", "sm_90")
    for tokens, is_taken in ((2**24 - 1, True), (2**24, False)):
        x = torch.empty(1, 1, tokens, 128, dtype=BF16, device="meta")
        assert _cudnn._is_long(inputs(query=x, key=x, value=x)) is is_taken


ABSENT: dict[str, tuple[str, Any]] = {
    "switched off": ("can_use_cudnn_attention", lambda _: False),
    "older than torch prefers": ("_version", lambda: 91500),
    "without the operator": ("attend", None),
}


@pytest.mark.parametrize("name", ABSENT)
def test_where_cudnn_is_not_taken(calls: list[float], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(_cudnn, *ABSENT[name])
    assert _cudnn.out_and_lse(inputs()) is None
    assert calls == []


def test_without_measured_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of one measurement, for causal calls of 65 to 128 features on Hopper, and up to 128 features on Blackwell."""
    limits = {"sm_80": {}, "sm_90": {(True, 65): 8192, (True, 128): 8192}}
    limits["sm_100"] = {(is_causal, size): 1024 for is_causal in (True, False) for size in (64, 65, 128)}
    for architecture, expected in limits.items():
        monkeypatch.setattr(_configurations, "TARGET", architecture)
        least = {(is_causal, size): _cudnn._least(is_causal, size) for is_causal in (True, False) for size in (64, 65, 128, 160)}
        assert {facts: tokens for facts, tokens in least.items() if tokens} == expected


def test_an_emulated_hopper_takes_no_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _cudnn._on_gpu(sides()["query"])


def test_torch_has_the_operator() -> None:
    """As it is called: on tensors without numbers."""
    query, key, value = (x.to("meta") for x in sides().values())
    assert _cudnn.attend is not None
    out, lse = _cudnn.attend(query, key, value, None, True, is_causal=True, scale=0.2)[:2]
    assert out.shape == query.shape and out.dtype == BF16
    assert lse.numel() == 2 * 2 * N and lse.dtype == torch.float32
