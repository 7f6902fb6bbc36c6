"""Models that two processes share give each of them the edits, effects and records of the whole model."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("torch.distributed.tensor")

from tests.helpers.interpret import edited_ranks
from tests.helpers.two_ranks import results_of


@pytest.mark.slow  # explaining/test_parallel.py divides explanations, which edits go through
def test_each_way_of_dividing(tmp_path: Path) -> None:
    ranks = results_of(edited_ranks.__name__, "each_way", tmp_path)
    for way, names in edited_ranks.WAYS.items():
        for name in names:
            for key, expected in edited_ranks.alone(name).items():
                for rank in ranks:
                    torch.testing.assert_close(
                        rank[f"{way.__name__}|{key}"], expected, rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}"
                    )
                assert torch.equal(*(rank[f"{way.__name__}|{key}"] for rank in ranks)), key
