"""A plug-in of pytest, `-p tools.planted.reached`: which functions of the core each test calls, and how long it takes.

A worker of pytest-xdist writes lines of JSON into VLATTN_REACHED, a folder, in a file of its own. What a test runs in another
process is not seen.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

FOLDER = Path(os.environ["VLATTN_REACHED"])
ROOT = Path(__file__).parents[2]
CORE = "vlattn_fast/", "kernels/"
_CODES: dict[CodeType, str] = {}  # "file:function"; empty for code that is not the core's
_reached = set[str]()


def _note(frame: FrameType, event: str, _: Any) -> None:
    code = frame.f_code
    name = _CODES.get(code)
    if name is None:
        path = os.path.realpath(code.co_filename)
        file = os.path.relpath(path, ROOT) if path.startswith(f"{ROOT}{os.sep}") else ""
        name = _CODES[code] = f"{file}:{code.co_name}" if file.startswith(CORE) else ""
    if name:
        _reached.add(name)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _reached.clear()
    before = time.process_time()
    threading.settrace(_note)  # type: ignore[arg-type]
    sys.settrace(_note)  # type: ignore[arg-type]
    yield
    sys.settrace(None)
    threading.settrace(None)  # type: ignore[arg-type]
    line = {"test": item.nodeid, "seconds": time.process_time() - before, "functions": sorted(_reached)}
    with (FOLDER / f"{os.environ.get('PYTEST_XDIST_WORKER', 'all')}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
