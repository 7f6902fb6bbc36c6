"""Small multiples: the maps of layers and heads side by side on one sheet, and their words as a table."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlattn_fast._ground.checks import check_bool, check_integer, check_items, check_number
from vlattn_fast.interpret.result.choices import Array, Choice, Sample, read_samples
from vlattn_fast.interpret.result.explained import Explained
from vlattn_fast.interpret.result.figure import Painter
from vlattn_fast.interpret.result.overlay import laid_over
from vlattn_fast.interpret.result.page import TEMPLATES, Page, fill_template
from vlattn_fast.interpret.result.photos import read_boxes, read_pictures
from vlattn_fast.interpret.result.scale import colors, for_scale, scale_of, shares

if TYPE_CHECKING:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from PIL.Image import Image as Picture

Place = tuple[int, int | None]  # a layer, and a head of it or None
Maps = Sequence[tuple[Place, Explained]]

_SIDE, _SMALL_SIDE, _MANY = 112, 56, 60  # pixels of a map's longer side, and of one among many
_COLUMNS = 6  # of the maps of layers
_GAP = 6  # pixels between maps
_INCH = 100  # pixels of a map in an inch of a figure, as matplotlib draws it


@dataclass(frozen=True)
class Sheet:
    """The maps of one row of the batch."""

    label: str
    places: list[Place]
    tiles: list[Picture | None]  # of each place; None where it has no picture
    words: list[str]
    values: list[tuple[Place, Array]]  # of the places that have words, one number a word

    @property
    def lines(self) -> list[list[tuple[Place, Picture]]]:
        """The maps by line: those of a layer's heads, or a few layers."""
        shown = [(place, tile) for place, tile in zip(self.places, self.tiles, strict=True) if tile is not None]
        if shown and shown[0][0][1] is not None:
            layers = dict.fromkeys(layer for (layer, _), _ in shown)
            return [[one for one in shown if one[0][0] == layer] for layer in layers]
        return [shown[first : first + _COLUMNS] for first in range(0, len(shown), _COLUMNS)]


def name_of(place: Place) -> str:
    layer, head = place
    return f"layer {layer}" if head is None else f"layer {layer}, head {head}"


@dataclass(frozen=True)
class Multiples:
    """Maps of layers and heads, with the arguments of `LayerExplanation.plot` and `to_html`."""

    maps: Maps
    image: Any
    labels: Any
    crop: Any
    processor: Any
    cmap: str
    rows: Any = None
    alpha: float = 0.85
    common: bool = False

    def figure(self) -> Figure:
        """See `LayerExplanation.plot`."""
        from matplotlib.figure import Figure

        drawn = [(_joined(sheet), sheet) for sheet in self._sheets()]
        parts: list[tuple[str, Array | Sheet, float, float]] = []  # what is drawn, and its width and height in inches
        for picture, sheet in drawn:
            if picture is not None:
                parts.append((sheet.label, picture, picture.shape[1] / _INCH, picture.shape[0] / _INCH + 0.5))
            if sheet.values:
                parts.append((sheet.label, sheet, 1.5 + 0.35 * len(sheet.words), 1.2 + 0.16 * len(sheet.values)))
        width, height = (max(sizes, default=1) for sizes in ([w for _, _, w, _ in parts], [sum(h for *_, h in parts)]))
        figure = Figure(figsize=(max(3.0, min(width, 40)), max(height, 1)), layout="constrained")
        if not parts:
            return figure
        axes = figure.subplots(len(parts), 1, squeeze=False, height_ratios=[h for *_, h in parts])[:, 0]
        for axis, (label, part, _, _) in zip(axes, parts, strict=True):
            axis.set_title(label, fontsize=9)
            if isinstance(part, Sheet):
                cells = np.stack([_cell_colors(row, colors(self.cmap)) for _, row in part.values])
                axis.imshow(cells, aspect="auto", interpolation="nearest")
                axis.set_xticks(range(len(part.words)), part.words, rotation=60, ha="right", fontsize=7)
                step = -(-len(part.values) // 60)  # names that can be read
                axis.set_yticks(
                    range(0, len(part.values), step), [name_of(place) for place, _ in part.values[::step]], fontsize=6
                )
            else:
                axis.imshow(part, interpolation="nearest", aspect="equal")
                _name_tiles(axis, next(sheet for picture, sheet in drawn if picture is part))
        return figure

    def page(self, title: str) -> Page:
        """See `LayerExplanation.to_html`."""
        from matplotlib.colors import to_hex

        blocks = []
        for sheet in self._sheets():
            lines = [[{"name": name_of(place), "source": _source(tile)} for place, tile in line] for line in sheet.lines]
            table = [
                {
                    "name": name_of(place),
                    "cells": [
                        {"color": to_hex(color), "value": f"{value:.4g}"}
                        for color, value in zip(_cell_colors(row, colors(self.cmap)), row.tolist(), strict=True)
                    ],
                }
                for place, row in sheet.values
            ]
            blocks.append({"label": sheet.label, "lines": lines, "words": sheet.words, "table": table})
        return Page(fill_template(TEMPLATES / "multiples.html", title=title, blocks=blocks))

    def _sheets(self) -> list[Sheet]:
        check_bool(common=self.common)
        check_number("alpha", self.alpha, low=0, high=1)
        shown = next((one for _, one in self.maps if one.located), self.maps[0][1])
        if self.rows is not None:
            check_items("rows", self.rows, "numbers of rows")
            for row in self.rows:
                check_integer("rows", row, low=0, high=len(shown) - 1)
        pictures = read_pictures(shown, self.image)
        boxes = read_boxes(shown, pictures, self.crop, self.processor)
        side = _SIDE if len(self.maps) <= _MANY else _SMALL_SIDE
        small = None if pictures is None else [_smaller(picture, side) for picture in pictures]
        painter = Painter(small, boxes, len(set(boxes)) > 1, colors(self.cmap), self.alpha)
        samples = [(place, read_samples(one, self.labels, self.rows)) for place, one in self.maps]
        sheets = []
        for number in range(len(samples[0][1])):
            of_row = [(place, of_map[number]) for place, of_map in samples]
            choices = [sample.choices[0] for _, sample in of_row]
            if self.common:
                painter.shared = scale_of(*(patch.values for choice in choices for patch in choice.patches))
            with_words = [
                (place, sample, choice) for (place, sample), choice in zip(of_row, choices, strict=True) if sample.words
            ]
            sheets.append(
                Sheet(
                    label=_label(of_row),
                    places=[place for place, _ in of_row],
                    tiles=[_tile(painter, choice, side) for choice in choices],
                    words=[word.text for word in with_words[0][1].words] if with_words else [],
                    values=[(place, choice.values) for place, _, choice in with_words],
                )
            )
        return sheets


def _label(of_row: Sequence[tuple[Place, Sample]]) -> str:
    return next((sample.label for _, sample in of_row if sample.words), of_row[0][1].label)


def _smaller(picture: Array, side: int) -> Array:
    from PIL import Image

    photo = Image.fromarray(picture)
    photo.thumbnail((side, side))
    return np.asarray(photo)


def _tile(painter: Painter, choice: Choice, side: int) -> Picture | None:
    """The map of a choice, over its picture; several maps of a row, as frames of a video, side by side."""
    from PIL import Image

    panels = [panel for panel in painter.panels(choice) if panel]
    if not panels:
        return None
    pictures = [laid_over(painter, panel, side) for panel in panels]
    whole = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width
    return whole


def _joined(sheet: Sheet) -> Array | None:
    """All maps of a sheet as one picture, with room for their names above each; None without maps."""
    lines = sheet.lines
    if not lines:
        return None
    width, height = _cell(sheet)
    whole = np.full((len(lines) * height, max(map(len, lines)) * width, 3), 255, dtype=np.uint8)
    for y, line in enumerate(lines):
        for x, (_, tile) in enumerate(line):
            top, left = y * height + _GAP * 3, x * width
            whole[top : top + tile.height, left : left + tile.width] = np.asarray(tile)
    return whole


def _cell(sheet: Sheet) -> tuple[int, int]:
    tiles = [tile for tile in sheet.tiles if tile is not None]
    return max(tile.width for tile in tiles) + _GAP, max(tile.height for tile in tiles) + 4 * _GAP


def _name_tiles(axis: Any, sheet: Sheet) -> None:
    """Names beside the lines and above the columns: of maps of layers above each."""
    (width, height), lines = _cell(sheet), sheet.lines
    places = [place for place, _ in max(lines, key=len)]
    axis.tick_params(length=0, labelsize=6, top=True, labeltop=True, bottom=False, labelbottom=False)
    axis.spines[:].set_visible(False)
    if places[0][1] is None:
        axis.set_xticks([])
        axis.set_yticks([])
        for y, line in enumerate(lines):
            for x, (place, _) in enumerate(line):
                axis.text(x * width, y * height + 2.4 * _GAP, name_of(place), fontsize=6)
        return
    axis.set_xticks([(x + 0.5) * width for x in range(len(places))], [f"head {head}" for _, head in places])
    axis.set_yticks([(y + 0.5) * height for y in range(len(lines))], [f"layer {line[0][0][0]}" for line in lines])


def _cell_colors(row: Array, cmap: ListedColormap) -> Array:
    """The colours (n, 3) of a row's numbers (n,), on a scale of its own."""
    low, high = scale_of(row)
    return for_scale(cmap, low)(np.nan_to_num(shares(row, low, high)).clip(0, 1))[:, :3]


def _source(tile: Picture) -> str:
    file = io.BytesIO()
    tile.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
