"""The machine as a library: compiles ptx/machine/*.cpp at the first use, which takes a minute or two, and keeps it.

PTX_CACHE names the folder for it; in a clone it is build/ptx/ beside pyproject.toml, for an installed package ptx-run/ in the
user's cache.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "machine"
PROJECT = SOURCES.parents[1] / "pyproject.toml"  # not installed


def _folder() -> Path:
    if "PTX_CACHE" in os.environ:
        return Path(os.environ["PTX_CACHE"]).absolute()
    if PROJECT.exists():
        return PROJECT.parent / "build" / "ptx"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptx-run"


BUILD = _folder()
# Sums stay as they are written (no fma of our own making), memory is read by any type.
FLAGS = "-std=c++20 -O3 -march=native -ffp-contract=off -fno-strict-aliasing -fPIC -Wall -Wextra".split()


def _compiler() -> str:
    name = os.environ.get("CXX", "g++")
    compiler = shutil.which(name)
    if compiler is None:
        raise RuntimeError(
            f"ptx compiles its emulator at the first use, and finds no {name}: install g++, or name a compiler in CXX"
        )
    return compiler


@cache
def _environment() -> bytes:
    """What the objects depend on beside their sources: compiler, flags and, because of -march=native, the processor."""
    version = subprocess.run([_compiler(), "--version"], capture_output=True, check=True).stdout
    processor = b""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})).encode()
    return version + " ".join(FLAGS).encode() + platform.machine().encode() + processor


def _key(*sources: Path) -> str:
    digest = hashlib.sha256(_environment())
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the machine of ptx does not compile:\n{' '.join(map(str, command))}\n{done.stderr}")


def _included(source: Path) -> set[Path]:
    """The headers that a source includes, and those that they include."""
    headers: set[Path] = set()
    left = [source]
    while left:
        names = re.findall(r'(?m)^#include "([^"]+)"', left.pop().read_text())
        fresh = {source.with_name(name) for name in names} - headers
        headers |= fresh
        left += fresh
    return headers


def _object(source: Path) -> Path:
    """The compiled source, which other processes may look for: it appears whole or not at all."""
    target = BUILD / f"{source.stem}-{_key(source, *sorted(_included(source)))}.o"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        _run(_compiler(), *FLAGS, "-c", source, "-o", unfinished)
        unfinished.replace(target)
    return target


def build(sources: Path = SOURCES) -> Path:
    """The library's path. One process compiles, the others wait for it."""
    files, headers = sorted(sources.glob("*.cpp")), sorted(sources.glob("*.h"))
    target = BUILD / f"machine-{_key(*files, *headers)}.so"
    if target.exists():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(_object, files))
            unfinished = target.with_suffix(f".{os.getpid()}")
            _run(_compiler(), "-shared", *objects, "-o", unfinished)
            unfinished.replace(target)
            _forget({target, *objects})
    return target


def _forget(used: set[Path]) -> None:
    """Removes all but the newest few libraries and objects, which edits of the sources leave behind."""
    kept = sorted((path for path in BUILD.iterdir() if path.suffix in (".so", ".o")), key=lambda path: path.stat().st_mtime)
    for path in kept[:-100]:
        if path not in used:
            path.unlink()


@cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build()))
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    signatures = {
        "ptx_load": (pointer, [text, ctypes.c_int, pointer, ctypes.c_int64, text]),
        "ptx_error": (text, [pointer]),
        "ptx_hits": (ctypes.POINTER(ctypes.c_uint64), [pointer]),
        "ptx_free": (None, [pointer]),
        "ptx_launch": (ctypes.c_int, [pointer, pointer]),
        "ptx_handlers": (text, []),
        "ptx_kinds": (text, []),
        "ptx_call_members": (text, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def handlers() -> set[str]:
    """The names of all handlers that the machine has."""
    return set(library().ptx_handlers().decode().split())
