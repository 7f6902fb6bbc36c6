"""The memory that a call takes on a CPU."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_of_call(call: Callable[[], Any]) -> tuple[int | None, float]:
    """Returns how far the process's largest resident set, VmHWM, rises above the level before the call (None without Linux), and
    the seconds of the call."""
    linux = Path("/proc/self/clear_refs").exists()
    held = 0
    if linux:
        ctypes.CDLL(None).malloc_trim(0)  # else memory freed by earlier calls would serve this call without being counted
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        held = _status("VmRSS")
    start = time.perf_counter()
    call()
    spent = time.perf_counter() - start
    return _status("VmHWM") - held if linux else None, spent


def _status(name: str) -> int:
    return int(re.findall(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[0]) * 1024
