"""Models that two processes share give each of them the explanation of the whole model."""

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("torch.distributed.tensor")

from tests.helpers.interpret import parallel_cases
from tests.helpers.two_ranks import results_of
from vlattn_fast.attach.tensor_parallel import heads_mesh


def test_each_way_of_dividing(tmp_path: Path) -> None:
    """All of them in one start of two processes, which takes longer than a way."""
    for rank in results_of(parallel_cases.__name__, "divided_each_way", tmp_path):
        wanted = {
            f"{way.__name__}|{key}": row
            for way, names in parallel_cases.WAYS.items()
            for name, methods in names.items()
            for key, row in parallel_cases.alone(name).items()
            if (method := key.split("|")[1]) in methods or method not in parallel_cases.METHODS
        }
        assert set(rank) == set(wanted)
        for key, row in wanted.items():
            torch.testing.assert_close(rank[key], row, rtol=1e-10, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


def test_heads_that_are_cut_in_two_are_refused(tmp_path: Path) -> None:
    """Half of the rows of the projection are neither all heads nor this process's."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore  # its import makes "fake" a name

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        attention = nn.Module()
        attention.q_proj = nn.Linear(8, 8, bias=False)
        weight = DTensor.from_local(torch.zeros(4, 8), DeviceMesh("cpu", [0, 1]), [Shard(0)], run_check=False)
        attention.q_proj.weight = nn.Parameter(weight)
        assert heads_mesh(attention, torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)) is None  # all heads are here
        assert heads_mesh(attention, torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)) is not None
        with pytest.raises(ValueError, match=r"model must divide whole heads among processes.*got 'q_proj.weight'"):
            heads_mesh(attention, torch.zeros(1, 3, 3, 2), torch.zeros(1, 3, 3, 2))
    finally:
        dist.destroy_process_group()
