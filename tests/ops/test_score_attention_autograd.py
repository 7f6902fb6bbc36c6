"""score_attention: dropout, what autograd may ask, autocast, memory under masks of any shape."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import LargestAllocation, as_dtype, assert_all_close_to, bytes_of, outputs_and_grads
from tests.helpers.ops.backends import F64, each, on
from tests.helpers.ops.score_cases import SCORES, B, H, M, N, attention_inputs, call, sizes_of, tensors
from vlattn_fast import scores as S
from vlattn_fast._ground import tensors as tensor_helpers
from vlattn_fast.backends.streaming import _tiles


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


@each("score", cpu=("dot", "additive"), triton=("dot", "additive"))
@pytest.mark.parametrize("heads", ({"h": 2, "kv": 2}, {"h": 4, "kv": 2}), ids=("own keys", "shared keys"))
def test_dropout_drops_what_streaming_drops(backend: str, score: str, heads: dict[str, int]) -> None:
    """One counter hash: the same seed drops the same pairs, in forward and backward. Heads that share keys drop their own."""
    inputs, make = tensors(backend, score, b=1 if backend == "triton" else B, **heads, **sizes_of(backend, score))
    options = {"dropout_p": 0.3, "return_lse": True, "enable_gqa": True}

    def run(name: str) -> dict[str, Tensor]:
        torch.manual_seed(5)
        return outputs_and_grads(call(va.score_attention, make, **options, backend=name), inputs)

    ours, theirs = run(backend), run("streaming")
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=2e-4, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_torchs_own_attention_has_no_second_derivative() -> None:
    inputs, make = attention_inputs(SCORES["dot"])
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    (grad,) = torch.autograd.grad(call(va.score_attention, make)(**leaves).pow(2).sum(), leaves["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="is not implemented"):
        torch.autograd.grad(grad.sum(), leaves["key"])


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


@pytest.mark.parametrize("score", SCORES)
def test_autocast_to_float16_takes_bfloat16(score: str) -> None:
    inputs, make = attention_inputs(SCORES[score])
    inputs = as_dtype(inputs, torch.bfloat16)
    exact = va.reference.score_attention(
        *(inputs[x].double() for x in ("query", "key", "value")), score=make(as_dtype(inputs, F64))
    )
    with torch.autocast("cpu", torch.float16):
        out = call(va.score_attention, make)(**inputs)
    assert out.dtype == torch.float16
    assert (out.double() - exact).abs().max() < 64 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def shapes(b: int, h: int, n: int, m: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of masks that broadcast to (b, h, n, m), of every rank from 0 to 4."""
    vectors = ((), (1,), (m,), (n, 1), (1, m), (n, m))
    return (
        *vectors,
        (1, n, m),
        (h, 1, m),
        (h, n, 1),
        (h, n, m),
        (b, 1, 1, m),
        (b, 1, n, 1),
        (1, h, n, m),
        (b, h, n, m),
        (1,) * 4,
    )


@on("streaming", "cpu", "triton")
@pytest.mark.slow("triton")
def test_garbage_in_padding_under_dropout_and_grouped_heads(backend: str) -> None:
    inputs, make = tensors(backend, "dot", n=34, m=37, h=4, kv=2)
    keys = torch.rand(B, 37) > 0.3
    there = ~keys[:, None].expand(B, 2, 37)

    def run(**x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        options = {"key_mask": keys, "dropout_p": 0.4, "enable_gqa": True, "backend": backend}
        return call(va.score_attention, make, **options)(**x)

    bad = inputs | {name: inputs[name].clone().masked_fill_(there[..., None], math.nan) for name in ("key", "value")}
    clean = outputs_and_grads(run, inputs)
    for name, x in outputs_and_grads(run, bad).items():
        assert torch.equal(x, clean[name]), name
    assert not clean["grad key"][there].any() and clean["grad key"].any()


@pytest.mark.parametrize("shape", shapes(2, 4, 128, 96), ids=str)
def test_no_mask_brings_a_whole_map(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's SDPA falls back to whole maps for masks of three dimensions: it gets them with four."""
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 1024)
    monkeypatch.setattr(tensor_helpers, "SHORT_PAIRS", 1024)
    mask = torch.rand(shape) > 0.4
    for lse in (False, True):
        q, k, v = (torch.randn(2, 4, length, 8, requires_grad=True) for length in (128, 96, 96))
        with LargestAllocation() as seen:
            out = va.score_attention(q, k, v, attn_mask=mask, return_lse=lse)
            (out[0] if lse else out).sum().backward()
        assert seen.bytes <= max(bytes_of(q), 4 * mask.numel()), (seen.by, seen.bytes)
