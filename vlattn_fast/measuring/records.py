"""The files that store results of measurements, and tables of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vlattn_fast.interpret.dataset.store import write_text

Item = TypeVar("Item")
Key = TypeVar("Key")
Fact = TypeVar("Fact", bound=Mapping[str, Any])


def read_json(path: Path, fits: Callable[[Any], bool], must: str) -> Any:
    """Returns the content of a JSON file, [] without a file. Raises ValueError, which begins with `must`, if it does not fit."""
    try:
        content = json.loads(path.read_text()) if path.exists() else []
    except (OSError, ValueError):
        content = None
    if not fits(content):
        raise ValueError(f"{must}; got {path}, which holds something else")
    return content


def write_records(path: Path, records: Iterable[Mapping[str, Any]], metadata: Mapping[str, Any] | None = None) -> None:
    """Writes a JSON list with a result per line, with `metadata` an object that ends with this list. The new file replaces the
    old one at once, so that a stopped run leaves the old one."""
    text = "[\n" + ",\n".join(map(json.dumps, records)) + "\n]"
    if metadata is not None:
        lines = (f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in metadata.items())
        text = "{\n" + "".join(lines) + f'"rows": {text}\n}}'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text + "\n")


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """A table; all columns but `words` hold numbers."""
    ruler = ["---" if column in words else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ruler, *lines))


def grouped(records: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """The records by what `key` says of them."""
    groups: dict[Key, list[Item]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def having(records: Iterable[Fact], **values: Any) -> list[Fact]:
    """Returns the records that have all of these values."""
    return [record for record in records if all(record.get(name) == value for name, value in values.items())]


def number(x: float | None, form: str) -> str:
    """Returns a number as it stands in a table; "" if there is none."""
    return "" if x is None else format(x, form)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation over seeds (0 of a single value). `sum` adds otherwise from Python 3.12 on."""
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean, (squares / max(len(values) - 1, 1)) ** 0.5


def spread(values: Sequence[float], form: str = ".3f", sign: str = "", none: str = "") -> str:
    """Mean ± standard deviation in a table; `none` without a value."""
    if not values:
        return none
    mean, deviation = mean_and_deviation(values)
    return f"{mean:{sign}{form}} ± {deviation:{form}}"
