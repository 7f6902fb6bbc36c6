"""Small multiples: the maps of layers and heads, or of named explanations, side by side, and their words as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vlattn_fast._ground.checks import check_bool, check_number
from vlattn_fast.interpret.result.figures.figure import Painter
from vlattn_fast.interpret.result.figures.figure_parts import draw_bar, fitted
from vlattn_fast.interpret.result.figures.page import TEMPLATES, Page, data_uri, fill_template
from vlattn_fast.interpret.result.figures.photos import each_once, read_boxes, read_images
from vlattn_fast.interpret.result.figures.scale import check_scale, colors, for_scale, joint, range_text, scale_of, shares
from vlattn_fast.interpret.result.numbers.choices import Array, Choice, Patch, Sample, chosen_numbers, read_samples, score_text
from vlattn_fast.interpret.result.numbers.explained import Explained
from vlattn_fast.interpret.result.numbers.sink_tokens import sinks_line

if TYPE_CHECKING:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from PIL.Image import Image as PILImage

Place = tuple[int, int | None] | str  # a layer, and a head of it or None; or the caller's name of an explanation
Maps = Sequence[tuple[Place, Explained]]
Rows = list[tuple[Place, Array]]  # one number a word

_SIDE, _SMALL_SIDE, _MANY = 112, 56, 60  # pixels of a map's longer side, and of one among many
_LARGE_SIDE = 260  # of the maps of named explanations
_COLUMNS, _LARGE_COLUMNS = 6, 4  # of the maps of layers, and of those; fewer if a map is wider than its side
_LEAST = 210  # pixels of a column of named explanations, so that their names have room
_IN_LINE = 4  # maps of a sample side by side
_GAP, _SEAM = 6, 2  # pixels between maps, and between those of one sample
_INCH = 100  # pixels of a map in an inch of a figure, as matplotlib draws it
_TEXTS = 0.85  # inches above and below the map of a named explanation, for its name, score and scale


@dataclass(frozen=True)
class Bar:
    """The scale of the map of a named explanation."""

    low: float
    high: float
    shades: ListedColormap
    of: list[Patch]

    @property
    def range(self) -> str:
        return range_text(*(patch.values for patch in self.of), end=self.high)

    @property
    def css(self) -> str:
        """The colours, as a background of a page."""
        from matplotlib.colors import to_hex

        stops = self.shades(np.linspace(0, 1, 17))
        return f"linear-gradient(to right, {', '.join(to_hex(stop, keep_alpha=True) for stop in stops)})"


@dataclass(frozen=True)
class Sheet:
    """The maps of one sample of the batch, or of one word of its answer."""

    label: str
    places: list[Place]
    tiles: list[PILImage | None]  # of each place; None without an image
    notes: dict[Place, str] = field(default_factory=dict)  # of named explanations: the score, and the names of its maps
    bars: dict[Place, Bar] = field(default_factory=dict)  # of those with maps; of maps of layers, if they share one, the first's
    tables: list[tuple[list[str], Rows]] = field(default_factory=list)  # words, and the maps that have these words
    panel_names: str = ""  # of maps of layers and heads: the names of maps that are side by side

    @property
    def lines(self) -> list[list[tuple[Place, PILImage]]]:
        """The maps by line: those of a layer's heads, or a few layers."""
        shown = [(place, tile) for place, tile in zip(self.places, self.tiles, strict=True) if tile is not None]
        if shown and _is_head(shown[0][0]):
            layers = dict.fromkeys(place[0] for place, _ in shown)
            return [[one for one in shown if one[0][0] == layer] for layer in layers]
        most, side = (_LARGE_COLUMNS, _LARGE_SIDE) if self.notes else (_COLUMNS, _SIDE)
        columns = max(1, min(most, most * (side + _GAP) // self.cell[0])) if shown else 1
        return [shown[first : first + columns] for first in range(0, len(shown), columns)]

    @property
    def cell(self) -> tuple[int, int]:
        """Pixels of the column and of the line of a map, with a gap."""
        tiles = [tile for tile in self.tiles if tile is not None]
        width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
        return max(width, _LEAST if self.notes else 0) + _GAP, height + _GAP


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
    samples: Any = None
    alpha: float = 0.85
    scale: str = "max"
    common: bool = False

    def figure(self) -> Figure:
        """See `LayerExplanation.plot`."""
        from matplotlib.figure import Figure

        # The parts under a title: maps, or a table of words; what draws each, and its width and height in inches.
        parts: list[tuple[str, Callable[[Any], None], float, float]] = []
        for sheet in self._sheets():
            if lines := sheet.lines:
                width, height = (pixels / _INCH for pixels in sheet.cell)
                width, height = width * max(map(len, lines)), (height + (_TEXTS if sheet.notes else 0.18)) * len(lines) + 0.4
                parts.append(
                    (
                        sheet.label + sheet.panel_names,
                        partial(_draw_named if sheet.notes else _draw_joined, sheet=sheet),
                        width,
                        height,
                    )
                )
            for words, rows in sheet.tables:
                table = partial(_draw_table, words=words, rows=rows, cmap=colors(self.cmap))
                parts.append((sheet.label, table, 1.5 + 0.35 * len(words), 1.2 + 0.16 * len(rows)))
        width, height = (max(sizes, default=1) for sizes in ([w for _, _, w, _ in parts], [sum(h for *_, h in parts)]))
        figure = Figure(figsize=(max(3.0, min(width, 40)), max(height, 1)), layout="constrained")
        if not parts:
            return figure
        figures = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=[h for *_, h in parts])[:, 0]
        for part, (label, draw, _, _) in zip(figures, parts, strict=True):
            part.suptitle(label, fontsize=9, parse_math=False)
            draw(part)
        return figure

    def page(self, title: str, similarity: Sequence[Mapping[str, Any]] = ()) -> Page:
        """See `LayerExplanation.to_html`. `similarity`: lines of a table below."""
        from matplotlib.colors import to_hex

        blocks = []
        for sheet in self._sheets():
            lines = [
                [
                    {
                        "name": name_of(place),
                        "note": sheet.notes.get(place),
                        "source": data_uri(tile.save, "png"),
                        "bar": sheet.bars.get(place),
                    }
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
            width = sheet.cell[0] - _GAP if lines else 0
            blocks.append({"label": sheet.label + sheet.panel_names, "lines": lines, "width": width, "tables": tables})
        sinks = sinks_line(self.maps[0][1].sinks)
        values = {"blocks": blocks, "similarity": similarity, "sinks": sinks}
        return Page(fill_template(TEMPLATES / "multiples.html", title=title, **values))

    def _sheets(self) -> list[Sheet]:
        check_bool(common=self.common)
        check_scale(self.scale)
        check_number("alpha", self.alpha, low=0, high=1)
        shown = next((one for _, one in self.maps if one.is_spatial), self.maps[0][1])
        numbers = chosen_numbers(self.samples, len(shown))
        named = isinstance(self.maps[0][0], str)
        side = _LARGE_SIDE if named else _SIDE if len(self.maps) <= _MANY else _SMALL_SIDE
        painters = [self._painter(place, one, side, numbers) for place, one in self.maps] if named else []
        painters = painters or [self._painter(None, shown, side, numbers)] * len(self.maps)
        samples = [read_samples(one, self.labels, numbers) for _, one in self.maps]
        return [sheet for row_samples in zip(*samples, strict=True) for sheet in self._sample_sheets(row_samples, painters, side)]

    def _painter(self, place: Place | None, shown: Explained, side: int, numbers: list[int] | None) -> Painter:
        """`place`: of explanations that may have a photo each."""
        image = self.image[place] if isinstance(self.image, Mapping) else None if not shown.is_spatial and place else self.image
        images = read_images(shown, image, numbers)
        boxes = read_boxes(shown, images, self.crop if shown.is_spatial or place is None else None, self.processor)
        small = each_once(images, lambda image: _fitted(image, side))
        return Painter(small, boxes, colors(self.cmap), self.alpha, self.scale, shown.photos)

    def _sample_sheets(self, samples: Sequence[Sample], painters: Sequence[Painter], side: int) -> list[Sheet]:
        """The sheets of a sample: one, or one for each word of its answer."""
        places = [place for place, _ in self.maps]
        counts = {place: len(sample.choices) for place, sample in zip(places, samples, strict=True)}
        if len(set(counts.values())) > 1:
            raise ValueError(f"explanations must have the same number of answer words; got {counts}")
        sheets = []
        for choices in zip(*(sample.choices for sample in samples), strict=True):
            if self.common:
                shared = joint(painter.range(one.patches) for painter, one in zip(painters, choices, strict=True))
                painters = [replace(painter, shared=shared) for painter in painters]
            tables: list[tuple[list[str], Rows]] = []
            for place, sample, choice in zip(places, samples, choices, strict=True):
                words = [word.text for word in sample.words]
                if words and not (tables and tables[-1][0] == words):
                    tables.append((words, []))
                if words:
                    tables[-1][1].append((place, choice.values))
            notes, bars = dict[Place, str](), dict[Place, Bar]()
            for place, painter, choice in zip(places, painters, choices, strict=True):
                if isinstance(place, str):
                    notes[place] = _note(painter, choice)
                    fitted, low, high = painter.fitted(choice.patches)
                    bars |= {place: Bar(low, high, fitted.shades(low), choice.patches)} if high > low else {}
            tiles = [
                _tile(painter, choice, side, outlined=bool(notes)) for painter, choice in zip(painters, choices, strict=True)
            ]
            if self.common and not notes:
                (low, high), patches = painters[0].range([]), [patch for choice in choices for patch in choice.patches]
                bars = {places[0]: Bar(low, high, painters[0].shades(low), patches)} if high > low else {}
            names = "" if notes else _panel_line(painters[0], choices[0])
            sheets.append(Sheet(_label(samples, choices), places, tiles, notes, bars, tables, f" ({names})" if names else ""))
        return sheets


def _note(painter: Painter, choice: Choice) -> str:
    """The line below the name of an explanation: its score, and the names of maps that are side by side."""
    return ", ".join(filter(None, (score_text(choice.score, choice.of), _panel_line(painter, choice))))


def _panel_line(painter: Painter, choice: Choice) -> str:
    """The names of maps that are side by side, such as "thumbnail | tiles"."""
    names = [name for name, _ in painter.named(choice)]
    return " | ".join(names) if len(names) <= _IN_LINE else ""


def _label(samples: Sequence[Sample], choices: Sequence[Choice]) -> str:
    """The names of a sample in all explanations; and the word of its answer."""
    with_words = [sample for sample in samples if sample.words] or samples
    names = list(dict.fromkeys(sample.label for sample in with_words))
    label = " | ".join(names)
    word = choices[0].label
    return label if word in names else f"{label}: {word}"


def _fitted(image: Array, side: int) -> Array:
    """The image with `side` pixels on its longer side."""
    from PIL import Image

    size = [max(1, round(pixels * side / max(image.shape[:2]))) for pixels in image.shape[1::-1]]
    return np.asarray(Image.fromarray(image).resize((size[0], size[1])))


def _tile(painter: Painter, choice: Choice, side: int, outlined: bool) -> PILImage | None:
    """The map of a choice, over its image; several maps of a sample, such as frames of a video, side by side, and many in
    a square. `outlined`: with a frame around a part of the image that has a map."""
    from PIL import Image

    panels = [panel for panel in painter.panels(choice) if panel]
    if not panels:
        return None
    images = [painter.laid_over(panel, side, outlined) for panel in panels]
    columns = len(images) if len(images) <= _IN_LINE else math.isqrt(len(images) - 1) + 1
    if len(images) > _IN_LINE:  # as wide as those of a line together
        smaller = [[_IN_LINE * (side + _SEAM) // columns - _SEAM for side in image.size] for image in images]
        images = [image.resize((width, height)) for image, (width, height) in zip(images, smaller, strict=True)]
    width, height = max(p.width for p in images) + _SEAM, max(p.height for p in images) + _SEAM
    lines = -(-len(images) // columns)
    whole = Image.new("RGB", (columns * width - _SEAM, lines * height - _SEAM), "white")
    for number, image in enumerate(images):
        whole.paste(image, (number % columns * width, number // columns * height))
    return whole


def _draw_named(part: Any, sheet: Sheet) -> None:
    """The maps of named explanations in columns, each under its name and score and above its scale."""
    from matplotlib.colors import Normalize

    lines = sheet.lines
    axes, width = part.subplots(len(lines), max(map(len, lines)), squeeze=False), (sheet.cell[0] - _GAP) / _INCH
    for axis in axes.flat:
        axis.set_axis_off()
    for line_axes, line in zip(axes, lines, strict=True):
        for axis, (place, tile) in zip(line_axes, line, strict=False):  # the last line may be shorter
            axis.imshow(np.asarray(tile), interpolation="nearest")
            title = axis.set_title("", fontsize=8, loc="left", parse_math=False)
            title.set_text("\n".join(fitted(title, text, width) for text in (name_of(place), sheet.notes[place]) if text))
            if (bar := sheet.bars.get(place)) is not None:
                draw_bar(part, Normalize(bar.low, bar.high), bar.shades, [axis], location="bottom", of=bar.of)


def _draw_joined(part: Any, sheet: Sheet) -> None:
    """The maps of layers and heads as one image, with names next to the lines and above the columns, or above each map."""
    from matplotlib.colors import Normalize

    axis, lines = part.subplots(), sheet.lines
    (width, height), names = sheet.cell, [place for place, _ in max(lines, key=len)]
    head_room = 0 if _is_head(names[0]) else 3 * _GAP  # for a line of names above each map
    height += head_room
    whole = np.full((len(lines) * height, len(names) * width, 3), 255, dtype=np.uint8)
    for y, line in enumerate(lines):
        for x, (_, tile) in enumerate(line):
            top, left = y * height + head_room, x * width
            whole[top : top + tile.height, left : left + tile.width] = np.asarray(tile)
    axis.imshow(whole, interpolation="nearest", aspect="equal")
    for bar in sheet.bars.values():
        draw_bar(part, Normalize(bar.low, bar.high), bar.shades, [axis], of=bar.of)
    if not sheet.bars:
        axis.set_xlabel("each map on a scale of its own", fontsize=7, color="gray")
    axis.tick_params(length=0, labelsize=6, top=True, labeltop=True, bottom=False, labelbottom=False)
    axis.spines[:].set_visible(False)
    if _is_head(names[0]):
        axis.set_xticks([(x + 0.5) * width for x in range(len(names))], [f"head {place[1]}" for place in names])
        axis.set_yticks([(y + 0.5) * height for y in range(len(lines))], [f"layer {line[0][0][0]}" for line in lines])
        return
    axis.set_xticks([])
    axis.set_yticks([])
    for y, line in enumerate(lines):
        for x, (place, _) in enumerate(line):
            axis.text(x * width, y * height + head_room - 0.6 * _GAP, name_of(place), fontsize=7, va="bottom", parse_math=False)


def _draw_table(part: Any, words: list[str], rows: Rows, cmap: ListedColormap) -> None:
    """Words (across) of several maps (down), each line on a scale of its own."""
    axis = part.subplots()
    axis.set_title("words, each line on a scale of its own", fontsize=7, color="gray")
    cells = np.stack([_cell_colors(row, cmap) for _, row in rows])
    axis.imshow(cells, aspect="auto", interpolation="nearest")
    ticks = axis.set_xticks(range(len(words)), words, rotation=60, ha="right", fontsize=9)
    step = -(-len(rows) // 60)  # so that the names are legible
    ticks += axis.set_yticks(range(0, len(rows), step), [name_of(place) for place, _ in rows[::step]], fontsize=8)
    for tick in ticks:
        tick.label1.set_parse_math(False)


def _cell_colors(row: Array, cmap: ListedColormap) -> Array:
    """The colours (n, 3) of a line's numbers (n,), on a scale of its own."""
    low, high = scale_of(row)
    return for_scale(cmap, low)(np.nan_to_num(shares(row, low, high)).clip(0, 1))[:, :3]
