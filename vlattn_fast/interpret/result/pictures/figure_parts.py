"""Parts of figures: scales, titles, and words in colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlattn_fast.interpret.result.numbers.choices import Array, Patch
from vlattn_fast.interpret.result.numbers.words import Word
from vlattn_fast.interpret.result.pictures.scale import range_text

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.colors import ListedColormap

SIZE, LINE = 11, 19  # of letters and of a line, in points


def draw_bar(part: Any, norm: Any, cmap: ListedColormap, axes: Any, location: str = "right", of: Sequence[Patch] = ()) -> None:
    """Draws a scale, and says what range the values `of` have on it."""
    from matplotlib.cm import ScalarMappable

    scale = ScalarMappable(norm, cmap)
    bar = part.colorbar(scale, ax=list(axes), location=location, shrink=0.8, aspect=25, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    if of:
        below = 9 if location == "bottom" else 4  # under a power of ten
        bar.set_label(range_text(*(patch.values for patch in of)), fontsize=7, labelpad=below)
    bar.ax.locator_params(nbins=4)
    bar.ax.ticklabel_format(scilimits=(-2, 3))
    for axis in (bar.ax.xaxis, bar.ax.yaxis):
        axis.get_offset_text().set_fontsize(7)


def set_title(text: Any, label: str, score: str, width: float) -> None:
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


def lines_of(words: list[Word], values: Array, width: float) -> list[list[tuple[str, bool, float]]]:
    """Words in lines of `width` inches: (text, whether a blank stands in front, value) each."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    measure, font = TextToPath(), FontProperties(size=SIZE)
    lines: list[list[tuple[str, bool, float]]] = []
    length = 0.0
    for word, value in zip(words, values.tolist(), strict=True):
        blank = word.space and bool(lines)
        advance = measure.get_text_width_height_descent(" " * blank + word.text, font, ismath=False)[0] + 4
        if not lines or length + advance > 72 * width * 0.9:
            lines.append([])
            blank, length = False, 0.0
        lines[-1].append((word.text, blank, value))
        length += advance
    return lines


def draw_words(axis: Any, words: list[Word], values: Array, width: float) -> None:
    """Draws words in lines, coloured by their share of the largest magnitude: orange above zero, blue below; and their range."""
    from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea, VPacker

    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0)) or 1.0
    lines: list[Artist] = []
    for line in lines_of(words, values, width):
        boxes: list[Artist] = []
        for text, blank, value in line:
            share = min(1.0, abs(value) / largest) if value == value else 0.0
            color = (1.0, 0.62, 0.24, share) if value >= 0 else (0.43, 0.70, 1.0, share)
            if blank:
                boxes.append(TextArea(" ", textprops={"size": SIZE}))
            box = {"facecolor": color, "edgecolor": "none", "pad": 1.5}
            boxes.append(TextArea(text, textprops={"size": SIZE, "bbox": box, "parse_math": False}))
        lines.append(HPacker(children=boxes, pad=0, sep=1, align="baseline"))
    lines.append(TextArea(range_text(values), textprops={"size": 7, "color": "gray"}))
    packed = VPacker(children=lines, pad=0, sep=7, align="left")
    corner = {"bbox_to_anchor": (0, 1), "bbox_transform": axis.transAxes}
    axis.add_artist(AnchoredOffsetbox("upper left", child=packed, frameon=False, **corner))
