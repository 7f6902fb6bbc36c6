"""The page of an Explanation: one HTML file with its data and a short script inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlattn_fast.interpret.pictures import colors
from vlattn_fast.interpret.view import (
    Array,
    Box,
    Choice,
    Explained,
    Patch,
    choices,
    limits,
    read_crops,
    read_pictures,
    row_label,
    row_words,
    shares,
)

_PHOTO_BYTES = 300_000  # of a JPEG; twenty-four maps beside it stay within a megabyte
_STEPS = 1000  # a map's values are stored as whole thousandths of their range


class Page(str):
    """A page's text, which a notebook shows in a frame."""

    def _repr_html_(self) -> str:
        source = html.escape(self, quote=True)
        return f'<iframe title="relevancy" style="width: 100%; height: 44rem; border: 0" srcdoc="{source}"></iframe>'


def render(explanations: Sequence[Explained], image: Any, labels: Sequence[str] | None, crop: Any, title: str, cmap: str) -> Page:
    """See `Explanation.to_html`."""
    import jinja2
    from matplotlib.colors import to_hex

    first = explanations[0]
    pictures, crops = read_pictures(first, image), read_crops(first, crop)
    listed = choices(first, labels)
    methods = []
    for explanation in explanations:
        found = listed if explanation is first else choices(explanation, labels)
        if [_kind(choice) for choice in found] != [_kind(choice) for choice in listed]:
            raise ValueError(f"beside must explain the same rows, words, maps and towers; got {explanation!r} beside {first!r}")
        layers = f", layers from {explanation.start_layer}" if explanation.start_layer else ""
        values = [_choice(c, crops, pictures, together=crop is not None) for c in found]
        methods.append({"name": explanation.method + layers, "choices": values})
    data = {
        "colors": [to_hex(color) for color in colors(cmap)(np.arange(256))],
        "steps": _STEPS,
        "pictures": [_photo(picture) for picture in pictures or []],
        "texts": [_text(first, row) for row in range(len(first))],
        "towers": list(first.relevancy),
        "methods": methods,
    }
    folder = Path(__file__).parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("explanation.html")
    return Page(template.render(title=title, data=data, groups=_groups(first, listed, labels), kind=_words_are(first)))


def _kind(choice: Choice) -> tuple[Any, ...]:
    """What choices must have in common to be shown in each other's place."""
    return choice.row, choice.label, len(choice.words), len(choice.patches), *choice.rows, *choice.towers


def _words_are(explanation: Explained) -> str:
    """What the page chooses among: rows, or words of an answer or of the prompt."""
    if not explanation.each:
        return "Rows"
    return "Answer" if explanation.text is not None else "Prompt"


def _groups(explanation: Explained, listed: list[Choice], labels: Sequence[str] | None) -> list[dict[str, Any]]:
    """The choices as the page lists them: an answer's words under their prompt, or all rows together."""
    numbered: list[dict[str, Any]] = [{"index": i, "choice": choice, "space": True} for i, choice in enumerate(listed)]
    if not explanation.each:
        return [{"label": None, "choices": numbered}]
    groups = []
    for row in range(len(explanation)):
        words = row_words(explanation, row)[1]
        mine = [one for one in numbered if one["choice"].row == row]
        for one, word in zip(mine, words, strict=False):
            one["space"] = word.space
        label = row_label(explanation, row) if len(explanation) > 1 else None
        groups.append({"label": label if labels is None else labels[row], "choices": mine})
    return groups


def _text(explanation: Explained, row: int) -> list[dict[str, Any]]:
    """The words of a row's text; an answer's that have rows of their own are buttons instead."""
    prompt, answer = row_words(explanation, row)
    return [{"text": word.text, "space": word.space} for word in (prompt if explanation.each else prompt + answer)]


def _choice(choice: Choice, crops: list[Box], pictures: list[Array] | None, together: bool) -> dict[str, Any]:
    """A choice as the page's script reads it."""
    views = {"": choice.patches, **choice.towers}
    return {
        "row": choice.row,
        "label": choice.label,
        "score": _number(choice.score),
        "words": [_number(value) for _, value in choice.words],
        "views": {name: _figures(patches, crops, pictures, together) for name, patches in views.items()},
        "rows": {name: _values(values, *_range(values)) for name, values in choice.rows.items()},
        "own": {name: _number(value) for name, value in choice.own.items()},
    }


def _figures(patches: list[Patch], crops: list[Box], pictures: list[Array] | None, together: bool) -> dict[str, Any]:
    """Maps by the figure that they are drawn into: regions of one picture share it, and so do maps with crops."""
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
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def _values(values: Array, low: float, high: float) -> dict[str, Any]:
    cells = np.rint(np.nan_to_num(shares(values, low, high)) * _STEPS).astype(int)
    return {"low": _number(low), "high": _number(high), "cells": cells.ravel().tolist()}


def _number(value: float | None) -> float | None:
    """Four digits; JSON has no NaN."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.4g}")


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
