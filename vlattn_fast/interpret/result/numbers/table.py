"""An Explanation as a list of entries, as a data frame, and compared with another Explanation."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_integer, describe
from vlattn_fast.interpret.result.numbers.choices import Array, Maps, home, maps_of, times, to_array
from vlattn_fast.interpret.result.numbers.explained import Explained
from vlattn_fast.interpret.result.numbers.rank_correlation import mean_ranks

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS: dict[str, Any] = {  # of a data frame, with types
    **{"sample": int, "answer": int, "answer_word": object, "tower": object, "part": object, "position": int},
    **{"image": int, "y": int, "x": int, "word": object, "value": float},
}


@dataclass(frozen=True)
class Entry:
    """One number of an explanation, and the token it belongs to.

    Args:
        sample: its number in the batch.
        answer: the explained token of the answer; None if the sample has one score.
        tower: the key in `Explanation.relevancy`.
        part: the kind of the entry's token; "token" if only the position in the tower is known.
        position: its number among the sample's words, patches, regions or tokens.
        place: (image, y, x) of a patch: which map, and where on its grid.
        word: the token of a word, as in `Explanation.tokens`, or the name of a token, as in `token_names`; of a sound its time.
        value: the raw relevancy.
    """

    sample: int
    answer: int | None
    tower: str
    part: Literal["patch", "sound", "word", "region", "token"]
    position: int
    place: tuple[int, int, int] | None
    word: str | None
    value: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """The similarity of two explanations per tower: tensors (B,), or (B, T) with an entry per token of an answer.

    Tokens that are 0 in both, such as padding, do not count. NaN if no token counts, all are equal, or one is NaN.

    Args:
        cosine: tower -> the cosine of the angle between the relevancy vectors.
        rank: tower -> Spearman's correlation of the ranks.
    """

    cosine: dict[str, Tensor]
    rank: dict[str, Tensor]

    @property
    def table(self) -> list[dict[str, Any]]:
        """A dict per tower and sample: "tower", "sample", "answer" if it is explained per token, "cosine", "rank"."""
        lines = []
        for tower, cosines in self.cosine.items():
            for index in torch.cartesian_prod(*map(torch.arange, cosines.shape)).reshape(-1, cosines.ndim).tolist():
                keys = dict(zip(("sample", "answer"), index, strict=False))
                values = {"cosine": cosines[tuple(index)], "rank": self.rank[tower][tuple(index)]}
                lines.append({"tower": tower, **keys, **{name: round(float(value), 6) for name, value in values.items()}})
        return lines

    def _repr_html_(self) -> str:
        """The table for a notebook."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in (self.table or [{"tower": ""}])[0])
        lines = ["".join(f"<td>{html.escape(str(value))}</td>" for value in line.values()) for line in self.table]
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class _Part(NamedTuple):
    """Entries of one kind in a tower and a sample: values (T, n), a line per token of an answer, or one."""

    kind: Literal["patch", "sound", "word", "region", "token"]
    values: Array
    image: int | None = None
    width: int = 1
    words: list[str] | None = None


def _groups(explanation: Explained) -> Iterator[tuple[int, int | None, str, list[_Part]]]:
    """All entries by sample, token of the answer and tower: those of a group can be compared."""
    tokens, answers = explanation.tokens, explanation.answer_tokens if explanation.per_token else None
    for sample in range(len(explanation)):
        words = None if tokens is None else tokens[sample]
        towers = {name: _tower_parts(explanation, sample, name, words) for name in explanation.relevancy}
        for answer in [None] if answers is None else range(len(answers[sample])):
            for tower, parts in towers.items():
                yield sample, answer, tower, parts


def largest(explanation: Explained, k: int) -> list[Entry]:
    """See `Explanation.top`."""
    check_integer("k", k, low=0)
    entries = []
    for sample, answer, tower, parts in _groups(explanation):
        arrays = [part.values[answer or 0] for part in parts]
        values, ends = np.concatenate(arrays), np.cumsum([len(array) for array in arrays])
        for i in np.argsort(-values, kind="stable")[:k].tolist():  # NaN is last
            number = int(np.searchsorted(ends, i, side="right"))
            part, position = parts[number], i - (int(ends[number - 1]) if number else 0)
            word = None if part.words is None else part.words[position]
            place = None if part.image is None else (part.image, *divmod(position, part.width))
            entries.append(Entry(sample, answer, tower, part.kind, position, place, word, float(values[i])))
    return sorted(entries, key=lambda e: (e.sample, e.answer or 0, math.isnan(e.value), -e.value))


def to_frame(explanation: Explained) -> pd.DataFrame:
    """See `Explanation.to_pandas`."""
    import pandas as pd

    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    said = explanation.answer_tokens
    for sample, answer, tower, parts in _groups(explanation):
        token = (-1, None) if answer is None or said is None else (answer, said[sample][answer])
        for part in parts:
            values = part.values[answer or 0]
            position = np.arange(len(values))
            place = (part.image, position // part.width, position % part.width) if part.image is not None else (-1, -1, -1)
            line = (sample, *token, tower, part.kind, position, *place, part.words, values)
            for name, column in zip(_COLUMNS, line, strict=True):
                kind = _COLUMNS[name]
                columns[name].append(np.broadcast_to(np.asarray(column, dtype=kind), len(values)))
    joined = {name: np.concatenate([np.zeros(0, _COLUMNS[name]), *parts]) for name, parts in columns.items()}
    missing = {name: pd.arrays.IntegerArray(joined[name], joined[name] < 0) for name in ("answer", "image", "y", "x")}
    return pd.DataFrame(joined | missing)


def compare(explanation: Explained, other: Explained) -> Comparison:
    """See `Explanation.compare`."""
    if not hasattr(other, "relevancy"):
        raise TypeError(f"other must be an Explanation; got {describe(other)}")
    shapes = [shapes_of(each) for each in (explanation, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"other must have the towers and shapes {shapes[0]}; got {shapes[1]}")
    cosine, rank = {}, {}
    for name, values in explanation.relevancy.items():
        pair = (each.without_self(name).detach().double().cpu().flatten(0, -2) for each in (explanation, other))
        scores = [_alike(a, b) for a, b in zip(*pair, strict=True)]
        cosine[name], rank[name] = (torch.tensor([s[i] for s in scores]).reshape(values.shape[:-1]) for i in (0, 1))
    return Comparison(cosine, rank)


def shapes_of(explanation: Explained) -> dict[str, tuple[int, ...]]:
    """tower -> the shape of its relevancy."""
    return {name: tuple(value.shape) for name, value in explanation.relevancy.items()}


def _alike(left: Tensor, right: Tensor) -> tuple[float, float]:
    """Cosine and rank correlation of two vectors (N,); NaN has no rank."""
    if bool((left.isnan() | right.isnan()).any()):
        return math.nan, math.nan
    counts = (left != 0) | (right != 0)
    left, right = left[counts], right[counts]
    a, b = mean_ranks(left), mean_ranks(right)
    return _cosine(left, right), _cosine(a - a.mean(), b - b.mean())


def _cosine(left: Tensor, right: Tensor) -> float:
    return float(left @ right / (left.norm() * right.norm()))


def _tower_parts(explanation: Explained, sample: int, tower: str, tokens: list[str] | None) -> list[_Part]:
    def lines(values: Tensor) -> Array:
        """Values of the sample as (T, n), or (1, n)."""
        array = to_array(values).astype(float)
        return array.reshape(len(array), math.prod(array.shape[1:])) if explanation.per_token else array.reshape(1, array.size)

    maps: Maps | None = (explanation.tower_images or {}).get(tower)
    if maps is None and tower == home(explanation, "vision", "sound", "language"):
        maps = explanation.image
    parts = []
    for i, part in maps_of(explanation, maps, sample):
        width, seconds = part.shape[-1], None if explanation.seconds is None else explanation.seconds[i]
        at = lines(part), i, width
        parts.append(_Part("patch", *at) if seconds is None else _Part("sound", *at, times(width, seconds)))
    if explanation.text is not None and tokens is not None and tower == home(explanation, "text", "language"):
        values = lines(explanation.text[sample])[:, : len(tokens)]  # shorter texts are padded with zeros
        parts.append(_Part("word", values, words=tokens))
    if explanation.regions is not None and tower == home(explanation, "vision", "joint"):
        parts.append(_Part("region", lines(explanation.regions[sample])))
    named = explanation.token_names if tower == next(iter(explanation.relevancy)) else None
    return parts or [_Part("token", lines(explanation.without_self(tower, sample)), words=named)]
