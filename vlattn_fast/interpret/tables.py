"""An Explanation as a list of its entries, as a data frame, and beside another one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vlattn_fast.interpret.randomised import mean_ranks
from vlattn_fast.interpret.view import Explained, Maps, home, text_row, tower_row, without_own

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Entry:
    """One number of an explanation, and what it belongs to.

    Args:
        row: of the batch.
        answer: the answer's token that is explained; None where the row is one score.
        tower: the key in `Explanation.relevancy`.
        part: what the entry belongs to; "token" where only its position in the tower is known.
        position: among the row's words, patches, regions or tokens.
        place: (image, y, x) of a patch: which map, and where on its grid.
        word: the token of a word, as `Explanation.tokens` has it.
        value: raw.
    """

    row: int
    answer: int | None
    tower: str
    part: Literal["patch", "word", "region", "token"]
    position: int
    place: tuple[int, int, int] | None
    word: str | None
    value: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """How alike two explanations are, per tower: tensors (B,), or (B, T) with a row per token of an answer.

    Tokens that are 0 in both, such as padding, do not count. NaN: nothing is left, or all that is left has one value.

    Args:
        cosine: tower -> the cosine of the angle between the rows.
        rank: tower -> Spearman's correlation of the ranks.
    """

    cosine: dict[str, Tensor]
    rank: dict[str, Tensor]

    @property
    def table(self) -> list[dict[str, Any]]:
        """A dict per tower and row: "tower", "row", "answer" where tokens of an answer have rows, "cosine", "rank"."""
        lines = []
        for tower, cosines in self.cosine.items():
            for index in torch.cartesian_prod(*map(torch.arange, cosines.shape)).reshape(-1, cosines.ndim).tolist():
                keys = dict(zip(("row", "answer"), index, strict=False))
                values = {"cosine": cosines[tuple(index)], "rank": self.rank[tower][tuple(index)]}
                lines.append({"tower": tower, **keys, **{name: round(float(value), 6) for name, value in values.items()}})
        return lines


def entries(explanation: Explained) -> Iterator[Entry]:
    """All entries, by row, token of the answer and tower."""
    for row in range(len(explanation)):
        answers = explanation.answer_tokens if explanation.each else None
        for answer in [None] if answers is None else range(len(answers[row])):
            for tower in explanation.relevancy:
                yield from _tower_entries(explanation, row, answer, tower)


def largest(explanation: Explained, k: int) -> list[Entry]:
    """See `Explanation.top`."""
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k must be an int; got {type(k).__name__}")
    if k < 0:
        raise ValueError(f"k must be 0 or more; got {k}")
    groups = groupby(entries(explanation), key=lambda entry: (entry.row, entry.answer, entry.tower))
    return [entry for _, group in groups for entry in sorted(group, key=lambda entry: -entry.value)[:k]]


def to_frame(explanation: Explained) -> pd.DataFrame:
    """See `Explanation.to_pandas`."""
    import pandas as pd

    names = ["row", "answer", "tower", "part", "position", "image", "y", "x", "word", "value"]
    lines = []
    for entry in entries(explanation):
        line = asdict(entry)
        line["image"], line["y"], line["x"] = line.pop("place") or (None, None, None)
        lines.append([line[name] for name in names])
    frame = pd.DataFrame(lines, columns=names)
    return frame.astype({"answer": "Int64", "image": "Int64", "y": "Int64", "x": "Int64"})


def compare(explanation: Explained, other: Explained) -> Comparison:
    """See `Explanation.compare`."""
    shapes = [{name: tuple(value.shape) for name, value in each.relevancy.items()} for each in (explanation, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"other must have the towers and shapes {shapes[0]}; got {shapes[1]}")
    cosine, rank = {}, {}
    for name, values in explanation.relevancy.items():
        rows = (without_own(each, name).double().cpu().reshape(-1, values.shape[-1]) for each in (explanation, other))
        scores = [_alike(a, b) for a, b in zip(*rows, strict=True)]
        cosine[name], rank[name] = (torch.tensor([s[i] for s in scores]).reshape(values.shape[:-1]) for i in (0, 1))
    return Comparison(cosine, rank)


def _alike(left: Tensor, right: Tensor) -> tuple[float, float]:
    """Cosine and rank correlation of two rows (N,)."""
    counts = (left != 0) | (right != 0)
    left, right = left[counts], right[counts]
    a, b = mean_ranks(left), mean_ranks(right)
    return _cosine(left, right), _cosine(a - a.mean(), b - b.mean())


def _cosine(left: Tensor, right: Tensor) -> float:
    return float(left @ right / (left.norm() * right.norm()))


def _tower_entries(explanation: Explained, row: int, answer: int | None, tower: str) -> list[Entry]:
    def pick(values: Tensor) -> Tensor:
        return values if answer is None else values[answer]

    def entry(
        part: Any, position: int, value: float, place: tuple[int, int, int] | None = None, word: str | None = None
    ) -> Entry:
        return Entry(row, answer, tower, part, position, place, word, value)

    made: list[Entry] = []
    for index, part in _tower_maps(explanation, tower, row):
        values = pick(part)
        for i, value in enumerate(values.flatten().tolist()):
            made.append(entry("patch", i, value, place=(index, i // values.shape[1], i % values.shape[1])))
    if explanation.text is not None and explanation.tokens is not None and tower == home(explanation, "text", "language"):
        words = zip(
            explanation.tokens[row], pick(text_row(explanation, row)).tolist(), strict=False
        )  # zeros behind shorter texts
        made += [entry("word", i, value, word=word) for i, (word, value) in enumerate(words)]
    if explanation.regions is not None and tower == home(explanation, "vision", "joint"):
        made += [entry("region", i, value) for i, value in enumerate(pick(explanation.regions[row]).tolist())]
    if made:
        return made
    return [entry("token", i, value) for i, value in enumerate(pick(tower_row(explanation, tower, row)).tolist())]


def _tower_maps(explanation: Explained, tower: str, row: int) -> list[tuple[int, Tensor]]:
    """The maps (h, w) or (T, h, w) of a tower and a row, each with its number."""
    maps: Maps | None = (explanation.tower_images or {}).get(tower)
    if maps is None and tower == home(explanation, "vision", "language"):
        maps = explanation.image
    if maps is None or explanation.image_rows is None:
        return []
    return [(i, part) for i, (part, owner) in enumerate(zip(maps, explanation.image_rows, strict=True)) if owner == row]
