"""The page of an Explanation: one HTML file with its data and a short script inside."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from vlattn_fast.interpret.result.figures.panel_names import panel_names
from vlattn_fast.interpret.result.figures.photos import read_boxes, read_images
from vlattn_fast.interpret.result.figures.scale import check_scale, colors, for_scale, limits, scale_of, shares
from vlattn_fast.interpret.result.numbers.choices import (
    Array,
    Box,
    Choice,
    Patch,
    Sample,
    image_number,
    panels,
    read_samples,
    score_text,
)
from vlattn_fast.interpret.result.numbers.explained import Explained
from vlattn_fast.interpret.result.numbers.sink_tokens import sinks_line

TEMPLATES = Path(__file__).parent / "templates"  # page.html is the frame of all pages
_PHOTO_SIZE = 400_000  # in base64, 300 kB of JPEG, so that a page of 24 maps stays within a megabyte
_STEPS = 1000  # a map's values are stored as whole thousandths of their range


class Page(str):
    """A page's text, which a notebook shows in a frame."""

    def _repr_html_(self) -> str:
        source = html.escape(self, quote=True)
        return f'<iframe title="relevancy" style="width: 100%; height: 44rem; border: 0" srcdoc="{source}"></iframe>'


def fill_template(path: Path, **values: Any) -> str:
    """The page that a file of jinja2 makes of values."""
    import jinja2

    loader = jinja2.FileSystemLoader([path.parent, TEMPLATES])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(path.name).render(**values)


def render(
    explanations: Sequence[Explained],
    image: Any,
    labels: Sequence[Any] | None,
    crop: Any,
    processor: Any,
    title: str,
    cmap: str,
    scale: str,
) -> Page:
    """See `Explanation.to_html`."""
    from matplotlib.colors import to_hex

    check_scale(scale)
    first = explanations[0]
    images = read_images(first, image)
    crops, photos = read_boxes(first, images, crop, processor), images or []
    listed, each = read_samples(first, labels), first.per_token
    methods = []
    for explanation in explanations:
        samples = listed if explanation is first else read_samples(explanation, labels)
        if _kinds(samples) != _kinds(listed):
            raise ValueError(f"others must explain the same samples, words, maps and towers; got {explanation!r} and {first!r}")
        shown = [_choice(choice, crops, images, explanation.photos) for sample in samples for choice in sample.choices]
        methods.append({"name": explanation.method, "choices": shown})
    data = {
        "colors": [to_hex(color) for color in colors(cmap)(np.arange(256))],
        # of a scale that begins below 0
        "signed": [to_hex(color) for color in for_scale(colors(cmap), -1.0)(np.arange(256))],
        "steps": _STEPS,
        # of maps of one photo, only the first has it
        "images": [_photo(one) if all(one is not before for before in photos[:i]) else None for i, one in enumerate(photos)],
        # without words of an answer that are choices: these are buttons
        "texts": [[{"text": w.text, "space": w.space} for w in (one.prompt if each else one.words)] for one in listed],
        "towers": list(first.relevancy),
        "methods": methods,
    }
    kind = "Samples" if not each else "Answer" if first.text is not None else "Prompt"
    numbers = count()
    groups = [[{"index": next(numbers), "choice": choice} for choice in sample.choices] for sample in listed]
    if each:  # an answer's words under their prompt
        names = [sample.label if labels is not None or len(listed) > 1 else None for sample in listed]
        parts = [{"label": name, "choices": group} for name, group in zip(names, groups, strict=True)]
    else:
        parts = [{"label": None, "choices": [one for group in groups for one in group]}]
    values = {"data": data, "groups": parts, "kind": kind, "clips": scale == "quantile"}
    values |= {"sinks": sinks_line(first.sinks), "no_map": first.no_map}
    return Page(fill_template(TEMPLATES / "explanation.html", title=title, **values))


def _choice(choice: Choice, crops: list[Box], images: list[Array] | None, photos: Sequence[int] | None) -> dict[str, Any]:
    return {
        "sample": choice.sample,
        "label": choice.label,
        "score": _finite(choice.score),
        "scored": score_text(choice.score, choice.of).replace(" -", " \u2212"),
        "words": [_finite(value) for value in choice.values.tolist()],
        "views": {name: _view(patches, crops, images, photos) for name, patches in {"": choice.patches, **choice.towers}.items()},
        "rows": {name: _values(values) for name, values in choice.relevancy.items()},
        "at_position": {name: _finite(value) for name, value in choice.at_position.items()},
    }


def _kinds(samples: Sequence[Sample]) -> list[tuple[Any, ...]]:
    """What choices must have in common to replace each other on the page."""
    chosen = (choice for sample in samples for choice in sample.choices)
    return [(c.sample, c.label, len(c.values), len(c.patches), *c.relevancy, *c.towers) for c in chosen]


def _view(patches: list[Patch], crops: list[Box], images: list[Array] | None, photos: Sequence[int] | None) -> dict[str, Any]:
    """The maps of a choice by figure, with their scale, the end of the scale that clips, and the range of their values."""
    values = [patch.values for patch in patches]
    (low, high), (_, clip), range_ = scale_of(*values), scale_of(*values, scale="quantile"), limits(*values)
    figures = []
    views = panels(patches, images, crops)
    for name, panel in zip(panel_names(photos, views), views, strict=True):
        maps = []
        for patch in panel:
            box = crops[patch.index] if patch.box is None else patch.box
            maps.append({"box": [round(x, 5) for x in box], "size": list(patch.values.shape), **_values(patch.values)})
            maps[-1] |= {} if patch.seconds is None else {"seconds": _finite(patch.seconds)}
        image = None if images is None else image_number(panel[0], images)
        figures.append({"image": image, "name": name, "maps": maps})
    ends = {"low": _finite(low), "high": _finite(high), "clip": _finite(clip), "range": [_finite(end) for end in range_]}
    return {**ends, "figures": figures}


def _values(values: Array) -> dict[str, Any]:
    """Values as thousandths of their own range, which keeps most digits."""
    (low, high), flat = limits(values), values.ravel()
    cells = np.rint(np.nan_to_num(shares(flat, low, high)).clip(0, 1) * _STEPS).astype(int).tolist()
    for i in np.flatnonzero(np.isnan(flat)).tolist():
        cells[i] = None
    return {"low": _finite(low), "high": _finite(high), "cells": cells}


def _finite(value: float | None) -> float | None:
    """Four digits; JSON has no NaN."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _photo(image: Array) -> dict[str, Any]:
    """An image as a JPEG in a data URI, smaller if it must be; transparent parts become white."""
    from PIL import Image

    photo = Image.fromarray(image)
    if photo.mode == "RGBA":
        white = Image.new("RGBA", photo.size, "white")
        photo = Image.alpha_composite(white, photo).convert("RGB")
    width, height = photo.size
    while len(source := data_uri(photo.save, "jpeg", quality=88)) > _PHOTO_SIZE:
        factor = max(0.5, 0.95 * (_PHOTO_SIZE / len(source)) ** 0.5)
        photo = photo.resize((max(1, int(photo.width * factor)), max(1, int(photo.height * factor))), Image.Resampling.LANCZOS)
    return {"source": source, "width": width, "height": height}


def data_uri(save: Callable[..., Any], kind: str, **options: Any) -> str:
    """The data URI of what `save`, a method of a PIL image or a figure, writes in the format "png" or "jpeg"."""
    file = io.BytesIO()
    save(file, format=kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode("ascii")
