"""score_attention by the CPU kernels: single masked pairs, samples of one head, no features, many keys that are alike."""

import math

import pytest
import torch

import vlattn_fast as va
from tests.helpers.ops.score_cases import check, tensors

KINDS = ("dot", "cosine-eps=5", "general-tanh-key", "additive", "hadamard-sigmoid-key")


@pytest.mark.parametrize("n", (1, 16, 17, 64, 100))
@pytest.mark.parametrize("score", ("dot", "additive"))
def test_a_mask_of_one_pair(score: str, n: int) -> None:
    """In the first row or in the last, of keys of which all other rows see all."""
    for row in {0, n - 1}:
        mask = torch.ones(n, 40, dtype=torch.bool)
        mask[row, 20] = False
        check("cpu", *tensors("cpu", score, b=1, n=n, m=40), cancels=True, attn_mask=mask)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("score", KINDS)
def test_samples_of_one_head(score: str) -> None:
    """What a thread knows of a sample's keys is not that of the next one's."""
    torch.set_num_threads(1)
    check("cpu", *tensors("cpu", score, b=3, h=1, n=20, m=33), cancels=True)


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
