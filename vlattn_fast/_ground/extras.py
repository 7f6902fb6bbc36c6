"""Optional packages, the extra that installs each, and the progress bars of tqdm."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO, TypeVar

T = TypeVar("T")
SECONDS = 2.0  # of a call before its bar appears
MINUTE = 60.0  # between two lines of a log file
_bars: ContextVar[bool] = ContextVar("_bars", default=True)


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Returns a context that reports a missing package with the extra of vlattn_fast that installs it.

    Raises:
        ModuleNotFoundError: naming the package and the command that installs it.
        ImportError: transformers' own, with its cause, if a package that it imports is there and fails.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        if missing.name is None:
            said = str(missing).partition(". ")[0]
            raise ImportError(
                f"{said}: {missing.__cause__}. `vlattn info` shows packages that do not fit each other"
            ) from missing
        command = f"pip install 'vlattn_fast[{name}]'"
        raise ModuleNotFoundError(f"{missing.name} is needed here and not installed: {command}", name=missing.name) from missing


def missing(package: str, *lowest: int) -> str:
    """Returns why `package` cannot be used, without importing it: it is not installed, or older than `lowest`; else empty."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # installed under another name, such as nightly builds
        return ""
    old = tuple(map(int, re.findall(r"\d+", version)[: len(lowest)])) < lowest
    return f"{package} {version} is installed, and {'.'.join(map(str, lowest))} or newer is needed" if old else ""


def with_progress(items: Iterable[T], what: str, **options: Any) -> Iterable[T]:
    """Returns `items`, with a progress bar that appears after two seconds; `options` are tqdm's.

    Bars are drawn on a terminal or in a notebook, if tqdm is installed; elsewhere, such as in a log file, a line is written each
    minute. `without_progress` and TQDM_DISABLE=1 in the environment switch all of them off.
    """
    bar = _bar(items, what, options)
    return items if bar is None else bar


@contextlib.contextmanager
def progress(what: str, **options: Any) -> Iterator[Callable[[int], None]]:
    """Returns a context with such a bar; it yields the function that sets its count."""
    bar = _bar(None, what, options)
    if bar is None:
        yield lambda count: None
        return
    with bar:
        yield lambda count: bar.update(count - bar.n)


@contextlib.contextmanager
def without_progress() -> Iterator[None]:
    """Returns a context in which no call shows a bar."""
    token = _bars.set(False)
    try:
        yield
    finally:
        _bars.reset(token)


def _bar(items: Any, what: str, options: dict[str, Any]) -> Any:
    """Returns tqdm's bar; None if bars are switched off or tqdm is not installed."""
    if not _bars.get() or os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        return None
    with contextlib.suppress(ModuleNotFoundError):
        from tqdm.auto import tqdm

        if not sys.stderr.isatty() and tqdm.__name__ == "tqdm_asyncio":  # not that of a notebook
            lines: Any = _Lines(sys.stderr)
            return tqdm(items, desc=what, file=lines, delay=MINUTE, mininterval=MINUTE, maxinterval=MINUTE, **options)
        return tqdm(items, desc=what, disable=None, delay=SECONDS, **options)  # None = only if stderr is a terminal
    return None


class _Lines:
    """A file in which each state of a bar is a line."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.last = file, ""

    def write(self, text: str) -> None:
        shown = text.replace("\x1b[A", "").strip()
        if shown not in ("", self.last):
            self.last = shown
            self.file.write(f"{shown}\n")

    def flush(self) -> None:
        self.file.flush()


def warn_of_two_trees() -> None:
    """Warns if this is a clone and its kernels would come from another one, such as one that is installed in editable mode: a
    clone has them next to the package's folder, where Python does not look."""
    here = Path(__file__).resolve().parents[2] / "kernels" / "__init__.py"
    spec = importlib.util.find_spec(f"vlattn_fast.{here.parent.name}") if here.exists() else None
    if spec is not None and spec.origin is not None and (there := Path(spec.origin).resolve()) != here:
        warnings.warn(
            f"vlattn_fast comes from {here.parents[1]}, and its Triton kernels and benchmarks from {there.parents[1]}, which is "
            f"installed in editable mode. Run `pip install -e {here.parents[1]}`, so that both come from one folder",
            stacklevel=3,
        )
