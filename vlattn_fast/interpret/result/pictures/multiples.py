"""Small multiples: the maps of layers and heads, or of named explanations, side by side, and their words as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vlattn_fast._ground.checks import check_bool, check_number
from vlattn_fast.interpret.result.numbers.choices import Array, Choice, Sample, chosen_numbers, read_samples, score_text
from vlattn_fast.interpret.result.numbers.explained import Explained
from vlattn_fast.interpret.result.numbers.sinks import sinks_line
from vlattn_fast.interpret.result.pictures.figure import Painter
from vlattn_fast.interpret.result.pictures.page import TEMPLATES, Page, data_uri, fill_template
from vlattn_fast.interpret.result.pictures.photos import each_once, read_boxes, read_pictures
from vlattn_fast.interpret.result.pictures.scale import colors, for_scale, range_text, scale_of, shares

if TYPE_CHECKING:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from PIL.Image import Image as Picture

Place = tuple[int, int | None] | str  # a layer, and a head of it or None; or the caller's name of an explanation
Maps = Sequence[tuple[Place, Explained]]
Rows = list[tuple[Place, Array]]  # one number a word

_SIDE, _SMALL_SIDE, _MANY = 112, 56, 60  # pixels of a map's longer side, and of one among many
_LARGE_SIDE = 260  # of the maps of named explanations
_COLUMNS, _LARGE_COLUMNS = 6, 4  # of the maps of layers, and of those
_GAP = 6  # pixels between maps
_INCH = 100  # pixels of a map in an inch of a figure, as matplotlib draws it


@dataclass(frozen=True)
class Sheet:
    """The maps of one row of the batch, or of one word of its answer."""

    label: str
    places: list[Place]
    tiles: list[Picture | None]  # of each place; None where it has no picture
    notes: dict[Place, str] = field(default_factory=dict)  # of named explanations: the score, and the range of the map
    tables: list[tuple[list[str], Rows]] = field(default_factory=list)  # words, and the places that have these words

    @property
    def lines(self) -> list[list[tuple[Place, Picture]]]:
        """The maps by line: those of a layer's heads, or a few layers."""
        shown = [(place, tile) for place, tile in zip(self.places, self.tiles, strict=True) if tile is not None]
        if shown and _is_head(shown[0][0]):
            layers = dict.fromkeys(place[0] for place, _ in shown)
            return [[one for one in shown if one[0][0] == layer] for layer in layers]
        columns = _LARGE_COLUMNS if self.notes else _COLUMNS
        return [shown[first : first + columns] for first in range(0, len(shown), columns)]


def _is_head(place: Place) -> bool:
    return not isinstance(place, str) and place[1] is not None


def name_of(place: Place) -> str:
    if isinstance(place, str):
        return place
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
        # The parts under a title: a picture of maps, or a table of words; and its width and height in inches.
        parts: list[tuple[str, Array | tuple[list[str], Rows], float, float]] = []
        for picture, sheet in drawn:
            if picture is not None:
                parts.append((sheet.label, picture, picture.shape[1] / _INCH, picture.shape[0] / _INCH + 0.5))
            for table in sheet.tables:
                parts.append((sheet.label, table, 1.5 + 0.35 * len(table[0]), 1.2 + 0.16 * len(table[1])))
        width, height = (max(sizes, default=1) for sizes in ([w for _, _, w, _ in parts], [sum(h for *_, h in parts)]))
        figure = Figure(figsize=(max(3.0, min(width, 40)), max(height, 1)), layout="constrained")
        if not parts:
            return figure
        axes = figure.subplots(len(parts), 1, squeeze=False, height_ratios=[h for *_, h in parts])[:, 0]
        for axis, (label, part, _, _) in zip(axes, parts, strict=True):
            axis.set_title(label, fontsize=9, parse_math=False)
            if isinstance(part, tuple):
                _draw_table(axis, *part, colors(self.cmap))
            else:
                axis.imshow(part, interpolation="nearest", aspect="equal")
                _name_tiles(axis, next(sheet for picture, sheet in drawn if picture is part))
        return figure

    def page(self, title: str, similarity: Sequence[Mapping[str, Any]] = ()) -> Page:
        """See `LayerExplanation.to_html`. `similarity`: lines of a table below."""
        from matplotlib.colors import to_hex

        blocks = []
        for sheet in self._sheets():
            lines = [
                [
                    {"name": name_of(place), "note": sheet.notes.get(place), "source": data_uri(tile.save, "png")}
                    for place, tile in line
                ]
                for line in sheet.lines
            ]
            tables = [
                {
                    "words": words,
                    "lines": [
                        {
                            "name": name_of(place),
                            "cells": [
                                {"color": to_hex(color), "value": f"{value:.4g}"}
                                for color, value in zip(_cell_colors(row, colors(self.cmap)), row.tolist(), strict=True)
                            ],
                        }
                        for place, row in rows
                    ],
                }
                for words, rows in sheet.tables
            ]
            blocks.append({"label": sheet.label, "lines": lines, "tables": tables})
        sinks = sinks_line(self.maps[0][1].sinks)
        values = {"blocks": blocks, "similarity": similarity, "sinks": sinks}
        return Page(fill_template(TEMPLATES / "multiples.html", title=title, **values))

    def _sheets(self) -> list[Sheet]:
        check_bool(common=self.common)
        check_number("alpha", self.alpha, low=0, high=1)
        shown = next((one for _, one in self.maps if one.is_spatial), self.maps[0][1])
        rows = chosen_numbers(self.rows, len(shown))
        named = isinstance(self.maps[0][0], str)
        side = _LARGE_SIDE if named else _SIDE if len(self.maps) <= _MANY else _SMALL_SIDE
        painters = [self._painter(place, one, side, rows) for place, one in self.maps] if named else []
        painters = painters or [self._painter(None, shown, side, rows)] * len(self.maps)
        samples = [read_samples(one, self.labels, rows) for _, one in self.maps]
        return [sheet for of_row in zip(*samples, strict=True) for sheet in self._of_row(of_row, painters, side)]

    def _painter(self, place: Place | None, shown: Explained, side: int, rows: list[int] | None) -> Painter:
        """`place`: where explanations may have a photo each."""
        image = self.image[place] if isinstance(self.image, Mapping) else None if not shown.is_spatial and place else self.image
        pictures = read_pictures(shown, image, rows)
        boxes = read_boxes(shown, pictures, self.crop if shown.is_spatial or place is None else None, self.processor)
        small = each_once(pictures, lambda picture: _fitted(picture, side))
        return Painter(small, boxes, colors(self.cmap), self.alpha)

    def _of_row(self, samples: Sequence[Sample], painters: Sequence[Painter], side: int) -> list[Sheet]:
        """The sheets of a row: one, or one for each word of its answer."""
        places = [place for place, _ in self.maps]
        counts = {place: len(sample.choices) for place, sample in zip(places, samples, strict=True)}
        if len(set(counts.values())) > 1:
            raise ValueError(f"explanations must have as many words of an answer each; got {counts}")
        sheets = []
        for choices in zip(*(sample.choices for sample in samples), strict=True):
            if self.common:
                shared = scale_of(*(patch.values for choice in choices for patch in choice.patches))
                painters = [replace(painter, shared=shared) for painter in painters]
            tables: list[tuple[list[str], Rows]] = []
            for place, sample, choice in zip(places, samples, choices, strict=True):
                words = [word.text for word in sample.words]
                if words and not (tables and tables[-1][0] == words):
                    tables.append((words, []))
                if words:
                    tables[-1][1].append((place, choice.values))
            notes: dict[Place, str] = {
                place: _note(choice) for place, choice in zip(places, choices, strict=True) if isinstance(place, str)
            }
            tiles = [_tile(painter, choice, side) for painter, choice in zip(painters, choices, strict=True)]
            sheets.append(Sheet(_label(samples, choices), places, tiles, notes, tables))
        return sheets


def _note(choice: Choice) -> str:
    """The line below the name of an explanation: its score, and the range of its map."""
    values = [patch.values for patch in choice.patches]
    return ", ".join(filter(None, (score_text(choice.score, choice.of_answer), range_text(*values) if values else "")))


def _label(samples: Sequence[Sample], choices: Sequence[Choice]) -> str:
    """The names of a row, of all explanations; and the word of its answer."""
    with_words = [sample for sample in samples if sample.words] or samples
    names = list(dict.fromkeys(sample.label for sample in with_words))
    label = " | ".join(names)
    word = choices[0].label
    return label if word in names else f"{label}: {word}"


def _fitted(picture: Array, side: int) -> Array:
    """The picture with `side` pixels on its longer side."""
    from PIL import Image

    size = [max(1, round(pixels * side / max(picture.shape[:2]))) for pixels in picture.shape[1::-1]]
    return np.asarray(Image.fromarray(picture).resize((size[0], size[1])))


def _tile(painter: Painter, choice: Choice, side: int) -> Picture | None:
    """The map of a choice, over its picture; several maps of a row, as frames of a video, side by side, and many in a square."""
    from PIL import Image

    panels = [panel for panel in painter.panels(choice) if panel]
    if not panels:
        return None
    pictures = [painter.laid_over(panel, side) for panel in panels]
    columns = len(pictures) if len(pictures) <= 4 else math.isqrt(len(pictures) - 1) + 1
    if len(pictures) > 4:  # as wide as four together
        pictures = [picture.resize((4 * picture.width // columns, 4 * picture.height // columns)) for picture in pictures]
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    lines = -(-len(pictures) // columns)
    whole = Image.new("RGB", (columns * width, lines * height), "white")
    for number, picture in enumerate(pictures):
        whole.paste(picture, (number % columns * width, number // columns * height))
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
            top, left = y * height + _head_room(sheet), x * width
            whole[top : top + tile.height, left : left + tile.width] = np.asarray(tile)
    return whole


def _head_room(sheet: Sheet) -> int:
    """Pixels above each map, for one line of names or two."""
    return (6 if sheet.notes else 3) * _GAP


def _cell(sheet: Sheet) -> tuple[int, int]:
    tiles = [tile for tile in sheet.tiles if tile is not None]
    return max(tile.width for tile in tiles) + _GAP, max(tile.height for tile in tiles) + _head_room(sheet) + _GAP


def _name_tiles(axis: Any, sheet: Sheet) -> None:
    """Names beside the lines and above the columns: of maps of layers and of named explanations above each."""
    (width, height), lines = _cell(sheet), sheet.lines
    places = [place for place, _ in max(lines, key=len)]
    axis.tick_params(length=0, labelsize=6, top=True, labeltop=True, bottom=False, labelbottom=False)
    axis.spines[:].set_visible(False)
    if not _is_head(places[0]):
        axis.set_xticks([])
        axis.set_yticks([])
        for y, line in enumerate(lines):
            for x, (place, _) in enumerate(line):
                bottom, text = y * height + _head_room(sheet) - 0.6 * _GAP, name_of(place)
                if sheet.notes:
                    text = f"{text if len(text) <= 40 else text[:39] + '…'}\n{sheet.notes[place]}"
                axis.text(x * width, bottom, text, fontsize=7 if sheet.notes else 6, va="bottom", parse_math=False)
        return
    axis.set_xticks([(x + 0.5) * width for x in range(len(places))], [f"head {place[1]}" for place in places])
    axis.set_yticks([(y + 0.5) * height for y in range(len(lines))], [f"layer {line[0][0][0]}" for line in lines])


def _draw_table(axis: Any, words: list[str], rows: Rows, cmap: ListedColormap) -> None:
    """Words (across) of several maps (down), each line on a scale of its own."""
    cells = np.stack([_cell_colors(row, cmap) for _, row in rows])
    axis.imshow(cells, aspect="auto", interpolation="nearest")
    ticks = axis.set_xticks(range(len(words)), words, rotation=60, ha="right", fontsize=7)
    step = -(-len(rows) // 60)  # names that can be read
    ticks += axis.set_yticks(range(0, len(rows), step), [name_of(place) for place, _ in rows[::step]], fontsize=6)
    for tick in ticks:
        tick.label1.set_parse_math(False)


def _cell_colors(row: Array, cmap: ListedColormap) -> Array:
    """The colours (n, 3) of a row's numbers (n,), on a scale of its own."""
    low, high = scale_of(row)
    return for_scale(cmap, low)(np.nan_to_num(shares(row, low, high)).clip(0, 1))[:, :3]
