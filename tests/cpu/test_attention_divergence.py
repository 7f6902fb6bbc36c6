"""attention_divergence by the CPU kernel: sizes around tiles of queries and blocks of keys, heads that threads share, and extreme
differences. The rest stands in tests/ops/test_attention_divergence.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to, outputs_and_grads
from tests.helpers.ops import tile_edges
from tests.helpers.ops.backends import LOW, assert_refused


def tensors(n: int, m: int, d: int = 6, other_d: int = 5, b: int = 1, heads: int = 2, shared: int = 1) -> dict[str, Tensor]:
    """The other side has as many heads of keys as queries."""
    shapes = {"query": (heads, n, d), "key": (heads // shared, m, d), "other_query": (heads, n, other_d)}
    shapes["other_key"] = heads, m, other_d
    return {name: torch.randn(b, *shape, dtype=torch.float64) for name, shape in shapes.items()}


def check(inputs: dict[str, Tensor], **options: Any) -> None:
    heads = 1 if options.get("head_mean") else inputs["query"].shape[1]
    cotangent = torch.randn(*inputs["query"].shape[:1], heads, inputs["query"].shape[2])
    ours = partial(va.attention_divergence, **options, backend="cpu")
    assert_all_close_to(ours, partial(va.reference.attention_divergence, **options), inputs, [cotangent])


@pytest.mark.parametrize("n, m", tile_edges.CPU)
def test_sizes_either_side_of_a_tile(n: int, m: int) -> None:
    check(as_dtype(tensors(n, m), torch.float32))
    check(as_dtype(tensors(n, m, 17, 16), torch.float32), kind="js", is_causal=True, key_mask=torch.rand(1, m) > 0.3)


@pytest.mark.parametrize("dtype, n", tile_edges.covering(LOW, tile_edges.CPU_COPIED))
def test_keys_that_are_copied(dtype: torch.dtype, n: int) -> None:
    """Halves and padding, under the causal mask, in means: each head has the tile's keys anew."""
    inputs = as_dtype(tensors(n, n, heads=4, shared=2), dtype)
    check(inputs, kind="reverse_kl", head_mean=True, is_causal=True, enable_gqa=True, key_mask=torch.rand(1, n) > 0.3)


@pytest.mark.parametrize("head_mean", [False, True])
def test_masks_of_float64(head_mean: bool) -> None:
    mask = 1e6 * torch.randn(2, 1, 20, 1, dtype=torch.float64) + torch.randn(2, 1, 20, 70, dtype=torch.float64)
    check(as_dtype(tensors(20, 70, b=2), torch.float32), head_mean=head_mean, attn_mask=mask, kind="hellinger")


@pytest.mark.parametrize("beta", [1e-6, 0.3, 1 - 1e-3])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_mixtures_of_any_weights(beta: float, size: float) -> None:
    """The weights of two keys differ by factors from 1.001 to e^60."""
    x = as_dtype(tensors(20, 33, heads=1), torch.float32)
    x |= {name: size * x[name] for name in ("query", "other_query")}
    check(x, kind="js", beta=beta)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("options", [{"is_causal": True}, {"kind": "js", "head_mean": True}])
def test_heads_that_threads_share(options: dict[str, Any]) -> None:
    """The heads of two key heads are those of eight of the other side. Any number of threads gives the same bits."""
    inputs = as_dtype(tensors(700, 60, heads=8, shared=4), torch.float32)
    run = partial(va.attention_divergence, backend="cpu", enable_gqa=True, **options)
    torch.set_num_threads(1)
    check(inputs, enable_gqa=True, **options)
    alone = outputs_and_grads(run, inputs)
    for count in (2, 3, 30):
        torch.set_num_threads(count)
        for name, value in outputs_and_grads(run, inputs).items():
            assert torch.equal(value, alone[name]), name


def test_nan_stays_in_its_row() -> None:
    x = as_dtype(tensors(20, 33), torch.float32)
    clean = va.attention_divergence(**x, backend="cpu")
    x["other_query"][0, 1, 3, 2] = torch.nan
    got = va.attention_divergence(**x, backend="cpu")
    assert got[0, 1, 3].isnan() and got.isnan().sum() == 1
    assert torch.equal(got[0, 0], clean[0, 0])


def test_what_is_refused() -> None:
    words = "the CPU kernels take float16, bfloat16 and float32"
    assert_refused("cpu", words, lambda: va.attention_divergence(**tensors(3, 4), backend="cpu"))
