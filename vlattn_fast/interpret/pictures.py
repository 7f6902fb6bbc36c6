"""Figures of an Explanation; matplotlib is imported here and in vlattn_fast.interpret.page alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

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
from vlattn_fast.interpret.words import Word

if TYPE_CHECKING:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

_WIDTH, _SMALL = 3.4, 2.3  # of a row's panel and of an answer's, in inches
_COLUMNS = 5  # of an answer's maps
_POINTS = 72 * _WIDTH * 0.9  # that a line of words may take
_SIZE, _LINE = 11, 19  # of words and of a line of them, in points
_EAST_ASIAN = 0x2E80  # from here on Unicode has what matplotlib's own font lacks: Chinese, Japanese, Korean, emoji
_FONTS = (  # that have it; of emoji not those of coloured bitmaps, which matplotlib cannot draw
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC", "WenQuanYi Zen Hei"),
    *("WenQuanYi Micro Hei", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "PingFang SC", "Hiragino Sans"),
    *("Apple SD Gothic Neo", "Arial Unicode MS", "Noto Emoji", "Segoe UI Emoji", "Symbola"),
)


def draw(
    explanation: Explained,
    image: Any,
    rows: Sequence[int] | None,
    labels: Sequence[str] | None,
    crop: Any,
    cmap: str,
    alpha: float,
) -> Figure:
    """See `Explanation.plot`."""
    from matplotlib import rc_context

    chosen = list(range(len(explanation))) if rows is None else list(rows)
    for row in chosen:
        if not 0 <= row < len(explanation):
            raise ValueError(f"rows must be from 0 to {len(explanation) - 1}; got {row}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1; got {alpha}")
    painter = _Painter(read_pictures(explanation, image), read_crops(explanation, crop), crop is not None, cmap, alpha)
    found = choices(explanation, labels)
    with rc_context({"font.family": _fonts(found)}):
        return _figure(explanation, chosen, found, labels, painter)


def _fonts(found: list[Choice]) -> list[str]:
    """matplotlib's fonts for the texts of choices: where its own lacks letters, those that are installed stand behind it."""
    from matplotlib import font_manager, rcParams

    texts = [choice.label for choice in found] + [word.text for choice in found for word, _ in choice.words]
    if max("".join(texts), default="") < chr(_EAST_ASIAN):
        return rcParams["font.family"]
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [*rcParams["font.family"], *(name for name in _FONTS if name in installed)]


def _figure(
    explanation: Explained, chosen: list[int], found: list[Choice], labels: Sequence[str] | None, painter: _Painter
) -> Figure:
    from matplotlib.figure import Figure

    groups = [[choice for choice in found if choice.row == row] for row in chosen]
    if explanation.each:
        sizes = [(_COLUMNS * _SMALL, 0.4 + sum(_answer_heights(group, painter))) for group in groups]
    else:
        sizes = [_row_size(group[0], painter) for group in groups]
    width, height = max([_WIDTH, *(w for w, _ in sizes)]), sum(h for _, h in sizes)
    figure = Figure(figsize=(width, max(height, 1)), layout="constrained")
    if not groups:
        return figure
    parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=[h for _, h in sizes])[:, 0]
    for part, row, group in zip(parts, chosen, groups, strict=True):
        if explanation.each:
            title = row_label(explanation, row) if labels is None else labels[row]
            _draw_answer(part, explanation, title, group, painter)
        else:
            _draw_row(part, group[0], painter)
    return figure


def colors(cmap: str) -> ListedColormap:
    """256 colours of matplotlib's map, without its last, which are so pale that the largest values would vanish on white."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    if cmap not in colormaps:
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
        """Panels of a choice, photos beside their overlays included."""
        return len(self.panels(choice)) * (1 if self.pictures is None else 2)

    def shape(self, choice: Choice) -> float:
        """Height of the first panel per width."""
        if not choice.patches:
            return 0.3
        picture = self._picture(choice.patches[0])
        height, width = (choice.patches[0].values if picture is None else picture).shape[:2]
        return min(2.0, height / width) if choice.patches[0].box is None or picture is not None else 1.0

    def photo(self, axis: Any, patches: list[Patch]) -> None:
        picture = self._picture(patches[0])
        if picture is not None:
            axis.imshow(picture)

    def overlay(self, axis: Any, patches: list[Patch], low: float, high: float) -> Any:
        """Draws the maps of one panel; what a colour bar describes."""
        picture = self._picture(patches[0])
        height, width = (1, 1) if picture is None else picture.shape[:2]
        if picture is None and patches[0].box is None and len(patches) == 1:
            height, width = patches[0].values.shape
        if picture is not None:
            axis.imshow(picture)
        for patch in patches:
            x1, y1, x2, y2 = self.crops[patch.index] if patch.box is None else patch.box
            opacity = None if picture is None else self.alpha * np.minimum(1, 1.5 * shares(patch.values, low, high)) ** 1.5
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

    def _frame(self, axis: Any, corner: tuple[float, float], size: tuple[float, float], region: bool) -> None:
        from matplotlib.patches import Rectangle

        style = {"edgecolor": "black", "alpha": 0.6} if region else {"edgecolor": "white", "linestyle": "--"}
        axis.add_patch(Rectangle(corner, *size, fill=False, linewidth=0.7, **style))

    def _number(self, patch: Patch) -> int:
        return 0 if self.pictures is None or len(self.pictures) == 1 else patch.index

    def _picture(self, patch: Patch) -> Array | None:
        return None if self.pictures is None else self.pictures[self._number(patch)]


def _row_size(choice: Choice, painter: _Painter) -> tuple[float, float]:
    """Inches of a row's figure."""
    height = max(0.9 * _WIDTH * max(0.3, painter.shape(choice)), _LINE * len(_lines_of(choice.words)) / 72)
    return _WIDTH * max(1, painter.count(choice) + bool(choice.words)), 0.5 + height


def _draw_row(part: Any, choice: Choice, painter: _Painter) -> None:
    """Photo, overlay and words of a row, under its label and score."""
    columns = max(1, painter.count(choice) + bool(choice.words))
    axes = part.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.set_axis_off()
    low, high = limits(choice.patches)
    drawn, at = None, 0
    for patches in painter.panels(choice):
        if painter.pictures is not None:
            painter.photo(axes[at], patches)
            at += 1
        drawn = painter.overlay(axes[at], patches, low, high)
        at += 1
    if drawn is not None and high > low:
        _bar(part, drawn, axes[:at])
    if choice.words:
        _draw_words(axes[at], choice.words)
    _title(part.suptitle("", fontsize=_SIZE), choice.label, choice.score, columns * _WIDTH)


def _answer_heights(group: list[Choice], painter: _Painter) -> list[float]:
    """Inches of an answer's parts: its maps in lines, and the table of its words."""
    lines, words = _lines(group, painter), bool(group and group[0].words)
    maps = [lines * (_SMALL * painter.shape(group[0]) + 0.6)] if lines else []
    return maps + ([0.9 + 0.22 * len(group)] if words else [])


def _lines(group: list[Choice], painter: _Painter) -> int:
    panels = sum(len(painter.panels(choice)) for choice in group)
    return -(-(panels + (painter.pictures is not None)) // _COLUMNS) if panels else 0


def _draw_answer(part: Any, explanation: Explained, title: str, group: list[Choice], painter: _Painter) -> None:
    """A map per word of the answer, and a table of what its words count for each other."""
    heights, lines = _answer_heights(group, painter), _lines(group, painter)
    if not heights:
        return
    parts = list(part.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    if lines:
        _draw_maps(parts.pop(0), group, painter, lines)
    if parts:
        _draw_table(parts.pop(0), explanation, group, painter.cmap)
    scores = [choice.score for choice in group if choice.score is not None]
    _title(part.suptitle("", fontsize=_SIZE), title, sum(scores) if scores else None, _COLUMNS * _SMALL)


def _draw_maps(part: Any, group: list[Choice], painter: _Painter, lines: int) -> None:
    axes = part.subplots(lines, _COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    free = iter(axes)
    if painter.pictures is not None:
        painter.photo(next(free), painter.panels(group[0])[0])
    for choice in group:
        low, high = limits(choice.patches)
        for patches in painter.panels(choice):
            axis = next(free)
            drawn = painter.overlay(axis, patches, low, high)
            _title(axis.set_title("", fontsize=9), choice.label, choice.score, _SMALL)
            if high > low:
                _bar(part, drawn, [axis], location="bottom")


def _draw_table(part: Any, explanation: Explained, group: list[Choice], cmap: ListedColormap) -> None:
    """Words of the answer (down) by the words that they rest on (across)."""
    axis = part.subplots()
    prompt = len(row_words(explanation, group[0].row)[0])
    values = np.array([[value for _, value in choice.words] for choice in group])
    values[np.triu_indices_from(values, prompt + 1)] = np.nan  # words that were not there yet
    drawn = axis.imshow(values, cmap=cmap, aspect="auto", interpolation="nearest")
    words = [word.text for word, _ in group[0].words]
    across = axis.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
    down = axis.set_yticks(range(len(group)), [choice.label for choice in group], fontsize=8)
    for tick in (*across, *down):
        tick.label1.set_parse_math(False)
    axis.axvline(prompt - 0.5, color="white", linewidth=2)
    _bar(part, drawn, [axis])


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
    """The label, as much of it as there is room for in `width` inches, and the score."""
    from matplotlib.textpath import TextToPath

    end, font, measure = "" if score is None else f"   score {score:.4g}", text.get_fontproperties(), TextToPath()

    def fits(shown: str) -> bool:
        return measure.get_text_width_height_descent(shown + end, font, ismath=False)[0] <= 72 * width - 6

    if not fits(label):
        label = label[: 1 + int(72 * width / 2)]  # letters are wider than two points
        label = next((cut for size in range(len(label) - 1, 0, -1) if fits(cut := label[:size].rstrip() + "…")), "…")
    text.set_parse_math(False)  # a dollar sign would start a formula
    text.set_text((label + end).lstrip())


def _lines_of(words: list[tuple[Word, float]]) -> list[list[tuple[str, bool, float]]]:
    """Words in lines: (text, whether a blank stands in front, value) each."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    measure, font = TextToPath(), FontProperties(size=_SIZE)
    lines: list[list[tuple[str, bool, float]]] = []
    length = 0.0
    for word, value in words:
        blank = word.space and bool(lines)
        advance = measure.get_text_width_height_descent(" " * blank + word.text, font, ismath=False)[0] + 4
        if not lines or length + advance > _POINTS:
            lines.append([])
            blank, length = False, 0.0
        lines[-1].append((word.text, blank, value))
        length += advance
    return lines


def _draw_words(axis: Any, words: list[tuple[Word, float]]) -> None:
    """Words in lines, coloured by their share of the largest magnitude: orange above zero, blue below."""
    from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea, VPacker

    largest = max(abs(value) for _, value in words) or 1.0
    lines: list[list[Any]] = []
    for line in _lines_of(words):
        lines.append([])
        for text, blank, value in line:
            share = abs(value) / largest
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
