"""score_attention by the CPU kernels: masks across tiles and blocks, keys that are copied, threads. The rest stands in
tests/ops/test_score_attention*.py."""

from __future__ import annotations

import math

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import as_dtype, outputs_and_grads
from tests.helpers.ops import tile_edges
from tests.helpers.ops.backends import LOW
from tests.helpers.ops.score_cases import MASKS, SCORES, attention_inputs, call, check, padding, tensors

KINDS = ("dot", "cosine-eps=5", "general-tanh-key", "additive", "hadamard-sigmoid-key")


@pytest.mark.parametrize("score, mask, size", tile_edges.covering(KINDS, tuple(MASKS), tile_edges.CPU_SEVERAL))
def test_masks_across_tiles_and_blocks(score: str, mask: str, size: tuple[int, int]) -> None:
    n, m = size
    found = check("cpu", *tensors("cpu", score, n=n, m=m), cancels=True, **MASKS[mask](n, m))
    assert not any(torch.isnan(x).any() for x in found.values())


@pytest.mark.parametrize("n", (1, 16, 17, 64, 100))
@pytest.mark.parametrize("score", ("dot", "additive"))
def test_a_mask_of_one_pair(score: str, n: int) -> None:
    """In the first row or in the last, of keys of which all other rows see all."""
    for row in {0, n - 1}:
        mask = torch.ones(n, 40, dtype=torch.bool)
        mask[row, 20] = False
        check("cpu", *tensors("cpu", score, b=1, n=n, m=40), cancels=True, attn_mask=mask)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("score", ("dot", "additive"))
def test_keys_that_are_copied(score: str, dtype: torch.dtype) -> None:
    """Halves and padding, under the causal mask and with key heads that are shared: later tiles see more of a block."""
    for n in (100, 800) if score == "dot" else (100,):
        inputs, make = tensors("cpu", score, dtype, h=4, kv=2, n=n, m=n)
        check("cpu", inputs, make, cancels=True, key_mask=padding(n), is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("n", (1, 2, 20))
@pytest.mark.parametrize("score, sizes", [("dot", (15, 1)), ("dot", (257, 300)), ("additive", (15, 64))])
def test_head_sizes(score: str, sizes: tuple[int, int], n: int) -> None:
    head_dim, value_dim = sizes
    shapes = {"query": (1, 2, n, head_dim), "key": (1, 2, 150, head_dim), "value": (1, 2, 150, value_dim)}
    inputs = {name: torch.randn(shape) for name, shape in shapes.items()}
    vector = torch.randn(head_dim)
    check("cpu", inputs, lambda _: va.scores.Additive(vector) if score == "additive" else score, cancels=True)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("score", KINDS)
def test_samples_of_one_head(score: str) -> None:
    """What a thread knows of a sample's keys is not that of the next one's."""
    torch.set_num_threads(1)
    check("cpu", *tensors("cpu", score, b=3, h=1, n=20, m=33), cancels=True)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("score", ("dot", "additive"))
def test_threads_that_share_a_head(score: str) -> None:
    """Each number of threads is right, and gives the same bits again."""
    for heads, (n, m) in ((1, (200, 300)), (3, (100, 900))):
        inputs, make = attention_inputs(SCORES[score], b=1, h=heads, kv=1, n=n, m=m)
        inputs = as_dtype(inputs, torch.float32)
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            check("cpu", inputs, make, cancels=True, enable_gqa=True, what=f"{count} threads")
            run = call(va.score_attention, make, return_lse=True, enable_gqa=True, backend="cpu")
            first, second = outputs_and_grads(run, inputs), outputs_and_grads(run, inputs)
            assert all(torch.equal(x, second[name]) for name, x in first.items())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("head_dim, value_dim", [(0, 8), (8, 0)])
def test_threads_that_share_a_head_without_features(head_dim: int, value_dim: int) -> None:
    """Sums of the values' gradients are joined where the keys have none, and the other way round."""
    torch.set_num_threads(3)
    shapes = {"query": (1, 1, 200, head_dim), "key": (1, 1, 7, head_dim), "value": (1, 1, 7, value_dim)}
    inputs = {name: torch.randn(shape) for name, shape in shapes.items()}
    check("cpu", inputs, lambda _: "dot")


@pytest.mark.parametrize("m", [200, 200_000])
def test_many_keys_that_are_alike(m: int) -> None:
    """The sums of the blocks of keys are all rounded the same way. The logits are exact, and all but one are alike."""
    key = torch.zeros(1, 1, m, 1)
    key[0, 0, m // 3] = 0.25
    query, exact = torch.ones(1, 1, 3, 1), torch.tensor(m - 1 + math.exp(0.25), dtype=torch.float64).log()
    _, lse = va.score_attention(query, key, key, score="dot", return_lse=True, backend="cpu")
    ulp = torch.finfo(torch.float32).eps * 2.0 ** exact.log2().floor()
    assert (lse.double() - exact).abs().max() <= ulp
    found = va.attention_statistics(query, key, scale=1.0, backend="cpu")
    assert (found.entropy.double() - (exact - 0.25 * (0.25 - exact).exp())).abs().max() <= 2 * ulp
    assert (found.maximum.double() / (0.25 - exact).exp() - 1).abs().max() <= 4 * torch.finfo(torch.float32).eps
