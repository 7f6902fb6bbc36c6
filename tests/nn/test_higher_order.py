"""`capture_relevancy(higher_order=True)` in float32, where the CPU kernels compute, beside maps that are stored;
and under DDP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.compare import assert_close_to
from tests.helpers.nn import divided_relevancy
from tests.helpers.nn.stored_relevancy import MAPS, STORED, stored_row
from tests.helpers.ops.backends import ready
from tests.helpers.two_ranks import results_of
from tests.nn.test_capture_relevancy import CASES, PIXELS, gradients, made, rows_of, weighed
from vlattn_fast.backends.cpu import score_attention as kernels
from vlattn_fast.nn import capture_relevancy


def step(model: nn.Module, inputs: dict[str, Tensor], name: str) -> Tensor:
    """The gradient of a loss on the relevancy alone."""
    score_of, towers = CASES[name][2:]
    dtype = next(model.parameters()).dtype
    MAPS.clear()
    if model.config._attn_implementation != STORED:
        with capture_relevancy(model, higher_order=True) as captured:
            outputs = model(**inputs)
        rows = rows_of(captured, score_of(outputs))
    else:
        outputs, rows = model(**inputs), {}
        for tower, (size, places) in towers.items():
            start = torch.eye(size, dtype=dtype)[places][:, None]
            maps = [x for x in MAPS if x.shape[-1] == size]
            rows[tower] = stored_row(maps, [], score_of(outputs).sum(), start, "gradient", True)
    weighed(rows).backward()
    return gradients(model)


@pytest.mark.parametrize("name", CASES)
def test_a_step_by_the_kernels_is_as_exact_as_on_stored_maps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    second = kernels.second
    monkeypatch.setattr(kernels, "second", lambda inputs: [calls.append(inputs), second(inputs)][1])
    inputs = CASES[name][1]
    narrow = {key: x.float() if x.is_floating_point() else x for key, x in inputs.items()}
    with ready("cpu"):
        ours = step(made(name).float(), narrow, name)
    assert calls
    assert_close_to(ours, step(made(name, STORED), inputs, name), step(made(name, STORED).float(), narrow, name), what=name)


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
