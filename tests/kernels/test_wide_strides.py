"""Offsets in kernels have 64 bits: heads that lie more than 2^31 elements apart. A wrong offset ends the process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.ops.backends import INTERPRET

H, N, D = 3, 5, 8
APART = 2**30 + 8  # elements; twice that does not fit into 32 bits


def spread(x: Tensor) -> Tensor:
    """The values of x (1, H, N, D), each head APART elements behind the one before. Untouched memory costs nothing."""
    wide = torch.empty((H - 1) * APART + N * D, dtype=x.dtype).as_strided(x.shape, (0, APART, D, 1))
    return wide.copy_(x)


@pytest.fixture(autouse=True)
def _overflow_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 32 bits too few, where an address would be one that exists. The emulator of compiled kernels knows all addresses."""
    if not INTERPRET:
        return
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=True))


@pytest.mark.parametrize("which", range(4))
def test_heads_of_congruence_loss(which: int) -> None:
    tensors = [torch.randn(1, H, N, D, dtype=torch.float16) for _ in range(4)]
    exact = va.congruence_loss((tensors[0], tensors[1]), (tensors[2], tensors[3]), backend="triton")
    tensors[which] = spread(tensors[which])
    loss = va.congruence_loss((tensors[0], tensors[1]), (tensors[2], tensors[3]), backend="triton")
    torch.testing.assert_close(loss, exact, rtol=0, atol=0)
