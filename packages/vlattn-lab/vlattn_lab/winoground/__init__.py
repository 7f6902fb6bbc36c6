"""Text, image and group score on swapped pairs (Thrush et al., "Winoground", CVPR 2022), for any scoring function.

A pair is two images and two captions; caption 0 belongs to image 0, caption 1 to image 1. `python -m vlattn_lab.winoground`
scores a saved model of transformers on a local copy of Winoground.

In: a scoring function, pairs; the command: folders of Winoground and of a model.
Out: shares of pairs with right scores.
Imports: nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.interpret.evaluating.ties import rounding
from vlattn_fast.interpret.result.figures.photos import open_image

Pair = tuple[Sequence[Any], Sequence[Any]]
PairScore = Callable[[Any, Any], Any]  # a number, or a tensor of one
SCORES = ("text", "image", "group")


def evaluate(score: PairScore, pairs: Iterable[Pair]) -> dict[str, float]:
    """Shares of the pairs with right scores; a tie counts as wrong, and so do scores that only their rounding tells apart.

    - "text": each image scores higher with its caption (equation 1);
    - "image": each caption scores higher with its image (equation 2);
    - "group": both (equation 3). Chance is 1/4, 1/4 and 1/6.

    Args:
        score: (image, caption) -> a number, higher for a better fit. A tensor is rounded as its dtype is, a number as float32.
        pairs: (two images, two captions) each, such as `load_pairs` gives.

    Raises:
        ValueError: a pair of another form; no pairs; a score that is NaN.

    >>> evaluate(lambda image, caption: -abs(image - len(caption)), [((3, 5), ("cat", "camel")), ((1, 9), ("a", "a"))])
    {'text': 0.5, 'image': 0.5, 'group': 0.5}
    """
    return shares([judge(score, pair, number) for number, pair in enumerate(pairs, 1)])


def load_pairs(directory: str | Path) -> Iterator[Pair]:
    """The pairs of a local copy of Winoground, one by one: `examples.jsonl` and a folder `images` of PNG files.

    Each line has "image_0", "image_1" (names of files without ".png"), "caption_0" and "caption_1". Images come as PIL
    images, RGB.

    Raises:
        ValueError: a missing file, or a line of another form (the message names the line).
    """
    return (pair_of(directory, example) for example in read_examples(directory))


def judge(score: PairScore, pair: Pair, number: int) -> dict[str, bool]:
    """Whether each of the three scores counts the pair as right. `number` is the pair's, for errors."""
    images, captions = pair
    if len(images) != 2 or len(captions) != 2:
        raise ValueError(f"pairs must be of two images and two captions; got {len(images)} and {len(captions)}")
    (s00, s01), (s10, s11) = ([score(image, caption) for caption in captions] for image in images)
    if any(map(math.isnan, (s00, s01, s10, s11))):
        raise ValueError(f"score must give numbers that can be compared; got NaN in pair {number}")
    text, image = _larger(s00, s01) and _larger(s11, s10), _larger(s00, s10) and _larger(s11, s01)
    return {"text": text, "image": image, "group": text and image}


def shares(hits: Sequence[dict[str, bool]]) -> dict[str, float]:
    if not hits:
        raise ValueError("pairs must hold at least one pair; got none")
    return {name: sum(hit[name] for hit in hits) / len(hits) for name in SCORES}


def read_examples(directory: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of examples.jsonl, each with the names of two images and two captions."""
    lines = Path(directory) / "examples.jsonl"
    if not lines.is_file():
        raise ValueError(f"directory must hold examples.jsonl and images/; got {directory} without them")
    named = ("image_0", "image_1", "caption_0", "caption_1")
    # splitlines() would also split at characters within texts, such as U+2028
    for number, line in enumerate(lines.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except ValueError:
            example = None
        if not isinstance(example, dict) or not example.keys() >= set(named):
            must = "image_0, image_1, caption_0 and caption_1"
            raise ValueError(f"examples.jsonl must have {must} in line {number}; got {line[:80]!r}")
        yield example


def pair_of(directory: str | Path | None, example: dict[str, Any]) -> Pair:
    """Two images, or their names if no directory has them, and two captions."""
    images: list[Any] = [example[f"image_{i}"] for i in (0, 1)]
    if directory is not None:
        images = [open_image(Path(directory) / "images" / f"{name}.png") for name in images]
    return images, [example[f"caption_{i}"] for i in (0, 1)]


def _larger(one: Any, second: Any) -> bool:
    """Whether a score is larger than another by more than their rounding."""
    error = rounding(one.dtype if isinstance(one, Tensor) and one.is_floating_point() else torch.float32)
    a, b = float(one), float(second)
    return a > b and not a - b <= error * max(abs(a), abs(b))  # also where one is infinite
