"""Formulas with exact truth: a seeded list, drawn by matplotlib's mathtext, with the box of each glyph in the picture.

Each symbol stands once in a formula. So a glyph's code says which symbol it is, and a symbol of an answer says which glyph it
names, in whatever order an answer has them.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

COUNT, SEED = 200, 0
HEIGHT, WIDTH, PATCH = 128, 512, 8  # pixels of the model's picture, and of its patches
SIZE, EDGE = 28, 10  # pixels: a drawn letter's font, and the white around a formula
FONTS = ("cm", "stix", "dejavuserif")
LETTERS = "abcdefghkmnpqrstuvxyz"  # without those that another glyph looks like
GREEK = ("alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "pi", "rho", "sigma", "tau", "psi", "omega")
KINDS = {  # L stands for a letter, D for a digit, G for a Greek letter
    "power": ("L^D+L=L", "L^{L+D}-L=D", "(L+L)^D=L", "L_D^D-L_L^D+L=L", "L^D+L^D-L=L^D", "L_D+L^L"),
    "fraction": (r"\frac{L+D}{L}", r"\frac{L}{D}+\frac{L}{L}=L", r"L=\frac{D}{L-L}", r"\frac{L^D-L}{L_D+L}=L"),
    "sum": (r"\sum_{L=D}^{L}L_L", r"\sum_{L=D}^{D}L^L+L", r"L-\sum_{L}L_L^D", r"\sum_{L=D}^{L}\frac{L}{L^D}"),
    "root": (r"\sqrt{L+L}=L", r"L^D-\sqrt{L}=D", r"\sqrt{L^D+L_D}", r"\frac{\sqrt{L}}{D}+L=L"),
    "Greek": ("G+G=G", "G^D-G_L=L", r"\frac{G+D}{G}=L", "G^D+L G-G_D=G"),
}
SYMBOLS = (*LETTERS, *"0123456789+-=()", *(f"\\{name}" for name in (*GREEK, "sum")))
STYLES = "left right displaystyle textstyle limits frac tfrac dfrac sqrt underset overset text hbox mathbin mathrel".split()
STYLES += "textbf textit textrm textsf mathbf mathit mathrm mathsf mathop boldsymbol boldmath nolimits footnotesize".split()
# of an answer, what names no glyph: where it is set, and how
LEFT_OUT = re.compile(
    r"\\(?:begin|end)\{[a-z]+\*?\}(?:\{[clr]+\})?|\\hspace\{\w+\}|\\[,;:!\[\] ]|[{}&$^_\s~]"
    r"|\\(?:" + "|".join(STYLES) + r")(?![A-Za-z])"
)


@dataclass(frozen=True)
class Formula:
    """The source of a formula, its place in the list, and the font of mathtext that draws it."""

    number: int
    kind: str
    font: str
    source: str

    @property
    def symbols(self) -> list[str]:
        return [symbol for symbol, _ in symbols(self.source)]


@dataclass(frozen=True)
class Drawing:
    """The picture (HEIGHT, WIDTH) of a formula, from 0 = black to 1 = white; the same without ink; and the box x0, y0, x1, y1 of
    each symbol's glyph in pixels, y from the top."""

    picture: np.ndarray[Any, Any]
    blank: np.ndarray[Any, Any]
    boxes: dict[str, tuple[float, float, float, float]]


def formulas(count: int = COUNT, seed: int = SEED) -> list[Formula]:
    """The list: kinds and fonts take turns, so that any first part of it has all of them."""
    draw, listed = random.Random(seed), []
    for number in range(count):
        kind = [*KINDS][number % len(KINDS)]
        pools = {"L": [*LETTERS], "D": [*"123456789"], "G": [f"\\{name} " for name in GREEK]}
        for pool in pools.values():
            draw.shuffle(pool)
        template = draw.choice(KINDS[kind])
        source = re.sub("[LDG]", lambda match, pools=pools: pools[match[0]].pop(), template)
        source = re.sub(" (?![A-Za-z])", "", source)  # a space ends a command where a letter follows
        listed.append(Formula(number, kind, FONTS[number // len(KINDS) % len(FONTS)], source))
    return listed


def symbols(text: str) -> list[tuple[str, int]]:
    """The symbols of LaTeX in its order, each with the index of the first character that tells which one it is: the one behind a
    backslash. Parts without a glyph are left out: braces, spaces, environments, fractions, styles."""
    kept = LEFT_OUT.sub(lambda match: " " * len(match[0]), text)
    return [(match[0], match.start() + (len(match[0]) > 1)) for match in re.finditer(r"\\[A-Za-z]+|\\.|\S", kept)]


def places(source: str, answer: str) -> dict[str, int] | None:
    """For each symbol of a source, the index of the character of an answer that names it; None unless the answer has each symbol
    once, and no other."""
    source_symbols, answer_symbols = symbols(source), symbols(answer)
    if sorted(symbol for symbol, _ in source_symbols) != sorted(symbol for symbol, _ in answer_symbols):
        return None
    indices = dict(answer_symbols)
    return {symbol: indices[symbol] for symbol, _ in source_symbols}


def draw(formula: Formula) -> Drawing:
    """Black on white, scaled and put on black as the model's package does with a picture."""
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path
    from PIL import Image

    known = codes(formula.font)
    glyphs, outlines, bars = _parsed(formula.source, formula.font)
    paths, names = [], []
    for code, x, y, scale in glyphs:
        vertices, kinds = outlines[code]
        paths.append(Path((np.asarray(vertices) * scale + [x, y]) * SIZE / 100, kinds))
        names.append(known.get(code))
    ink = [*paths, *(Path(np.asarray(vertices) * SIZE / 100, kinds) for vertices, kinds in bars)]
    extents = [path.get_extents() for path in ink]
    x0, y0 = min(box.x0 for box in extents) - EDGE, min(box.y0 for box in extents) - EDGE
    width = int(np.ceil(max(box.x1 for box in extents) + EDGE - x0))
    height = int(np.ceil(max(box.y1 for box in extents) + EDGE - y0))
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(x0, x0 + width), ylim=(y0, y0 + height))
    axes.axis("off")
    for path in ink:
        axes.add_patch(PathPatch(path, facecolor="black", linewidth=0))
    picture = Image.fromarray(_pixels(figure))
    canvas, left, top, scale_x, scale_y = _fitted(picture)
    blank, *_ = _fitted(Image.new("L", picture.size, 255))
    boxes = {}
    for symbol, path in zip(names, paths, strict=True):
        if symbol is not None:
            box = path.get_extents()
            xs = [left + (x - x0) * scale_x for x in (box.x0, box.x1)]
            ys = [top + (height - (y - y0)) * scale_y for y in (box.y1, box.y0)]
            if symbol in boxes:
                raise ValueError(f"each symbol must stand once in a formula; got {symbol!r} twice in {formula.source!r}")
            boxes[symbol] = (float(xs[0]), float(ys[0]), float(xs[1]), float(ys[1]))
    return Drawing(canvas, blank, {symbol: boxes[symbol] for symbol in formula.symbols})


@cache
def codes(font: str) -> dict[str, str]:
    """Which symbol a glyph is, by its code in a font: all symbols, each drawn by itself."""
    return {glyphs[0][0]: symbol for symbol in SYMBOLS for glyphs, _, _ in [_parsed(symbol, font)]}


def _parsed(source: str, font: str) -> tuple[Any, Any, Any]:
    """Glyphs as (code, x, y, scale), the outline of each code, and the outlines of bars; at 100 units for the font's size."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    return TextToPath().get_glyphs_mathtext(FontProperties(size=SIZE, math_fontfamily=font), f"${source}$")


def _pixels(figure: Any) -> np.ndarray[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., 0].copy()


def _fitted(picture: Any) -> tuple[np.ndarray[Any, Any], int, int, float, float]:
    """A grey picture scaled into WIDTH x HEIGHT, in the middle of black; where it begins; by how much each side grew."""
    from PIL import Image

    scale = min(WIDTH / picture.width, HEIGHT / picture.height)
    width, height = round(picture.width * scale), round(picture.height * scale)
    left, top = (WIDTH - width) // 2, (HEIGHT - height) // 2
    canvas = Image.new("L", (WIDTH, HEIGHT), 0)
    canvas.paste(picture.resize((width, height), Image.Resampling.BILINEAR), (left, top))
    return np.asarray(canvas, dtype=np.float32) / 255, left, top, width / picture.width, height / picture.height
