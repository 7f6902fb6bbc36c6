"""The colours of numbers in figures: from 0 to the largest, and if some are below 0, as far below it as above.

A scale that began at the smallest number would draw a map that is nearly even at full contrast. A scale that ends at the largest
number hides the rest of a map in which one entry is many times the others; one of the kind "quantile" ends below it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.colors import ListedColormap

Array = np.ndarray[Any, Any]

# The colour map of relevancy, in figures, overlays, pages and galleries. Over a photo 0 is transparent, and without
# one it is the map's first colour, so that white is never an amount.
RELEVANCY = "inferno"
KINDS = ("max", "quantile")
_SHARE = 0.99  # of the numbers lie on a scale of the kind "quantile"
_BELOW = (0.43, 0.70, 1.0)  # the colour of the scale's lower end, as that of words below 0


def check_scale(scale: Any) -> None:
    if scale not in KINDS:
        raise ValueError(f"scale must be one of {', '.join(map(repr, KINDS))}; got {scale!r}")


def limits(*parts: Array) -> tuple[float, float]:
    """The smallest and the largest finite number; 0 and 0 without numbers."""
    values = _finite(parts)
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def _finite(parts: Sequence[Array]) -> Array:
    values = np.concatenate([np.zeros(0), *(part.ravel() for part in parts)])
    return values[np.isfinite(values)]


def scale_of(*parts: Array, scale: str = "max") -> tuple[float, float]:
    """The ends of the scale on which numbers are drawn: the largest magnitude, or with "quantile" that of the number which is at
    least as large as 99 % of them, which leaves out at least one. If that number is 0, the largest again."""
    low, high = limits(*parts)
    end = max(high, -low)
    if scale == "quantile" and end > 0:
        end = float(np.quantile(np.abs(_finite(parts)), _SHARE, method="lower")) or end
    return (0.0, end) if low >= 0 else (-end, end)


def joint(scales: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The ends of one scale that reaches as far as each of these."""
    ends = list(scales)
    high = max((high for _, high in ends), default=0.0)
    return (-high if any(low < 0 for low, _ in ends) else 0.0), high


def clipped(end: float, *parts: Array) -> bool:
    """Whether a scale that ends at `end` leaves out some of the numbers."""
    low, high = limits(*parts)
    return max(high, -low) > end


def range_text(*parts: Array, end: float | None = None) -> str:
    """The range of numbers, as written next to their scale; and where the scale clips them, if it ends at `end`."""
    low, high = limits(*parts)
    cut = "" if end is None or not clipped(end, *parts) else f", clipped at {'±' if low < 0 else ''}{end:.3g}"
    return f"values {low:.3g} to {high:.3g}{cut}".replace("-", "\u2212")


def shares(values: Array, low: float, high: float) -> Array:
    """Values mapped to [0, 1]; zeros if `low` equals `high`."""
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def strengths(share: Array, low: float) -> Array:
    """How far shares of a scale that begins at `low` are from that of 0: 0 to 1."""
    return np.abs(2 * share - 1) if low < 0 else share


def evenness(low: float, high: float, *parts: Array) -> float:
    """The strength that nine tenths of the numbers reach: near 1 for a map that is nearly even."""
    strength = strengths(shares(_finite(parts), low, high).clip(0, 1), low)
    return float(np.quantile(strength, 0.1, method="lower")) if strength.size and high > low else 0.0


def colors(cmap: str) -> ListedColormap:
    """256 colours of matplotlib's map, without its ends: the last are so pale that the largest values would vanish on white, and
    the first so dark that middle ones would vanish on a dark photo."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    if not isinstance(cmap, str) or cmap not in colormaps:
        raise ValueError(f"cmap must be the name of a matplotlib colormap, such as 'inferno' or 'viridis'; got {cmap!r}")
    return ListedColormap(colormaps[cmap](np.linspace(0.25, 0.85, 256)), name=cmap)


def for_scale(cmap: ListedColormap, low: float) -> ListedColormap:
    """The colours of a scale that begins at `low`: `cmap` above 0, and below it from the same colour at 0 to a pale blue."""
    from matplotlib.colors import ListedColormap

    if low >= 0:
        return cmap
    below = np.linspace(1, 0, 128)[:, None] * (np.array([*_BELOW, 1.0]) - cmap(0.0)) + cmap(0.0)
    return ListedColormap(np.concatenate([below, cmap(np.linspace(0, 1, 128))]), name=cmap.name)
