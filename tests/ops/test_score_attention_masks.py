"""score_attention on every backend: digits of masks, dropout beside padding, fully masked rows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.autograd import forward_ad

import vlattn_fast as va
from tests.helpers.compare import LargestAllocation, bytes_of, outputs_and_grads
from tests.helpers.ops.backends import DTYPES, LOW, each, on
from tests.helpers.ops.score_cases import FEW, PLAIN, B, M, N, call, check, tensors
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


@each("score", reference=("dot",), **FEW)
@pytest.mark.slow("cuda", "triton")
def test_fully_masked_rows_give_zeros(backend: str, score: str) -> None:
    """Zero outputs and gradients and an lse of -inf, whatever masks the row, in every dtype."""
    visible = torch.ones(B, 1, N, M, dtype=torch.bool)
    visible[0, :, 2] = False
    padded = visible.clone()
    padded[0] = False
    options = {
        "bool": {"attn_mask": visible},
        "key": {"key_mask": padded[:, 0, 0]},
        "float": {"attn_mask": torch.zeros(B, 1, N, M).masked_fill(~visible, -torch.inf)},
    }
    lse = backend != "sdpa"
    if not lse:
        del options["bool"], options["float"]
    dtypes = DTYPES[backend] if backend != "triton" else LOW[:1]
    for dtype, masks in itertools.product(dtypes, options.values()):
        inputs, make = tensors(backend, score, dtype)
        found = outputs_and_grads(call(va.score_attention, make, return_lse=lse, backend=backend, **masks), inputs)
        assert not found["out0"][0, :, 2].any() and not found["grad query"][0, :, 2].any()
        assert not any(torch.isnan(x).any() for x in found.values())
        if lse:
            assert torch.isneginf(found["out1"][0, :, 2]).all() and torch.isfinite(found["out1"][1]).all()


@each("masks", streaming=("bool", "float"), reference=("bool", "float"))
def test_a_fully_masked_row_has_no_tangent(masks: str, backend: str) -> None:
    """Whether its pairs are masked by True and False or by -inf, beside which the scores still have tangents."""
    query, key, value = (torch.randn(1, 2, 4, 3, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1] = False
    added = mask if masks == "bool" else torch.zeros(4, 4, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, x.cos()) for x in (query, key, value)]
        results = va.score_attention(*duals, attn_mask=added, return_lse=True, backend=backend)
        for tangent in [forward_ad.unpack_dual(x).tangent for x in results]:
            assert not tangent[:, :, 1].any() and tangent[:, :, [0, 2, 3]].all()


@on("streaming", "sdpa", "cpu", "triton", "cuda")
def test_causal_is_top_left_for_unequal_lengths(backend: str) -> None:
    """Query i sees keys j <= i whatever M is, as SDPA (flash-attention counts from the bottom right)."""
    for n, m in itertools.product((3, 9), (5, 1)) if backend != "sdpa" else ((3, 40), (20, 16)):
        inputs, make = tensors(backend, PLAIN[backend], n=n, m=m)
        found = check(backend, inputs, make, cancels=True, is_causal=True)
        torch.testing.assert_close(found["out0"][:, :, 0], inputs["value"][:, :, 0])


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
