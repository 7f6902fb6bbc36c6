"""The CUDA C++ kernels built for the host and run on CPU tensors (csrc/cuda/host/emulation.h), through the public calls.

VLATTN_CUDA_LIBRARY names another library: a sanitized build, a broken one, or with VLATTN_TEST_DEVICE=cuda (`make gpu`) that for
the GPU. The tests name no device: what they make lies on the default one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.cuda.building import CUDA, SANITIZED, THREADS, build
from tests.helpers.ops import backends
from tests.helpers.ops.backends import cuda_library  # noqa: F401  a fixture

LATE = {"cuda/test_build.py": [CUDA], "compiled/test_cuda.py": [CUDA]}
EARLY = {**LATE, "cuda/test_sanitized.py": [("asan", *SANITIZED), ("tsan", *THREADS)]}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long to build is built beside the other tests. Tests of what takes minutes come last; those of the CPU kernels
    under sanitizers take longest by themselves and come first, so that no process waits for them at the end."""
    names = {_name(item) for item in items}
    if not names & EARLY.keys() or names <= EARLY.keys():
        return
    items.sort(key=lambda item: (_name(item) in LATE) - (_name(item) == "cpu/test_sanitized.py"))
    threading.Thread(target=_build_early, args=(sorted(names & EARLY.keys(), reverse=True),), daemon=True).start()


def _name(item: pytest.Item) -> str:
    return f"{item.path.parent.name}/{item.path.name}"


def _build_early(names: list[str]) -> None:
    for wanted in [one for name in names for one in EARLY[name]]:
        try:
            build(*wanted)
        except (pytest.skip.Exception, AssertionError):
            pass  # the test that needs it says so


@pytest.fixture(autouse=True)
def _on_device(cuda_library: Path) -> Iterator[None]:  # noqa: F811
    with backends.ready("cuda", cuda_library):
        yield
