"""`capture_relevancy(higher_order=True)` under DDP. Beside stored maps it is tested in tests/cpu/test_higher_order.py."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.nn import divided_relevancy
from tests.helpers.two_ranks import results_of
from tests.nn.test_capture_relevancy import PIXELS, made
from vlattn_fast.nn import capture_relevancy


def test_copies_have_the_gradients_of_all_inputs(tmp_path: Path) -> None:
    """Two processes with one input each under DDP, with ∇A as a constant and without."""
    expected = divided_relevancy.replicated_gradients()
    for grads in results_of(divided_relevancy.__name__, "of_this_copy", tmp_path):
        torch.testing.assert_close(grads, expected)


def test_a_static_graph_is_refused() -> None:
    """DDP would add up the gradients of the copies behind the relevancy's backward pass, before the loss's has any."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(made("ViT"), static_graph=True)
        for wrapped in (model, torch.compile(model, backend="eager")):
            with pytest.raises(ValueError, match="Pass static_graph=False"):
                capture_relevancy(wrapped)
        with capture_relevancy(model, method="rollout") as captured:  # has no backward pass
            model(pixel_values=PIXELS)
        captured.relevancy()[:, 1:].sum().backward()
    finally:
        torch.distributed.destroy_process_group()
