"""No tensor grows with the pairs of tokens: what calls allocate, forward and backward, grows with the tokens."""

import pytest
import torch
from torch import Tensor

from tests.helpers.compare import LargestAllocation, outputs_and_grads
from tests.helpers.ops.properties import SMALL, calls, every, floating
from vlattn_fast.backends.streaming import _tiles
from vlattn_fast.checking.cases import Example

WITHOUT = {
    "congruence_loss": "it has maps of a sample, but no head's: tests/ops/test_congruence_loss.py",
    "attention_map": "its result is a map: tests/ops/test_attention_map.py",
    "relevancy_residual": "it adds token by token",
    "stacked_cross_attention": "it has the map of each pair: tests/ops/test_stacked_cross_attention.py",
}
TOKENS = 128, 256


@every("streaming", "cpu", without=WITHOUT)
@pytest.mark.slow("attention_divergence", "indexer_divergence", "recurrent_step", "score_attention")
def test_twice_as_many_tokens_take_twice_as_much(backend: str, operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 1 << 14)
    seen: dict[str, list[LargestAllocation]] = {}
    for n in TOKENS:
        sizes = SMALL._replace(queries=n, keys=n, regions=n, words=n, heads=2, images=2)
        for call in calls(operator, backend, sizes, torch.float32):

            def run(call: Example = call, **x: Tensor) -> tuple[Tensor, ...]:
                return floating(call.run(x, backend=backend))

            tensors = call.in_dtype(torch.float32)
            with LargestAllocation() as memory:
                outputs_and_grads(run, tensors) if call.differentiable else run(**tensors)
            seen.setdefault(call.title, []).append(memory)
    for title, (few, many) in seen.items():
        assert many.peak <= 2.2 * few.peak, f"{title}: {few.peak} and {many.peak} bytes"
        assert many.bytes < 4 * n * n, f"{title}: {many.by} made {many.bytes} bytes"
