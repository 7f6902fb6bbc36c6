"""Some samples of an explanation of a batch, as if only these samples had been explained."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlattn_fast._ground.checks import describe
from vlattn_fast.interpret.result.numbers.explained import Explained

E = TypeVar("E", bound=Explained)

_MAPS = ("image", "tower_images")


def chosen_rows(index: Any, count: int) -> list[int]:
    """The samples, from 0, that an index names among `count`: a number, negative from the end, or a slice. IndexError for a
    number out of range."""
    if isinstance(index, slice):
        return list(range(count)[index])
    try:
        number = operator.index(index)
    except TypeError:
        raise TypeError(f"index must be the number of a sample, or a slice; got {describe(index)}") from None
    if not -count <= number < count:
        raise IndexError(f"index must be from {-count} to {count - 1}; got {number}")
    return [number % count]


def some_samples(explanation: E, rows: Sequence[int], in_front: int = 0, shared: Sequence[str] = ()) -> E:
    """The part of an explanation that has these samples of the batch.

    Args:
        in_front: the number of dimensions of relevancy, text, regions and each map before that of the samples.
        shared: fields that are not per sample.
    """
    batch, owners = len(explanation), explanation.image_samples or []
    maps_of = [(new, place) for new, row in enumerate(rows) for place, owner in enumerate(owners) if owner == row]
    chosen = [place for _, place in maps_of]
    rows = list(rows)

    def selected(value: Tensor, places: Sequence[int], at: int) -> Tensor:
        return value.index_select(at, torch.tensor(places, dtype=torch.long, device=value.device))

    def picked(value: Tensor, at: int) -> Tensor:
        if value.shape[at] not in (batch, len(owners)):
            raise ValueError(f"explanation must have {batch} samples in each field; got {value.shape[at]}")
        # a tower that sees one image at a time has a vector for each
        return selected(value, rows if value.shape[at] == batch else chosen, at)

    def part(value: Any, at: int) -> Any:
        if isinstance(value, dict):
            return {name: part(one, at) for name, one in value.items()}
        if isinstance(value, Tensor):
            return picked(value, at)
        return [value[row] for row in rows] if isinstance(value, list) else value

    def maps(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: maps(one) for name, one in value.items()}
        if isinstance(value, tuple):
            some = tuple(value[place] for place in chosen)
            return torch.stack(some, in_front) if len({one.shape for one in some}) == 1 else some
        return value if value is None else selected(value, chosen, in_front)

    fields: dict[str, Any] = {}
    for field in dataclasses.fields(explanation):
        name, value = field.name, getattr(explanation, field.name)
        if name == "image_samples":
            fields[name] = None if value is None else [new for new, _ in maps_of]
        elif name in ("photos", "crops"):
            some = None if value is None else [value[place] for place in (chosen if owners else rows)]
            numbers = {photo: number for number, photo in enumerate(dict.fromkeys(some or []))} if name == "photos" else {}
            fields[name] = [numbers[photo] for photo in some] if some and numbers else some
        elif name in shared or name == "token_names":
            fields[name] = value
        elif name in _MAPS:
            fields[name] = maps(value)
        else:
            fields[name] = part(value, in_front if name in ("relevancy", "text", "regions") else 0)
    if fields["text"] is not None and fields["token_ids"] is not None:
        fields["text"] = fields["text"][..., : max(map(len, fields["token_ids"]), default=0)]  # without the batch's padding
    return type(explanation)(**fields)
