"""An end at once for processes of pytest that nothing asks for more: Python takes seconds to take apart what they hold.

To be imported before all that calls something at the end of a process: what is registered first is called last.
"""

from __future__ import annotations

import atexit
import os
import sys

at_once = False


@atexit.register
def _leave() -> None:
    if at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
