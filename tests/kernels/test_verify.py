"""`vlattn verify` for the Triton kernels (and, on a GPU, for streaming there)."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.ops.backends import DEVICE, INTERPRET
from vlattn_fast.checking.verify import DTYPES, verify
from vlattn_fast.ops import OPERATORS


@pytest.mark.parametrize("operator", [name for name, operator in OPERATORS.items() if "triton" in operator.backends])
@pytest.mark.slow
def test_verify_passes(operator: str) -> None:
    if DEVICE != "cpu":  # torch 2.9 knows no default device any more where it was None once
        torch.set_default_device(None)  # verify places its tensors itself
    backends = ("triton",) if DEVICE == "cpu" else ("triton", "streaming")
    # the suites of tests/ops/ cover every dtype; here bfloat16, which has the largest tiles, takes the interpreter the least time
    dtypes = (torch.bfloat16,) if INTERPRET else DTYPES
    for result in verify(backends, dtypes, device=DEVICE, operators=(operator,)):
        assert result.checks > 0, result.reasons
        assert result.passed, f"{result.backend} {result.dtype}: {result.ratio:.2f} of what is allowed in {result.worst}"
