"""Optional packages, and the extra that installs each."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
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


def missing(package: str, *lowest: int) -> str:
    """Why `package` cannot be used, without an import of it: it is not installed, or older than `lowest`; else empty."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # installed under another name, as nightly builds are
        return ""
    old = tuple(map(int, re.findall(r"\d+", version)[: len(lowest)])) < lowest
    return f"{package} {version} is installed, and {'.'.join(map(str, lowest))} or newer is needed" if old else ""


def with_progress(items: Iterable[T], what: str, **options: Any) -> Iterable[T]:
    """`items`, with a progress bar on a terminal where tqdm is installed; `options` are tqdm's."""
    with contextlib.suppress(ModuleNotFoundError):
        from tqdm import tqdm

        bar: Iterable[T] = tqdm(items, desc=what, disable=None, **options)
        return bar
    return items
