"""Agreement of a map with ground truth, boxes or a mask: pointing game, intersection over union, mass inside.

A score takes the map's values (n,), the box of each entry (n, 4), x1, y1, x2, y2 relative to the image, and the `Truth`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.checks import describe
from vlattn_fast.interpret.adapters.sound import Seconds
from vlattn_fast.interpret.evaluating.ties import constant, levelled
from vlattn_fast.interpret.result.numbers.words import join_tokens


@dataclass(frozen=True)
class Truth:
    """The true part of an image: some cells of a grid over the image, whose lines need not be even."""

    x: Tensor  # (X + 1,), the lines from left to right, relative to the image
    y: Tensor  # (Y + 1,), from top to bottom
    inside: Tensor  # bool (Y, X)
    timed: bool = False  # it is of a sound: x is in seconds

    @classmethod
    def from_boxes(cls, boxes: Tensor) -> Truth:
        """The union of boxes (K, 4), cut along every edge."""
        x, y = (boxes[:, [axis, axis + 2]].double().flatten().unique() for axis in (0, 1))
        columns, rows = (
            (boxes[:, axis, None] < centre) & (centre < boxes[:, axis + 2, None])
            for axis, centre in ((0, (x[1:] + x[:-1]) / 2), (1, (y[1:] + y[:-1]) / 2))
        )
        return cls(x, y, (rows[:, :, None] & columns[:, None, :]).any(0))

    @classmethod
    def from_mask(cls, mask: Tensor) -> Truth:
        """The True pixels of a mask (h, w) over the whole image."""
        y, x = (torch.arange(size + 1).double() / size for size in mask.shape)
        return cls(x, y, mask)

    @classmethod
    def from_seconds(cls, stretches: Sequence[Seconds]) -> Truth:
        """The union of stretches of a sound."""
        whole = cls.from_boxes(torch.tensor([[part.begin, 0.0, part.end, 1.0] for part in stretches]))
        return replace(whole, timed=True)

    @property
    def area(self) -> Tensor:
        return (self.y.diff()[:, None] * self.x.diff() * self.inside).sum()

    def areas_in(self, boxes: Tensor) -> Tensor:
        """(n,), the area of the true part in each of boxes (n, 4)."""
        rows, columns = _overlaps(boxes[:, [1, 3]], self.y), _overlaps(boxes[:, [0, 2]], self.x)
        return ((rows @ self.inside.double()) * columns).sum(1)

    def has_centres_of(self, boxes: Tensor) -> Tensor:
        """bool (n,): whether the centre of a box lies in the true part, its edge included."""
        x, y = ((boxes[:, axis, None] + boxes[:, axis + 2, None]) / 2 for axis in (0, 1))
        columns, rows = ((line[:-1] <= centre) & (centre <= line[1:]) for line, centre in ((self.x, x), (self.y, y)))
        return ((rows.double() @ self.inside.double()) * columns).sum(1) > 0


def pointing(values: Tensor, entries: Tensor, truth: Truth) -> float:
    """1 if the centre of the largest entry lies in the true part, else 0 (Zhang et al., "Top-down neural attention", ECCV
    2016, without their margin of 15 pixels). A constant map points nowhere: 0."""
    if constant(values):
        return 0.0
    return float(truth.has_centres_of(entries[levelled(values, torch.float32).argmax(), None])[0])


def intersection_over_union(values: Tensor, entries: Tensor, truth: Truth) -> float:
    """Area that the entries above the map's mean share with the true part, divided by the area of both together. 0 for a constant
    map, which has no entry above its mean."""
    if constant(values):  # a rounded mean may lie below all values
        return 0.0
    above = Truth.from_boxes(entries[values > values.mean()])
    y, x = above.inside.nonzero(as_tuple=True)
    pieces = torch.stack([above.x[x], above.y[y], above.x[x + 1], above.y[y + 1]], 1)  # which do not overlap, as entries may
    shared = truth.areas_in(pieces).sum()
    return float(shared / (above.area + truth.area - shared))


def mass(values: Tensor, entries: Tensor, truth: Truth) -> float:
    """Share of the positive mass in the true part, by the area of each entry inside, or by the centre of an entry without area. 0
    without positive mass."""
    covered, whole = truth.areas_in(entries), (entries[:, 2] - entries[:, 0]) * (entries[:, 3] - entries[:, 1])
    inside = torch.where(whole > 0, covered / whole, truth.has_centres_of(entries).double())
    positive = values.double().clamp(min=0)
    total = positive.sum()
    return float((positive * inside).sum() / total) if total > 0 else 0.0


def grid_entries(height: int, width: int) -> Tensor:
    """(height * width, 4), the cells of a grid over the whole image, row by row."""
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    cells = torch.stack([x / width, y / height, (x + 1) / width, (y + 1) / height], dim=-1)
    return cells.view(-1, 4)


def check_truth(boxes: Any, count: int) -> list[Truth | None]:
    """The ground truth of each of `count` samples: boxes (K, 4), a mask bool (h, w), `Seconds`, or None. An empty list and a mask
    without a True pixel are None. TypeError or ValueError if there is not one entry per sample, or corners lie outside of the
    image or in the wrong order."""
    if boxes is None:
        return [None] * count
    if isinstance(boxes, Seconds):
        boxes = [boxes]
    if count == 1 and _of_one_sample(boxes):
        boxes = [boxes]
    if len(boxes) != count:
        raise ValueError(f"boxes must be None or one set of boxes or one mask for each of the {count} samples; got {len(boxes)}")
    sets = [[part] if isinstance(part, Seconds) else part for part in boxes]
    return [None if part is None or len(part) == 0 else _checked(part) for part in sets]


def check_text_truth(truth: Any, texts: Sequence[tuple[Tensor, Tensor] | None], tokenizer: Any) -> list[Truth | None]:
    """The true words of each sample, in a row with its words. Of a text: its ids (N,), and the columns of its words; or None.
    ValueError for a truth that names no word of the text."""
    if truth is None or len(texts) == 1:
        truth = [truth] * len(texts)
    if len(truth) != len(texts):
        raise ValueError(f"text_truth must be given for each of the {len(texts)} samples, or None; got {len(truth)}")
    return [
        None if one is None or text is None else _true_words(one, *text, tokenizer)
        for one, text in zip(truth, texts, strict=True)
    ]


def _true_words(truth: Any, ids: Tensor, words: Tensor, tokenizer: Any) -> Truth:
    chosen = torch.zeros(len(ids), dtype=torch.bool)
    form = f"text_truth must be words of the text that may be removed, columns of input_ids, or bool (N,) = ({len(ids)},)"
    if isinstance(truth, Tensor) and truth.dtype == torch.bool and truth.numel() == len(ids):
        chosen = truth.detach().cpu().flatten()
    else:
        for one in [truth] if isinstance(truth, str) else truth.tolist() if isinstance(truth, Tensor) else truth:
            found = _columns_of(one, ids, words, tokenizer) if isinstance(one, str) else [one]
            if not found or not all(type(column) is int and -len(ids) <= column < len(ids) for column in found):
                raise ValueError(f"{form}; got {one!r}")
            chosen[found] = True
    if not bool(chosen[words].any()):
        raise ValueError(f"{form}; got {truth!r:.80}")
    return Truth.from_mask(chosen[words][None])


def _columns_of(phrase: str, ids: Tensor, words: Tensor, tokenizer: Any) -> list[int]:
    """Where a word, or several in a row, stand among the columns of words."""
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise ValueError(f"processor must be given for a text_truth of words; got {phrase!r} without it")
    tokens_joined = join_tokens([str(token) for token in tokenizer.convert_ids_to_tokens(ids[words].tolist())])
    said = phrase.split()
    starts = [n for n in range(len(tokens_joined)) if said and [word.text for word in tokens_joined[n : n + len(said)]] == said]
    return [int(words[token]) for n in starts for word in tokens_joined[n : n + len(said)] for token in word.tokens]


def _of_one_sample(boxes: Any) -> bool:
    """Whether these are boxes or a mask themselves, not a list with one entry per sample."""
    if len(boxes) == 0 or isinstance(boxes, Tensor):
        return len(boxes) == 0 or boxes.ndim == 2
    if isinstance(boxes[0], Seconds):
        return True
    return boxes[0] is not None and len(boxes[0]) > 0 and torch.as_tensor(boxes[0]).ndim == 1


def _checked(boxes: Any) -> Truth | None:
    if not isinstance(boxes, Tensor) and all(isinstance(part, Seconds) for part in boxes):
        return Truth.from_seconds(boxes)
    corners = torch.as_tensor(boxes).detach().cpu()
    if corners.dtype == torch.bool and corners.ndim == 2:
        return Truth.from_mask(corners) if bool(corners.any()) else None
    if corners.dtype == torch.bool or corners.ndim != 2 or corners.shape[1] != 4:
        raise ValueError(f"boxes must be (K, 4), or a mask bool (h, w), for each sample; got {describe(corners)}")
    corners = corners.double()
    inside = (corners >= 0) & (corners <= 1)
    if not bool(inside.all() & (corners[:, :2] < corners[:, 2:]).all()):
        raise ValueError(f"boxes must be x1 < x2 and y1 < y2 relative to the image, in [0, 1]; got {corners.tolist()}")
    return Truth.from_boxes(corners)


def _overlaps(intervals: Tensor, lines: Tensor) -> Tensor:
    """(n, k), the length that each interval (n, 2) shares with each part between two of the k + 1 lines."""
    return (intervals[:, 1:].minimum(lines[1:]) - intervals[:, :1].maximum(lines[:-1])).clamp(min=0).double()


BoxScore = Callable[[Tensor, Tensor, Truth], float]
BOX_SCORES: dict[str, BoxScore] = {"pointing": pointing, "iou": intersection_over_union, "mass": mass}
