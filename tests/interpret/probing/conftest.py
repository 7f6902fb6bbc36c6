from collections.abc import Iterator

import pytest

from tests.helpers.interpret.probe_cases import quick_fits


@pytest.fixture
def quick() -> Iterator[None]:
    with quick_fits():
        yield
