"""A formula, and what each character of the model's answer looks at: the picture of README and of docs/experiments/real.md."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from vlattn_lab.real.formulas import PATCH
from vlattn_lab.real.reading import BOTH, Reader, Reading, Rule, relevancy

Array = np.ndarray[Any, Any]
RULE = Rule("gradient", BOTH, "logit")  # the default of `va.explain`
NUMBER = 16  # of the list: a fraction with a power and an index
WIDTH, LINE = 9.0, 0.5  # inches, of the figure and of the line above
ANSWER, FORMULA = 0.95, 0.62  # the shares of the width that they take


def picture(reader: Reader, reading: Reading, rule: Rule = RULE) -> Figure:
    """The answer, each character that names a glyph on a colour of its own; and the formula, lit in that colour by the map of the
    character."""
    symbols = [*reading.drawing.boxes]
    colours = [colorsys.hsv_to_rgb(number / len(symbols), 0.85, 1.0) for number in range(len(symbols))]
    shares = [smooth(relevancy(reader, reading, symbol, rule)) for symbol in symbols]
    rows, columns = (slice(places.min(), places.max() + 1) for places in np.nonzero(reading.drawing.blank))  # without the padding
    shown = lit(reading.drawing.picture, shares, colours)[rows, columns]
    height = FORMULA * WIDTH * shown.shape[0] / shown.shape[1]
    figure = Figure(figsize=(WIDTH, LINE + height))
    axis = figure.add_axes(((1 - FORMULA) / 2, 0, FORMULA, height / (LINE + height)))
    axis.imshow(shown, interpolation="bicubic", aspect="auto")
    axis.set_axis_off()
    characters = [reader.names[number] for number in reading.ids]
    colour_at = {reading.places[symbol]: colour for symbol, colour in zip(symbols, colours, strict=True)}
    size = 72 * ANSWER * WIDTH / len(characters) / 0.6  # a character of the font is 0.6 of its size wide
    for place, character in enumerate(characters):
        marked = {"bbox": {"facecolor": (*colour_at[place], 0.6), "linewidth": 0, "pad": 1.5}} if place in colour_at else {}
        x, y = (1 - ANSWER) / 2 + ANSWER * (place + 0.5) / len(characters), 1 - LINE / 2 / (LINE + height)
        figure.text(x, y, character, family="monospace", size=size, ha="center", va="center_baseline", parse_math=False, **marked)
    return figure


def smooth(values: Tensor) -> Array:
    """The positive part of a map (h, w) of patches as pixels (H, W), from 0 to 1 at its largest."""
    large = nn.functional.interpolate(values[None, None].clamp(min=0), scale_factor=PATCH, mode="bicubic")[0, 0].clamp(min=0)
    return (large / large.max().clamp(min=1e-30)).numpy()


def lit(grey: Array, shares: Sequence[Array], colours: Sequence[Sequence[float]]) -> Array:
    """A grey picture (H, W) as RGB under coloured light: where a share (H, W) is 1, white paper has its colour."""
    light = np.ones((*grey.shape, 3))
    for share, colour in zip(shares, colours, strict=True):
        light *= 1 - share[..., None] * (1 - np.asarray(colour))
    return np.round(255 * grey[..., None] * light).astype(np.uint8)
