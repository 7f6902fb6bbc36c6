"""Files of tensors, written with the usual rights, and read with errors that name the file."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from vlattn_fast._ground.extras import extra


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes safetensors to `path` with the rights of the umask; safetensors itself gives rights only to the owner.
    OSError if the file cannot be written, e.g. on a full disk: `path` keeps its earlier content."""
    with extra("explain"):
        from safetensors import SafetensorError
        from safetensors.torch import save_file

    existed = path.exists()
    path.touch()
    try:
        rights = stat.S_IMODE(path.stat().st_mode)
        save_file(tensors, path, metadata=metadata)
        path.chmod(rights)
    except SafetensorError as error:
        if not existed:
            path.unlink(missing_ok=True)
        number = int(code[1]) if (code := re.search(r"os error (\d+)", str(error))) else 0
        raise OSError(number, os.strerror(number) if number else str(error), str(path)) from error


@contextlib.contextmanager
def open_tensors(path: Path, message: str) -> Iterator[Any]:
    """The safetensors file at `path`. ValueError with `message` and the reason if `path` is another or a truncated file."""
    with extra("explain"):
        from safetensors import SafetensorError, safe_open

    if path.is_dir():
        raise ValueError(f"{message}, which is a directory")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{message}: {type(error).__name__}: {error}") from error
