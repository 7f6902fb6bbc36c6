"""An explanation of a batch as one explanation per input, and an explanation as tensors and metadata."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.interpret.result.explanation import Explanation
from vlattn_fast.interpret.result.numbers.samples import some_samples

_TENSOR, _TUPLE = "$tensor", "$tuple"


def split(explanation: Explanation, counts: Sequence[int]) -> list[Explanation]:
    """The explanations of consecutive inputs of a batch, which have so many samples each."""
    if len(counts) == 1:
        return [explanation]
    ends = itertools.accumulate(counts)
    return [some_samples(explanation, range(end - count, end)) for count, end in zip(counts, ends, strict=True)]


def pack(explanation: Explanation) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU by their keys, metadata for JSON)."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            # safetensors does not support tensors that share memory, and a map may be a view of its relevancy vector.
            tensors[place] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {_TENSOR: place}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):  # a sink
            return walk(dataclasses.asdict(value), place)
        if isinstance(value, Mapping):
            return {str(name): walk(one, f"{place}.{name}") for name, one in value.items()}
        if isinstance(value, (tuple, list)):
            parts = [walk(one, f"{place}.{i}") for i, one in enumerate(value)]
            return {_TUPLE: parts} if isinstance(value, tuple) else parts
        return value

    values = ((field.name, getattr(explanation, field.name)) for field in dataclasses.fields(explanation))
    metadata = {name: walk(value, name) for name, value in values if value is not None}
    return tensors, metadata


def unpack(metadata: Mapping[str, Any], read: Callable[[str], Tensor]) -> Explanation:
    """The explanation from `pack`'s metadata; `read` returns the tensor of a key."""

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            if _TENSOR in value:
                return read(value[_TENSOR])
            if _TUPLE in value:
                return tuple(walk(one) for one in value[_TUPLE])
            return {name: walk(one) for name, one in value.items()}
        return [walk(one) for one in value] if isinstance(value, list) else value

    return Explanation(**{name: walk(value) for name, value in metadata.items()})
