"""Pictures of explanations of DigitScenes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._ground.extras import extra
from vlattn_fast.interpret import Explanation
from vlattn_fast.interpret.result.numbers.choices import Array
from vlattn_fast.lab.pointing import box_shares
from vlattn_fast.lab.processor import DIGIT_WORDS
from vlattn_fast.lab.questions import Questions
from vlattn_fast.lab.scenes import CANVAS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL, _GAP, _HEAD, _FOOT = 1.8, 0.14, 0.78, 0.3  # inches
_PIXELS = 256  # of a panel, both sides
_INK, _GREY, _FRAME = "#1a1a1a", "#7a7a7a", "#0a7d5e"


def answer_figure(explanation: Explanation, prompts: Questions, words: list[str], sample: int = 0) -> Figure:
    """The scene of a prompt, and a map over the scene for each word of the answer, each map with a separate scale. For a word
    that stands for a digit, the digit with the largest share of the map is framed."""
    with extra("viz"):
        from matplotlib.figure import Figure

    assert isinstance(explanation.image, Tensor) and explanation.scores is not None  # an answer about a scene has both
    maps, boxes = explanation.image[sample].double(), prompts.boxes[sample]
    ink = _smooth(prompts.images[sample].double())
    count = 1 + len(words)
    width, height = count * (_PANEL + _GAP) + _GAP, _HEAD + _PANEL + _FOOT
    figure = Figure(figsize=(width, height), facecolor="white")
    title = f"{prompts.questions[sample]}?"
    figure.text(_GAP / width, 1 - 0.22 / height, title, fontsize=15, color=_INK, va="center", weight="bold")
    for i in range(count):
        corner = (_GAP + i * (_PANEL + _GAP)) / width, _FOOT / height
        axis = figure.add_axes((*corner, _PANEL / width, _PANEL / height), xticks=[], yticks=[])
        axis.spines[:].set(color="#c8c8c8", linewidth=0.8)
        glow = torch.zeros_like(ink)
        if i:
            map_, score = maps[i - 1], float(explanation.scores[sample, i - 1].exp())
            glow = _smooth((map_ - map_.min()) / (map_.max() - map_.min()).clamp(min=1e-30))
            if words[i - 1] in DIGIT_WORDS:
                _frame(axis, boxes[int(box_shares(map_[None], boxes[None])[0].argmax())].tolist())
            axis.set_title(words[i - 1], fontsize=15, color=_INK, pad=5)
            axis.set_xlabel(f"p = {score:.2f}", fontsize=9, color=_GREY, labelpad=3)
        axis.imshow(_glowing(ink.numpy(), glow.numpy()), extent=(0, CANVAS, CANVAS, 0))
    _legend(figure, width, height)
    return figure


def _legend(figure: Figure, width: float, height: float) -> None:
    """The meaning of the colours, under the scene."""
    left, bottom, long, high = _GAP + 0.68, 0.12, 0.6, 0.1  # inches
    axis = figure.add_axes((left / width, bottom / height, long / width, high / height), xticks=[], yticks=[])
    axis.spines[:].set(color="#c8c8c8", linewidth=0.8)
    ramp = np.linspace(0, 1, 64)[None]
    axis.imshow(_glowing(np.zeros_like(ramp), ramp), aspect="auto")
    for x, text, side in ((left - 0.06, "relevancy", "right"), (left + long + 0.06, "largest", "left")):
        place = x / width, (bottom + high / 2) / height
        figure.text(*place, text, ha=side, va="center_baseline", fontsize=9, color=_GREY)


def _smooth(values: Tensor) -> Tensor:
    """(h, w) in [0, 1] -> (_PIXELS, _PIXELS)."""
    size = (_PIXELS, _PIXELS)
    return F.interpolate(values[None, None], size=size, mode="bicubic", align_corners=False)[0, 0].clamp(0, 1)


def _glowing(ink: Array, glow: Array) -> Array:
    """Dark ink on paper that is white where the map is low and glows where it is high: RGB in [0, 1]."""
    from matplotlib import colormaps

    paper = colormaps["YlOrRd"](0.85 * glow)[..., :3]
    strength = np.minimum(1, 2 * glow)[..., None]
    return (1 - strength + strength * paper) * (1 - 0.92 * ink[..., None])


def _frame(axis: Axes, box: list[float]) -> None:
    from matplotlib.patches import FancyBboxPatch

    x1, y1, x2, y2 = box
    style = "round,pad=0,rounding_size=1"
    axis.add_patch(FancyBboxPatch((x1, y1), x2 - x1, y2 - y1, boxstyle=style, fill=False, edgecolor=_FRAME, linewidth=2))
