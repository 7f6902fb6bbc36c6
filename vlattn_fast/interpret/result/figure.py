"""Figures of an Explanation; matplotlib is imported here and in vlattn_fast.interpret.result.page alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlattn_fast._ground.checks import check_integer, check_items, check_number
from vlattn_fast.interpret.result.choices import (
    WHOLE,
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
from vlattn_fast.interpret.result.words import Word

if TYPE_CHECKING:
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
    explanation: Explained,
    image: Any,
    rows: Sequence[int] | None,
    labels: Sequence[Any] | None,
    crop: Any,
    cmap: str,
    alpha: float,
) -> Figure:
    """See `Explanation.plot`."""
    from matplotlib import rc_context

    chosen = _chosen(rows, len(explanation))
    check_number("alpha", alpha, low=0, high=1)
    painter = _Painter(read_pictures(explanation, image), read_crops(explanation, crop), crop is not None, cmap, alpha)
    drawn = read_rows(explanation, labels, chosen)
    with rc_context({"font.family": _fonts(drawn)}):
        return _figure(drawn, explanation.each, painter)


def _chosen(rows: Sequence[int] | None, count: int) -> list[int]:
    """The rows to draw."""
    if rows is None:
        return list(range(count))
    check_items("rows", rows, "numbers of rows")
    for row in rows:
        check_integer("rows", row)
        if not 0 <= row < count:
            raise ValueError(f"rows must be from 0 to {count - 1}; got {row}")
    return list(rows)


def _fonts(rows: list[Row]) -> list[str]:
    """matplotlib's fonts for the texts of rows: its own, then installed fonts with the missing letters."""
    from matplotlib import font_manager, rcParams

    texts = [row.label for row in rows] + [word.text for row in rows for word in (*row.prompt, *row.answer)]
    if max("".join(texts), default="") < chr(_EAST_ASIAN):
        return rcParams["font.family"]
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [*rcParams["font.family"], *(name for name in _FONTS if name in installed)]


def _figure(rows: list[Row], each: bool, painter: _Painter) -> Figure:
    from matplotlib.figure import Figure

    if each:
        sizes = [(_COLUMNS * _SMALL, 0.4 + sum(_answer_heights(row, painter))) for row in rows]
    else:
        sizes = [_row_size(row, painter) for row in rows]
    width, height = max([_WIDTH, *(w for w, _ in sizes)]), sum(h for _, h in sizes)
    figure = Figure(figsize=(width, max(height, 1)), layout="constrained")
    if not rows:
        return figure
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=[h for _, h in sizes])[:, 0]
    for part, row in zip(parts, rows, strict=True):
        (_draw_answer if each else _draw_row)(part, row, painter)
    return figure


def colors(cmap: str) -> ListedColormap:
    """256 colours of matplotlib's map, without its last ones, so pale that the largest values would vanish on white."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    if not isinstance(cmap, str) or cmap not in colormaps:
        raise ValueError(f"cmap must be a name of matplotlib's colours, such as 'inferno' or 'viridis'; got {cmap!r}")
    return ListedColormap(colormaps[cmap](np.linspace(0, 0.85, 256)), name=cmap)


class _Painter:
    """Draws the panels of choices: the photo, and the maps over it."""

    def __init__(self, pictures: list[Array] | None, crops: list[Box], together: bool, cmap: str, alpha: float) -> None:
        self.pictures, self.crops, self.together, self.cmap, self.alpha = pictures, crops, together, colors(cmap), alpha

    def panels(self, choice: Choice) -> list[list[Patch]]:
        """The maps by panel: regions of one picture share it, and so do maps with crops."""
        panels: dict[Any, list[Patch]] = {}
        for patch in choice.patches:
            shared = self.together or patch.box is not None
            panels.setdefault(self._number(patch) if shared else ("map", patch.index), []).append(patch)
        return list(panels.values())

    def count(self, choice: Choice) -> int:
        """The number of panels of a choice, photos included."""
        return len(self.panels(choice)) * (1 if self.pictures is None else 2)

    def shape(self, patches: list[Patch]) -> float:
        """Height per width of the panel that begins with these maps."""
        if not patches:
            return 0.3
        picture = self._picture(patches[0])
        height, width = (patches[0].values if picture is None else picture).shape[:2]
        return min(2.0, height / width) if patches[0].box is None or picture is not None else 1.0

    def photo(self, axis: Any, patches: list[Patch]) -> None:
        picture = self._picture(patches[0])
        if picture is not None:
            axis.imshow(picture)

    def overlay(self, axis: Any, patches: list[Patch], low: float, high: float) -> Any:
        """Draws the maps of one panel; returns the artist for a colour bar."""
        picture = self._picture(patches[0])
        height, width = (1, 1) if picture is None else picture.shape[:2]
        if picture is None and patches[0].box is None and len(patches) == 1:
            height, width = patches[0].values.shape
        if picture is not None:
            axis.imshow(picture)
        for patch in patches:
            x1, y1, x2, y2 = self.crops[patch.index] if patch.box is None else patch.box
            share = np.nan_to_num(shares(patch.values, low, high)).clip(0, 1)
            opacity = None if picture is None else self.alpha * np.minimum(1, 1.5 * share) ** 1.5
            drawn = axis.imshow(
                patch.values,
                cmap=self.cmap,
                vmin=low,
                vmax=high,
                alpha=opacity,
                extent=(x1 * width, x2 * width, y2 * height, y1 * height),
                interpolation="nearest" if picture is None or patch.values.size == 1 else "bilinear",
            )
            if patch.values.size == 1 or (x1, y1, x2, y2) != (0, 0, 1, 1):
                self._frame(axis, (x1 * width, y1 * height), ((x2 - x1) * width, (y2 - y1) * height), patch.values.size == 1)
        axis.set(xlim=(0, width) if picture is None else (-0.5, width - 0.5), ylim=(height, 0), aspect="equal")
        return drawn

    def small(self) -> _Painter:
        """A copy with pictures in the size that they have on a sheet."""
        from PIL import Image

        if self.pictures is None:
            return self
        sizes = [(_TILE, max(1, round(_TILE * min(2.0, picture.shape[0] / picture.shape[1])))) for picture in self.pictures]
        small = [np.asarray(Image.fromarray(one).resize(size)) for one, size in zip(self.pictures, sizes, strict=True)]
        return _Painter(small, self.crops, self.together, self.cmap.name, self.alpha)

    def tile(self, patches: list[Patch], low: float, high: float) -> Array:
        """A panel as pixels (h, _TILE, 3), floats from 0 to 1."""
        picture = self._picture(patches[0])
        tile = np.ones((max(1, round(_TILE * self.shape(patches))), _TILE, 3))
        if picture is not None:
            visible = picture[..., 3:] / 255 if picture.shape[2] == 4 else 1.0
            tile = picture[: len(tile), :, :3] / 255 * visible + 1 - visible
        for patch in patches:
            x1, y1, x2, y2 = self.crops[patch.index] if patch.box is None else patch.box
            share = np.nan_to_num(shares(patch.values, low, high)).clip(0, 1)
            opacity = np.ones_like(share) if picture is None else self.alpha * np.minimum(1, 1.5 * share) ** 1.5
            down, inside_down = _cells(len(tile), y1, y2, share.shape[0])
            along, inside_along = _cells(_TILE, x1, x2, share.shape[1])
            inside, cells = np.ix_(inside_down, inside_along), np.ix_(down, along)
            seen = opacity[cells][..., None]
            tile[inside] = seen * self.cmap(share)[cells][..., :3] + (1 - seen) * tile[inside]
        return tile

    def _frame(self, axis: Any, corner: tuple[float, float], size: tuple[float, float], region: bool) -> None:
        from matplotlib.patches import Rectangle

        style = {"edgecolor": "black", "alpha": 0.6} if region else {"edgecolor": "white", "linestyle": "--"}
        axis.add_patch(Rectangle(corner, *size, fill=False, linewidth=0.7, **style))

    def _number(self, patch: Patch) -> int:
        return 0 if self.pictures is None or len(self.pictures) == 1 else patch.index

    def _picture(self, patch: Patch) -> Array | None:
        return None if self.pictures is None else self.pictures[self._number(patch)]


def _cells(size: int, start: float, end: float, count: int) -> tuple[Array, Array]:
    """The pixels among `size` between `start` and `end` (relative): the one of `count` cells that each shows, and its number."""
    places = ((np.arange(size) + 0.5) / size - start) / (end - start)
    inside = (places >= 0) & (places < 1)
    return (places[inside] * count).astype(int), np.flatnonzero(inside)


def _row_size(row: Row, painter: _Painter) -> tuple[float, float]:
    """Inches of a row's figure."""
    choice = row.choices[0]
    height = max(0.9 * _WIDTH * max(0.3, painter.shape(choice.patches)), _LINE * len(_lines_of(row.words, choice.values)) / 72)
    return _WIDTH * _columns(row, painter), 0.5 + height


def _columns(row: Row, painter: _Painter) -> int:
    """The number of axes of a row: panels and words, or towers without these."""
    return painter.count(row.choices[0]) + bool(row.words) or len(row.choices[0].rows)


def _draw_row(part: Any, row: Row, painter: _Painter) -> None:
    """Draws photo, overlay and words of a row, or its towers' entries without these, under its label and score."""
    (choice,), columns = row.choices, _columns(row, painter)
    axes = part.subplots(1, columns, squeeze=False)[0]
    low, high = limits(choice.patches)
    drawn, at = None, 0
    if not choice.patches and not row.words:
        for axis, (name, values) in zip(axes, choice.rows.items(), strict=True):
            axis.stairs(values, fill=True, color=painter.cmap(0.5))
            axis.set_title(name, fontsize=9, parse_math=False)
    else:
        for axis in axes:
            axis.set_axis_off()
    for patches in painter.panels(choice):
        if painter.pictures is not None:
            painter.photo(axes[at], patches)
            at += 1
        drawn = painter.overlay(axes[at], patches, low, high)
        at += 1
    if drawn is not None and high > low:
        _bar(part, drawn, axes[:at])
    if row.words:
        _draw_words(axes[at], row.words, choice.values)
    _title(part.suptitle("", fontsize=_SIZE), row.label, choice.score, columns * _WIDTH)


def _answer_heights(row: Row, painter: _Painter) -> list[float]:
    """Inches of an answer's parts: the lines of maps and the table of words, or a table per tower without these."""
    if not row.choices:
        return [0.3]
    table, (lines, columns) = 0.9 + 0.22 * min(len(row.choices), _MANY), _lines(row, painter)
    shape, width = painter.shape(row.choices[0].patches), _COLUMNS * _SMALL / columns
    maps = [lines * (width * shape + (0.6 if columns == _COLUMNS else 0.2))] if lines else []
    return maps + [table] * (bool(row.words) if lines or row.words else len(row.choices[0].rows))


def _lines(row: Row, painter: _Painter) -> tuple[int, int]:
    """The number of lines of an answer's maps, and of maps in a line."""
    panels = sum(len(painter.panels(choice)) for choice in row.choices)
    columns = _COLUMNS if len(row.choices) <= _MANY else _SHEET
    return -(-(panels + (painter.pictures is not None)) // columns) if panels else 0, columns


def _draw_answer(part: Any, row: Row, painter: _Painter) -> None:
    """Draws a map per word of the answer, and a table of the relevancy of its words for each other."""
    heights, (lines, columns) = _answer_heights(row, painter), _lines(row, painter)
    parts = list(part.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    if lines:
        (_draw_maps if columns == _COLUMNS else _draw_sheet)(parts.pop(0), row, painter, lines)
    if row.words:
        values = np.array([choice.values for choice in row.choices], dtype=float)
        values[np.triu_indices_from(values, len(row.prompt) + 1)] = np.nan  # later words
        axis = _draw_table(parts.pop(0), row, values, [word.text for word in row.words], painter.cmap)
        axis.axvline(len(row.prompt) - 0.5, color="white", linewidth=2)
    elif row.choices and not lines:
        for name, values in row.choices[0].rows.items():
            tower = np.array([choice.rows[name] for choice in row.choices])
            axis = _draw_table(parts.pop(0), row, tower, [str(i) for i in range(len(values))], painter.cmap)
            axis.set_title(name, fontsize=9, parse_math=False)
    scores = [choice.score for choice in row.choices if choice.score is not None]
    _title(part.suptitle("", fontsize=_SIZE), row.label, sum(scores) if scores else None, _COLUMNS * _SMALL)


def _draw_maps(part: Any, row: Row, painter: _Painter, lines: int) -> None:
    axes = part.subplots(lines, _COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    free = iter(axes)
    if painter.pictures is not None:
        painter.photo(next(free), painter.panels(row.choices[0])[0])
    for choice in row.choices:
        low, high = limits(choice.patches)
        for patches in painter.panels(choice):
            axis = next(free)
            drawn = painter.overlay(axis, patches, low, high)
            _title(axis.set_title("", fontsize=9), choice.label, choice.score, _SMALL)
            if high > low:
                _bar(part, drawn, [axis], location="bottom")


def _draw_sheet(part: Any, row: Row, painter: _Painter, lines: int) -> None:
    """Draws the maps of many words as one image with one scale, each under its word. An axis per map would take minutes."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    painter = painter.small()
    low, high = limits([patch for choice in row.choices for patch in choice.patches])
    tiles = [(choice.label, painter.tile(maps, low, high)) for choice in row.choices for maps in painter.panels(choice)]
    if painter.pictures is not None:
        photo = [Patch(patch.index, np.zeros((1, 1)), WHOLE) for patch in painter.panels(row.choices[0])[0][:1]]
        tiles.insert(0, ("", painter.tile(photo, 0, 0)))
    gap, text = 6, 22
    height = max(len(tile) for _, tile in tiles) + text
    sheet = np.full((lines * height, _SHEET * (_TILE + gap), 4), 255, np.uint8)
    axis = part.subplots()
    axis.set_axis_off()
    for number, (label, tile) in enumerate(tiles):
        y, x = number // _SHEET * height + text, number % _SHEET * (_TILE + gap)
        sheet[y : y + len(tile), x : x + _TILE, :3] = np.rint(255 * tile)
        shown = label if len(label) <= 10 else label[:9] + "…"
        axis.text(x, y - 3, shown, fontsize=7, parse_math=False, in_layout=False)
    axis.imshow(sheet, interpolation="nearest")
    if high > low:
        _bar(part, ScalarMappable(Normalize(low, high), painter.cmap), [axis])


def _draw_table(part: Any, row: Row, values: Array, across: list[str], cmap: ListedColormap) -> Any:
    """Draws words of the answer (down) by the tokens they rest on (across); names only some where there are many."""
    axis = part.subplots()
    drawn = axis.imshow(values, cmap=cmap, aspect="auto", interpolation="nearest")
    below, beside = -(-len(across) // _NAMES) or 1, -(-len(row.choices) // _MANY) or 1
    columns = axis.set_xticks(range(0, len(across), below), across[::below], rotation=90, fontsize=8)
    lines = axis.set_yticks(range(0, len(row.choices), beside), [choice.label for choice in row.choices[::beside]], fontsize=8)
    for tick in (*columns, *lines):
        tick.label1.set_parse_math(False)
    _bar(part, drawn, [axis])
    return axis


def _bar(part: Any, drawn: Any, axes: Any, location: str = "right") -> None:
    from matplotlib.cm import ScalarMappable

    bar = part.colorbar(  # without the map's transparency
        ScalarMappable(drawn.norm, drawn.cmap), ax=list(axes), location=location, shrink=0.8, aspect=25, pad=0.02
    )
    bar.ax.tick_params(labelsize=7)
    bar.ax.locator_params(nbins=4)
    bar.ax.ticklabel_format(scilimits=(-2, 3))
    for axis in (bar.ax.xaxis, bar.ax.yaxis):
        axis.get_offset_text().set_fontsize(7)


def _title(text: Any, label: str, score: float | None, width: float) -> None:
    """Sets the title: the score, and as much of the label as fits into `width` inches."""
    from matplotlib.textpath import TextToPath

    end, font, measure = "" if score is None else f"   score {score:.4g}", text.get_fontproperties(), TextToPath()

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
    """Draws words in lines, coloured by their share of the largest magnitude: orange above zero, blue below."""
    from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea, VPacker

    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0)) or 1.0
    lines: list[list[Any]] = []
    for line in _lines_of(words, values):
        lines.append([])
        for text, blank, value in line:
            share = min(1.0, abs(value) / largest) if value == value else 0.0
            color = (1.0, 0.62, 0.24, share) if value >= 0 else (0.43, 0.70, 1.0, share)
            box = {"facecolor": color, "edgecolor": "none", "pad": 1.5}
            if blank:
                lines[-1].append(TextArea(" ", textprops={"size": _SIZE}))
            lines[-1].append(TextArea(text, textprops={"size": _SIZE, "bbox": box, "parse_math": False}))
    rows: list[Any] = [HPacker(children=line, pad=0, sep=1, align="baseline") for line in lines]
    packed = VPacker(children=rows, pad=0, sep=7, align="left")
    axis.add_artist(
        AnchoredOffsetbox("upper left", child=packed, frameon=False, bbox_to_anchor=(0, 1), bbox_transform=axis.transAxes)
    )
