"""An explanation of a batch as one explanation per input, and an explanation as tensors and facts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.interpret.result.explanation import Explanation

_TENSOR, _TUPLE = "$tensor", "$tuple"


def split(explanation: Explanation, counts: Sequence[int]) -> list[Explanation]:
    """The explanations of consecutive inputs of a batch, which have so many samples each."""
    if len(counts) == 1:
        return [explanation]
    ends = itertools.accumulate(counts)
    return [_part(explanation, end - count, end) for count, end in zip(counts, ends, strict=True)]


def _part(explanation: Explanation, first: int, end: int) -> Explanation:
    """The part of an explanation that `explain` gives for these samples alone."""
    batch, owners = len(explanation), explanation.image_rows or []
    chosen = [place for place, owner in enumerate(owners) if first <= owner < end]

    def part(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: part(one) for name, one in value.items()}
        if not isinstance(value, (Tensor, list)):
            return value
        if len(value) == batch:
            return value[first:end]
        if isinstance(value, Tensor) and len(value) == len(owners):  # a tower that sees one image at a time
            return value[chosen]
        raise ValueError(f"explanation must have {batch} rows in each field; got {len(value)}")

    def maps(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: maps(one) for name, one in value.items()}
        if not isinstance(value, tuple):
            return value if value is None else value[chosen]
        some = tuple(value[place] for place in chosen)
        return torch.stack(some) if len({one.shape for one in some}) == 1 else some

    fields: dict[str, Any] = {}
    for field in dataclasses.fields(explanation):
        value = getattr(explanation, field.name)
        if field.name == "image_rows":
            fields[field.name] = None if value is None else [owners[place] - first for place in chosen]
        else:
            fields[field.name] = (maps if field.name in ("image", "tower_images") else part)(value)
    if fields["text"] is not None and fields["token_ids"] is not None:
        fields["text"] = fields["text"][..., : max(map(len, fields["token_ids"]))]  # without the batch's padding
    return Explanation(**fields)


def pack(explanation: Explanation) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU by place, other facts for JSON)."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            # safetensors refuses tensors that share memory, and a map may be a view of its row.
            tensors[place] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {_TENSOR: place}
        if isinstance(value, Mapping):
            return {str(name): walk(one, f"{place}.{name}") for name, one in value.items()}
        if isinstance(value, (tuple, list)):
            parts = [walk(one, f"{place}.{i}") for i, one in enumerate(value)]
            return {_TUPLE: parts} if isinstance(value, tuple) else parts
        return value

    values = ((field.name, getattr(explanation, field.name)) for field in dataclasses.fields(explanation))
    facts = {name: walk(value, name) for name, value in values if value is not None}
    return tensors, facts


def unpack(facts: Mapping[str, Any], read: Callable[[str], Tensor]) -> Explanation:
    """The explanation from `pack`'s facts; `read` returns the tensor of a place."""

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            if _TENSOR in value:
                return read(value[_TENSOR])
            if _TUPLE in value:
                return tuple(walk(one) for one in value[_TUPLE])
            return {name: walk(one) for name, one in value.items()}
        return [walk(one) for one in value] if isinstance(value, list) else value

    return Explanation(**{name: walk(value) for name, value in facts.items()})
