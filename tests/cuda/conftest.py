"""The CUDA C++ kernels on CPU tensors, emulated (tools/emulated/), through the public calls. A finding fails a test.

VLATTN_CUDA_LIBRARY names another library, with VLATTN_TEST_DEVICE=cuda (`make gpu`) that for the GPU. The tests name no device:
what they make lies on the default one.
"""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.cuda.building import PTX, build
from tests.helpers.ops import backends
from tests.helpers.ops.backends import cuda_library  # noqa: F401  a fixture

LATE = {"cuda/test_build.py", "compiled/test_cuda.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The library is built beside the other tests. Tests of what takes long come last."""
    names = {_name(item) for item in items}
    if not names & LATE or names <= LATE:
        return
    items.sort(key=lambda item: _name(item) in LATE)
    threading.Thread(target=_build_early, daemon=True).start()


def _name(item: pytest.Item) -> str:
    return f"{item.path.parent.name}/{item.path.name}"


def _build_early() -> None:
    with contextlib.suppress(pytest.skip.Exception, RuntimeError):  # the test that needs it says so
        build(*PTX)


@pytest.fixture(autouse=True)
def _on_device(cuda_library: Path) -> Iterator[None]:  # noqa: F811
    with backends.ready("cuda", cuda_library):
        yield
