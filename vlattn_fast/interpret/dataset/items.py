"""The inputs of many explanations: JSON lines, CSV, a folder of images, or a Hugging Face dataset saved on disk."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlattn_fast._ground.extras import extra
from vlattn_fast.interpret.explaining.loading import json_lines, open_lines
from vlattn_fast.interpret.result.pictures.photos import open_image, to_rgb

COLUMNS = ("image", "text", "target", "answer", "id")
BOXES = "boxes"  # a column that `evaluate` alone reads
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Item:
    """One input; without target and answer the command's."""

    id: str  # its name in the index
    image: Any = None  # a path; a picture, where a Hugging Face dataset holds it; or None
    texts: list[str] = field(default_factory=list)  # beside the image
    target: int | None = None
    answer: str | None = None
    boxes: Any = None  # of the parts of the picture that the answer rests on: JSON or a list; the path of a mask, or a picture
    problem: str | None = None  # why the input cannot be read, if known already

    @property
    def path(self) -> str | None:
        """The absolute path of its image, where it has one."""
        return str(Path(self.image).resolve()) if isinstance(self.image, (str, Path)) else None

    def picture(self) -> Any:
        """The picture in RGB, or None. ValueError where the image is none."""
        if self.image is None:
            return None
        if not isinstance(self.image, (str, Path)) and not hasattr(self.image, "convert"):
            raise ValueError(f"image must be a path or a picture; got {self.image!r}")
        return open_image(self.image) if isinstance(self.image, (str, Path)) else to_rgb(self.image)


class Items(Sequence[Item]):
    """The inputs of a dataset in its order. Pictures are not read.

    `source` is a .jsonl or .csv file, with paths relative to its folder; a folder of images, also in subfolders; or a folder that
    `datasets.Dataset.save_to_disk` wrote. ValueError where it is none of these, has none of the columns, or has one id twice.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = Path(source)
        self._records: Any  # a sequence of dicts, or a Hugging Face dataset, whose records are read on access
        facts: Any = None
        if self.source.is_dir():
            if any((self.source / name).exists() for name in ("state.json", "dataset_dict.json")):
                self._records, facts = _saved(self.source)
            else:
                files = (file for file in self.source.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
                names = sorted(file.relative_to(self.source).as_posix() for file in files)
                self._records = [{"image": name, "id": name} for name in names]
        elif not self.source.exists():
            raise ValueError(f"dataset must be a file or a folder; got {self.source}, which is not there")
        elif self.source.suffix == ".csv":
            self._records = _csv(self.source)
        elif self.source.suffix in (".jsonl", ".ndjson"):
            self._records = _from_json(self.source)
        else:
            raise ValueError(f"dataset must end in .csv or .jsonl, or be a folder; got {self.source.name}")
        digest, seen = hashlib.sha256(), set()
        self.parts: set[tuple[bool, bool]] = set()  # of its readable inputs: whether they have a picture, and a text
        for number, record in enumerate(self._records if facts is None else facts):
            identity = _id(record, number)
            if identity in seen:
                raise ValueError(f"id must be unique; got {identity!r} twice in {self.source}")
            seen.add(identity)
            if "problem" not in record:
                image = "image" in self._records.column_names if facts is not None else _filled(record, "image") is not None
                self.parts.add((image, bool(_filled(record, "text"))))
            digest.update(json.dumps([identity, *(str(record.get(name)) for name in COLUMNS)]).encode())
        if not seen:
            raise ValueError(f"dataset must have at least one input; got none in {self.source}")
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        record = self._records[number]
        identity = _id(record, number)
        if "problem" in record:
            return Item(identity, problem=record["problem"])
        image, texts, target, answer = (_filled(record, name) for name in COLUMNS[:-1])
        texts = [] if texts is None else [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return Item(identity, problem=f"text must be a text or a list of texts; got {texts!r}")
        if answer is not None and not isinstance(answer, str):
            return Item(identity, problem=f"answer must be a text; got {answer!r}")
        if isinstance(target, str) and target.strip().lstrip("-").isdecimal():
            target = int(target)
        if target is not None and (not isinstance(target, int) or isinstance(target, bool)):
            return Item(identity, problem=f"target must be an int; got {target!r}")
        folder, boxes = self.source if self.source.is_dir() else self.source.parent, _filled(record, BOXES)
        if isinstance(image, str):
            image = folder / image
        if isinstance(boxes, str) and not boxes.lstrip().startswith("["):
            boxes = folder / boxes
        return Item(identity, image, texts, target, answer, boxes)


def _filled(record: Mapping[str, Any], name: str) -> Any:
    value = record.get(name)
    return None if isinstance(value, str) and not value else value


def _id(record: Mapping[str, Any], number: int) -> str:
    identity = _filled(record, "id")
    return str(number if identity is None else identity)


def _check_columns(names: Sequence[str], source: Path) -> None:
    if not {"image", "text"} & set(names):
        raise ValueError(f"dataset must have a column image or text; got {', '.join(names)} in {source}")


def _csv(source: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    with open_lines(source) as lines:
        reader = csv.DictReader(lines, strict=True)  # else an open quote swallows all later lines
        try:
            names = reader.fieldnames or []
            _check_columns(names, source)
            for record in reader:
                if None in record:  # a comma in an unquoted text
                    expected, got = f"{len(names)} fields, as the first one", len(names) + len(record[None])
                    problem = f"line {reader.line_num} must have {expected}; got {got}"
                    records.append({"id": record.get("id"), "problem": problem})
                else:
                    records.append({name: record.get(name) for name in (*COLUMNS, BOXES)})
        except csv.Error as error:
            raise ValueError(f"dataset must be CSV; got {source}, line {reader.line_num}: {error}") from None
    return records


def _from_json(source: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for number, record in json_lines(source):
        if isinstance(record, dict):
            records.append({name: record.get(name) for name in (*COLUMNS, BOXES)})
        else:
            records.append({"problem": f"line {number} must be a JSON object; got {record!r}"})
    if records and not any(record.get("image") is not None or record.get("text") is not None for record in records):
        got = next((record["problem"] for record in records if "problem" in record), "neither")
        raise ValueError(f"dataset must have a column image or text; got {got} in {source}")
    return records


def _saved(source: Path) -> tuple[Any, Any]:
    """The records of a Hugging Face dataset, and the same without pictures."""
    with extra("datasets"):
        import datasets

    records = datasets.load_from_disk(str(source))
    if hasattr(records, "keys"):
        raise ValueError(f"dataset must be one split; got {', '.join(records.keys())}: name the folder of one, {source}/...")
    _check_columns(records.column_names, source)
    names = [name for name in (*COLUMNS, BOXES) if name in records.column_names]
    facts = [name for name in names if name != "image"]
    return records.select_columns(names), records.select_columns(facts) if facts else [{}] * len(records)
