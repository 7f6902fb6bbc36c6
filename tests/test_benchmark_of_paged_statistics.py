"""The bound of the benchmark of paged statistics, against which its times are read."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast.benchmarks import _choice

SIZES = {"R": 3, "Hkv": 2, "shared": 4, "M": 40, "D": 8}


@pytest.mark.parametrize("name, tokens", [("paged-answers", 1), ("paged-prompt", 5)])
def test_the_bound_reads_each_key_once(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The query heads of a key head are rows of one block: repeated keys are four times the bytes."""
    (benchmark,) = _choice.choose([f"paged_attention_statistics/forward/{name}"])
    problem = benchmark.build({**SIZES, "N": tokens}, torch.device("cpu"), torch.float32)
    calls: list[dict[str, Any]] = []
    whole = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        calls.append({"query": query, "key": key, "out": whole(query, key, value, attn_mask=attn_mask)})
        return calls[-1]["out"]

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    problem.variants["SDPA"].run(problem.tensors)
    (call,) = calls
    assert call["key"].shape == (3, 2, 40, 8) and call["query"].shape == (3, 2, 4 * tokens, 8)
    # the same attention, a head at a time
    query = problem.tensors["tokens"].view(3, tokens, 8, 8).transpose(1, 2)  # (R, H, N, D)
    key = call["key"].repeat_interleave(4, 1)
    seen = torch.ones(tokens, 40, dtype=torch.bool).tril(40 - tokens)
    want = whole(query, key, key, attn_mask=seen)
    torch.testing.assert_close(call["out"].unflatten(2, (4, tokens)).flatten(1, 2), want)
