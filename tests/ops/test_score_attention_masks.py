"""score_attention on every backend: digits of masks, dropout beside padding, memory."""

import math

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import LargestAllocation, bytes_of, outputs_and_grads
from tests.helpers.ops.backends import on
from tests.helpers.ops.score_cases import PLAIN, B, call, check, tensors
from vlattn_fast._ground import tensors as tensor_helpers
from vlattn_fast.backends.streaming import _tiles


@on("streaming", "cpu", "triton", "cuda")
def test_a_float32_mask_keeps_its_digits_under_16_bit(backend: str) -> None:
    """A bias around 40 has a spacing of 1/4 in bfloat16."""
    inputs, make = tensors(backend, PLAIN[backend], torch.bfloat16, n=17, m=40)
    check(backend, inputs, make, attn_mask=40.0 + torch.randn(17, 40))


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
