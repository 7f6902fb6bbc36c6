"""Releases of Triton that lack what a test needs."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

import pytest


def _is_before(major: int, minor: int) -> bool:
    """Whether an older Triton is installed."""
    try:
        numbers = re.findall(r"\d+", version("triton"))
    except PackageNotFoundError:
        return False
    return (int(numbers[0]), int(numbers[1])) < (major, minor)


needs_fences = pytest.mark.skipif(_is_before(3, 8), reason="Triton before 3.8 leaves out fences on sm_90 and has races on sm_100")
needs_sanitizers = pytest.mark.skipif(_is_before(3, 9), reason="Triton before 3.9 has no FpSan, or other numbers in it")
