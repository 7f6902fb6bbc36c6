"""The page of an Explanation: one HTML file with its data and a short script inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from vlattn_fast.interpret.result.choices import (
    Array,
    Box,
    Choice,
    Explained,
    Patch,
    Row,
    limits,
    read_crops,
    read_pictures,
    read_rows,
    shares,
)
from vlattn_fast.interpret.result.figure import colors

_PHOTO_BYTES = 300_000  # of a JPEG, so that a page of 24 maps stays within a megabyte
_STEPS = 1000  # a map's values are stored as whole thousandths of their range


class Page(str):
    """A page's text, which a notebook shows in a frame."""

    def _repr_html_(self) -> str:
        source = html.escape(self, quote=True)
        return f'<iframe title="relevancy" style="width: 100%; height: 44rem; border: 0" srcdoc="{source}"></iframe>'


def render(explanations: Sequence[Explained], image: Any, labels: Sequence[Any] | None, crop: Any, title: str, cmap: str) -> Page:
    """See `Explanation.to_html`."""
    import jinja2
    from matplotlib.colors import to_hex

    first = explanations[0]
    pictures, crops = read_pictures(first, image), read_crops(first, crop)
    listed = read_rows(first, labels)
    methods = []
    for explanation in explanations:
        rows = listed if explanation is first else read_rows(explanation, labels)
        if _kinds(rows) != _kinds(listed):
            raise ValueError(f"beside must explain the same rows, words, maps and towers; got {explanation!r} beside {first!r}")
        layers = f", layers from {explanation.start_layer}" if explanation.start_layer else ""
        values = [_choice(c, crops, pictures, together=crop is not None) for row in rows for c in row.choices]
        methods.append({"name": explanation.method + layers, "choices": values})
    data = {
        "colors": [to_hex(color) for color in colors(cmap)(np.arange(256))],
        "steps": _STEPS,
        "pictures": [_photo(picture) for picture in pictures or []],
        "texts": [_text(row, first.each) for row in listed],
        "towers": list(first.relevancy),
        "methods": methods,
    }
    folder = Path(__file__).parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("explanation.html")
    groups = _groups(listed, first.each, labels is not None)
    return Page(template.render(title=title, data=data, groups=groups, kind=_words_are(first)))


def _kinds(rows: list[Row]) -> list[tuple[Any, ...]]:
    """The facts that choices must share to replace each other on the page."""
    chosen = (choice for row in rows for choice in row.choices)
    return [(c.row, c.label, len(c.values), len(c.patches), *c.rows, *c.towers) for c in chosen]


def _words_are(explanation: Explained) -> str:
    """The kind of the page's choices: rows, or words of an answer or of the prompt."""
    if not explanation.each:
        return "Rows"
    return "Answer" if explanation.text is not None else "Prompt"


def _groups(rows: list[Row], each: bool, labelled: bool) -> list[dict[str, Any]]:
    """The choices as the page lists them: an answer's words under their prompt, or all rows together."""
    numbers = count()
    groups = [[{"index": next(numbers), "choice": choice} for choice in row.choices] for row in rows]
    if not each:
        return [{"label": None, "choices": [one for group in groups for one in group]}]
    labels = [row.label if labelled or len(rows) > 1 else None for row in rows]
    return [{"label": label, "choices": group} for label, group in zip(labels, groups, strict=True)]


def _text(row: Row, each: bool) -> list[dict[str, Any]]:
    """The words of a row's text, without words of an answer that have rows: these are buttons."""
    return [{"text": word.text, "space": word.space} for word in (row.prompt if each else row.words)]


def _choice(choice: Choice, crops: list[Box], pictures: list[Array] | None, together: bool) -> dict[str, Any]:
    """A choice as the page's script reads it."""
    views = {"": choice.patches, **choice.towers}
    return {
        "row": choice.row,
        "label": choice.label,
        "score": _number(choice.score),
        "words": _numbers(choice.values),
        "views": {name: _figures(patches, crops, pictures, together) for name, patches in views.items()},
        "rows": {name: _values(values, *_range(values)) for name, values in choice.rows.items()},
        "own": {name: _number(value) for name, value in choice.at_position.items()},
    }


def _figures(patches: list[Patch], crops: list[Box], pictures: list[Array] | None, together: bool) -> dict[str, Any]:
    """Maps by figure: regions of one picture share a figure, and so do maps with crops."""
    low, high = limits(patches)
    figures: dict[Any, dict[str, Any]] = {}
    for patch in patches:
        number = 0 if pictures is None or len(pictures) == 1 else patch.index
        picture = None if pictures is None else number
        key = number if together or patch.box is not None else ("map", patch.index)
        box = crops[patch.index] if patch.box is None else patch.box
        map_ = {"box": [round(x, 5) for x in box], "size": list(patch.values.shape), **_values(patch.values, low, high)}
        figures.setdefault(key, {"picture": picture, "maps": []})["maps"].append(map_)
    return {"low": _number(low), "high": _number(high), "figures": list(figures.values())}


def _range(values: Array) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    return (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)


def _values(values: Array, low: float, high: float) -> dict[str, Any]:
    flat = values.ravel()
    cells = np.rint(np.nan_to_num(shares(flat, low, high)).clip(0, 1) * _STEPS).astype(int).tolist()
    for i in np.flatnonzero(np.isnan(flat)).tolist():
        cells[i] = None
    return {"low": _number(low), "high": _number(high), "cells": cells}


def _number(value: float | None) -> float | None:
    """Four digits; JSON has no NaN."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.4g}")


def _numbers(values: Array) -> list[float | None]:
    known = np.isfinite(values).tolist()
    return [float(f"{value:.4g}") if finite else None for value, finite in zip(values.tolist(), known, strict=True)]


def _photo(picture: Array) -> dict[str, Any]:
    """A picture as a JPEG in a data URI, smaller where it must be; transparent parts become white."""
    from PIL import Image

    photo = Image.fromarray(picture)
    if photo.mode == "RGBA":
        white = Image.new("RGBA", photo.size, "white")
        photo = Image.alpha_composite(white, photo).convert("RGB")
    width, height = photo.size
    while len(encoded := _jpeg(photo)) > _PHOTO_BYTES:
        factor = max(0.5, 0.95 * (_PHOTO_BYTES / len(encoded)) ** 0.5)
        photo = photo.resize((max(1, int(photo.width * factor)), max(1, int(photo.height * factor))), Image.Resampling.LANCZOS)
    source = "data:image/jpeg;base64," + base64.b64encode(encoded).decode("ascii")
    return {"source": source, "width": width, "height": height}


def _jpeg(photo: Any) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()
