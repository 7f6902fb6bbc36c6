"""For every test: fixed seeds and one thread."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods without options are the published forms: the formulas of the test hold nothing fixed."""
    from vlattn_fast.interpret.relevancy.methods.registry import METHODS

    for kind in METHODS.values():
        monkeypatch.setattr(kind, "default_freeze", ())
