"""stacked_cross_attention in Triton: sizes around its tiles, chunks of pairs, and what it refuses.

The rest stands in tests/ops/test_stacked_cross_attention.py.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

import vlattn_fast as va
from tests.helpers.ops.backends import assert_refused
from tests.helpers.ops.stacked_cross_attention_cases import RAGGED, check, tensors
from vlattn_fast.kernels import _stacked_inputs as kernels

F32, BF16 = torch.float32, torch.bfloat16


# one block of queries, contexts or features, and several; 289 regions are AttnGAN's
@pytest.mark.parametrize(
    "queries, contexts, size", [(1, 1, 1), (15, 17, 3), (33, 63, 17), (65, 33, 65), (17, 100, 64), (130, 20, 5), (20, 289, 20)]
)
def test_sizes_either_side_of_a_tile(queries: int, contexts: int, size: int) -> None:
    check("triton", tensors((1, 2), contexts, queries, size, F32), caption_lengths=(queries, (queries + 1) // 2))
    words = (max(1, contexts - 3),)
    inputs = tensors((2, 1), queries, contexts, size, F32)
    check("triton", inputs, first_norm="softmax", direction="i2t", caption_lengths=words)


@pytest.mark.parametrize("direction, regions, words, size", [("t2i", 33, 20, 65), ("i2t", 66, 68, 72)])
def test_sizes_either_side_of_a_tile_in_half_precision(direction: str, regions: int, words: int, size: int) -> None:
    check("triton", tensors((1, 2), regions, words, size, BF16), direction=direction, caption_lengths=(words, 10))


def test_the_best_queries_of_several_tiles_share_the_gradient() -> None:
    """Equal regions, in numbers whose sums are exact: 128 of them are pooled at a time."""
    inputs = {name: (4.0 * x).round().abs() / 4.0 for name, x in tensors((1, 2), 130, 4, 16, F32).items()}
    inputs["images"][:] = inputs["images"][:, :1]
    check("triton", inputs, direction="i2t", aggregation="max")


@pytest.mark.parametrize("elements", (1, 700))
def test_chunks_add_up(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of few elements: one pair at a time, and several sets of either side."""
    monkeypatch.setattr(kernels, "_map_elements", lambda device: elements)
    check("triton", tensors(dtype=F32), **RAGGED)
    pairs = torch.zeros(3, 5)
    for x, tiles_y in kernels.chunks((torch.empty(3, 7, 2), None), (torch.empty(5, 9, 2), None)):
        for y in tiles_y:
            pairs[x, y] += 1
            assert pairs[x, y].numel() * 16 * 9 <= max(elements, 16 * 9)  # rows of maps are padded
    assert (pairs == 1).all()


def test_chunks_grow_with_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve maps of eight bytes take at most a sixteenth of its memory, and at least half of that where it is large."""
    for gigabytes in (1, 8, 24, 80, 141):
        memory = gigabytes * 10**9
        properties = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, properties=properties: properties)
        elements = kernels._map_elements(torch.device("cuda", 0))
        assert elements >= 1 << 22 and elements & (elements - 1) == 0
        if elements > 1 << 22:
            assert memory / 32 < elements * 12 * 8 <= memory / 16
    assert elements >= 1 << 26
    assert kernels._map_elements(torch.device("cpu")) == 1 << 22


def test_many_contexts_are_refused() -> None:
    run = partial(va.stacked_cross_attention, torch.randn(1, 4097, 4), torch.randn(1, 3, 4), backend="triton")
    assert_refused("triton", "at most 4096 contexts", run)
