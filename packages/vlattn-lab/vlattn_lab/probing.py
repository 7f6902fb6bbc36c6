"""DigitScenes as `probe` takes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from vlattn_lab.processor import DIGIT_WORDS, RELATIONS, DigitProcessor
from vlattn_lab.scenes import batches, digit_scenes

_FIRST, _ARTICLE, _SECOND = 1, 4, 5  # columns of the input ids: [CLS] three left of a seven [SEP]
# What captions say of a relation, in its two parts; any other pair is in no caption.
_PARTS = [tuple(relation.split()) for relation in RELATIONS]
_WORD_RELATIONS = {
    "subject": ((1, 2), (2, 4)),
    "object": ((2, 4), (5, 6)),
    "article": ((4, 5), (5, 6)),
    "relation": ((2, 3), (3, 4)),
}


def probe_samples(count: int, *, seed: int = 0, batch: int = 50) -> Iterator[tuple[dict[str, Tensor], list[dict[str, Any]]]]:
    """`count` test scenes with true captions, in batches: (inputs, labels of each scene).

    phrases: the two digits that a caption names, the second with its article; their class is the digit. relations: the regions of
    the two, in the order of the caption, and their relation. word_relations: subject and relation, relation and object, article
    and object, the two words of the relation. sentence: "first_digit", the word that a caption begins with. variants:
    "inverted", the caption with its digits exchanged, which is false of the scene; "odd_word", the caption with one word of the
    relation replaced, so that no caption has the two words together.

    >>> inputs, (labels,) = next(probe_samples(1, seed=3))
    >>> sorted(labels), len(labels["phrases"])
    (['phrases', 'relations', 'sentence', 'variants', 'word_relations'], 2)
    """
    random, processor = np.random.default_rng(seed), DigitProcessor()
    for part in batches(digit_scenes(count, seed=seed), batch):
        labels = []
        for caption, digits in zip(part.captions, part.digits.tolist(), strict=True):
            words = caption.split()
            first, second = (digits.index(DIGIT_WORDS.index(word)) for word in (words[0], words[-1]))
            relation = next(name for name in RELATIONS if name in caption)
            changed = {
                "inverted": [words[-1], *words[1:-1], words[0]],
                "odd_word": [words[0], *_odd((words[1], words[2]), random), *words[3:]],
            }
            labels.append(
                {
                    "phrases": [((_FIRST, _FIRST + 1), first, words[0]), ((_ARTICLE, _SECOND + 1), second, words[-1])],
                    "relations": [(first, second, relation)],
                    "word_relations": [(one, two, name) for name, (one, two) in _WORD_RELATIONS.items()],
                    "sentence": {"first_digit": words[0]},
                    "variants": {
                        task: processor.words([" ".join(text)])["input_ids"][0].tolist() for task, text in changed.items()
                    },
                }
            )
        yield part.inputs(), labels


def _odd(relation: tuple[str, str], random: np.random.Generator) -> tuple[str, str]:
    """The relation with one word replaced by one that stands in its place in other relations, but never with the other word."""
    heads, tails = (sorted({one[part] for one in _PARTS}) for part in (0, 1))
    odd = [
        one for one in itertools.product(heads, tails) if one not in _PARTS and (one[0] == relation[0]) != (one[1] == relation[1])
    ]
    return odd[int(random.integers(len(odd)))]
