"""The CPU kernels (csrc/cpu/), through the public calls. VLATTN_CPU_ISA names an instruction set, VLATTN_CPU_LIBRARY a build."""

from collections.abc import Iterator

import pytest
import torch

from tests.helpers.ops import backends


@pytest.fixture(autouse=True)
def _built() -> Iterator[None]:
    with backends.ready("cpu"):
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    """The test may set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
