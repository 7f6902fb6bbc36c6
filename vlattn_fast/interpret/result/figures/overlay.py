"""A photo under one map, as an image of the photo's size."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlattn_fast._ground.checks import check_integer, check_number
from vlattn_fast.interpret.result.figures.figure import Painter
from vlattn_fast.interpret.result.figures.photos import read_boxes, read_images
from vlattn_fast.interpret.result.figures.scale import check_scale, colors, limits
from vlattn_fast.interpret.result.numbers.choices import read_samples
from vlattn_fast.interpret.result.numbers.explained import Explained

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


def overlay(
    explanation: Explained,
    image: Any,
    number: int,
    word: int | None,
    panel: int,
    crop: Any,
    processor: Any,
    cmap: str,
    alpha: float,
    scale: str,
) -> PILImage:
    """See `Explanation.overlay`."""
    check_number("alpha", alpha, low=0, high=1)
    check_scale(scale)
    check_integer("sample", number, low=0, high=len(explanation) - 1)
    images = read_images(explanation, image, [number])
    if images is None:
        raise ValueError("image must be the photo under the map; got None")
    boxes = read_boxes(explanation, images, crop, processor)
    painter = Painter(images, boxes, colors(cmap), alpha, scale)
    (sample,) = read_samples(explanation, None, [number])
    if word is not None:
        if not explanation.per_token:
            raise ValueError(f"word must be None if the words of an answer have no maps; got {word}")
        check_integer("word", word, low=0, high=len(sample.choices) - 1)
    maps = [painter.panels(choice) for choice in (sample.choices if word is None else sample.choices[word : word + 1])]
    check_integer("panel", panel, low=0, high=len(maps[0]) - 1)
    patches = [
        replace(parts[0], values=sum(part.values for part in parts)) for parts in zip(*(one[panel] for one in maps), strict=True)
    ]
    shown = painter.laid_over(patches)
    shown.info |= {"scale": painter.range(patches), "range": limits(*(patch.values for patch in patches))}
    return shown
