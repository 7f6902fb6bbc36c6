"""A directory of explanations: shards of safetensors, and beside each shard the lines that say what is finished.

A file is written under another name, synchronised and renamed. A shard counts once its lines are there, so what a killed run
leaves half-written counts for nothing, and is written over.

    settings.json           the options that decide the results, and a digest of the dataset
    shards/R-N.safetensors  the N-th shard of rank R: tensors "<item>/<place>", in the metadata the facts of each item
    shards/R-N.jsonl        its lines: {"item", "id"}, and for an input that failed also {"image", "text", "error"}
    failures.jsonl          the inputs that failed, written when a run ends
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vlattn_fast._extras import extra
from vlattn_fast.interpret.dataset.pieces import pack
from vlattn_fast.interpret.explanation import Explanation

FORMAT = "vlattn_fast.explanations.1"
SETTINGS, FAILURES, SHARDS = "settings.json", "failures.jsonl", "shards"


def write_text(path: Path, text: str) -> None:
    """Write a file that is there as a whole, or not at all."""
    unfinished = _unfinished(path)
    unfinished.write_text(text, encoding="utf-8")
    _publish(unfinished, path)


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
    return "".join(_line(entry) + "\n" for entry in entries)


def _line(entry: dict[str, Any]) -> str:
    line = json.dumps(entry, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # halves of characters, as names of files may have them: escaped they can be written
        return json.dumps(entry)
    return line


def read_settings(directory: Path) -> dict[str, Any] | None:
    """The settings of a directory; None where there are none."""
    try:
        settings = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise ValueError(f"directory must be one that `vlattn explain --dataset` wrote ({FORMAT}); got {directory}")
    return settings


def check_settings(directory: Path, settings: Mapping[str, Any]) -> None:
    """ValueError where `directory` was begun with other options, or holds something else."""
    there = read_settings(directory)
    if there is None:
        # A run that was killed as it began may have left its settings half-written.
        begun = {_unfinished(directory / SETTINGS)}
        if directory.exists() and (not directory.is_dir() or set(directory.iterdir()) - begun):
            raise ValueError(f"out must be a new or an empty directory, or one to go on with; got {directory}")
        return
    for name in sorted({*there, *settings}):
        if there.get(name) != settings.get(name):
            if name == "dataset":  # of which only a digest is known
                raise ValueError(f"dataset must be the one with which {directory} was begun; got another or a changed one")
            was, now = (json.dumps(one.get(name), ensure_ascii=False) for one in (there, settings))
            raise ValueError(f"{name} must be {was}, with which {directory} was begun; got {now}")


def finished(directory: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each shard that counts, by its name without an ending, and its lines."""
    for path in sorted((directory / SHARDS).glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:  # splitlines() also parts at characters that stand in texts, as U+2028
            yield path.stem, [json.loads(line) for line in lines]


def clean(directory: Path) -> None:
    """Remove what a killed run has left half-written."""
    for path in (directory / SHARDS).iterdir():
        if path.suffix == ".tmp" or (path.suffix == ".safetensors" and not path.with_suffix(".jsonl").exists()):
            path.unlink()


@contextlib.contextmanager
def locked(directory: Path, alone: bool) -> Iterator[None]:
    """Hold `directory` against other runs; the ranks of one share it. The lock ends with the process, however that ends.

    Args:
        alone: ValueError where any process of another run still holds it. Without: wait for this one to be let in.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    with (directory / SETTINGS).open("rb") as file:
        try:
            if alone:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_SH)  # the lock of one's own becomes a shared one
        except BlockingIOError:
            raise ValueError(f"out must be of one run at a time; got {directory}, which another run is writing to") from None
        except OSError:  # a file system without locks
            pass
        yield


class ShardWriter:
    """The explanations and failures of one rank, which `flush` makes count."""

    def __init__(self, directory: Path, rank: int) -> None:
        self.folder, self.rank = directory / SHARDS, rank
        self._number = 0
        self._tensors: dict[str, Tensor] = {}
        self._facts: dict[str, str] = {}
        self._lines: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, item: int, identity: str, explanation: Explanation) -> None:
        tensors, facts = pack(explanation)
        self._tensors |= {f"{item}/{place}": value for place, value in tensors.items()}
        self._facts[str(item)] = json.dumps(facts)
        self._lines.append({"item": item, "id": identity})

    def fail(self, line: dict[str, Any]) -> None:
        self._lines.append(line)

    def flush(self) -> None:
        """Write the shard, then its lines."""
        with extra("explain"):
            from safetensors.torch import save_file

        if not self._lines:
            return
        while (lines := self.folder / f"{self.rank:05}-{self._number:06}.jsonl").exists():
            self._number += 1
        if self._facts:
            shard = lines.with_suffix(".safetensors")
            save_file(self._tensors, _unfinished(shard), metadata=self._facts)
            _publish(_unfinished(shard), shard)
        write_text(lines, to_lines(self._lines))
        self._tensors, self._facts, self._lines = {}, {}, []
