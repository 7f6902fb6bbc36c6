"""A process of pytest begins and ends sooner: imports are not searched for garbage, and at its end Python takes nothing apart.

`python -m tests.helpers.process` is `python -m pytest` that ends so. tests/conftest.py imports this module before all that calls
something at the end of a process: what is registered first is called last.
"""

import atexit
import gc
import os
import sys

gc.disable()  # until tests/conftest.py has collected the tests
status: int | None = None  # with which the process ends at once


@atexit.register
def _leave() -> None:
    if status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    import pytest

    status = int(pytest.main())
