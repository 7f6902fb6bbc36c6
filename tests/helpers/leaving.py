"""An end at once for processes of pytest: Python takes seconds to take apart what they hold.

`python -m tests.helpers.leaving` is `python -m pytest` that ends so. Others import it before all that calls something at the end
of a process: what is registered first is called last.
"""

from __future__ import annotations

import atexit
import os
import sys

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
