"""Checks that the fields of an Explanation fit together, for those that users make by hand."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlattn_fast._ground.checks import check_tensor, describe

_BY_ROW = ("text", "regions", "boxes", "scores", "target", "answer", "places")


def check_fields(explanation: Any) -> None:
    """Relevancy is floating point, other fields have its rows, and each map has a row.

    Raises:
        TypeError, ValueError: naming the field.
    """
    relevancy = explanation.relevancy
    if not isinstance(relevancy, dict) or not relevancy:
        raise TypeError(f"relevancy must be a dict of towers and their tensors (B, N); got {describe(relevancy)}")
    for name, values in relevancy.items():
        field = f"relevancy[{name!r}]"
        check_tensor(field, values)
        if values.ndim not in (2, 3) or not values.is_floating_point():
            raise ValueError(f"{field} must be floating point of shape (B, N) or (B, T, N); got {describe(values)}")
    rows = len(explanation)
    named = () if explanation.text is None else ("words", "token_ids")
    for name in (*_BY_ROW, *named):
        value = getattr(explanation, name)
        if value is not None and len(value) != rows:
            raise ValueError(f"{name} must have {rows} rows, as relevancy has; got {len(value)}")
    for name in named:
        longest = max(map(len, getattr(explanation, name) or [[]]), default=0)
        if longest > explanation.text.shape[-1]:
            raise ValueError(f"{name} must be at most {explanation.text.shape[-1]} in a row, as text has; got {longest}")
    if explanation.image is not None:
        _check_maps("image", explanation.image, explanation.image_rows, rows)
    for name, maps in (explanation.tower_images or {}).items():
        _check_maps(f"tower_images[{name!r}]", maps, explanation.image_rows, rows)


def _check_maps(name: str, maps: Any, image_rows: list[int] | None, rows: int) -> None:
    if not isinstance(maps, (Tensor, tuple)) or not all(isinstance(part, Tensor) and part.ndim in (2, 3) for part in maps):
        raise TypeError(f"{name} must be a tensor (B, h, w) or a tuple of maps (h, w); got {describe(maps)}")
    for part in maps:
        if 0 in part.shape[-2:]:
            raise ValueError(f"{name} must have maps with at least one patch; got one of {tuple(part.shape)}")
    if len(rows_of_maps := range(rows) if image_rows is None else image_rows) != len(maps):
        raise ValueError(f"image_rows must name the row of each of the {len(maps)} maps of {name}; got {rows_of_maps}")
    if not all(0 <= row < rows for row in rows_of_maps):
        raise ValueError(f"image_rows must be from 0 to {rows - 1}; got {image_rows}")
