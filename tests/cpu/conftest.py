"""The CPU kernels (csrc/cpu/), through the public calls. VLATTN_CPU_ISA names an instruction set, VLATTN_CPU_LIBRARY a build."""

from collections.abc import Iterator

import pytest

from tests.helpers.ops import backends


@pytest.fixture(autouse=True)
def _built() -> Iterator[None]:
    with backends.ready("cpu"):
        yield
