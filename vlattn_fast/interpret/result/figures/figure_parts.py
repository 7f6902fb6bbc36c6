"""Parts of figures: scales, titles, and words in colours."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlattn_fast.interpret.result.figures.scale import clipped, range_text
from vlattn_fast.interpret.result.numbers.choices import Array, Patch
from vlattn_fast.interpret.result.numbers.words import Word

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

SIZE, LINE = 11, 19  # of letters and of a line, in points


def draw_bar(part: Any, norm: Any, cmap: ListedColormap, axes: Any, location: str = "right", of: Sequence[Patch] = ()) -> None:
    """Draws a scale, and the range of the values `of` on it. It ends in a point if it clips some of them."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import MaxNLocator

    scale, values, right = ScalarMappable(norm, cmap), [patch.values for patch in of], location == "right"
    extend = "neither" if not clipped(norm.vmax, *values) else "max" if norm.vmin >= 0 else "both"
    where = {"panchor": False} if right else {}  # else panels of several shapes would stand at their right sides
    bar = part.colorbar(scale, ax=list(axes), location=location, shrink=0.8, aspect=25, pad=0.02, extend=extend, **where)
    bar.ax.tick_params(labelsize=9)
    if of:
        bar.set_label(range_text(*values, end=norm.vmax), fontsize=9)
    long = bar.ax.yaxis if right else bar.ax.xaxis
    long.set_major_locator(MaxNLocator(4 if right else 3, steps=[1, 2, 2.5, 4, 5, 10]))
    long.set_major_formatter(lambda value, _: f"{value:.3g}".replace("-", "\u2212"))  # without a power of ten in a corner


def draw_note(figure: Figure, note: str, width: float) -> None:
    """Draws a sentence below all parts of a figure that is `width` inches wide, and makes room for it."""
    lines = textwrap.wrap(note, int(19 * width))  # letters of an inch
    figure.set_figheight(figure.get_figheight() + 0.12 * len(lines) + 0.1)
    figure.supxlabel("\n".join(lines), fontsize=7, color="gray", parse_math=False)


def set_title(text: Any, label: str, score: str, width: float) -> None:
    """Sets the title: the score, and as much of the label as fits into `width` inches."""
    text.set_parse_math(False)  # a dollar sign would start a formula
    text.set_text(fitted(text, label, width, score and f"   {score}").lstrip())


def fitted(text: Any, label: str, width: float, end: str = "") -> str:
    """As much of a label as fits into `width` inches before `end`, in the font of a text."""
    from matplotlib.textpath import TextToPath

    font, measure = text.get_fontproperties(), TextToPath()

    def fits(shown: str) -> bool:
        return measure.get_text_width_height_descent(shown + end, font, ismath=False)[0] <= 72 * width - 6

    if not fits(label):
        label = label[: 1 + int(72 * width / 2)]  # letters are wider than two points
        label = next((cut for size in range(len(label) - 1, 0, -1) if fits(cut := label[:size].rstrip() + "…")), "…")
    return label + end


def lines_of(words: list[Word], values: Array, width: float) -> list[list[tuple[str, bool, float]]]:
    """Words in lines of `width` inches: (text, whether a space comes before it, value) each."""
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


def with_frame(pixels: Array, left: int, top: int, right: int, bottom: int) -> Array:
    """An image (h, w, channels) with a frame of dashes in black and white, which show on any photo, as far as it lies inside."""
    x1, x2 = (min(max(x, 0), pixels.shape[1] - 1) for x in (left, right - 1))
    y1, y2 = (min(max(y, 0), pixels.shape[0] - 1) for y in (top, bottom - 1))
    across, down = (255 * (np.arange(first, last + 1) // 4 % 2)[:, None] for first, last in ((x1, x2), (y1, y2)))
    pixels[[y1, y2], x1 : x2 + 1, :3] = across
    pixels[y1 : y2 + 1, [x1, x2], :3] = down[:, None]
    return pixels
