"""csrc/cuda/relevancy_attention_long.cu: edges of its tiles, the order of its sums, and what it does not take."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.ops.backends import DEVICE, assert_refused
from tests.helpers.ops.relevancy_cases import call, check, tensors
from vlattn_fast.ops import relevancy_attention

BF16, FP16 = torch.bfloat16, torch.float16


def inputs_of(n: int, *, d: int = 128, dtype: torch.dtype = BF16, **sizes: Any) -> dict[str, Tensor]:
    return tensors(n, **{"h": 1, "kv": 1, "rows": 1, **sizes}, d=d, dv=d, dtype=dtype)


@pytest.mark.parametrize("n, dtype", [(257, BF16), (320, FP16), pytest.param(384, BF16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("causal", (False, True))
def test_edges_of_tiles(causal: bool, n: int, dtype: torch.dtype) -> None:
    """64 queries and 128 keys: one of each beyond the last whole tile, half a tile of keys, and whole tiles."""
    check("cuda", inputs_of(n, dtype=dtype), is_causal=causal)


@pytest.mark.parametrize("d, causal", [(8, True), pytest.param(72, False, marks=pytest.mark.slow), (64, False)])
def test_features_that_are_missing_in_a_tile(d: int, causal: bool) -> None:
    check("cuda", inputs_of(257, d=d), is_causal=causal)


@pytest.mark.parametrize("causal", (True, pytest.param(False, marks=pytest.mark.slow)))
def test_grouped_heads_with_weights(causal: bool) -> None:
    """Two samples, two query heads for each of two key heads: they share dk, dv and r Abar, and have turns of their own."""
    inputs = inputs_of(290, b=2, h=4, kv=2)
    check("cuda", inputs, is_causal=causal, residual_weight=torch.rand(290, 2).T, attention_weight=torch.randn(2, 290))


@pytest.mark.parametrize("scale", (-0.3, 0.0))
def test_a_scale_of_either_sign(scale: float) -> None:
    check("cuda", inputs_of(257, d=16), scale=scale)


def test_logits_far_from_zero() -> None:
    """All keys have an offset, which a query's logits share: the log-sum-exp is near 2,500, and its rounding shows in 16 bits."""
    inputs = inputs_of(257, d=64)
    inputs["key"] = inputs["key"] + 40.0
    inputs["query"] = inputs["query"].abs() + 4.0
    check("cuda", inputs, is_causal=True)


def test_rows_that_begin_between_16_bytes() -> None:
    """They are copied: the kernel reads pieces of 16 bytes."""
    inputs = inputs_of(257, d=24)
    for name in ("query", "key", "value"):
        inputs[name] = inputs[name][..., 3:19]
    check("cuda", inputs)


def test_without_relevancy_and_without_gradients() -> None:
    inputs = inputs_of(257, d=32)
    query = inputs["query"].requires_grad_()
    out, _ = call(va.relevancy_attention, backend="cuda")(**inputs)
    (grad,) = torch.autograd.grad(out.float().sum(), [query])  # nothing asks for r Abar
    carrier = inputs["carrier"].requires_grad_()
    out, carried = call(va.relevancy_attention, backend="cuda")(**{**inputs, "query": query.detach(), "carrier": carrier})
    (r,) = torch.autograd.grad(carried.sum(), [carrier])  # dout is zero
    assert grad.shape == query.shape and grad.isfinite().all()
    assert torch.equal(r, torch.ones_like(r))


@pytest.mark.skipif(DEVICE != "cpu", reason="a device has one order of its own")
@pytest.mark.parametrize("causal", (False, True))
def test_the_order_of_blocks_and_warps_changes_no_bit(causal: bool, cuda_library: Path) -> None:
    """dq is a sum over blocks of keys, which take turns: one after another, and up to four at once."""
    from ptx.running.reports import Options
    from tools.emulated import cuda

    inputs = {name: x.requires_grad_() for name, x in inputs_of(300, h=2, d=32).items()}
    cotangents = [torch.randn(1, 2, 300, 32, dtype=BF16), torch.rand(1, 1, 300)]
    found = []
    for seed in range(4):
        with cuda.emulated(90, Options(seed=seed, interleave=seed + 1), library=cuda_library) as launches:
            outputs = call(va.relevancy_attention, backend="cuda", is_causal=causal, enable_gqa=True)(**inputs)
            found.append(torch.autograd.grad(outputs, [*inputs.values()], cotangents))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    assert 100 in {launch.carveout for launch in launches}  # an SM holds the blocks for which tiles were chosen


@pytest.mark.parametrize(
    "sizes, options, words",
    [
        ({"dtype": torch.float32}, {}, "takes float16 and bfloat16"),
        ({"rows": 2}, {}, "takes one relevancy vector per sample"),
        ({"d": 20}, {}, "a multiple of 8"),
        ({"d": 136}, {}, "a head_dim of at most 128"),
        ({}, {"rule": "attention"}, "takes rule='gradient' without row_normalize"),
        ({}, {"row_normalize": True}, "takes rule='gradient' without row_normalize"),
        ({}, {"key_mask": torch.ones(1, 257, dtype=torch.bool)}, "takes no mask but the causal one"),
        ({}, {"attn_mask": torch.zeros(257, 257)}, "takes no mask but the causal one"),
    ],
)
def test_what_it_cannot_run_is_refused(sizes: dict[str, Any], options: dict[str, Any], words: str) -> None:
    inputs = inputs_of(257, **sizes)
    assert_refused("cuda", words, lambda: va.relevancy_attention(**inputs, **options, backend="cuda"))


@pytest.mark.skipif(DEVICE != "cpu", reason="the device is what it is")
@pytest.mark.parametrize("capability", ((8, 0), (10, 0)))
def test_other_gpus_are_refused(capability: tuple[int, int]) -> None:
    described, refusals = relevancy_attention.OPERATOR.describe(**inputs_of(257)), relevancy_attention.BACKENDS["cuda"].refusals
    assert refusals(described._replace(capability=(9, 0))) == []
    assert refusals(described._replace(capability=capability)) == [
        "the CUDA C++ kernel needs a compute capability of 9.0 (Hopper)"
    ]
