"""Optional packages, and the extra that installs each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """A context in which a missing package is reported with the extra of vlattn_fast that installs it.

    Raises:
        ModuleNotFoundError: naming the package and the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        command = f"pip install 'vlattn_fast[{name}]'"
        raise ModuleNotFoundError(f"{missing.name} is needed here and not installed: {command}", name=missing.name) from missing


def with_progress(items: Iterable[T], what: str, **options: Any) -> Iterable[T]:
    """`items`, with a progress bar on a terminal where tqdm is installed; `options` are tqdm's."""
    with contextlib.suppress(ModuleNotFoundError):
        from tqdm import tqdm

        bar: Iterable[T] = tqdm(items, desc=what, disable=None, **options)
        return bar
    return items
