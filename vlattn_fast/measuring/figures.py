"""Figures of measurements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlattn_fast._ground.extras import extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def panels(lines: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """Returns a figure of `size` inches, and its panels line by line."""
    with extra("viz"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False, **options)
