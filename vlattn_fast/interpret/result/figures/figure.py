"""Figures of an Explanation, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp
from typing import TYPE_CHECKING, Any

import numpy as np

from vlattn_fast._ground.checks import check_bool, check_number
from vlattn_fast.interpret.result.figures.figure_parts import (
    LINE,
    SIZE,
    draw_bar,
    draw_note,
    draw_words,
    lines_of,
    set_title,
    with_frame,
)
from vlattn_fast.interpret.result.figures.panel_names import panel_names
from vlattn_fast.interpret.result.figures.photos import each_once, read_boxes, read_images
from vlattn_fast.interpret.result.figures.scale import (
    check_scale,
    colors,
    evenness,
    for_scale,
    joint,
    scale_of,
    shares,
    strengths,
)
from vlattn_fast.interpret.result.numbers.choices import (
    WHOLE,
    Array,
    Box,
    Choice,
    Patch,
    Sample,
    chosen_numbers,
    image_number,
    panels,
    read_samples,
    score_text,
)
from vlattn_fast.interpret.result.numbers.explained import Explained

if TYPE_CHECKING:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from PIL.Image import Image as PILImage

_WIDTH, _SMALL = 3.4, 2.3  # inches of a sample's panel, and of an answer's
_TITLE = 0.15  # inches between the title of an answer and its maps
_COLUMNS = 5  # for an answer's maps
_ROWS = 6  # that stand below one another at full size; more wrap into a grid of smaller ones
_ACROSS = 4  # panels of a sample in a line
_WITH_PHOTOS = 6  # panels of a sample at most, if its photos have axes of their own next to its maps
_MANY = 40  # words of an answer; a longer answer has one sheet of maps, and fewer names than lines in its table
_SHEET, _TILE = 16, 72  # maps in a line of the sheet, and pixels in a line of a map
_NAMES = 64  # that fit above the columns of a table
_STRIP = 0.12  # height per width of the strip of a sound
_EAST_ASIAN = 0x2E80  # matplotlib's font lacks Unicode from here on: Chinese, Japanese, Korean, emoji
_FONTS = (  # with these letters; no coloured emoji, which matplotlib cannot draw
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC", "WenQuanYi Zen Hei"),
    *("WenQuanYi Micro Hei", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "PingFang SC", "Hiragino Sans"),
    *("Apple SD Gothic Neo", "Arial Unicode MS", "Noto Emoji", "Segoe UI Emoji", "Symbola"),
)


def draw(
    explanation: Explained,
    image: Any,
    numbers: Any,
    labels: Any,
    crop: Any,
    processor: Any,
    cmap: str,
    alpha: float,
    scale: str,
    common: bool,
) -> Figure:
    """See `Explanation.plot`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    numbers = chosen_numbers(numbers, len(explanation))
    check_number("alpha", alpha, low=0, high=1)
    check_bool(common=common)
    check_scale(scale)
    images = read_images(explanation, image, numbers)
    boxes = read_boxes(explanation, images, crop, processor)
    painter = Painter(images, boxes, colors(cmap), alpha, scale, explanation.photos)
    samples, each = read_samples(explanation, labels, numbers), explanation.per_token
    if common:
        painter.shared = joint(painter.range(choice.patches) for sample in samples for choice in sample.choices)
    with rc_context({"font.family": _fonts(samples)}):
        if each:
            sizes = [(_COLUMNS * _SMALL, 0.25 + _TITLE + sum(_answer_heights(sample, painter))) for sample in samples]
        else:
            sizes = [_sample_size(sample, painter, _unit(samples)) for sample in samples]
        if not samples:
            return Figure(figsize=(_WIDTH, 1), layout="constrained")
        heights, across = _grid(sizes)
        width = across * max([_WIDTH if across == 1 else 0, *(w for w, _ in sizes)])
        figure = Figure(figsize=(width, max(sum(heights), 1)), layout="constrained")
        parts = figure.subfigures(len(heights), across, squeeze=False, height_ratios=heights).flat
        for part, sample in zip(parts, samples, strict=False):  # the last line may be shorter
            if each:
                _draw_answer(part, sample, painter)
            else:
                _draw_sample(part, sample, painter, _unit(samples))
        if explanation.no_map is not None:
            draw_note(figure, f"No map: {explanation.no_map}.", width)
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

    images: list[Array] | None
    crops: list[Box]
    cmap: ListedColormap
    alpha: float
    scale: str = "max"  # its kind, see `scale_of`
    photos: list[int] | None = None  # the number of the photo of each map, if known
    shared: tuple[float, float] | None = None  # the range of one scale for all maps; None = each choice has its own

    def shades(self, low: float) -> ListedColormap:
        """The colours of a scale that begins at `low`, as transparent as the map over an image is."""
        from matplotlib.colors import ListedColormap

        rgba = for_scale(self.cmap, low)(np.linspace(0, 1, 256))
        rgba[:, 3] = self.opacity(np.linspace(0, 1, 256), low)
        return ListedColormap(rgba, name=self.cmap.name)

    def range(self, patches: Sequence[Patch]) -> tuple[float, float]:
        """The ends of the scale that some maps have."""
        return scale_of(*(patch.values for patch in patches), scale=self.scale) if self.shared is None else self.shared

    def fitted(self, patches: Sequence[Patch]) -> tuple[Painter, float, float]:
        """A painter for some maps, which leaves the image visible where they are nearly even, and the ends of their scale."""
        low, high = self.range(patches)
        even = evenness(low, high, *(patch.values for patch in patches))
        return replace(self, alpha=self.alpha * (1 - even / 2)), low, high

    def panels(self, choice: Choice) -> list[list[Patch]]:
        return panels(choice.patches, self.images, self.crops)

    def named(self, choice: Choice) -> list[tuple[str, list[Patch]]]:
        """The panels with their names; "" if a panel needs no name."""
        views = self.panels(choice)
        return list(zip(panel_names(self.photos, views), views, strict=True))

    def image(self, patches: list[Patch]) -> Array | None:
        """The image under the maps of a panel."""
        return None if self.images is None else self.images[image_number(patches[0], self.images)]

    def shape(self, patches: list[Patch]) -> float:
        """Height per width of the panel that begins with these maps."""
        if not patches:
            return 0.3
        if patches[0].seconds is not None:
            return _STRIP
        image = self.image(patches)
        height, width = (patches[0].values if image is None else image).shape[:2]
        return min(2.0, height / width) if patches[0].box is None or image is not None else 1.0

    def placed(self, patch: Patch, low: float, high: float) -> tuple[Box, Array, Array]:
        """The box of a map on its image, and for each number its share of the range and its opacity over an image."""
        share = np.nan_to_num(shares(patch.values, low, high)).clip(0, 1)
        return self.crops[patch.index] if patch.box is None else patch.box, share, self.opacity(share, low)

    def opacity(self, share: Array, low: float) -> Array:
        """The opacity of shares of a scale that begins at `low`: over an image what is near 0 is transparent."""
        if self.images is None:
            return np.ones_like(share)
        return self.alpha * np.minimum(1, 1.5 * strengths(share, low)) ** 1.5

    def photo(self, axis: Any, patches: list[Patch]) -> None:
        image = self.image(patches)
        if image is not None:
            axis.imshow(image)

    def overlay(self, axis: Any, patches: list[Patch], low: float, high: float) -> Any:
        """Draws the maps of one panel; returns the artist for a colour bar."""
        from matplotlib.patches import Rectangle

        image = self.image(patches)
        height, width = (1, 1) if image is None else image.shape[:2]
        if image is None and patches[0].box is None and len(patches) == 1:
            height, width = patches[0].values.shape
        seconds = patches[0].seconds
        if seconds is not None:
            height, width = _STRIP * seconds, seconds
        self.photo(axis, patches)
        for patch in patches:
            (x1, y1, x2, y2), _, opacity = self.placed(patch, low, high)
            region = patch.values.size == 1
            painted = {"cmap": for_scale(self.cmap, low), "vmin": low, "vmax": high, "alpha": None if image is None else opacity}
            smooth = "nearest" if image is None or region else "bilinear"
            extent = x1 * width, x2 * width, y2 * height, y1 * height
            drawn = axis.imshow(patch.values, extent=extent, interpolation=smooth, **painted)
            if region or (x1, y1, x2, y2) != WHOLE:  # white dashes on black show on any photo
                size = (x2 - x1) * width, (y2 - y1) * height
                styles: list[dict[str, Any]] = [{"edgecolor": "black", "alpha": 0.6}, {"edgecolor": "white", "linestyle": "--"}]
                for style in styles[: 1 if region else 2]:
                    axis.add_patch(Rectangle((x1 * width, y1 * height), *size, fill=False, linewidth=0.7, **style))
        axis.set(xlim=(0, width) if image is None else (-0.5, width - 0.5), ylim=(height, 0), aspect="equal")
        if seconds is not None:
            axis.set_axis_on()
            axis.set(yticks=[], xlabel="seconds")
        return drawn

    def laid_over(self, patches: Sequence[Patch], side: int = 0, outlined: bool = False) -> PILImage:
        """The maps of one panel over their image, of its size; without an image on white, whose longer side is `side` pixels.
        `outlined`: with a frame around a map of a part of the image."""
        from PIL import Image

        (painter, low, high), image = self.fitted(patches), self.image([*patches])
        if image is None:
            tall = self.shape([*patches])
            width, height = (max(1, round(side * part / max(1, tall))) for part in (1, tall))
            shown = Image.new("RGBA", (width, height), "white")
        else:
            shown = Image.new("RGBA", image.shape[1::-1], "white")
            shown = Image.alpha_composite(shown, Image.fromarray(image).convert("RGBA"))
        smooth = Image.Resampling.NEAREST if image is None else Image.Resampling.BILINEAR
        for patch in patches:
            box, share, _ = self.placed(patch, low, high)
            left, top, right, bottom = (round(part * shown.size[number % 2]) for number, part in enumerate(box))
            size = max(1, right - left), max(1, bottom - top)
            large = np.asarray(Image.fromarray(share.astype(np.float32)).resize(size, smooth)).clip(0, 1)
            colored = for_scale(self.cmap, low)(large)
            colored[..., 3] = painter.opacity(large, low)
            layer = Image.new("RGBA", shown.size)
            layer.paste(Image.fromarray(np.rint(255 * colored).astype(np.uint8)), (left, top))
            shown = Image.alpha_composite(shown, layer)
            if outlined and box != WHOLE:
                shown = Image.fromarray(with_frame(np.array(shown), left, top, right, bottom))
        return shown.convert("RGB")


def _unit(samples: Sequence[Sample]) -> float:
    """Inches of a panel of samples."""
    return _WIDTH if len(samples) <= _ROWS else _SMALL


def _grid(sizes: Sequence[tuple[float, float]]) -> tuple[list[float], int]:
    """The heights of the lines, and how many samples of these sizes stand in a line: one, or as many as make a figure of many
    about as wide as it is tall."""
    width, height = (max(size) for size in zip(*sizes, strict=True))
    count = len(sizes)
    across = 1 if count <= _ROWS else min(range(1, count + 1), key=lambda n: max(n * width, -(-count // n) * height))
    return [max(h for _, h in sizes[first : first + across]) for first in range(0, count, across)], across


def _cells(painter: Painter, choice: Choice) -> list[tuple[str | None, list[Patch]]]:
    """The axes of a sample's maps in turn: their name, or None for their photo, which comes before its first map unless there
    are many; and the maps."""
    cells: list[tuple[str | None, list[Patch]]] = []
    before = None
    for name, view in painter.named(choice):
        if (photo := painter.image(view)) is not before:
            cells.append((None, view))
        cells.append((name, view))
        before = photo
    return cells if len(cells) <= _WITH_PHOTOS else [cell for cell in cells if cell[0] is not None]


def _axes(sample: Sample, painter: Painter) -> tuple[int, int, int]:
    """The number of axes of a sample: panels and photos, or towers without panels and words; and their lines and columns. Words
    have a further column."""
    cells = _cells(painter, sample.choices[0])
    if len(cells) > _MANY:
        return 1, 1, 1
    count = len(cells) or (0 if sample.words else len(sample.choices[0].relevancy))
    photos = [number for number, (name, _) in enumerate(cells) if name is None]
    group = photos[1] if len(photos) > 1 else 1  # a photo and its maps stand in one line
    columns = min(count, max(1, _ACROSS // group) * group)
    return count, -(-count // max(columns, 1)), columns


def _sample_size(sample: Sample, painter: Painter, unit: float) -> tuple[float, float]:
    """Inches of a sample's figure, whose panels are `unit` wide."""
    choice, (_, lines, columns) = sample.choices[0], _axes(sample, painter)
    words = LINE * (1 + len(lines_of(sample.words, choice.values, unit))) / 72
    width, shape, panels = unit * columns, painter.shape(choice.patches), len(painter.panels(choice))
    height = 0.9 * unit * max(0.3, shape) * lines
    if panels > _MANY:
        width = _COLUMNS * _SMALL
        height = -(-panels // _SHEET) * (width / _SHEET * shape + 0.2)
    return width + unit * bool(sample.words), 0.5 + max(height, words)


def _draw_sample(part: Any, sample: Sample, painter: Painter, unit: float) -> None:
    """Draws photo, overlay and words of a sample, or its towers' entries without these, under its label and score."""
    (choice,), (count, lines, columns) = sample.choices, _axes(sample, painter)
    cells = _cells(painter, choice)
    if len(cells) > _MANY:
        widths = [_COLUMNS * _SMALL, unit][: 1 + bool(sample.words)]
        maps, *rest = part.subfigures(1, len(widths), squeeze=False, width_ratios=widths)[0]
        _draw_sheet(maps, [((name or "").split(" of ")[0], view) for name, view in cells], painter)
        axes, words = [], [one.subplots() for one in rest]
    else:
        grid = part.add_gridspec(max(lines, 1), columns + bool(sample.words))
        axes = [part.add_subplot(grid[number // columns, number % columns]) for number in range(count)]
        words = [part.add_subplot(grid[:, -1])] if sample.words else []
    if choice.patches or sample.words:
        for axis in (*axes, *words):
            axis.set_axis_off()
    else:
        for axis, (name, values) in zip(axes, choice.relevancy.items(), strict=True):
            axis.stairs(values, fill=True, color=painter.cmap(0.5))
            axis.set_title(name, fontsize=9, parse_math=False)
    if choice.patches and axes:
        _draw_panels(part, axes, cells, choice, painter)
    if sample.words:
        draw_words(words[0], sample.words, choice.values, unit)
    size, _ = _sample_size(sample, painter, unit)
    set_title(part.suptitle("", fontsize=SIZE), sample.label, score_text(choice.score, choice.of), size)


def _draw_panels(
    part: Any, axes: Sequence[Any], cells: Sequence[tuple[str | None, list[Patch]]], choice: Choice, painter: Painter
) -> None:
    """Draws the maps of a choice and their photos, with one scale."""
    painter, low, high = painter.fitted(choice.patches)
    for axis, (name, patches) in zip(axes, cells, strict=True):
        if name is None:
            painter.photo(axis, patches)
        else:
            drawn = painter.overlay(axis, patches, low, high)
            axis.set_title(name, fontsize=9)
    if high > low:
        draw_bar(part, drawn.norm, painter.shades(low), axes, of=choice.patches)


def _answer_heights(sample: Sample, painter: Painter) -> list[float]:
    """Inches of an answer's parts: the lines of maps and the table of words, or a table per tower without these."""
    if not sample.choices:
        return [0.3]
    table, (lines, columns) = 0.9 + 0.22 * min(len(sample.choices), _MANY), _lines(sample, painter)
    if _is_sound(sample):
        return [table] * (1 + bool(sample.words))
    shape, width = painter.shape(sample.choices[0].patches), _COLUMNS * _SMALL / columns
    maps = [lines * (width * shape + (0.6 if columns == _COLUMNS else 0.2))] if lines else []
    return maps + [table] * (bool(sample.words) if lines or sample.words else len(sample.choices[0].relevancy))


def _lines(sample: Sample, painter: Painter) -> tuple[int, int]:
    """The number of lines of an answer's maps, and of maps in a line."""
    panels = sum(len(painter.panels(choice)) for choice in sample.choices)
    columns = _COLUMNS if len(sample.choices) <= _MANY else _SHEET
    return -(-(panels + (painter.images is not None)) // columns) if panels else 0, columns


def _draw_answer(part: Any, sample: Sample, painter: Painter) -> None:
    """Draws a map per word of the answer, and a table of the relevancy of its words for each other."""
    from matplotlib.ticker import MaxNLocator

    heights, (lines, columns) = _answer_heights(sample, painter), _lines(sample, painter)
    _, *parts = part.subfigures(1 + len(heights), 1, squeeze=False, height_ratios=[_TITLE, *heights])[:, 0]  # under the title
    if _is_sound(sample):  # a line of one table for each word, whose own scale it has
        (strips, *_), lines = zip(*(choice.patches for choice in sample.choices), strict=True), 1
        shown = [(patch.values / (painter.range([patch])[1] or 1.0)).clip(-1, 1) for patch in strips]
        axis = _draw_table(parts.pop(0), sample, np.concatenate(shown), [], painter.cmap)
        seconds = strips[0].seconds
        axis.images[0].set_extent((0, seconds, len(shown) - 0.5, -0.5))
        ticks = [tick for tick in MaxNLocator(10, steps=[1, 2, 5, 10]).tick_values(0, seconds) if tick <= seconds]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        scaled = "each word in parts of its largest value" if painter.shared is None else "in parts of the largest value"
        axis.set_xlabel(f"seconds; {scaled}", fontsize=8)
    elif lines:
        if columns == _COLUMNS:
            _draw_maps(parts.pop(0), sample, painter, lines)
        else:
            named = [(choice.label, maps) for choice in sample.choices for maps in painter.panels(choice)]
            _draw_sheet(parts.pop(0), named, painter, with_photo=True)
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
    text = score_text(sum(scores), sample.choices[0].of) if scores else ""
    set_title(part.suptitle("", fontsize=SIZE), sample.label, text, _COLUMNS * _SMALL)


def _is_sound(sample: Sample) -> bool:
    return any(patch.seconds is not None for choice in sample.choices for patch in choice.patches)


def _draw_maps(part: Any, sample: Sample, painter: Painter, lines: int) -> None:
    axes = part.subplots(lines, _COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    free = iter(axes)
    if painter.images is not None:
        painter.photo(next(free), painter.panels(sample.choices[0])[0])
    for choice in sample.choices:
        fitted, low, high = painter.fitted(choice.patches)
        for name, patches in painter.named(choice):
            axis = next(free)
            drawn = fitted.overlay(axis, patches, low, high)
            probability = "" if choice.score is None else f"p {exp(choice.score):.2g}"
            label = f"{choice.label} ({name})" if name else choice.label
            set_title(axis.set_title("", fontsize=9), label, probability, _SMALL)
            if high > low:
                draw_bar(part, drawn.norm, fitted.shades(low), [axis], location="bottom", of=choice.patches)


def _draw_sheet(part: Any, named: list[tuple[str, list[Patch]]], painter: Painter, with_photo: bool = False) -> None:
    """Draws many maps as one image with one scale, each under its name, after the photo by itself. An axis per map would
    take minutes."""
    from matplotlib.colors import Normalize
    from PIL import Image

    from vlattn_fast.interpret.result.figures.labels import Labels

    def smaller(image: Array) -> Array:
        size = _TILE, max(1, round(_TILE * min(2.0, image.shape[0] / image.shape[1])))
        return np.asarray(Image.fromarray(image).resize(size))

    def tile(patches: list[Patch]) -> Array:
        return np.asarray(painter.laid_over(patches, round(_TILE * max(1, painter.shape(patches)))))

    shown = [patch for _, maps in named for patch in maps]
    low, high = painter.range(shown)
    painter = replace(painter, images=each_once(painter.images, smaller), shared=(low, high))
    tiles = [(name, tile(maps)) for name, maps in named]
    if painter.images is not None and with_photo:
        photo = [Patch(patch.index, np.zeros((1, 1)), WHOLE) for patch in named[0][1][:1]]
        tiles.insert(0, ("", tile(photo)))
    gap, text = 6, 22
    height = max(len(pixels) for _, pixels in tiles) + text
    sheet = np.full((-(-len(tiles) // _SHEET) * height, _SHEET * (_TILE + gap), 3), 255, np.uint8)
    axis = part.subplots()
    axis.set_axis_off()
    labels = []
    for number, (label, pixels) in enumerate(tiles):
        y, x = number // _SHEET * height + text, number % _SHEET * (_TILE + gap)
        sheet[y : y + len(pixels), x : x + _TILE] = pixels
        labels.append((x, y - 3, label if len(label) <= 10 else label[:9] + "…"))
    axis.imshow(sheet, interpolation="nearest")
    axis.add_artist(Labels(labels, size=7))
    if high > low:
        draw_bar(part, Normalize(low, high), painter.shades(low), [axis], of=shown)


def _draw_table(part: Any, sample: Sample, values: Array, across: list[str], cmap: ListedColormap) -> Any:
    """Draws words of the answer (down) by the tokens they rest on (across); only some have names if there are many."""
    axis = part.subplots()
    low, high = scale_of(values)
    cmap = for_scale(cmap, low)
    drawn = axis.imshow(values, cmap=cmap, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    below, step = -(-len(across) // _NAMES) or 1, -(-len(sample.choices) // _MANY) or 1
    columns = axis.set_xticks(range(0, len(across), below), across[::below], rotation=90, fontsize=10)
    words = [choice.label for choice in sample.choices[::step]]
    lines = axis.set_yticks(range(0, len(sample.choices), step), words, fontsize=10)
    for tick in (*columns, *lines):
        tick.label1.set_parse_math(False)
    draw_bar(part, drawn.norm, cmap, [axis])
    return axis
