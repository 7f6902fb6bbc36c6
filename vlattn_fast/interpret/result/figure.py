"""Figures of an Explanation, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp
from typing import TYPE_CHECKING, Any

import numpy as np

from vlattn_fast._ground.checks import check_bool, check_integer, check_items, check_number
from vlattn_fast.interpret.result.choices import (
    WHOLE,
    Array,
    Box,
    Choice,
    Patch,
    Sample,
    panels,
    picture_number,
    read_samples,
    score_text,
)
from vlattn_fast.interpret.result.explained import Explained
from vlattn_fast.interpret.result.photos import each_once, read_boxes, read_pictures
from vlattn_fast.interpret.result.scale import colors, for_scale, range_text, scale_of, shares, strengths
from vlattn_fast.interpret.result.words import Word

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

_WIDTH, _SMALL = 3.4, 2.3  # inches of a row's panel, and of an answer's
_COLUMNS = 5  # for an answer's maps
_MANY = 40  # words of an answer; a longer answer has one sheet of maps, and fewer names than lines in its table
_SHEET, _TILE = 16, 72  # maps in a line of the sheet, and pixels in a line of a map
_NAMES = 80  # that fit above the columns of a table
_POINTS = 72 * _WIDTH * 0.9  # of a line of words
_SIZE, _LINE = 11, 19  # of letters and of a line, in points
_EAST_ASIAN = 0x2E80  # matplotlib's font lacks Unicode from here on: Chinese, Japanese, Korean, emoji
_FONTS = (  # with these letters; no coloured emoji, which matplotlib cannot draw
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC", "WenQuanYi Zen Hei"),
    *("WenQuanYi Micro Hei", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "PingFang SC", "Hiragino Sans"),
    *("Apple SD Gothic Neo", "Arial Unicode MS", "Noto Emoji", "Segoe UI Emoji", "Symbola"),
)


def draw(
    explanation: Explained, image: Any, rows: Any, labels: Any, crop: Any, processor: Any, cmap: str, alpha: float, common: bool
) -> Figure:
    """See `Explanation.plot`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if rows is not None:
        check_items("rows", rows, "numbers of rows")
        rows = list(rows)
        for row in rows:
            check_integer("rows", row)
            if not 0 <= row < len(explanation):
                raise ValueError(f"rows must be from 0 to {len(explanation) - 1}; got {row}")
    check_number("alpha", alpha, low=0, high=1)
    check_bool(common=common)
    pictures = read_pictures(explanation, image, rows)
    boxes = read_boxes(explanation, pictures, crop, processor)
    painter = Painter(pictures, boxes, colors(cmap), alpha)
    samples, each = read_samples(explanation, labels, rows), explanation.each
    if common:
        choices = [choice for sample in samples for choice in sample.choices]
        painter.shared = scale_of(*(patch.values for choice in choices for patch in choice.patches))
    with rc_context({"font.family": _fonts(samples)}):
        if each:
            sizes = [(_COLUMNS * _SMALL, 0.4 + sum(_answer_heights(sample, painter))) for sample in samples]
        else:
            sizes = [_sample_size(sample, painter) for sample in samples]
        width, height = max([_WIDTH, *(w for w, _ in sizes)]), sum(h for _, h in sizes)
        figure = Figure(figsize=(width, max(height, 1)), layout="constrained")
        if samples:
            parts = figure.subfigures(len(samples), 1, squeeze=False, height_ratios=[h for _, h in sizes])[:, 0]
            for part, sample in zip(parts, samples, strict=True):
                (_draw_answer if each else _draw_sample)(part, sample, painter)
    return figure


def _fonts(samples: list[Sample]) -> list[str]:
    """matplotlib's fonts for the texts of samples: its own, then installed fonts with the missing letters."""
    from matplotlib import font_manager, rcParams

    texts = [one.label for one in samples] + [word.text for one in samples for word in (*one.prompt, *one.answer)]
    if max("".join(texts), default="") < chr(_EAST_ASIAN):
        return rcParams["font.family"]
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [*rcParams["font.family"], *(name for name in _FONTS if name in installed)]


@dataclass
class Painter:
    """Draws the panels of choices: the photo, and the maps over it."""

    pictures: list[Array] | None
    crops: list[Box]
    cmap: ListedColormap
    alpha: float
    shared: tuple[float, float] | None = None  # the range of one scale for all maps; None = each choice has its own

    def shades(self, low: float) -> ListedColormap:
        """The colours of a scale that begins at `low`, as transparent as the map over a picture is."""
        from matplotlib.colors import ListedColormap

        rgba = for_scale(self.cmap, low)(np.linspace(0, 1, 256))
        rgba[:, 3] = self.opacity(np.linspace(0, 1, 256), low)
        return ListedColormap(rgba, name=self.cmap.name)

    def range(self, patches: Sequence[Patch]) -> tuple[float, float]:
        """The ends of the scale that some maps have."""
        return scale_of(*(patch.values for patch in patches)) if self.shared is None else self.shared

    def panels(self, choice: Choice) -> list[list[Patch]]:
        return panels(choice.patches, self.pictures, self.crops)

    def picture(self, patches: list[Patch]) -> Array | None:
        """The picture under the maps of a panel."""
        return None if self.pictures is None else self.pictures[picture_number(patches[0], self.pictures)]

    def shape(self, patches: list[Patch]) -> float:
        """Height per width of the panel that begins with these maps."""
        if not patches:
            return 0.3
        picture = self.picture(patches)
        height, width = (patches[0].values if picture is None else picture).shape[:2]
        return min(2.0, height / width) if patches[0].box is None or picture is not None else 1.0

    def placed(self, patch: Patch, low: float, high: float) -> tuple[Box, Array, Array]:
        """The box of a map on its picture, and for each number its share of the range and its opacity over a picture."""
        share = np.nan_to_num(shares(patch.values, low, high)).clip(0, 1)
        return self.crops[patch.index] if patch.box is None else patch.box, share, self.opacity(share, low)

    def opacity(self, share: Array, low: float) -> Array:
        """The opacity of shares of a scale that begins at `low`: over a picture what is near 0 is transparent."""
        if self.pictures is None:
            return np.ones_like(share)
        return self.alpha * np.minimum(1, 1.5 * strengths(share, low)) ** 1.5

    def photo(self, axis: Any, patches: list[Patch]) -> None:
        picture = self.picture(patches)
        if picture is not None:
            axis.imshow(picture)

    def overlay(self, axis: Any, patches: list[Patch], low: float, high: float) -> Any:
        """Draws the maps of one panel; returns the artist for a colour bar."""
        from matplotlib.patches import Rectangle

        picture = self.picture(patches)
        height, width = (1, 1) if picture is None else picture.shape[:2]
        if picture is None and patches[0].box is None and len(patches) == 1:
            height, width = patches[0].values.shape
        self.photo(axis, patches)
        for patch in patches:
            (x1, y1, x2, y2), _, opacity = self.placed(patch, low, high)
            region = patch.values.size == 1
            painted = {
                "cmap": for_scale(self.cmap, low),
                "vmin": low,
                "vmax": high,
                "alpha": None if picture is None else opacity,
            }
            smooth = "nearest" if picture is None or region else "bilinear"
            extent = x1 * width, x2 * width, y2 * height, y1 * height
            drawn = axis.imshow(patch.values, extent=extent, interpolation=smooth, **painted)
            if region or (x1, y1, x2, y2) != (0, 0, 1, 1):
                style = {"edgecolor": "black", "alpha": 0.6} if region else {"edgecolor": "white", "linestyle": "--"}
                size = (x2 - x1) * width, (y2 - y1) * height
                axis.add_patch(Rectangle((x1 * width, y1 * height), *size, fill=False, linewidth=0.7, **style))
        axis.set(xlim=(0, width) if picture is None else (-0.5, width - 0.5), ylim=(height, 0), aspect="equal")
        return drawn

    def tile(self, patches: list[Patch], low: float, high: float) -> Array:
        """A panel as pixels (h, _TILE, 3), floats from 0 to 1."""
        picture = self.picture(patches)
        tile = np.ones((max(1, round(_TILE * self.shape(patches))), _TILE, 3))
        if picture is not None:
            visible = picture[..., 3:] / 255 if picture.shape[2] == 4 else 1.0
            tile = picture[: len(tile), :, :3] / 255 * visible + 1 - visible
        for patch in patches:
            (x1, y1, x2, y2), share, opacity = self.placed(patch, low, high)
            down, inside_down = _cells(len(tile), y1, y2, share.shape[0])
            along, inside_along = _cells(_TILE, x1, x2, share.shape[1])
            inside, cells = np.ix_(inside_down, inside_along), np.ix_(down, along)
            seen = opacity[cells][..., None]
            tile[inside] = seen * for_scale(self.cmap, low)(share)[cells][..., :3] + (1 - seen) * tile[inside]
        return tile


def _cells(size: int, start: float, end: float, count: int) -> tuple[Array, Array]:
    """The pixels among `size` between `start` and `end` (relative): the one of `count` cells that each shows, and its number."""
    places = ((np.arange(size) + 0.5) / size - start) / (end - start)
    inside = (places >= 0) & (places < 1)
    return (places[inside] * count).astype(int), np.flatnonzero(inside)


def _sample_size(sample: Sample, painter: Painter) -> tuple[float, float]:
    """Inches of a sample's figure."""
    choice = sample.choices[0]
    lines = _LINE * (1 + len(_lines_of(sample.words, choice.values))) / 72
    return _WIDTH * _columns(sample, painter), 0.5 + max(0.9 * _WIDTH * max(0.3, painter.shape(choice.patches)), lines)


def _columns(sample: Sample, painter: Painter) -> int:
    """The number of axes of a sample: panels, photos and words, or towers without these."""
    panels = len(painter.panels(sample.choices[0])) * (1 if painter.pictures is None else 2)
    return panels + bool(sample.words) or len(sample.choices[0].relevancy)


def _draw_sample(part: Any, sample: Sample, painter: Painter) -> None:
    """Draws photo, overlay and words of a sample, or its towers' entries without these, under its label and score."""
    (choice,), columns = sample.choices, _columns(sample, painter)
    axes = part.subplots(1, columns, squeeze=False)[0]
    low, high = painter.range(choice.patches)
    if not choice.patches and not sample.words:
        for axis, (name, values) in zip(axes, choice.relevancy.items(), strict=True):
            axis.stairs(values, fill=True, color=painter.cmap(0.5))
            axis.set_title(name, fontsize=9, parse_math=False)
    else:
        for axis in axes:
            axis.set_axis_off()
    at = 0
    views = painter.panels(choice)
    for number, patches in enumerate(views, start=1):
        if painter.pictures is not None:
            painter.photo(axes[at], patches)
            at += 1
        drawn = painter.overlay(axes[at], patches, low, high)
        if len(views) > 1:
            axes[at].set_title(f"map {number} of {len(views)}", fontsize=9)
        at += 1
    if high > low:
        _bar(part, drawn.norm, painter.shades(low), axes[:at], of=choice.patches)
    if sample.words:
        _draw_words(axes[at], sample.words, choice.values)
    _title(part.suptitle("", fontsize=_SIZE), sample.label, score_text(choice.score, choice.of_answer), columns * _WIDTH)


def _answer_heights(sample: Sample, painter: Painter) -> list[float]:
    """Inches of an answer's parts: the lines of maps and the table of words, or a table per tower without these."""
    if not sample.choices:
        return [0.3]
    table, (lines, columns) = 0.9 + 0.22 * min(len(sample.choices), _MANY), _lines(sample, painter)
    shape, width = painter.shape(sample.choices[0].patches), _COLUMNS * _SMALL / columns
    maps = [lines * (width * shape + (0.6 if columns == _COLUMNS else 0.2))] if lines else []
    return maps + [table] * (bool(sample.words) if lines or sample.words else len(sample.choices[0].relevancy))


def _lines(sample: Sample, painter: Painter) -> tuple[int, int]:
    """The number of lines of an answer's maps, and of maps in a line."""
    panels = sum(len(painter.panels(choice)) for choice in sample.choices)
    columns = _COLUMNS if len(sample.choices) <= _MANY else _SHEET
    return -(-(panels + (painter.pictures is not None)) // columns) if panels else 0, columns


def _draw_answer(part: Any, sample: Sample, painter: Painter) -> None:
    """Draws a map per word of the answer, and a table of the relevancy of its words for each other."""
    heights, (lines, columns) = _answer_heights(sample, painter), _lines(sample, painter)
    parts = list(part.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    if lines:
        (_draw_maps if columns == _COLUMNS else _draw_sheet)(parts.pop(0), sample, painter, lines)
    if sample.words:
        values = np.array([choice.values for choice in sample.choices], dtype=float)
        values[np.triu_indices_from(values, len(sample.prompt) + 1)] = np.nan  # later words
        axis = _draw_table(parts.pop(0), sample, values, [word.text for word in sample.words], painter.cmap)
        axis.axvline(len(sample.prompt) - 0.5, color="white", linewidth=2)
    elif sample.choices and not lines:
        for name, values in sample.choices[0].relevancy.items():
            tower = np.array([choice.relevancy[name] for choice in sample.choices])
            axis = _draw_table(parts.pop(0), sample, tower, [str(i) for i in range(len(values))], painter.cmap)
            axis.set_title(name, fontsize=9, parse_math=False)
    scores = [choice.score for choice in sample.choices if choice.score is not None]
    _title(part.suptitle("", fontsize=_SIZE), sample.label, score_text(sum(scores) if scores else None, True), _COLUMNS * _SMALL)


def _draw_maps(part: Any, sample: Sample, painter: Painter, lines: int) -> None:
    axes = part.subplots(lines, _COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    free = iter(axes)
    if painter.pictures is not None:
        painter.photo(next(free), painter.panels(sample.choices[0])[0])
    for choice in sample.choices:
        low, high = painter.range(choice.patches)
        for patches in painter.panels(choice):
            axis = next(free)
            drawn = painter.overlay(axis, patches, low, high)
            _title(
                axis.set_title("", fontsize=9), choice.label, "" if choice.score is None else f"p {exp(choice.score):.2g}", _SMALL
            )
            if high > low:
                _bar(part, drawn.norm, painter.shades(low), [axis], location="bottom", of=choice.patches)


def _draw_sheet(part: Any, sample: Sample, painter: Painter, lines: int) -> None:
    """Draws the maps of many words as one image with one scale, each under its word. An axis per map would take minutes."""
    from matplotlib.colors import Normalize
    from PIL import Image

    from vlattn_fast.interpret.result.labels import Labels

    def smaller(picture: Array) -> Array:
        size = _TILE, max(1, round(_TILE * min(2.0, picture.shape[0] / picture.shape[1])))
        return np.asarray(Image.fromarray(picture).resize(size))

    painter = replace(painter, pictures=each_once(painter.pictures, smaller))
    low, high = painter.range([patch for choice in sample.choices for patch in choice.patches])
    tiles = [(choice.label, painter.tile(maps, low, high)) for choice in sample.choices for maps in painter.panels(choice)]
    if painter.pictures is not None:
        photo = [Patch(patch.index, np.zeros((1, 1)), WHOLE) for patch in painter.panels(sample.choices[0])[0][:1]]
        tiles.insert(0, ("", painter.tile(photo, 0, 0)))
    gap, text = 6, 22
    height = max(len(tile) for _, tile in tiles) + text
    sheet = np.full((lines * height, _SHEET * (_TILE + gap), 4), 255, np.uint8)
    axis = part.subplots()
    axis.set_axis_off()
    labels = []
    for number, (label, tile) in enumerate(tiles):
        y, x = number // _SHEET * height + text, number % _SHEET * (_TILE + gap)
        sheet[y : y + len(tile), x : x + _TILE, :3] = np.rint(255 * tile)
        labels.append((x, y - 3, label if len(label) <= 10 else label[:9] + "…"))
    axis.imshow(sheet, interpolation="nearest")
    axis.add_artist(Labels(labels, size=7))
    if high > low:
        shown = [patch for choice in sample.choices for patch in choice.patches]
        _bar(part, Normalize(low, high), painter.shades(low), [axis], of=shown)


def _draw_table(part: Any, sample: Sample, values: Array, across: list[str], cmap: ListedColormap) -> Any:
    """Draws words of the answer (down) by the tokens they rest on (across); names only some where there are many."""
    axis = part.subplots()
    low, high = scale_of(values)
    cmap = for_scale(cmap, low)
    drawn = axis.imshow(values, cmap=cmap, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    below, beside = -(-len(across) // _NAMES) or 1, -(-len(sample.choices) // _MANY) or 1
    columns = axis.set_xticks(range(0, len(across), below), across[::below], rotation=90, fontsize=8)
    words = [choice.label for choice in sample.choices[::beside]]
    lines = axis.set_yticks(range(0, len(sample.choices), beside), words, fontsize=8)
    for tick in (*columns, *lines):
        tick.label1.set_parse_math(False)
    _bar(part, drawn.norm, cmap, [axis])
    return axis


def _bar(part: Any, norm: Any, cmap: ListedColormap, axes: Any, location: str = "right", of: Sequence[Patch] = ()) -> None:
    """Draws a scale, and says what range the values `of` have on it."""
    from matplotlib.cm import ScalarMappable

    scale = ScalarMappable(norm, cmap)
    bar = part.colorbar(scale, ax=list(axes), location=location, shrink=0.8, aspect=25, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    if of:
        bar.set_label(range_text(*(patch.values for patch in of)), fontsize=7)
    bar.ax.locator_params(nbins=4)
    bar.ax.ticklabel_format(scilimits=(-2, 3))
    for axis in (bar.ax.xaxis, bar.ax.yaxis):
        axis.get_offset_text().set_fontsize(7)


def _title(text: Any, label: str, score: str, width: float) -> None:
    """Sets the title: the score, and as much of the label as fits into `width` inches."""
    from matplotlib.textpath import TextToPath

    end, font, measure = score and f"   {score}", text.get_fontproperties(), TextToPath()

    def fits(shown: str) -> bool:
        return measure.get_text_width_height_descent(shown + end, font, ismath=False)[0] <= 72 * width - 6

    if not fits(label):
        label = label[: 1 + int(72 * width / 2)]  # letters are wider than two points
        label = next((cut for size in range(len(label) - 1, 0, -1) if fits(cut := label[:size].rstrip() + "…")), "…")
    text.set_parse_math(False)  # a dollar sign would start a formula
    text.set_text((label + end).lstrip())


def _lines_of(words: list[Word], values: Array) -> list[list[tuple[str, bool, float]]]:
    """Words in lines: (text, whether a blank stands in front, value) each."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    measure, font = TextToPath(), FontProperties(size=_SIZE)
    lines: list[list[tuple[str, bool, float]]] = []
    length = 0.0
    for word, value in zip(words, values.tolist(), strict=True):
        blank = word.space and bool(lines)
        advance = measure.get_text_width_height_descent(" " * blank + word.text, font, ismath=False)[0] + 4
        if not lines or length + advance > _POINTS:
            lines.append([])
            blank, length = False, 0.0
        lines[-1].append((word.text, blank, value))
        length += advance
    return lines


def _draw_words(axis: Any, words: list[Word], values: Array) -> None:
    """Draws words in lines, coloured by their share of the largest magnitude: orange above zero, blue below; and their range."""
    from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea, VPacker

    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0)) or 1.0
    lines: list[Artist] = []
    for line in _lines_of(words, values):
        boxes: list[Artist] = []
        for text, blank, value in line:
            share = min(1.0, abs(value) / largest) if value == value else 0.0
            color = (1.0, 0.62, 0.24, share) if value >= 0 else (0.43, 0.70, 1.0, share)
            if blank:
                boxes.append(TextArea(" ", textprops={"size": _SIZE}))
            box = {"facecolor": color, "edgecolor": "none", "pad": 1.5}
            boxes.append(TextArea(text, textprops={"size": _SIZE, "bbox": box, "parse_math": False}))
        lines.append(HPacker(children=boxes, pad=0, sep=1, align="baseline"))
    lines.append(TextArea(range_text(values), textprops={"size": 7, "color": "gray"}))
    packed = VPacker(children=lines, pad=0, sep=7, align="left")
    corner = {"bbox_to_anchor": (0, 1), "bbox_transform": axis.transAxes}
    axis.add_artist(AnchoredOffsetbox("upper left", child=packed, frameon=False, **corner))
