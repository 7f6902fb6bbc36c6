"""`vlattn verify` for the CUDA C++ kernels."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.ops.backends import DEVICE
from vlattn_fast.checking.verify import verify
from vlattn_fast.ops import OPERATORS

WITH_KERNELS = [name for name, operator in OPERATORS.items() if "cuda" in operator.backends]


@pytest.mark.slow("congruence_loss")
@pytest.mark.parametrize("operator", WITH_KERNELS)
def test_verify_passes(operator: str) -> None:
    if DEVICE != "cpu":  # torch 2.9 knows no default device any more where it was None once
        torch.set_default_device(None)  # verify places its tensors itself
    for result in verify(("cuda",), device=DEVICE, operators=(operator,)):
        assert result.checks > 0, result.reasons
        assert result.passed, f"{result.dtype}: {result.ratio:.2f} of what is allowed in {result.worst}"
