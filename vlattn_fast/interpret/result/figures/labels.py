"""Words on a figure of many maps; this file imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import rcParams
from matplotlib.artist import Artist
from matplotlib.font_manager import FontProperties


class Labels(Artist):
    """Words (x, y, word), each on a line of its own after its point in data coordinates, in letters of `size` points. A Text per
    word would be laid out anew for each drawing."""

    def __init__(self, labels: Sequence[tuple[float, float, str]], size: float) -> None:
        super().__init__()
        self.labels, self._font, self._color = labels, FontProperties(size=size), rcParams["text.color"]
        self.set_in_layout(False)

    def draw(self, renderer: Any) -> None:
        context = renderer.new_gc()
        context.set_foreground(self._color)
        height, axes = renderer.get_canvas_width_height()[1], self.axes
        assert axes is not None
        for x, y, word in (label for label in self.labels if label[2] and self.get_visible()):
            right, up = axes.transData.transform((x, y))
            renderer.draw_text(context, right, height - up if renderer.flipy() else up, word, self._font, 0)
        context.restore()
