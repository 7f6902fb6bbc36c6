"""The ask of a request: its layers, statistics, groups of tokens and edits, checked and written out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_bool, check_integer, check_names, check_number, describe
from vlattn_vllm.attention import PER_TOKEN, SUMS

KEY = "vlattn"  # a field of a request to the server, and a name in the extra_args of vLLM's SamplingParams
STATISTICS = (*PER_TOKEN, *SUMS)
NAMED = ("image", "question", "answer")
MOST_GROUPS = 64
MOST_EDITED_GROUPS = 16  # of queries, and of keys
MOST_BYTES = 1 << 16  # of an ask as JSON
FIELDS = ("layers", "statistics", "groups", "top", "compact", "steer")
EDIT_FIELDS = ("queries", "keys", "layers", "heads", "weight")

Span = tuple[int, int | None]  # None: to the newest token


class Edit(NamedTuple):
    """The attention of these queries to these keys is multiplied by `weight` before it is normalised; 0 cuts it."""

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    queries: tuple[Span, ...]
    keys: tuple[Span, ...]
    weight: float


class Ask(NamedTuple):
    """`groups`: names with their spans of tokens. `top`: how many tokens `received` keeps by layer and head; None = all.
    `images`: their spans, if `statistics` need them. Written as JSON, it comes back from `read`."""

    layers: tuple[int, ...]
    statistics: tuple[str, ...]
    groups: tuple[tuple[str, tuple[Span, ...]], ...]
    top: int | None = None
    steer: tuple[Edit, ...] = ()
    images: tuple[Span, ...] = ()

    def written(self) -> dict[str, Any]:
        """Without tuples, as JSON gives it back."""
        value: dict[str, Any] = json.loads(json.dumps({**self._asdict(), "steer": [edit._asdict() for edit in self.steer]}))
        return value

    @staticmethod
    def read(value: Mapping[str, Any]) -> Ask:
        fields = {**_tuples(value), "steer": tuple(Edit(**_tuples(edit)) for edit in value["steer"])}
        return Ask(**fields)


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _tuples(each) for name, each in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def check_ask(value: Any, layers: int, heads: int, prompt: int, pictures: Sequence[Span], most: int) -> Ask:
    """The Ask of a request to a model of so many layers and heads.

    `prompt`: its number of tokens; `pictures`: their spans in it; `most`: tokens of the prompt and of its longest answer.

    Raises:
        ValueError, TypeError: naming the part of `value` that is wrong.
    """
    if not isinstance(value, Mapping) or not set(value) <= set(FIELDS):
        raise ValueError(f"{KEY} must be a dict with some of {', '.join(FIELDS)}; got {value!r:.200}")
    if (size := len(json.dumps(value, default=str))) > MOST_BYTES:
        raise ValueError(f"{KEY} must have at most {MOST_BYTES} bytes as JSON; got {size}")
    value = plain(value)
    named = {"image": tuple(pictures), "question": _between(pictures, prompt), "answer": ((prompt, None),)}
    steer = tuple(_edit(edit, layers, heads, named, most) for edit in plain_edits(value["steer"])) if "steer" in value else ()
    check_edited_groups(steer, most)
    if steer and value.get("statistics") in ([], ()):
        if given := sorted({*value} - {"statistics", "steer", "compact"}):
            raise ValueError(f"statistics must name one if {' and '.join(given)} are given; got none")
        return Ask((), (), (), None, steer)
    numbers = _numbers("layers", value.get("layers"), layers)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"layers must name each layer once; got {list(numbers)}")
    statistics = _names("statistics", value.get("statistics", ("mass",)), STATISTICS)
    top = value.get("top")
    if top is not None:
        check_integer("top", top, low=1)
        if "received" not in statistics:
            raise ValueError(f"statistics must name 'received' if top is given; got {list(statistics)}")
    check_bool(compact=value.get("compact", False))
    images = named["image"] if "image_entropy" in statistics else ()
    if "image_entropy" in statistics and not images:
        raise ValueError(f"statistics must leave out 'image_entropy', since the prompt has no image; got {list(statistics)}")
    if "mass" in statistics:
        groups = _groups(value.get("groups", NAMED), named, most)
        check_disjoint(groups)
    elif "groups" in value:
        raise ValueError(f"statistics must name 'mass' if groups are given; got {list(statistics)}")
    else:
        groups = ()
    return Ask(numbers, statistics, groups, top, steer, images)


def plain(value: Any) -> Any:
    """With lists for sequences, and Python's numbers for NumPy's and torch's, as JSON has them."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [plain(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else value


def plain_edits(value: Any) -> list[Mapping[str, Any]]:
    """Each edit as the dict that JSON has: va.Steer and va.Knockout become one."""
    legend = f"steer must be a list of edits: va.Steer, va.Knockout, or dicts with some of {', '.join(EDIT_FIELDS)}"
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence) or len(value) == 0:
        raise TypeError(f"{legend}; got {value!r:.200}")
    edits = []
    for edit in value:
        if not isinstance(edit, Mapping):
            from vlattn_fast import Knockout, Steer

            if not isinstance(edit, (Knockout, Steer)):
                raise TypeError(f"{legend}; got {describe(edit)}")
            if edit.tower is not None:
                raise ValueError(f"tower of an edit must be None at a server, which edits the decoder; got {edit.tower!r}")
            weight = edit.weight if isinstance(edit, Steer) else 0.0
            given = {name: getattr(edit, name) for name in EDIT_FIELDS[:-1]}
            edit = {**{name: each for name, each in given.items() if each is not None}, "weight": weight}
        if "weight" not in edit or not set(edit) <= set(EDIT_FIELDS):
            raise ValueError(f"{legend}, weight among them; got {edit!r:.200}")
        edits.append(plain(edit))
    return edits


def check_edited_groups(edits: Sequence[Edit], most: int) -> None:
    """ValueError for edits whose sets of tokens overlap in too many ways."""
    for side in ("queries", "keys") if edits else ():
        _, members = groups_of_sets([getattr(edit, side) for edit in edits], most)
        if (count := int(members.any(0).sum())) > MOST_EDITED_GROUPS:
            raise ValueError(
                f"steer must have at most {MOST_EDITED_GROUPS} groups of {side}, each with the tokens that the same edits name; "
                f"got {count}"
            )


def _edit(value: Mapping[str, Any], layers: int, heads: int, named: Mapping[str, tuple[Span, ...]], most: int) -> Edit:
    check_number("weight", value["weight"])
    if value["weight"] < 0:
        raise ValueError(f"weight must be at least 0, which cuts the attention; got {value['weight']!r}")
    if all(value.get(name) is None for name in ("queries", "keys", "heads")):
        raise ValueError(f"an edit must have queries, keys or heads, or it edits all attention; got {dict(value)!r:.200}")
    return Edit(
        _from_the_end("layers", value.get("layers"), layers),
        _from_the_end("heads", value.get("heads"), heads),
        _tokens("queries", value.get("queries"), named, most),
        _tokens("keys", value.get("keys"), named, most),
        float(value["weight"]),
    )


def _numbers(name: str, value: Any, count: int, low: int = 0) -> tuple[int, ...]:
    """Numbers from `low` to `count` - 1; None = all."""
    if value is None:
        return tuple(range(count))
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) == 0:
        raise TypeError(f"{name} must be a list of at least one number; got {describe(value)}")
    for number in value:
        check_integer(f"a number of {name}", number, low=low, high=count - 1)
    return tuple(value)


def _from_the_end(name: str, value: Any, count: int) -> tuple[int, ...]:
    """Of an edit, where negative numbers count from the end, and one needs no list."""
    numbers = _numbers(f"{name} of an edit", [value] if isinstance(value, int) else value, count, -count)
    return tuple(sorted({number % count for number in numbers}))


def _tokens(name: str, value: Any, named: Mapping[str, tuple[Span, ...]], most: int) -> tuple[Span, ...]:
    if value is None:
        return ((0, None),)
    if isinstance(value, str):
        (value,) = _names(f"{name} of an edit", [value], NAMED)
        if not named[value]:
            raise ValueError(f"{name} of an edit name {value!r}, and the prompt has no such token")
        return named[value]
    if isinstance(value, Sequence) and len(value) == 2 and not isinstance(value[0], Sequence):
        value = [value]
    return _spans(name, value, most)


def _names(name: str, value: Any, known: Sequence[str]) -> tuple[str, ...]:
    names = check_names(name, value, known)
    if isinstance(value, Sequence) and len(names) < len(value):
        raise ValueError(f"{name} must name each once; got {list(value)}")
    return names


def _groups(value: Any, named: Mapping[str, tuple[Span, ...]], most: int) -> tuple[tuple[str, tuple[Span, ...]], ...]:
    if isinstance(value, Mapping):
        if not value or not all([isinstance(name, str) for name in value]):
            raise ValueError(f"groups must have at least one group, each with a string for its name; got {value!r:.200}")
        if len(value) > MOST_GROUPS:  # each takes a number for each token, layer and head
            raise ValueError(f"groups must be at most {MOST_GROUPS}; got {len(value)}")
        return tuple((name, _spans(f"groups[{name!r}]", spans, most)) for name, spans in value.items())
    names = value.split("|") if isinstance(value, str) else value
    return tuple((name, named[name]) for name in _names("groups", names, NAMED))


def _between(pictures: Sequence[Span], prompt: int) -> tuple[Span, ...]:
    """The parts of the prompt beside the pictures, which come in order."""
    starts = [0, *[prompt if end is None else end for _, end in pictures]]
    ends = [*[start for start, _ in pictures], prompt]
    return tuple((start, end) for start, end in zip(starts, ends, strict=True) if start < end)


def _spans(name: str, value: Any, most: int) -> tuple[Span, ...]:
    legend = f"{name} must be a list of at least one [start, end], numbers of tokens, where end may be None"
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) == 0:
        raise TypeError(f"{legend}; got {describe(value)}")
    for span in value:
        if isinstance(span, str) or not isinstance(span, Sequence) or len(span) != 2:
            raise ValueError(f"{legend}; got {value!r:.200}")
        start, end = span
        check_integer(f"the start of a span of {name}", start, low=0)
        if end is not None:
            check_integer(f"the end of a span of {name}", end, low=start + 1)
        if start >= most or (end is not None and end > most):
            raise ValueError(
                f"a span of {name} must lie within the {most} tokens of the prompt and its longest answer; got {list(span)}. "
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


def groups_of_sets(sets: Sequence[tuple[Span, ...]], tokens: int) -> tuple[Tensor, Tensor]:
    """(tokens,) the number of each token's group, and (sets, groups) which set has which group.

    The tokens of a group are in the same sets; one group may be in none.
    """
    numbers = {spans: number for number, spans in enumerate(dict.fromkeys(sets))}
    ends = {end for spans in numbers for span in spans for end in span if end is not None}
    starts = torch.tensor(sorted(end for end in {0, *ends} if end < tokens))  # from each to the next, tokens are in the same sets
    members, groups = torch.stack([inside(spans, starts) for spans in numbers]).unique(dim=1, return_inverse=True)
    return groups[torch.bucketize(torch.arange(tokens), starts, right=True) - 1], members[[numbers[spans] for spans in sets]]


def inside(spans: Sequence[Span], positions: Tensor) -> Tensor:
    """Whether each position lies in one of the spans."""
    within = torch.zeros_like(positions, dtype=torch.bool)
    for start, end in spans:
        within |= (positions >= start) & (positions < (math.inf if end is None else end))
    return within
