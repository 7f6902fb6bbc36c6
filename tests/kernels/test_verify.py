"""`vlattn verify` for the Triton kernels (and, on a GPU, for streaming there)."""

from __future__ import annotations

import pytest
import torch

from tests.ops.backends import DEVICE
from vlattn_fast.verify import DTYPES, OPERATORS, verify


@pytest.mark.parametrize("operator", OPERATORS)
def test_verify_passes(operator: str) -> None:
    torch.set_default_device(None)  # verify places its tensors itself
    backends = ("triton",) if DEVICE == "cpu" else ("triton", "streaming")
    dtypes = DTYPES[:2] if DEVICE == "cpu" else DTYPES  # float16 takes the same ways as bfloat16, and the interpreter its time
    for result in verify(backends, dtypes, device=DEVICE, operators=(operator,)):
        assert result.checks > 0, result.reasons
        assert result.passed, f"{result.backend} {result.dtype}: {result.ratio:.2f} of what is allowed in {result.worst}"
