"""One page with a thumbnail, the map and the words of each explanation of a data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from vlattn_fast._ground.extras import with_progress
from vlattn_fast.interpret.dataset.failures import summary
from vlattn_fast.interpret.result.explanation import Explanation
from vlattn_fast.interpret.result.figures.figure import Painter
from vlattn_fast.interpret.result.figures.multiples import Bar
from vlattn_fast.interpret.result.figures.page import Page, data_uri, fill_template
from vlattn_fast.interpret.result.figures.photos import open_image, read_boxes, read_images
from vlattn_fast.interpret.result.figures.scale import colors, limits
from vlattn_fast.interpret.result.numbers.choices import Patch, Sample, explained_as, read_samples, score_text, to_array

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

TEMPLATE = Path(__file__).parent / "templates" / "gallery.html"
SIDE = 240  # the longer side of a thumbnail, in pixels


class _Shown(NamedTuple):
    """A map as an image for a page, and its scale."""

    source: str
    bar: Bar


def gallery(explanations: Any, processor: Any, limit: int | None, title: str, cmap: str) -> Page:
    """See `Explanations.to_html`."""
    shown = explanations if limit is None else explanations[:limit]
    numbers = with_progress(range(len(shown)), "drawing")
    cards = [card for index in numbers for card in _cards(shown, index, processor, cmap)]
    counts = f"{len(shown)} of {len(explanations)} explanations, {len(explanations.failures)} failures"
    try:
        mean = _without_photo(explanations.mean_map(), cmap)
    except ValueError:  # no maps, or several grids
        mean = None
    return Page(
        fill_template(TEMPLATE, title=title, counts=counts, mean=mean, cards=cards, failures=summary(explanations.failures))
    )


def _cards(explanations: Any, index: int, processor: Any, cmap: str) -> Iterator[dict[str, Any]]:
    explanation, name = explanations[index], explanations.ids[index]
    photo, note = _photo(explanations.images[index]) if explanation.is_spatial else (None, "")
    for number, sample in enumerate(read_samples(explanation)):
        first = sample.choices[0] if sample.choices else None
        score = None if first is None or explanation.per_token else first.score
        try:
            shown = _thumbnail(explanation, sample, photo, processor, cmap)
        except ValueError as error:  # maps without a photo under them
            shown, note = _thumbnail(explanation, sample, None, None, cmap), str(error)
        yield {
            "name": name if len(explanation) == 1 else f"{name}, sample {number}",
            "scored": score_text(score, explained_as(explanation)),
            "map": shown,
            "words": _words(sample),
            "note": note,
        }


def _photo(path: str | None) -> tuple[PILImage | None, str]:
    """The photo that an input names, as a thumbnail; else None, and the reason."""
    if path is None:
        return None, "no path of a photo is stored"
    try:
        photo = open_image(path)
    except (OSError, ValueError) as error:
        return None, str(error)
    photo.thumbnail((SIDE, SIDE))
    return photo, ""


def _thumbnail(explanation: Explanation, sample: Sample, photo: PILImage | None, processor: Any, cmap: str) -> _Shown | None:
    """The first panel of a sample's maps, those of an answer's words added up, over its photo if there is one."""
    images = read_images(explanation, photo)
    if images is None and explanation.image is None:
        return None
    boxes = read_boxes(explanation, images, None, processor if images is not None else None)
    painter = Painter(images, boxes, colors(cmap), 0.85)
    panels = [drawn[0] for choice in sample.choices if (drawn := painter.panels(choice))]
    if not panels:
        return None
    total = [
        Patch(parts[0].index, np.sum([part.values for part in parts], 0), parts[0].box) for parts in zip(*panels, strict=True)
    ]
    return _shown(painter, total)


def _without_photo(values: Tensor, cmap: str) -> _Shown:
    """A map (h, w) without a photo."""
    return _shown(Painter(None, [(0.0, 0.0, 1.0, 1.0)], colors(cmap), 1.0), [Patch(0, to_array(values))])


def _shown(painter: Painter, patches: list[Patch]) -> _Shown:
    fitted, low, high = painter.fitted(patches)
    image = painter.laid_over(patches, SIDE)
    return _Shown(data_uri(image.save, "jpeg", quality=85), Bar(low, high, fitted.shades(low), patches))


def _words(sample: Sample) -> list[dict[str, Any]]:
    """The words of a sample, each with its share of the largest; maps of an answer's words are added up."""
    if not sample.choices or not sample.words:
        return []
    sums = np.sum([choice.values for choice in sample.choices], 0)
    largest = max(map(abs, limits(sums)), default=0.0)
    shares = np.nan_to_num(sums / largest).clip(0, 1) if largest else np.zeros_like(sums)
    return [
        {"text": word.text, "space": word.space, "share": f"{share:.2f}", "value": f"{value:.4g}"}
        for word, share, value in zip(sample.words, shares, sums, strict=True)
    ]
