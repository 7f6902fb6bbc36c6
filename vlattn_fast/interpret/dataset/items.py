"""The inputs of many explanations: JSON lines, CSV, a folder of images, a Hugging Face dataset saved on disk, or mappings in
memory."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.extras import extra
from vlattn_fast.interpret.explaining.loading import json_lines, open_lines
from vlattn_fast.interpret.result.figures.photos import open_image, to_rgb

COLUMNS = ("image", "text", "target", "answer", "id")
TRUTHS = ("boxes", "text_truth")  # columns that only `evaluate` reads
_READ = (*COLUMNS, *TRUTHS)
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Item:
    """One input; without target and answer it has those of the command."""

    id: str  # its name in the index
    image: Any = None  # a path; an image that a Hugging Face dataset holds; or None
    texts: list[str] = field(default_factory=list)  # besides the image
    target: int | None = None
    answer: Any = None  # a text, or token ids
    boxes: Any = None  # of the parts of the image that the answer rests on: JSON or a list; the path of a mask, or an image
    text_truth: Any = None  # of the text: JSON or a list of words or of columns
    problem: str | None = None  # why the input cannot be used, if known already
    inputs: Mapping[str, Any] | None = None  # the model's, if they are given in place of image and texts

    @property
    def path(self) -> str | None:
        """The absolute path of its image, or None."""
        return str(Path(self.image).resolve()) if isinstance(self.image, (str, Path)) else None

    def load_image(self) -> Any:
        """The image in RGB, or None. ValueError if it cannot be read."""
        if self.image is None:
            return None
        if not isinstance(self.image, (str, Path)) and not hasattr(self.image, "convert"):
            raise ValueError(f"image must be a path or an image; got {self.image!r}")
        return open_image(self.image) if isinstance(self.image, (str, Path)) else to_rgb(self.image)


class Items(Sequence[Item]):
    """The inputs of a dataset in its order. Images are not read.

    `source` is a .jsonl or .csv file, with paths relative to its folder; a folder of images, also in subfolders; a folder that
    `datasets.Dataset.save_to_disk` wrote; or mappings, with these columns or with the model's inputs. ValueError if it is none of
    these, has none of the columns, or has one id twice.
    """

    def __init__(self, source: str | Path | Iterable[Mapping[str, Any]]) -> None:
        self.source = Path(source) if isinstance(source, (str, Path)) else Path()
        self._entries: Any  # a sequence of dicts, or a Hugging Face dataset, whose entries are read on access
        without_images: Any = None
        if not isinstance(source, (str, Path)):
            self._entries = [_in_memory(entry) for entry in source]
        elif self.source.is_dir():
            if any((self.source / name).exists() for name in ("state.json", "dataset_dict.json")):
                self._entries, without_images = _saved(self.source)
            else:
                files = (file for file in self.source.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
                names = sorted(file.relative_to(self.source).as_posix() for file in files)
                self._entries = [{"image": name, "id": name} for name in names]
        elif not self.source.exists():
            raise ValueError(f"dataset must be a file or a folder; got {self.source}, which does not exist")
        elif self.source.suffix == ".csv":
            self._entries = _csv(self.source)
        elif self.source.suffix in (".jsonl", ".ndjson"):
            self._entries = _from_json(self.source)
        else:
            raise ValueError(f"dataset must end in .csv or .jsonl, or be a folder; got {self.source.name}")
        self.digests: list[str] = []  # of each input, by which a later run knows it
        ids = set()
        self.parts: set[tuple[bool, bool]] = set()  # of its readable inputs: whether they have an image, and a text
        for number, entry in enumerate(self._entries if without_images is None else without_images):
            identity = _id(entry, number)
            if identity in ids:
                raise ValueError(f"id must be unique; got {identity!r} twice in {self.source}")
            ids.add(identity)
            if "problem" not in entry:
                has_column = without_images is not None and "image" in self._entries.column_names
                image = has_column or (without_images is None and _filled(entry, "image") is not None)
                if "inputs" not in entry:
                    self.parts.add((image, bool(_filled(entry, "text"))))
            self.digests.append(_digest(identity, entry))
        if not ids:
            where = f" in {source}" if isinstance(source, (str, Path)) else ""
            raise ValueError(f"dataset must have at least one input; got none{where}")

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        entry = self._entries[number]
        identity = _id(entry, number)
        if "problem" in entry:
            return Item(identity, problem=entry["problem"])
        image, texts, target, answer = (_filled(entry, name) for name in COLUMNS[:-1])
        texts = [] if texts is None else [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return Item(identity, problem=f"text must be a text or a list of texts; got {texts!r}")
        if answer is not None and not isinstance(answer, str) and "inputs" not in entry:
            return Item(identity, problem=f"answer must be a text; got {answer!r}")
        if isinstance(target, str) and target.strip().lstrip("-").isdecimal():
            target = int(target)
        if target is not None and (not isinstance(target, int) or isinstance(target, bool)):
            return Item(identity, problem=f"target must be an int; got {target!r}")
        folder = self.source if self.source.is_dir() else self.source.parent
        boxes, text_truth = (_filled(entry, name) for name in TRUTHS)
        if isinstance(image, str):
            image = folder / image
        if isinstance(boxes, str) and not boxes.lstrip().startswith("["):
            boxes = folder / boxes
        return Item(identity, image, texts, target, answer, boxes, text_truth, inputs=entry.get("inputs"))


def _in_memory(entry: Any) -> dict[str, Any]:
    """An entry with columns; "inputs" holds those of the model: under that name, or beside the columns, as a DataLoader gives
    them."""
    if not isinstance(entry, Mapping):
        raise TypeError(
            f"dataset must give mappings, with the columns {', '.join(COLUMNS)} or the model's inputs; got {entry!r:.80}"
        )
    columns = {name: entry.get(name) for name in _READ}
    if (inputs := entry.get("inputs")) is not None:
        if not isinstance(inputs, Mapping) or not any(isinstance(x, Tensor) for x in inputs.values()):
            raise TypeError(f"inputs must be a mapping with the model's tensors; got {type(inputs).__name__}")
        return {**columns, "inputs": inputs}
    inputs = {name: x for name, x in entry.items() if name not in columns}
    if any(isinstance(x, Tensor) for x in inputs.values()):
        return {**columns, "inputs": inputs}
    if columns["image"] is None and columns["text"] is None:
        raise ValueError(
            f"dataset must give an image, a text or tensors in each mapping; got {', '.join(map(str, entry)) or 'none'}"
        )
    return columns


def _digest(identity: str, entry: Mapping[str, Any]) -> str:
    """A hash by which a later run knows an input: of the columns, and of the numbers of tensors and of images in memory."""
    digest = hashlib.sha256(json.dumps([identity, *(str(entry.get(name)) for name in COLUMNS if name != "image")]).encode())
    image: Any = entry.get("image")
    digest.update(image.tobytes() if hasattr(image, "tobytes") else json.dumps(str(image)).encode())
    for name, x in sorted((entry.get("inputs") or {}).items()):
        digest.update(name.encode())
        plain = (
            x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            if isinstance(x, Tensor)
            else repr(x).encode()
        )
        digest.update(plain)
    return digest.hexdigest()[:16]


def _filled(entry: Mapping[str, Any], name: str) -> Any:
    value = entry.get(name)
    return None if isinstance(value, str) and not value else value


def _id(entry: Mapping[str, Any], number: int) -> str:
    identity = _filled(entry, "id")
    return str(number if identity is None else identity)


def _check_columns(names: Sequence[str], source: Path) -> None:
    if not {"image", "text"} & set(names):
        raise ValueError(f"dataset must have a column image or text; got {', '.join(names)} in {source}")


def _csv(source: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    with open_lines(source) as lines:
        reader = csv.DictReader(lines, strict=True)  # else an open quote swallows all later lines
        try:
            names = reader.fieldnames or []
            _check_columns(names, source)
            for entry in reader:
                if None in entry:  # a comma in an unquoted text
                    expected, got = f"{len(names)} fields, as the first line", len(names) + len(entry[None])
                    problem = f"line {reader.line_num} must have {expected}; got {got}"
                    entries.append({"id": entry.get("id"), "problem": problem})
                else:
                    entries.append({name: entry.get(name) for name in _READ})
        except csv.Error as error:
            raise ValueError(f"dataset must be CSV; got {source}, line {reader.line_num}: {error}") from None
    return entries


def _from_json(source: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for number, entry in json_lines(source):
        if isinstance(entry, dict):
            entries.append({name: entry.get(name) for name in _READ})
        else:
            entries.append({"problem": f"line {number} must be a JSON object; got {entry!r}"})
    if entries and not any(entry.get("image") is not None or entry.get("text") is not None for entry in entries):
        got = next((entry["problem"] for entry in entries if "problem" in entry), "neither")
        raise ValueError(f"dataset must have a column image or text; got {got} in {source}")
    return entries


def _saved(source: Path) -> tuple[Any, Any]:
    """The entries of a Hugging Face dataset, and the same without images."""
    with extra("datasets"):
        import datasets

    entries = datasets.load_from_disk(str(source))
    if hasattr(entries, "keys"):
        raise ValueError(f"dataset must be one split; got {', '.join(entries.keys())}. Pass the folder of one, {source}/...")
    _check_columns(entries.column_names, source)
    names = [name for name in _READ if name in entries.column_names]
    without_images = [name for name in names if name != "image"]
    return entries.select_columns(names), entries.select_columns(without_images) if without_images else [{}] * len(entries)
