"""The statistics of one completion, and their form between processes and in JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PER_TOKEN = ("mass", "entropy", "maximum")


@dataclass(frozen=True)
class Attention:
    """Statistics of the attention that chose the tokens of a completion, float32; None for each that was not asked for.

    Row t of `mass`, `entropy` and `maximum` is the query from which token t was chosen: the last token of the prompt for the
    first, and the token before for the others.

    Args:
        layers: their numbers, in the order of the request.
        groups: names of the groups.
        mass: (tokens, layers, heads, groups), the attention that falls on each group.
        entropy: (tokens, layers, heads) in nats.
        maximum: (tokens, layers, heads), the largest weight.
        received: (layers, heads, prompt), what each token of the prompt gets from the queries from queries[0] to queries[1] - 1,
            added. None in the chunks of a stream but the last.
        queries: positions. The first is above 0 where vLLM took a prefix out of its cache: these queries did not run.
        refused: why there are no numbers, or none in `received` alone, where only the running engine could tell; empty otherwise.
    """

    layers: tuple[int, ...]
    groups: tuple[str, ...]
    mass: Tensor | None = None
    entropy: Tensor | None = None
    maximum: Tensor | None = None
    received: Tensor | None = None
    queries: tuple[int, int] | None = None
    refused: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Lists and numbers for JSON, without what is None."""
        values = {name: value.tolist() for name in (*PER_TOKEN, "received") if (value := getattr(self, name)) is not None}
        facts: dict[str, Any] = {"layers": list(self.layers), "groups": list(self.groups), **values}
        if self.queries is not None:
            facts["queries"] = list(self.queries)
        return {**facts, "refused": self.refused} if self.refused else facts

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Attention:
        """The Attention of `to_dict`."""
        tensors = {name: torch.tensor(value[name]) for name in (*PER_TOKEN, "received") if name in value}
        queries = tuple(value["queries"]) if "queries" in value else None
        return Attention(
            tuple(value["layers"]), tuple(value["groups"]), **tensors, queries=queries, refused=value.get("refused", "")
        )


def joined(parts: Sequence[Attention]) -> Attention:
    """Consecutive chunks of one completion as one."""
    last = parts[-1]
    rows = {name: [part for each in parts if (part := getattr(each, name)) is not None] for name in PER_TOKEN}
    whole = {name: torch.cat(some) if some else None for name, some in rows.items()}
    return Attention(last.layers, last.groups, **whole, received=last.received, queries=last.queries, refused=last.refused)


def to_bytes(attention: Attention) -> dict[str, Any]:
    """For msgpack, which knows no tensor in a field of any type."""
    packed: dict[str, Any] = {"layers": list(attention.layers), "groups": list(attention.groups), "refused": attention.refused}
    for name in (*PER_TOKEN, "received"):
        if (value := getattr(attention, name)) is not None:
            packed[name] = [list(value.shape), value.contiguous().numpy().tobytes()]
    return packed if attention.queries is None else {**packed, "queries": list(attention.queries)}


def from_bytes(packed: Mapping[str, Any]) -> Attention:
    tensors = {}
    for name in (*PER_TOKEN, "received"):
        if name in packed:
            shape, data = packed[name]
            empty = math.prod(shape) == 0
            flat = torch.empty(0) if empty else torch.frombuffer(bytearray(data), dtype=torch.float32)
            tensors[name] = flat.reshape(shape)
    queries = tuple(packed["queries"]) if "queries" in packed else None
    return Attention(tuple(packed["layers"]), tuple(packed["groups"]), **tensors, queries=queries, refused=packed["refused"])
