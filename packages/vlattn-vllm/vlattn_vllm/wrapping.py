"""How methods of vLLM are wrapped: by name, once a process, and the original is called with what it was called with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

WRAPPED: list[tuple[Any, str]] = []  # in this process


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Puts `around(original, *args, **kwargs)` in the place of a method. A second time changes nothing."""
    original = getattr(owner, name)
    if getattr(original, "__vlattn__", False):
        return

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    method.__vlattn__ = True  # type: ignore[attr-defined]
    setattr(owner, name, method)
    WRAPPED.append((owner, name))
