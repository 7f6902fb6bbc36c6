"""Agreement of a map with ground-truth boxes: pointing game, intersection over union, mass inside.

A score takes the map's values (n,), the place of each entry (n, 4) and the boxes (K, 4), as x1, y1, x2, y2 relative to the image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def pointing(values: Tensor, entries: Tensor, boxes: Tensor) -> float:
    """1 where the centre of the largest entry lies in a box, else 0 (Zhang et al., "Top-down neural attention", ECCV 2016,
    without their margin of 15 pixels). A constant map points nowhere: 0."""
    if bool((values == values[0]).all()):
        return 0.0
    return float(_centre_inside(entries, boxes)[values.argmax()])


def intersection_over_union(values: Tensor, entries: Tensor, boxes: Tensor) -> float:
    """Area that the entries above the map's mean share with the boxes, divided by the area of both together. 0 for a constant
    map, which has no entry above its mean."""
    if bool((values == values[0]).all()):  # a rounded mean may lie below all values
        return 0.0
    above = entries[values > values.mean()]
    area, in_entries, in_boxes = _cut(above, boxes)
    chosen, true = in_entries.any(0), in_boxes.any(0)
    return float((area * (chosen & true)).sum() / (area * (chosen | true)).sum())


def mass(values: Tensor, entries: Tensor, boxes: Tensor) -> float:
    """Share of the positive mass inside the boxes, by the area of each entry inside, or by the centre of an entry without area. 0
    without positive mass."""
    area, in_entries, in_boxes = _cut(entries, boxes)
    weights = in_entries * area
    covered, whole = (weights * in_boxes.any(0)).sum((1, 2)), weights.sum((1, 2))
    inside = torch.where(whole > 0, covered / whole, _centre_inside(entries, boxes).double())
    positive = values.double().clamp(min=0)
    total = positive.sum()
    return float((positive * inside).sum() / total) if total > 0 else 0.0


def grid_entries(height: int, width: int) -> Tensor:
    """(height * width, 4), the cells of a grid over the whole image, row by row."""
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    cells = torch.stack([x / width, y / height, (x + 1) / width, (y + 1) / height], dim=-1)
    return cells.view(-1, 4)


def check_boxes(boxes: Any, count: int) -> list[Tensor | None]:
    """The ground truth of each of `count` samples as (K, 4), or None. TypeError or ValueError where there is not one entry a
    sample, or corners lie outside of the image or in the wrong order."""
    if boxes is None:
        return [None] * count
    if count == 1 and not isinstance(boxes, Tensor) and len(boxes) and boxes[0] is not None and len(boxes[0]):
        boxes = [boxes] if torch.as_tensor(boxes[0]).ndim == 1 else boxes
    elif count == 1 and isinstance(boxes, Tensor) and boxes.ndim == 2:
        boxes = [boxes]
    if count == 1 and len(boxes) == 0:
        return [None]
    if len(boxes) != count:
        raise ValueError(f"boxes must be None or one set of boxes for each of the {count} samples; got {len(boxes)}")
    return [None if part is None or len(part) == 0 else _checked(part) for part in boxes]


def _checked(boxes: Any) -> Tensor:
    corners = torch.as_tensor(boxes).detach().cpu().double()
    if corners.ndim != 2 or corners.shape[1] != 4:
        raise ValueError(f"boxes must be (K, 4) for each sample; got {tuple(corners.shape)}")
    inside = (corners >= 0) & (corners <= 1)
    if not bool(inside.all() & (corners[:, :2] < corners[:, 2:]).all()):
        raise ValueError(f"boxes must be x1 < x2 and y1 < y2 relative to the image, in [0, 1]; got {corners.tolist()}")
    return corners


def _centre_inside(entries: Tensor, boxes: Tensor) -> Tensor:
    """bool (n,): whether the centre of an entry lies in a box, its edge included."""
    x, y = ((entries[:, axis, None] + entries[:, axis + 2, None]) / 2 for axis in (0, 1))
    inside = (boxes[:, 0] <= x) & (x <= boxes[:, 2]) & (boxes[:, 1] <= y) & (y <= boxes[:, 3])
    return inside.any(1)


def _cut(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The plane cut along every edge, so that areas of unions are exact: the pieces' areas (Y, X), and which pieces lie in which
    box of `first` (n, Y, X) and `second` (K, Y, X)."""
    boxes = torch.cat([first, second]).double()
    edges = [boxes[:, [axis, axis + 2]].flatten().unique() for axis in (0, 1)]
    inside = []
    for axis, edge in enumerate(edges):
        centre = (edge[1:] + edge[:-1]) / 2
        inside.append((boxes[:, axis, None] < centre) & (centre < boxes[:, axis + 2, None]))
    width, height = (edge.diff() for edge in edges)
    within = inside[1][:, :, None] & inside[0][:, None, :]
    return height[:, None] * width, within[: len(first)], within[len(first) :]


Score = Callable[[Tensor, Tensor, Tensor], float]
BOX_SCORES: dict[str, Score] = {"pointing": pointing, "iou": intersection_over_union, "mass": mass}
