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
_OF_MAPS = ("image_samples", "photos", "crops", "seconds")  # of samples if there is no map


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
    owners = explanation.image_samples or []
    maps_of = [(new, place) for new, row in enumerate(rows) for place, owner in enumerate(owners) if owner == row]
    chosen = [place for _, place in maps_of]

    def entries(value: Any, places: Sequence[int], at: int) -> Any:
        """These of the samples, or of the maps; whole what is no collection."""
        if isinstance(value, dict):
            return {name: entries(one, places, at) for name, one in value.items()}
        if isinstance(value, Tensor):
            return value.index_select(at, torch.tensor(places, dtype=torch.long, device=value.device))
        if isinstance(value, tuple):
            some = tuple(value[place] for place in places)
            return torch.stack(some, at) if len({one.shape for one in some}) == 1 else some
        return [value[place] for place in places] if isinstance(value, list) else value

    fields: dict[str, Any] = {}
    for field in dataclasses.fields(explanation):
        name, value = field.name, getattr(explanation, field.name)
        per_map = name in _MAPS or (name in _OF_MAPS and bool(owners))
        layered = in_front if name in ("relevancy", "text", "regions", *_MAPS) else 0
        fields[name] = value if name in (*shared, "token_names") else entries(value, chosen if per_map else list(rows), layered)
    fields["image_samples"] = None if explanation.image_samples is None else [new for new, _ in maps_of]
    if fields["photos"] is not None:
        numbers = {photo: number for number, photo in enumerate(dict.fromkeys(fields["photos"]))}
        fields["photos"] = [numbers[photo] for photo in fields["photos"]]
    if fields["text"] is not None and fields["token_ids"] is not None:
        fields["text"] = fields["text"][..., : max(map(len, fields["token_ids"]), default=0)]  # without the batch's padding
    return type(explanation)(**fields)
