"""A data set for `probe` from a file of JSON lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlattn_fast.interpret.explaining.loading import build_inputs, json_lines, on_device
from vlattn_fast.interpret.probing.labels import KEYS, read_item
from vlattn_fast.interpret.result.figures.photos import open_image

_COLUMNS = ("image", "text", *KEYS)
SUFFIXES = (".jsonl", ".ndjson")


def samples(model: Any, processor: Any, source: str | Path) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """(inputs, labels) of each line, which has "text", "image" (a path relative to the file's folder), and labels as in `probe`.

    `source` is the file, or a folder with one such file. ValueError if it is neither, is empty, or has an invalid line.
    """
    source = Path(source)
    if source.is_dir():
        files = sorted(file for file in source.iterdir() if file.suffix in SUFFIXES)
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise ValueError(f"dataset must be a folder with one .jsonl file, or the file; got {names} in {source}")
        source = files[0]
    if source.suffix not in SUFFIXES or not source.is_file():
        raise ValueError(f"dataset must be a .jsonl file, or a folder with one; got {source}")
    number = 0
    for number, entry in json_lines(source):
        _check(entry, number)
        labels = {name: entry[name] for name in KEYS if entry.get(name) is not None}
        try:
            picture = None if entry.get("image") is None else open_image(source.parent / entry["image"])
            inputs = on_device(build_inputs(model, processor, picture, [entry["text"]]), model)
            read_item((inputs, labels))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error}, in line {number} of the dataset") from error
        yield inputs, labels
    if not number:
        raise ValueError(f"dataset must have at least one line; got none in {source}")


def _check(entry: Any, number: int) -> None:
    """ValueError unless a line is a valid sample."""
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise ValueError(f"dataset must have a JSON object with a text in line {number}; got {entry!r}")
    if not isinstance(entry.get("image"), str | None):
        raise ValueError(f"dataset must have a path as image in line {number}; got {entry['image']!r}")
    if unknown := [name for name in entry if name not in (*_COLUMNS, "id")]:
        raise ValueError(f"dataset must have columns among {', '.join(_COLUMNS)} and id; got {unknown} in line {number}")
