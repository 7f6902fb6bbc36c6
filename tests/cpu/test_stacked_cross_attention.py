"""stacked_cross_attention by the CPU kernels: sizes around blocks of rows, lanes and spans, and chunks."""

import pytest
import torch

from tests.helpers.ops.stacked_cross_attention_cases import check, random_lengths, tensors

F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@pytest.mark.parametrize(
    "sets, regions, words, size", [((2, 3), 16, 17, 16), ((1, 5), 1, 24, 33), ((3, 1), 130, 49, 15), ((2, 7), 33, 15, 130)]
)
def test_sizes_either_side_of_a_block(sets: tuple[int, int], regions: int, words: int, size: int, direction: str) -> None:
    inputs = tensors(sets, regions, words, size, F32)
    check("cpu", inputs, direction=direction)
    check("cpu", inputs, direction=direction, first_norm="softmax", caption_lengths=random_lengths(inputs["captions"], 0))


def test_more_maps_than_a_chunk_of_the_backward_pass() -> None:
    check("cpu", tensors((5, 2), 300, 2000, 4, F32), image_lengths=(300, 0, 7, 300, 299), aggregation="mean")


@pytest.mark.parametrize("regions", [528, 529, 1050])
def test_contexts_that_come_in_parts(regions: int) -> None:
    """More than 528 at a time are too many, and blocks have up to 128 rows of queries then."""
    inputs = tensors((2, 4), regions, 50, 24, F32)
    check("cpu", inputs, image_lengths=(regions, regions - 30), caption_lengths=(50, 40, 38, 49))
