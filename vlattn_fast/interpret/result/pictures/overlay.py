"""A photo under one map, as a picture of the photo's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vlattn_fast._ground.checks import check_integer, check_number
from vlattn_fast.interpret.result.numbers.choices import Patch, read_samples
from vlattn_fast.interpret.result.numbers.explained import Explained
from vlattn_fast.interpret.result.pictures.figure import Painter
from vlattn_fast.interpret.result.pictures.photos import read_boxes, read_pictures
from vlattn_fast.interpret.result.pictures.scale import colors, for_scale, limits

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


def overlay(
    explanation: Explained, image: Any, row: int, word: int | None, panel: int, crop: Any, processor: Any, cmap: str, alpha: float
) -> Picture:
    """See `Explanation.overlay`."""
    check_number("alpha", alpha, low=0, high=1)
    check_integer("row", row, low=0, high=len(explanation) - 1)
    pictures = read_pictures(explanation, image, [row])
    if pictures is None:
        raise ValueError("image must be the photo under the map; got None")
    boxes = read_boxes(explanation, pictures, crop, processor)
    painter = Painter(pictures, boxes, colors(cmap), alpha)
    (sample,) = read_samples(explanation, None, [row])
    if word is not None:
        if not explanation.each:
            raise ValueError(f"word must be None where no word of an answer has a map; got {word}")
        check_integer("word", word, low=0, high=len(sample.choices) - 1)
    maps = [painter.panels(choice) for choice in (sample.choices if word is None else sample.choices[word : word + 1])]
    check_integer("panel", panel, low=0, high=len(maps[0]) - 1)
    patches = [
        replace(parts[0], values=sum(part.values for part in parts)) for parts in zip(*(one[panel] for one in maps), strict=True)
    ]
    picture = laid_over(painter, patches)
    picture.info |= {"scale": painter.range(patches), "range": limits(*(patch.values for patch in patches))}
    return picture


def laid_over(painter: Painter, patches: Sequence[Patch], side: int = 0) -> Picture:
    """Maps over their picture, of its size; without a picture one map alone, whose longer side is `side` pixels."""
    from PIL import Image

    low, high = painter.range(patches)
    cmap = for_scale(painter.cmap, low)
    photo = painter.picture([*patches])
    if photo is None:
        rows, columns = patches[0].values.shape
        scale = side / max(rows, columns)
        size = max(1, round(columns * scale)), max(1, round(rows * scale))
        share = painter.placed(patches[0], low, high)[1]
        cells = np.rint(255 * cmap(share)[..., :3]).astype(np.uint8)
        return Image.fromarray(cells).resize(size, Image.Resampling.NEAREST)
    shown = Image.alpha_composite(Image.new("RGBA", photo.shape[1::-1], "white"), Image.fromarray(photo).convert("RGBA"))
    for patch in patches:
        (x1, y1, x2, y2), share, _ = painter.placed(patch, low, high)
        left, top, right, bottom = (
            round(x1 * shown.width),
            round(y1 * shown.height),
            round(x2 * shown.width),
            round(y2 * shown.height),
        )
        size = max(1, right - left), max(1, bottom - top)
        large = np.asarray(Image.fromarray(share.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)).clip(0, 1)
        colored = cmap(large)
        colored[..., 3] = painter.opacity(large, low)
        layer = Image.new("RGBA", shown.size)
        layer.paste(Image.fromarray(np.rint(255 * colored).astype(np.uint8)), (left, top))
        shown = Image.alpha_composite(shown, layer)
    return shown.convert("RGB")
