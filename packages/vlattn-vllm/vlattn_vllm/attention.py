"""The statistics of one completion, and their form between processes and in JSON."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PER_TOKEN = ("mass", "entropy", "maximum", "diagonal")
SUMS = ("received", "received_answer")  # over queries
TENSORS = (*PER_TOKEN, *SUMS, "tokens")
_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Attention:
    """Statistics of the attention that chose the tokens of a completion, float32; None for each that was not asked for.

    Row t of `mass`, `entropy`, `maximum` and `diagonal` is the query from which token t was chosen: the last token of the prompt
    for the first, and the token before for the others.

    Args:
        layers: their numbers, in the order of the request.
        groups: names of the groups.
        mass: (tokens, layers, heads, groups), the attention that falls on each group.
        entropy: (tokens, layers, heads) in nats.
        maximum: (tokens, layers, heads), the largest weight.
        diagonal: (tokens, layers, heads), the attention of that token on itself.
        received: (layers, heads, prompt), what each token of the prompt gets from the queries from queries[0] to queries[1] - 1,
            added. None in the chunks of a stream but the last. With `top`: (layers, heads, top), the largest.
        received_answer: (layers, heads, tokens - 1), the same for each token of the answer, which its own query and later ones
            give it. The last token has no query.
        queries: positions. The first is above 0 where vLLM took a prefix out of its cache: these queries did not run.
        refused: why there are no numbers and no edits from some token on, or no `received`, if only the running engine could
            tell; else empty.
        tokens: with `top` (layers, heads, top), the numbers of these tokens of the prompt; else None.
        seconds: of the worker, for these numbers and edits.
    """

    layers: tuple[int, ...]
    groups: tuple[str, ...]
    mass: Tensor | None = None
    entropy: Tensor | None = None
    maximum: Tensor | None = None
    received: Tensor | None = None
    queries: tuple[int, int] | None = None
    refused: str = ""
    tokens: Tensor | None = None
    seconds: float = 0.0
    diagonal: Tensor | None = None
    received_answer: Tensor | None = None

    def is_empty(self) -> bool:
        return all(getattr(self, name) is None for name in TENSORS)

    def refusing(self, reason: str) -> Attention:
        """The same without its numbers."""
        return Attention(self.layers, self.groups, refused=reason, seconds=self.seconds)

    def to_dict(self, compact: bool = False) -> dict[str, Any]:
        """Lists and numbers for JSON, without what is None.

        compact: each array as {"dtype", "shape", "data"} instead, little-endian bytes in base64. The numbers are float16, or
            float32 if one is above 65504.
        """
        written = _array if compact else Tensor.tolist
        values = {name: written(value) for name in TENSORS if (value := getattr(self, name)) is not None}
        facts: dict[str, Any] = {"layers": list(self.layers), "groups": list(self.groups), **values}
        if self.queries is not None:
            facts["queries"] = list(self.queries)
        return {**facts, "refused": self.refused} if self.refused else facts

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Attention:
        """The Attention of `to_dict`."""
        tensors: dict[str, Any] = {name: _tensor(value[name]) for name in TENSORS if name in value}
        queries = tuple(value["queries"]) if "queries" in value else None
        return Attention(
            tuple(value["layers"]), tuple(value["groups"]), **tensors, queries=queries, refused=value.get("refused", "")
        )


def _array(value: Tensor) -> dict[str, Any]:
    if not value.is_floating_point():
        value = value.int()
    elif value.abs().le(_LARGEST).all():
        value = value.half()
    data = base64.b64encode(value.numpy().tobytes()).decode()
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "data": data}


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Mapping):
        return torch.tensor(value)
    flat = _flat(base64.b64decode(value["data"]), getattr(torch, value["dtype"]))
    return (flat.float() if flat.is_floating_point() else flat.long()).view(value["shape"])


def _flat(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def joined(parts: Sequence[Attention]) -> Attention:
    """Consecutive chunks of one completion as one."""
    last = parts[-1]
    rows = {name: [part for each in parts if (part := getattr(each, name)) is not None] for name in PER_TOKEN}
    whole: dict[str, Any] = {name: torch.cat(some) if some else None for name, some in rows.items()}
    end = {name: getattr(last, name) for name in (*SUMS, "tokens", "queries")}
    refused = next((part.refused for part in parts if part.refused), "")
    return Attention(
        parts[0].layers, parts[0].groups, **whole, **end, refused=refused, seconds=sum(part.seconds for part in parts)
    )


def to_bytes(attention: Attention) -> dict[str, Any]:
    """For msgpack, which knows no tensor in a field of any type."""
    packed: dict[str, Any] = {name: getattr(attention, name) for name in ("layers", "groups", "queries", "refused", "seconds")}
    for name in TENSORS:
        if (value := getattr(attention, name)) is not None:
            packed[name] = [list(value.shape), value.contiguous().numpy().tobytes()]
    return packed


def from_bytes(packed: Mapping[str, Any]) -> Attention:
    fields = {**packed, "layers": tuple(packed["layers"]), "groups": tuple(packed["groups"])}
    for name in TENSORS:
        if name in packed:
            shape, data = packed[name]
            fields[name] = _flat(data, torch.int64 if name == "tokens" else torch.float32).view(shape)
    if fields["queries"] is not None:
        fields["queries"] = tuple(fields["queries"])
    return Attention(**fields)
