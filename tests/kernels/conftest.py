"""Triton kernels in Triton's interpreter on CPU tensors; with VLATTN_PTX=90 compiled and emulated; with
VLATTN_TEST_DEVICE=cuda (`make gpu`) compiled, on that device.

The tests name no device: what they make lies on the default one.
"""

from collections.abc import Iterator

import pytest

from tests.helpers.ops import backends


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with backends.ready("triton"):
        yield
