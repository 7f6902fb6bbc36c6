"""The ask of a request: its layers, statistics and groups of tokens, checked and written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_integer, check_names, describe

KEY = "attention"  # in the extra_args of vLLM's SamplingParams
STATISTICS = ("mass", "entropy", "maximum", "received")
NAMED = ("image", "question", "answer")
MOST_GROUPS = 64
DEFAULT = {"statistics": ("mass",), "groups": NAMED}

Span = tuple[int, int | None]  # None: to the newest token


class Ask(NamedTuple):
    """`groups`: names with their spans of tokens. Written as JSON, it comes back from `read`."""

    layers: tuple[int, ...]
    statistics: tuple[str, ...]
    groups: tuple[tuple[str, tuple[Span, ...]], ...]

    def written(self) -> dict[str, Any]:
        groups = [[name, [list(span) for span in spans]] for name, spans in self.groups]
        return {"layers": list(self.layers), "statistics": list(self.statistics), "groups": groups}

    @staticmethod
    def read(value: Mapping[str, Any]) -> Ask:
        groups = tuple((name, tuple((start, end) for start, end in spans)) for name, spans in value["groups"])
        return Ask(tuple(value["layers"]), tuple(value["statistics"]), groups)


def check_ask(value: Any, layers: int, prompt: int, pictures: Sequence[Span], most: int) -> Ask:
    """The Ask of a request to a model of so many layers; `prompt`: its number of tokens; `pictures`: their spans in it; `most`:
    tokens of the prompt and of its longest answer.

    Raises:
        ValueError, TypeError: naming the part of `value` that is wrong.
    """
    if not isinstance(value, Mapping) or not set(value) <= {"layers", *DEFAULT}:
        raise ValueError(f"{KEY} must be a dict with some of layers, statistics and groups; got {value!r:.200}")
    numbers = _layers(value.get("layers"), layers)
    statistics = _names("statistics", value.get("statistics", DEFAULT["statistics"]), STATISTICS)
    if "mass" not in statistics:
        if "groups" in value:
            raise ValueError(f"statistics must name 'mass' where groups are given; got {list(statistics)}")
        return Ask(numbers, statistics, ())
    groups = _groups(value.get("groups", NAMED), prompt, pictures, most)
    check_disjoint(groups)
    return Ask(numbers, statistics, groups)


def _layers(value: Any, layers: int) -> tuple[int, ...]:
    if value is None:
        return tuple(range(layers))
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) == 0:
        raise TypeError(f"layers must be a list of at least one number; got {describe(value)}")
    for number in value:
        check_integer("a number of layers", number, low=0, high=layers - 1)
    if len(set(value)) < len(value):
        raise ValueError(f"layers must name each layer once; got {list(value)}")
    return tuple(value)


def _names(name: str, value: Any, known: Sequence[str]) -> tuple[str, ...]:
    names = check_names(name, value, known)
    if isinstance(value, Sequence) and len(names) < len(value):
        raise ValueError(f"{name} must name each once; got {list(value)}")
    return names


def _groups(value: Any, prompt: int, pictures: Sequence[Span], most: int) -> tuple[tuple[str, tuple[Span, ...]], ...]:
    if isinstance(value, Mapping):
        if not value or not all([isinstance(name, str) for name in value]):
            raise ValueError(f"groups must have at least one group, each with a string for its name; got {value!r:.200}")
        if len(value) > MOST_GROUPS:  # each takes a number for each token, layer and head
            raise ValueError(f"groups must be at most {MOST_GROUPS}; got {len(value)}")
        return tuple((name, _spans(name, spans, most)) for name, spans in value.items())
    names = value.split("|") if isinstance(value, str) else value
    spans = {"image": tuple(pictures), "question": _between(pictures, prompt), "answer": ((prompt, None),)}
    return tuple((name, spans[name]) for name in _names("groups", names, NAMED))


def _between(pictures: Sequence[Span], prompt: int) -> tuple[Span, ...]:
    """The parts of the prompt beside the pictures, which come in order."""
    starts = [0, *[prompt if end is None else end for _, end in pictures]]
    ends = [*[start for start, _ in pictures], prompt]
    return tuple((start, end) for start, end in zip(starts, ends, strict=True) if start < end)


def _spans(name: str, value: Any, most: int) -> tuple[Span, ...]:
    legend = f"groups[{name!r}] must be a list of at least one [start, end], numbers of tokens, where end may be None"
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) == 0:
        raise TypeError(f"{legend}; got {describe(value)}")
    for span in value:
        if isinstance(span, str) or not isinstance(span, Sequence) or len(span) != 2:
            raise ValueError(f"{legend}; got {value!r:.200}")
        start, end = span
        check_integer(f"the start of a span of {name!r}", start, low=0)
        if end is not None:
            check_integer(f"the end of a span of {name!r}", end, low=start + 1)
        if start >= most or (end is not None and end > most):
            raise ValueError(
                f"a span of {name!r} must lie within the {most} tokens of the prompt and its longest answer; got {list(span)}. "
                f"An end of None is the newest token"
            )
    return tuple((start, end) for start, end in value)


def check_disjoint(groups: Sequence[tuple[str, Sequence[Span]]]) -> None:
    """A token has one group."""
    spans = sorted((start, float("inf") if end is None else end, name) for name, some in groups for start, end in some)
    for (_, end, before), (start, _, name) in zip(spans, spans[1:], strict=False):
        if start < end:
            raise ValueError(f"groups must not share tokens; got {before!r} and {name!r}, which both have token {start}")


def groups_of_tokens(ask: Ask, length: int) -> Tensor:
    """(length,) int32: the number of each token's group, -1 = none."""
    groups = torch.full((length,), -1, dtype=torch.int32)
    for number, (_, spans) in enumerate(ask.groups):
        for start, end in spans:
            groups[start:end] = number
    return groups
