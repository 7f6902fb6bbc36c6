"""Rows of relevancy_residual that threads share."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.compare import assert_close_to
from tests.helpers.ops.backends import F64
from vlattn_fast.backends.cpu import relevancy_residual
from vlattn_fast.backends.inputs import ResidualWeightsInputs
from vlattn_fast.backends.reference.relevancy_residual import BY_ROWS, residual_weights


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("weighting", BY_ROWS)
def test_several_threads(weighting: str) -> None:
    """They give the bits of one thread, also of a sample alone."""
    rows = [torch.randn(3, 110, 1030) for _ in range(3)]
    found = []
    for count, samples in ((8, rows), (1, rows), (1, [x[1:2] for x in rows])):
        torch.set_num_threads(count)
        found.append(torch.stack(relevancy_residual.backward(ResidualWeightsInputs(*samples, weighting, "cpu"))))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0][:, 1:2], found[2])
    exact, formula = (torch.stack(residual_weights(*(x.to(dtype) for x in rows), weighting)) for dtype in (F64, torch.float32))
    assert_close_to(found[0], exact, formula, what=weighting)
