"""The statistics of one completion, and their form between processes and in JSON."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

PER_TOKEN = ("mass", "entropy", "image_entropy", "maximum", "diagonal")
SUMS = ("received", "received_answer")  # over queries
SHARES = ("share_image", "share_question", "share_answer")
TENSORS = (*PER_TOKEN, *SUMS, "tokens")
_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Attention:
    """Statistics of the attention that chose the tokens of a completion, float32; None for each that was not asked for.

    Row t of `mass`, `entropy`, `image_entropy`, `maximum` and `diagonal` is the query from which token t was chosen: the last
    token of the prompt for the first, and the token before for the others.

    Args:
        layers: their numbers, in the order of the request.
        groups: names of the groups.
        mass: (tokens, layers, heads, groups), the attention that falls on each group.
        entropy: (tokens, layers, heads) in nats.
        image_entropy: (tokens, layers, heads) in nats, of the attention on image tokens in parts of what these get.
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
    image_entropy: Tensor | None = None

    def is_empty(self) -> bool:
        return all(getattr(self, name) is None for name in TENSORS)

    def refusing(self, reason: str) -> Attention:
        """The same without its numbers."""
        return Attention(self.layers, self.groups, refused=reason, seconds=self.seconds)

    def grounding(self) -> dict[str, Tensor]:
        """The numbers of `va.token_grounding` that follow from the statistics, by its names, as means over layers and heads.

        Each is (tokens,). `share_image`, `share_question` and `share_answer` need `mass` with these groups, `attention_entropy`
        needs `image_entropy`, `diagonal` that of the next token's query, and `received_less_diagonal` also `received_answer`: NaN
        where that query did not run, as for the last token.
        """
        per_token = {} if self.mass is None else {f"share_{name}": self.mass[..., n] for n, name in enumerate(self.groups)}
        numbers = {name: value for name, value in per_token.items() if name in SHARES}
        if self.image_entropy is not None:
            numbers["attention_entropy"] = self.image_entropy
        if self.diagonal is not None:
            numbers["diagonal"] = torch.cat([self.diagonal[1:], torch.full_like(self.diagonal[:1], torch.nan)])
            if (received := self.received_answer) is not None:
                later = torch.arange(received.shape[2], 0, -1)  # queries that see the token, its own among them
                mean = torch.nn.functional.pad(received / later, (0, len(self.diagonal) - len(later)), value=torch.nan)
                numbers["received_less_diagonal"] = mean.permute(2, 0, 1) - numbers["diagonal"]
        return {name: value.mean((1, 2)) for name, value in numbers.items()}

    def to_dict(self, compact: bool = False) -> dict[str, Any]:
        """Lists and numbers for JSON, without what is None.

        compact: each array as {"dtype", "shape", "data"} instead, little-endian bytes in base64. The numbers are float16, or
            float32 if one is above 65504.
        """
        return self.written(_compact if compact else Tensor.tolist)

    def to_bytes(self) -> dict[str, Any]:
        """For msgpack: exact, and with `seconds`."""
        return {**self.written(_array), "seconds": self.seconds}

    def written(self, write: Callable[[Tensor], Any]) -> dict[str, Any]:
        """What is not None, each tensor as `write` returns it."""
        values = {name: write(value) for name in TENSORS if (value := getattr(self, name)) is not None}
        facts = {"queries": self.queries and list(self.queries), "refused": self.refused}
        return {"layers": list(self.layers), "groups": list(self.groups), **values, **{n: x for n, x in facts.items() if x}}

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Attention:
        """The Attention of `to_dict`."""
        fields: dict[str, Any] = {name: tuple(value[name]) for name in ("layers", "groups", "queries") if name in value}
        fields |= {name: value[name] for name in ("refused", "seconds") if name in value}
        fields |= {name: _tensor(value[name]) for name in TENSORS if name in value}
        return Attention(**fields)


def _array(value: Tensor) -> dict[str, Any]:
    data = value.contiguous().numpy().tobytes()
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "data": data}


def _compact(value: Tensor) -> dict[str, Any]:
    if not value.is_floating_point():
        value = value.int()
    elif value.abs().le(_LARGEST).all():
        value = value.half()
    written = _array(value)
    return {**written, "data": base64.b64encode(written["data"]).decode()}


def _tensor(value: Any) -> Tensor:
    """A tensor, or one from lists, or from an array with bytes or their base64."""
    if not isinstance(value, Mapping):
        return torch.as_tensor(value)
    data, dtype = value["data"], getattr(torch, value["dtype"])
    data = bytearray(base64.b64decode(data) if isinstance(data, str) else data)
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return (flat.float() if flat.is_floating_point() else flat.long()).view(value["shape"])


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


class Answer(NamedTuple):
    """The completion of a prompt. `text` is empty where the engine has no tokenizer."""

    id: str
    tokens: list[int]
    text: str
    attention: Attention
