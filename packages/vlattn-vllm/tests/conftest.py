"""For every test: fixed seeds, one thread, and a Triton kernel that takes CPU tensors."""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Iterator

import pytest
import torch

# Triton asks for its interpreter when it decorates a kernel. The processes that tests start must not have the variable.
os.environ["TRITON_INTERPRET"] = "1"
importlib.import_module("vlattn_fast.kernels.paged_attention_statistics")
del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
