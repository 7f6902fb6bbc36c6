"""DigitScenes as `probe` takes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from vlattn_lab.processor import DIGIT_WORDS, RELATIONS
from vlattn_lab.scenes import batches, digit_scenes

_FIRST, _ARTICLE, _SECOND = 1, 4, 5  # columns of the input ids: [CLS] three left of a seven [SEP]


def probe_samples(count: int, *, seed: int = 0, batch: int = 50) -> Iterator[tuple[dict[str, Tensor], list[dict[str, Any]]]]:
    """`count` test scenes with true captions, in batches: (inputs, labels of each scene).

    phrases: the two digits that a caption names, the second with its article. relations: the regions of the two, in the order of
    the caption, and their relation. sentence: "first_digit", the word that a caption begins with.

    >>> inputs, (labels,) = next(probe_samples(1, seed=3))
    >>> sorted(labels), len(labels["phrases"])
    (['phrases', 'relations', 'sentence'], 2)
    """
    for part in batches(digit_scenes(count, seed=seed), batch):
        labels = []
        for caption, digits in zip(part.captions, part.digits.tolist(), strict=True):
            words = caption.split()
            first, second = (digits.index(DIGIT_WORDS.index(word)) for word in (words[0], words[-1]))
            relation = next(name for name in RELATIONS if name in caption)
            phrases = [((_FIRST, _FIRST + 1), first), ((_ARTICLE, _SECOND + 1), second)]
            sentence = {"first_digit": words[0]}
            labels.append({"phrases": phrases, "relations": [(first, second, relation)], "sentence": sentence})
        yield part.inputs(), labels
