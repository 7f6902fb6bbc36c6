"""How methods of vLLM are wrapped: by name, once a process, and the original is called with what it was called with."""

from __future__ import annotations

import contextlib
import functools
import logging
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


def harmless(around: Callable[..., Any], refuse: Callable[..., None] | None = None) -> Callable[..., Any]:
    """The same, for methods that serve all requests: if `around` fails, the original does its work alone.

    refuse: tells those who ask. It is called with the reason, the original's result and arguments; before the original, too, if
        that has not run yet, with None for the result.
    """

    def tell(*args: Any) -> None:
        if refuse is not None:
            with contextlib.suppress(Exception):
                refuse(*args)

    @functools.wraps(around)
    def method(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        results: list[Any] = []
        raised: list[BaseException] = []

        def noted(*some: Any, **named: Any) -> Any:
            try:
                results.append(original(*some, **named))
            except BaseException as error:
                raised.append(error)
                raise
            return results[-1]

        try:
            return around(noted, *args, **kwargs)
        except Exception as error:
            if error in raised:
                raise
            reason = fault(error)
        if not results:
            tell(reason, None, *args)
            results.append(original(*args, **kwargs))
        tell(reason, results[-1], *args)
        return results[-1]

    return method


def fault(error: Exception) -> str:
    """Why there are no numbers, after an error of this package; its traceback goes to vLLM's log."""
    logging.getLogger("vllm.vlattn").error("vlattn_vllm failed; vLLM goes on", exc_info=error)
    return f"vlattn_vllm failed ({type(error).__name__}: {error}); the log has more"
