"""Triton kernels in Triton's interpreter on CPU tensors; with VLATTN_TEST_DEVICE=cuda (`make gpu`) compiled, on that device.

The tests name no device: what they make lies on the default one.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator

import pytest
import torch
import vlattn_fast.kernels

from vlattn_fast.ops import _dispatch

DEVICE = os.environ.get("VLATTN_TEST_DEVICE", "cpu")
INTERPRET = DEVICE == "cpu"

if INTERPRET:
    # triton.jit asks when it decorates; the variable must not reach what other tests start
    os.environ["TRITON_INTERPRET"] = "1"
    for module in pkgutil.iter_modules(vlattn_fast.kernels.__path__):
        importlib.import_module(f"vlattn_fast.kernels.{module.name}")
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if INTERPRET:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(_dispatch, "INTERPRETED", True)
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """VLATTN_SHARD=i/n keeps each n-th test from the i-th on: `make gpu` runs n processes side by side."""
    if shard := os.environ.get("VLATTN_SHARD"):
        i, n = map(int, shard.split("/"))
        items[:] = items[i::n]
