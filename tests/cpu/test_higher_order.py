"""`capture_relevancy(higher_order=True)` in float32, where the CPU kernels compute, beside maps that are stored."""

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.compare import assert_close_to
from tests.helpers.nn.stored_relevancy import MAPS, STORED, stored_row
from tests.helpers.ops.backends import ready
from tests.nn.test_capture_relevancy import CASES, gradients, made, rows_of, weighed
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


@torch.no_grad()
def rolled(model: nn.Module, shift: int) -> nn.Module:
    """The model with its weights in other places: another draw."""
    for parameter in model.parameters():
        parameter.copy_(parameter.flatten().roll(shift).view_as(parameter))
    return model


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("name", CASES)
def test_a_step_by_the_kernels_is_as_exact_as_on_stored_maps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    second = kernels.second
    monkeypatch.setattr(kernels, "second", lambda inputs: [calls.append(inputs), second(inputs)][1])
    inputs = CASES[name][1]
    narrow = {key: x.float() if x.is_floating_point() else x for key, x in inputs.items()}
    ours, exact, formula = [], [], []
    for shift in range(4):  # the errors of one model hang on the rounding of a few rows
        with ready("cpu"):
            ours.append(step(rolled(made(name), shift).float(), narrow, name))
        exact.append(step(rolled(made(name, STORED), shift), inputs, name))
        formula.append(step(rolled(made(name, STORED), shift).float(), narrow, name))
    assert calls
    assert_close_to(ours, exact, formula, what=name)
