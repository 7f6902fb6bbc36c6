"""The labels of a data set for `probe`."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vlattn_fast.interpret.adapters.adapter import WITHOUT_ADAPTER, Adapter
from vlattn_fast.interpret.probing.layout import IMAGE, TEXT, Layout

KEYS = ("phrases", "relations", "word_relations", "sentence", "variants")
TASKS = ("length", "word_content", "word_order")  # of every text


@dataclass(frozen=True)
class Labels:
    """A sample's phrases as (columns of the input ids, regions, class or None), relations as (region, region, class), those of
    words as (columns, columns, class), classes of the text and the ids of its variants by task."""

    phrases: list[tuple[list[int], list[int], Any]] = field(default_factory=list)
    relations: list[tuple[int, int, Any]] = field(default_factory=list)
    word_relations: list[tuple[list[int], list[int], Any]] = field(default_factory=list)
    sentence: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, list[int]] = field(default_factory=dict)


def read_item(item: Any, adapter: Adapter = WITHOUT_ADAPTER) -> tuple[Mapping[str, Any], list[Labels]]:
    """Inputs, with transformers' names for images and texts, and the labels of each sample."""
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        got = f"{len(item)} of them" if isinstance(item, (tuple, list)) else type(item).__name__
        raise TypeError(f"dataset must yield (inputs, labels); got {got}")
    inputs, labels = item
    if not isinstance(inputs, Mapping):
        raise TypeError(f"dataset must yield inputs as a mapping of the model's keyword arguments; got {type(inputs).__name__}")
    inputs = adapter.standard(inputs)
    first = [inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs]
    count = next((len(x) for x in (*first, *inputs.values()) if isinstance(x, Tensor) and x.ndim), 1)
    listed = [None] * count if labels is None else list(labels) if isinstance(labels, (list, tuple)) else [labels]
    if len(listed) != count:
        raise ValueError(f"dataset must yield labels for each of {count} samples of the inputs; got {len(listed)}")
    return inputs, [_labels(one) for one in listed]


def _labels(raw: Any) -> Labels:
    if raw is None:
        return Labels()
    if dataclasses.is_dataclass(raw) and not isinstance(raw, type):
        raw = {name: getattr(raw, name, None) for name in KEYS}
    if not isinstance(raw, Mapping):
        raise TypeError(f"dataset must yield labels as a dict, a dataclass or None; got {type(raw).__name__}")
    if unknown := [name for name in raw if name not in KEYS]:
        raise ValueError(f"labels must be among {', '.join(KEYS)}; got {unknown}")
    sentence = _tasks(raw, "sentence", "class", TASKS)
    variants = _tasks(raw, "variants", "input ids", (*TASKS, *sentence))
    return Labels(
        [_phrase(phrase) for phrase in _entries(raw, "phrases")],
        [(*(_number("relations", one, entry) for one in entry[:2]), entry[2]) for entry in _related(raw, "relations", "region")],
        [
            (*(_columns("word_relations", span) for span in entry[:2]), entry[2])
            for entry in _related(raw, "word_relations", "(start, stop)")
        ],
        {task: label for task, label in sentence.items() if label is not None},
        {task: _ids(task, each) for task, each in variants.items() if each is not None},
    )


def _entries(raw: Mapping[str, Any], name: str) -> Iterable[Any]:
    """The list of a label; empty without one."""
    value = () if raw.get(name) is None else raw[name]
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list; got {value!r}")
    return value


def _phrase(phrase: Any) -> tuple[list[int], list[int], Any]:
    if not isinstance(phrase, Sequence) or len(phrase) not in (2, 3):
        raise ValueError(f"phrases must be ((start, stop), region or regions), with or without a class; got {phrase!r}")
    span, regions, *kind = phrase
    several = isinstance(regions, (list, tuple)) or getattr(regions, "ndim", 0) > 0  # NumPy's and torch's arrays, too
    numbers = [_number("phrases", one, phrase) for one in (regions if several else [regions])]
    if not numbers:
        raise ValueError(f"phrases must name a region each; got {phrase!r}")
    return _columns("phrases", span), list(dict.fromkeys(numbers)), kind[0] if kind else None


def _related(raw: Mapping[str, Any], name: str, part: str) -> Iterator[Any]:
    """The entries (part, part, class) of a label."""
    for entry in _entries(raw, name):
        if not isinstance(entry, Sequence) or len(entry) != 3 or entry[2] is None:
            raise ValueError(f"{name} must be ({part}, {part}, class) each; got {entry!r}")
        yield entry


def _tasks(raw: Mapping[str, Any], name: str, what: str, others: Sequence[str]) -> Mapping[str, Any]:
    """The tasks of a text; `others`: names that are taken."""
    tasks = {} if raw.get(name) is None else raw[name]
    if not isinstance(tasks, Mapping):
        raise TypeError(f"{name} must be a dict of task -> {what}; got {type(tasks).__name__}")
    for task in tasks:
        if not isinstance(task, str) or task in others:
            raise ValueError(f"{name} must have tasks with names other than {', '.join(others)}; got {task!r}")
    return tasks


def _columns(name: str, span: Any) -> list[int]:
    """The columns of a span (start, stop)."""
    try:
        start, stop = map(operator.index, span)
    except (TypeError, ValueError):
        start = stop = -1
    if not 0 <= start < stop:
        raise ValueError(f"{name} must have a span (start, stop) of columns of the input ids; got {span!r}")
    return list(range(start, stop))


def _ids(task: str, ids: Any) -> list[int]:
    try:
        return [operator.index(one) for one in ids]
    except TypeError:
        raise TypeError(f"variants must give the input ids of the changed text; got {ids!r} for {task!r}") from None


def _number(name: str, region: Any, entry: Any) -> int:
    """The number of a region as an int, also from NumPy or torch."""
    try:
        return operator.index(region)
    except TypeError:
        raise TypeError(f"{name} must name regions by their numbers; got {entry!r}") from None


def tokens_of(layout: Layout, sample: int, columns: Sequence[int], number: int, name: str = "phrases") -> list[int]:
    """Positions in the sequence for columns of the input ids; errors name the label, and the input by its `number` in the data
    set."""
    tokens = [column + layout.offset for column in columns]
    parts = layout.parts[sample]
    if tokens[-1] >= len(parts) or bool((parts[tokens] != TEXT).any()):
        raise ValueError(f"{name} must name text tokens in input {number}; got columns {columns[0]} to {columns[-1]}")
    return tokens


def regions_of(layout: Layout, sample: int, regions: Sequence[int], number: int) -> list[int]:
    """Positions in the sequence for the numbers of image tokens; `number` as in `tokens_of`."""
    positions = layout.regions[sample]
    for region in regions:
        if not 0 <= region < len(positions) or layout.parts[sample, positions[region]] != IMAGE:
            among = f"the {len(positions)} image tokens of input {number} without padding"
            raise ValueError(f"regions must be among {among}; got {region}")
    return [positions[region] for region in regions]
