"""Pictures of an Explanation; matplotlib and jinja2 are imported here and nowhere else in vlattn_fast.interpret."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray[Any, Any]


class Explained(Protocol):
    """What a picture reads of an Explanation."""

    def __len__(self) -> int: ...
    @property
    def image(self) -> Tensor | tuple[Tensor, ...] | None: ...
    @property
    def image_rows(self) -> list[int] | None: ...
    @property
    def text(self) -> Tensor | None: ...
    @property
    def tokens(self) -> list[list[str]] | None: ...
    @property
    def regions(self) -> Tensor | None: ...
    @property
    def boxes(self) -> Tensor | None: ...
    @property
    def scores(self) -> Tensor | None: ...
    @property
    def target(self) -> list[int] | None: ...


def draw(explanation: Explained, image: Any, rows: Sequence[int] | None, cmap: str, alpha: float) -> Figure:
    """See `Explanation.plot`."""
    from matplotlib.figure import Figure

    chosen = list(range(len(explanation))) if rows is None else list(rows)
    for row in chosen:
        if not 0 <= row < len(explanation):
            raise ValueError(f"rows must be from 0 to {len(explanation) - 1}; got {row}")
    pictures = _pictures(explanation, image)
    maps = [_maps(explanation, row) for row in chosen]
    has_text, has_regions = explanation.text is not None, explanation.regions is not None
    columns = max([int(has_regions), *(len(part) for part in maps)]) + int(has_text)
    figure = Figure(figsize=(4.5 * max(columns, 1), 3.6 * max(len(chosen), 1)), layout="constrained")
    axes = figure.subplots(max(len(chosen), 1), max(columns, 1), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for line, row, parts in zip(axes, chosen, maps, strict=False):
        for axis, (index, values) in zip(line, parts, strict=False):
            _draw_map(axis, values, _of(pictures, index), cmap, alpha)
        if has_regions:
            _draw_regions(line[0], explanation, row, _of(pictures, row), cmap, alpha)
        if has_text:
            _draw_words(line[-1], _words(explanation, row), cmap)
        if explanation.scores is not None:
            line[0].set_title(f"score {float(explanation.scores[row]):.4g}", fontsize=9)
    return figure


def _draw_map(axis: Any, values: Array, picture: Array | None, cmap: str, alpha: float) -> None:
    height, width = values.shape if picture is None else picture.shape[:2]
    extent = (0, width, height, 0)
    if picture is not None:
        axis.imshow(picture, extent=extent)
    axis.imshow(
        scaled(values),
        cmap=cmap,
        vmin=0,
        vmax=1,
        extent=extent,
        alpha=None if picture is None else alpha,
        interpolation="nearest" if picture is None else "bilinear",
    )


def _draw_regions(axis: Any, explanation: Explained, row: int, picture: Array | None, cmap: str, alpha: float) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    if explanation.regions is None or explanation.boxes is None:
        return
    height, width = (1, 1) if picture is None else picture.shape[:2]
    if picture is not None:
        axis.imshow(picture, extent=(0, width, height, 0))
    shares = scaled(_numpy(explanation.regions[row]))
    for share, (x1, y1, x2, y2) in zip(shares, _numpy(explanation.boxes[row]), strict=True):
        corner, size = (x1 * width, y1 * height), ((x2 - x1) * width, (y2 - y1) * height)
        axis.add_patch(Rectangle(corner, *size, facecolor=colormaps[cmap](share), edgecolor="black", alpha=alpha, linewidth=0.5))
    axis.set(xlim=(0, width), ylim=(height, 0), aspect="equal")


def _draw_words(axis: Any, words: list[tuple[str, float, float]], cmap: str) -> None:
    from matplotlib import colormaps

    axis.set_axis_on()
    axis.barh(range(len(words)), [value for _, value, _ in words], color=[colormaps[cmap](share) for _, _, share in words])
    axis.set_yticks(range(len(words)), [_plain(word) for word, _, _ in words], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("relevancy", fontsize=8)


def render_html(explanation: Explained, image: Any, title: str, cmap: str) -> str:
    """See `Explanation.save_html`."""
    import jinja2

    pictures = _pictures(explanation, image)
    rows = []
    for row in range(len(explanation)):
        words = _words(explanation, row)
        rows.append(
            {
                "index": row,
                "score": None if explanation.scores is None else f"{float(explanation.scores[row]):.4g}",
                "target": None if explanation.target is None else explanation.target[row],
                "pngs": _pngs(explanation, row, pictures, cmap),
                "words": [
                    {"text": word, "value": f"{value:.4g}", "share": f"{max(share, 0):.3f}"} for word, value, share in words
                ],
            }
        )
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = (Path(__file__).parent / "templates" / "explanation.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(title=title, explanation=explanation, rows=rows)


def _pngs(explanation: Explained, row: int, pictures: list[Array] | None, cmap: str) -> list[str]:
    """Each map of a row as a base64 PNG."""
    from matplotlib.figure import Figure

    drawn = []
    parts = [*_maps(explanation, row), *([] if explanation.regions is None else [(row, None)])]
    for index, values in parts:
        figure = Figure(figsize=(4, 4), layout="constrained")
        axis = figure.subplots()
        axis.set_axis_off()
        picture = _of(pictures, index)
        if values is None:
            _draw_regions(axis, explanation, row, picture, cmap, 0.6)
        else:
            _draw_map(axis, values, picture, cmap, 0.6)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
        drawn.append(base64.b64encode(buffer.getvalue()).decode("ascii"))
    return drawn


def scaled(values: Array) -> Array:
    """Values mapped to [0, 1] by their smallest and largest; a constant becomes zeros."""
    low, high = float(values.min(initial=np.inf)), float(values.max(initial=-np.inf))
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _maps(explanation: Explained, row: int) -> list[tuple[int, Array]]:
    """The maps of a row, each with its number among all maps."""
    if explanation.image is None or explanation.image_rows is None:
        return []
    owners = enumerate(zip(explanation.image, explanation.image_rows, strict=True))
    return [(index, _numpy(part)) for index, (part, owner) in owners if owner == row]


def _words(explanation: Explained, row: int) -> list[tuple[str, float, float]]:
    """(word, value, share of the largest magnitude) of one row."""
    if explanation.text is None or explanation.tokens is None:
        return []
    words = explanation.tokens[row]
    values = _numpy(explanation.text[row])[: len(words)]
    largest = float(np.abs(values).max(initial=0.0))
    shares = values / largest if largest > 0 else np.zeros_like(values)
    return [(word, float(value), float(share)) for word, value, share in zip(words, values, shares, strict=True)]


def _plain(word: str) -> str:
    """A word as matplotlib should draw it: the dollar sign would start a formula."""
    return word.replace("$", r"\$")


def _pictures(explanation: Explained, image: Any) -> list[Array] | None:
    """The user's image or images as (H, W, 3) or (H, W) arrays, one for all rows or one per row."""
    if image is None:
        return None
    many = isinstance(image, (list, tuple)) or (hasattr(image, "ndim") and image.ndim == 4)
    pictures = [_picture(part) for part in image] if many else [_picture(image)]
    count = len(explanation) if explanation.image_rows is None else len(explanation.image_rows)
    if len(pictures) not in (1, count):
        raise ValueError(f"image must be one image or {count} of them (one per map); got {len(pictures)}")
    return pictures


def _picture(image: Any) -> Array:
    array = np.asarray(image.detach().cpu() if isinstance(image, Tensor) else image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1):
        array = np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    if array.ndim != 3 or array.shape[2] not in (3, 4):
        raise ValueError(f"image must have shape (H, W), (H, W, 3) or (3, H, W); got {array.shape}")
    if array.dtype.kind == "f" and array.size and not (array.min() >= -1e-3 and array.max() <= 1 + 1e-3):
        got = f"{array.min():.3g} to {array.max():.3g}"
        raise ValueError(f"image must be bytes, or floats from 0 to 1 (not a model's normalised pixel_values); got {got}")
    return array.clip(0, 1) if array.dtype.kind == "f" else array


def _of(pictures: list[Array] | None, index: int) -> Array | None:
    """The picture under map `index`."""
    if pictures is None:
        return None
    return pictures[index] if len(pictures) > 1 else pictures[0]


def _numpy(tensor: Tensor) -> Array:
    return tensor.detach().cpu().float().numpy()
