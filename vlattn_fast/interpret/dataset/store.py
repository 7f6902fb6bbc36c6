"""A directory of explanations: shards of safetensors, and for each shard a file with the lines of its finished inputs.

A file is written under another name, synchronised and renamed. A shard counts once its lines exist, so a later run writes over
the half-written files of a killed one. A shard that was truncated or deleted later, or whose header was damaged, does not count
either.

    settings.json           the options that decide the results
    shards/R-N.safetensors  the N-th shard of rank R: tensors "<item>/<key>", and in the header the metadata of each item
    shards/R-N.jsonl        its lines: {"item", "id", "image", "digest" of the input}, and with {"text", "error"} instead of the
                            digest for an input that failed; then {"seal"}
    failures.jsonl          the inputs that failed, written when a run ends
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vlattn_fast.interpret.dataset.pieces import pack
from vlattn_fast.interpret.result.explanation import Explanation
from vlattn_fast.interpret.result.numbers.tensor_files import write_tensors

FORMAT = "vlattn_fast.explanations.2"
_HALF = re.compile("[\ud800-\udfff]")
SETTINGS, FAILURES, SHARDS = "settings.json", "failures.jsonl", "shards"


def write_text(path: Path, text: str) -> None:
    """Writes a whole file, or nothing."""
    with _published(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _published(path: Path) -> Iterator[Path]:
    """The temporary name under which `path` is written. A failure removes the file, which would fill a full disk further."""
    unfinished = _unfinished(path)
    try:
        yield unfinished
        _publish(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _publish(unfinished: Path, path: Path) -> None:
    _synchronise(unfinished)
    unfinished.replace(path)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _synchronise(path.parent)


def _synchronise(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_lines(entries: list[dict[str, Any]]) -> str:
    """JSON lines; half characters, as in names of files, are escaped."""
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    escaped = (json.dumps(entry) if _HALF.search(line) else line for entry, line in zip(entries, lines, strict=True))
    return "".join(line + "\n" for line in escaped)


def read_settings(directory: Path, form: str = FORMAT) -> dict[str, Any] | None:
    """The settings of a directory of this format, if any."""
    try:
        settings = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or settings.get("format") != form:
        writer = "`vlattn explain --dataset`" if form == FORMAT else "an earlier run"
        raise ValueError(f"directory must be one that {writer} wrote ({form}); got {directory}")
    return settings


def check_settings(directory: Path, settings: Mapping[str, Any], digests: Sequence[str] | None = None) -> None:
    """ValueError if `directory` was begun with other options, or holds something else, or explains an input that the dataset
    with these `digests` does not have. Inputs that failed may have been corrected, and others added."""
    there = read_settings(directory, settings.get("format", FORMAT))
    if there is None:
        # A run that was killed early may have left half-written settings.
        begun = {_unfinished(directory / SETTINGS)}
        if directory.exists() and (not directory.is_dir() or set(directory.iterdir()) - begun):
            raise ValueError(f"out must be a new or an empty directory, or one of an earlier run; got {directory}")
        return
    shards = list(finished(directory)) if settings.get("format") == FORMAT else []
    explained = [line for shard in shards if shard.fault is None for line in shard.lines if "error" not in line]
    if settings.get("format") == FORMAT and not explained:
        return  # every input failed: the run begins anew, with corrected options, too
    for name in dict.fromkeys(("format", "method", *sorted({*there, *settings}))):  # the method's options come after it
        if there.get(name) != settings.get(name):
            if name == "dataset":  # the settings hold only its digest
                raise ValueError(f"dataset must be the one of the earlier runs in {directory}; got another or a changed one")
            was, now = (json.dumps(one.get(name), ensure_ascii=False) for one in (there, settings))
            raise ValueError(
                f"{name} must be {was}, as in the earlier runs in {directory}; got {now}. Or pass another folder as out"
            )
    for line in explained if digests is not None else ():
        if [line.get("digest")] != (digests or [])[line["item"] : line["item"] + 1]:
            same = f"number {line['item']} is still {line['id']!r}, unchanged"
            raise ValueError(f"dataset must be one whose input {same}, since {directory} explains it; got another. Change out")


Line = dict[str, Any]  # of an item, in a shard's lines


class Shard(NamedTuple):
    """A shard with lines: its name without an ending, its lines, and why it cannot be read (None = readable)."""

    name: str
    lines: list[Line]
    fault: str | None


def finished(directory: Path) -> Iterator[Shard]:
    """The shards with lines, in the order of their names."""
    for path in sorted((directory / SHARDS).glob("*.jsonl")):
        try:
            with path.open(encoding="utf-8") as text:  # splitlines() also splits at characters of texts, such as U+2028
                lines = [json.loads(line) for line in text]
        except ValueError:
            yield Shard(path.stem, [], f"{path} is broken")
            continue
        shard, seal = path.with_suffix(".safetensors"), lines.pop()["seal"] if lines and "seal" in lines[-1] else None
        whole = all("error" in line for line in lines) or seal is not None and seal == _seal(shard)
        yield Shard(path.stem, lines, None if whole else f"{shard} is truncated, damaged or missing")


def stored_items(directory: Path, broken: Callable[[str], Exception]) -> tuple[list[tuple[str, Line]], list[Line]]:
    """The lines of the items in the order of the dataset, each with the name of its shard, and those of failures whose items have
    no other line.

    Raises:
        broken(fault): a shard is truncated, damaged or missing.
    """
    items: dict[int, tuple[str, Line]] = {}
    failures: dict[int, Line] = {}
    for name, lines, fault in finished(directory):
        if fault is not None:
            raise broken(fault)
        for line in lines:
            if "error" in line:
                failures[line["item"]] = line
            else:
                items.setdefault(line["item"], (name, line))
    return [items[item] for item in sorted(items)], [failures[item] for item in sorted(failures) if item not in items]


def _seal(shard: Path) -> str | None:
    """The size of a file of safetensors and the sum of its header, None without the file: to open thousands of files would take
    minutes."""
    try:
        with shard.open("rb") as file:
            size, length = shard.stat().st_size, file.read(8)
            return f"{size} {zlib.crc32(length + file.read(min(size, int.from_bytes(length, 'little')))):08x}"
    except FileNotFoundError:
        return None


def clean(directory: Path) -> list[Shard]:
    """Removes half-written files of a killed run and unreadable shards; returns the readable shards."""
    shards = list(finished(directory))
    for shard in shards:
        if shard.fault is not None:
            warnings.warn(f"{shard.fault}; its inputs are explained again", stacklevel=2)
            (directory / SHARDS / f"{shard.name}.jsonl").unlink()
    for path in (directory / SHARDS).iterdir():
        if path.suffix == ".tmp" or (path.suffix == ".safetensors" and not path.with_suffix(".jsonl").exists()):
            path.unlink()
    return [shard for shard in shards if shard.fault is None]


@contextlib.contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[None]:
    """A context that locks a file or folder against other processes. The lock ends with the process.

    A shared lock waits, and others of its kind share it. ValueError if the lock is exclusive and another process holds one.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        where = path if path.is_dir() else path.parent
        raise ValueError(
            f"out must not be written by another run; got {where}. Wait until that run ends, or pass another out"
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(handle)


def begin(out: Path, settings: dict[str, Any], stack: contextlib.ExitStack, digests: Sequence[str] | None = None) -> set[int]:
    """Makes or resumes the directory and locks it; returns the numbers of the finished items.

    The first rank locks the directory for itself. The other ranks share a lock of the settings, so no run begins if the first
    rank dies.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(out))
        check_settings(out, settings, digests)  # again: another run may have begun while the model was loaded
        if read_settings(out, settings["format"]) != settings:
            write_text(out / SETTINGS, to_lines([settings]))
    except OSError as error:
        raise ValueError(f"out must be a directory that can be written; got {out}: {error.strerror}") from error
    with locked(out / SETTINGS):
        (out / SHARDS).mkdir(exist_ok=True)
        return {line["item"] for shard in clean(out) for line in shard.lines if "error" not in line}


class ShardWriter:
    """The explanations of one rank, and the lines of its inputs, which `flush` writes."""

    def __init__(self, directory: Path, rank: int) -> None:
        self.folder, self.rank = directory / SHARDS, rank
        self._number = 0
        self._tensors: dict[str, Tensor] = {}
        self._metadata: dict[str, str] = {}
        self.lines: list[dict[str, Any]] = []

    def add(self, item: int, identity: str, image: str | None, digest: str, explanation: Explanation) -> None:
        self.put(item, identity, image, *pack(explanation))
        self.lines[-1]["digest"] = digest

    def put(self, item: int, identity: str, image: str | None, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        self._tensors |= {f"{item}/{place}": value for place, value in tensors.items()}
        self._metadata[str(item)] = json.dumps(metadata)
        self.lines.append({"item": item, "id": identity} | ({} if image is None else {"image": image}))

    def flush(self) -> None:
        """Writes the shard, then its lines. OSError if a file cannot be written, e.g. on a full disk."""
        if not self.lines:
            return
        while (lines := self.folder / f"{self.rank:05}-{self._number:06}.jsonl").exists():
            self._number += 1
        if self._metadata:
            shard = lines.with_suffix(".safetensors")
            with _published(shard) as unfinished:
                write_tensors(unfinished, self._tensors, self._metadata)
            self.lines.append({"seal": _seal(shard)})
        write_text(lines, to_lines(self.lines))
        self._tensors, self._metadata, self.lines = {}, {}, []
