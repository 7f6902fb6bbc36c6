"""`vlattn verify` for the Triton kernels (and, on a GPU, for streaming there)."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.conftest import DEVICE
from vlattn_fast.verify import OPERATORS, verify


@pytest.mark.parametrize("operator", OPERATORS)
def test_verify_passes(operator: str) -> None:
    torch.set_default_device(None)  # verify places its tensors itself
    backends = ("triton",) if DEVICE == "cpu" else ("triton", "streaming")
    for result in verify(backends, device=DEVICE, operators=(operator,)):
        assert result.checks > 0, result.reasons
        assert result.passed, f"{result.backend} {result.dtype}: {result.ratio:.2f} of what is allowed in {result.worst}"
