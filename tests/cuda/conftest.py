"""The CUDA C++ kernels built for the host and run on CPU tensors (csrc/cuda/host/emulation.h), through the public calls.

VLATTN_CUDA_LIBRARY names another library: a sanitized build, a broken one, or with VLATTN_TEST_DEVICE=cuda (`make gpu`) that for
the GPU. The tests name no device: what they make lies on the default one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cuda.building import CUDA, SANITIZED, build
from tests.ops import backends
from tests.ops.backends import cuda_library  # noqa: F401  a fixture

LATE = {"test_build.py": ("cuda", *CUDA), "test_cuda.py": ("cuda", *CUDA), "test_sanitized.py": ("asan", *SANITIZED)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of what takes minutes to build come last: until then it is built beside the others."""
    late = {item.path.name for item in items} & LATE.keys()
    if not late or len(late) == len({item.path.name for item in items}):
        return
    items.sort(key=lambda item: item.path.name in late)
    threading.Thread(target=_build_early, args=(sorted(late),), daemon=True).start()


def _build_early(late: list[str]) -> None:
    for name in late:
        try:
            build(*LATE[name])
        except (pytest.skip.Exception, AssertionError):
            pass  # the test that needs it says so


@pytest.fixture(autouse=True)
def _on_device(cuda_library: Path) -> Iterator[None]:  # noqa: F811
    with backends.ready("cuda", cuda_library):
        yield
