"""A formula, and the map of each of its glyphs: the picture of docs/experiments/real.md."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tools.real.formulas import PATCH
from tools.real.reading import BOTH, PLAIN, Reader, Reading, Rule, relevancy

SHOWN = {"gradient": Rule("gradient", PLAIN, "logit"), "norms, attention\nheld fixed": Rule("gradient", BOTH, "logit")}


def picture(reader: Reader, reading: Reading, rules: dict[str, Rule] = SHOWN) -> Figure:
    """A line for each rule, and a column for each glyph, whose box is green: ink in black, and the map over it in red."""
    boxes = reading.drawing.boxes
    columns = np.where(reading.drawing.blank[reading.drawing.blank.shape[0] // 2] > 0)[0]
    figure = Figure(figsize=(1.7 * len(boxes), 0.75 * len(rules)))
    axes = figure.subplots(len(rules), len(boxes), squeeze=False)
    for (title, rule), line in zip(rules.items(), axes, strict=True):
        for (symbol, box), axis in zip(boxes.items(), line, strict=True):
            values = relevancy(reader, reading, symbol, rule).clamp(min=0).numpy()
            axis.imshow(alight(reading.drawing.picture, values))
            axis.add_patch(Rectangle(box[:2], box[2] - box[0], box[3] - box[1], fill=False, edgecolor="green"))
            axis.set(xlim=(columns[0], columns[-1] + 1), xticks=[], yticks=[])
        line[0].set_ylabel(title, fontsize=7)
    figure.subplots_adjust(0.05, 0, 1, 1, wspace=0.03, hspace=0.03)
    return figure


def alight(grey: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A grey picture (H, W) as RGB, whose paper is red where the map (h, w) is large: full red at its largest entry."""
    share = np.kron(values / max(values.max(), 1e-30), np.ones((PATCH, PATCH)))
    paper = np.stack([grey, grey * (1 - share), grey * (1 - share)], -1)
    return (255 * paper).astype(np.uint8)
