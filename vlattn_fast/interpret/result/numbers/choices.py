"""The samples of an Explanation for figures and tables, each with one `Choice`, or one per word of an answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_integer, check_items, describe
from vlattn_fast.interpret.result.numbers.explained import Explained, difference
from vlattn_fast.interpret.result.numbers.words import Marks, Word, find_marks, join_tokens

Array = np.ndarray[Any, Any]
Box = tuple[float, float, float, float]
Maps = Tensor | tuple[Tensor, ...]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Patch:
    """Values on a part of an image."""

    index: int  # the number of the map among all maps, or of the sample for regions
    values: Array  # (h, w), evenly over `box`; (1, 1) for a region
    box: Box | None = None  # x1, y1, x2, y2 relative to the image; None = the caller's crop
    seconds: float | None = None  # the length of the sound under a strip; None = it is a map of an image


@dataclass(frozen=True)
class Choice:
    """Relevancy for one sample, or for one word of its answer; entries of a word are sums over its tokens."""

    sample: int  # its number in the batch
    label: str  # the sample's text, class or the answer's word
    space: bool  # whether a space stands before the label
    score: float | None  # the explained score
    of: str | None  # what the score is, see `Explanation`
    patches: list[Patch]  # maps and regions
    towers: dict[str, list[Patch]]  # other maps, by tower
    values: Array  # one per word of `Sample.words`
    relevancy: dict[str, Array]  # tower -> its relevancy vector, without what the explained positions give themselves
    at_position: dict[str, float]  # tower -> the sum of that, if known


@dataclass(frozen=True)
class Sample:
    """One sample of the batch."""

    label: str  # its name, text, class or number, without an answer whose words are the choices
    prompt: list[Word]
    answer: list[Word]
    words: list[Word]  # of `prompt` and `answer`, those that have values
    choices: list[Choice]  # the sample itself, or the words of its answer if it is explained per token


def chosen_numbers(samples: Any, count: int) -> list[int] | None:
    """The samples to draw, of `count`; None = all."""
    if samples is None:
        return None
    check_items("samples", samples, "numbers from 0")
    numbers = list(samples)
    for number in numbers:
        check_integer("samples", number)
        if not 0 <= number < count:
            raise ValueError(f"samples must be from 0 to {count - 1}; got {number}")
    return numbers


def read_samples(explanation: Explained, labels: Any = None, numbers: Sequence[int] | None = None) -> list[Sample]:
    """The samples of an explanation, all or some, named by their text or class, or by `labels` for the whole batch."""
    if labels is not None:
        check_items("labels", labels, "a name for each sample")
        if isinstance(labels, (Set, Mapping, bytes)) or not hasattr(labels, "__len__"):  # without an order, or read only once
            raise TypeError(f"labels must be a name for each sample; got {describe(labels)}")
        labels = [str(label.item() if isinstance(label, Tensor) and label.ndim == 0 else label) for label in labels]
        if len(labels) != len(explanation):
            raise ValueError(f"labels must be {len(explanation)}, one per sample; got {len(labels)}")
    tokens, answers = explanation.tokens, explanation.answer_tokens
    if tokens is None and explanation.text is not None and answers is None:  # the entries have no names
        tokens = [[str(place) for place in range(explanation.text.shape[-1])]] * len(explanation)
    marks = find_marks(token for sample in tokens or [] for token in sample)
    shown = explanation.text is not None or explanation.per_token
    samples = []
    for number in range(len(explanation)) if numbers is None else numbers:
        end = None if answers is None else answers[number]
        prompt, answer = _join(tokens[number], end, marks) if tokens is not None and shown else ([], [])
        label = _label(explanation, number, prompt, answer) if labels is None else labels[number]
        words = [] if explanation.text is None else [*prompt, *answer]
        answered = None
        if explanation.per_token and end is not None:
            answered = join_tokens(end, marks) if tokens is None else _shifted(answer, len(end) - len(tokens[number]))
        samples.append(Sample(label, prompt, answer, words, _choices(explanation, number, label, words, answered)))
    return samples


def _join(tokens: list[str], answer: list[str] | None, marks: Marks) -> tuple[list[Word], list[Word]]:
    """The words of a prompt, and the words of the answer after the prompt."""
    if answer is None:
        return join_tokens(tokens, marks), []
    split = len(tokens) - len(answer)
    answered = _shifted(join_tokens(tokens[split:], marks), split)
    answered[:1] = [replace(word, space=True) for word in answered[:1]]
    return join_tokens(tokens[:split], marks), answered


def score_text(score: float | None, of: str | None) -> str:
    """How a score is shown, by what it is; a log-probability also as a probability."""
    if score is None:
        return ""
    if of == "log_probability":
        return f"log-probability {score:.4g} (p {math.exp(score):.2g})"
    return f"{of or 'score'} {score:.4g}"


def explained_as(explanation: Explained) -> str | None:
    """The kind of the scores; those of answers that were stored without it are log-probabilities."""
    return explanation.of or (None if explanation.answer is None else "log_probability")


def _shifted(words: list[Word], by: int) -> list[Word]:
    return [replace(word, tokens=range(word.tokens.start + by, word.tokens.stop + by)) for word in words]


def _label(explanation: Explained, number: int, prompt: list[Word], answer: list[Word]) -> str:
    words = prompt if explanation.per_token and explanation.text is not None else [*prompt, *answer]
    text = "".join(" " * word.space + word.text for word in words).strip()
    if text:
        return text if len(text) <= 80 else text[:79] + "…"
    return f"sample {number}" if explanation.target is None else f"target {explanation.target[number]}"


def times(count: int, seconds: float) -> list[str]:
    """The middles of `count` equal stretches of a sound."""
    return [f"{(number + 0.5) * seconds / count:.2f} s" for number in range(count)]


def to_array(tensor: Tensor) -> Array:
    """A tensor as NumPy's float32; a float64 tensor as float64."""
    tensor = tensor.detach().cpu()
    return (tensor if tensor.dtype.itemsize > 4 else tensor.float()).numpy()


def _choices(explanation: Explained, number: int, label: str, words: list[Word], answer: list[Word] | None) -> list[Choice]:
    """The choices of a sample, with the entries of its text added up to `words`.

    Args:
        answer: the words of the sample's answer, with tokens counted from the answer's first; None = the sample is one choice.
    """
    ranges = None if answer is None else [word.tokens for word in answer]
    count = 1 if ranges is None else len(ranges)

    def pick(values: Tensor) -> Array:
        """Values (T, ...) of the sample's tokens added up to (choices, ...); values (...) of a single choice as (1, ...)."""
        return to_array(values)[None] if ranges is None else _sums(to_array(values), ranges, 0)

    def means(values: Array) -> Array:
        """The means (choices,) of the entries (T,) of the sample's tokens, or of its one or several entries."""
        if ranges is None or values.ndim == 0:
            return np.full(count, values.mean())
        return _sums(values, ranges, 0) / [len(part) for part in ranges]

    def patches_of(maps: Maps | None) -> list[Patch]:
        lengths = explanation.seconds
        listed = maps_of(explanation, maps, number)
        return [Patch(i, pick(part), seconds=None if lengths is None else lengths[i]) for i, part in listed]

    relevancy = {name: pick(explanation.without_self(name, number)) for name in explanation.relevancy}
    at_position = {
        name: means(to_array(difference(values[number], explanation.without_self(name, number)).sum(-1)))
        for name, values in explanation.relevancy.items()
        if name in explanation.explained_towers and len(values) == len(explanation)
    }
    text = torch.zeros(0) if explanation.text is None else explanation.text[number]
    values = _sums(pick(text), [word.tokens for word in words], 1) if words else np.zeros((count, 0))
    scores = None if explanation.scores is None else pick(explanation.scores[number]).reshape(count, -1).sum(1)
    patches = patches_of(explanation.image)
    if explanation.regions is not None and explanation.boxes is not None:
        regions, boxes = pick(explanation.regions[number]), to_array(explanation.boxes[number]).tolist()
        patches += [Patch(number, regions[:, i].reshape(-1, 1, 1), tuple(box)) for i, box in enumerate(boxes)]
    towers = {name: patches_of(maps) for name, maps in (explanation.tower_images or {}).items()}

    def of(choice: int, parts: list[Patch]) -> list[Patch]:
        return [replace(part, values=part.values[choice]) for part in parts]

    return [
        Choice(
            sample=number,
            label=label if answer is None else answer[i].text,
            space=answer is None or answer[i].space,
            score=None if scores is None else float(scores[i]),
            of=explained_as(explanation),
            patches=of(i, patches),
            towers={name: of(i, parts) for name, parts in towers.items()},
            values=values[i],
            relevancy={name: part[i] for name, part in relevancy.items()},
            at_position={name: float(part[i]) for name, part in at_position.items()},
        )
        for i in range(count)
    ]


def _sums(values: Array, ranges: Sequence[range], axis: int) -> Array:
    """Sums of the entries along an axis over consecutive ranges."""
    if not ranges:
        return np.zeros((*values.shape[:axis], 0, *values.shape[axis + 1 :]), values.dtype)
    values = np.take(values, range(ranges[-1].stop), axis)  # the rest is padding for longer texts
    return np.add.reduceat(values, [part.start for part in ranges], axis)


def home(explanation: Explained, *names: str) -> str:
    """The tower of a part: the first of the names that the explanation has, or its first tower."""
    return next((name for name in names if name in explanation.relevancy), next(iter(explanation.relevancy)))


def maps_of(explanation: Explained, maps: Maps | None, sample: int) -> list[tuple[int, Tensor]]:
    """The maps (h, w) or (T, h, w) of a sample, each with its number."""
    if maps is None or explanation.image_samples is None:
        return []
    return [(i, part) for i, (part, owner) in enumerate(zip(maps, explanation.image_samples, strict=True)) if owner == sample]


def panels(patches: Sequence[Patch], images: Sequence[Array] | None, crops: Sequence[Box]) -> list[list[Patch]]:
    """Patches by panel: regions of one image share it, and so do maps whose crops do not overlap."""
    shown: list[tuple[int, list[Patch]]] = []
    for patch in patches:
        number = image_number(patch, images)
        for of, panel in shown:
            apart = patch.box is not None or not any(_overlap(crops[patch.index], crops[one.index]) for one in panel)
            if of == number and (panel[0].box is None) == (patch.box is None) and apart:
                panel.append(patch)
                break
        else:
            shown.append((number, [patch]))
    return [panel for _, panel in shown]


def _overlap(one: Box, two: Box) -> bool:
    """Whether two crops share more than an edge, which rounding may move."""
    across, down = (min(one[i + 2], two[i + 2]) - max(one[i], two[i]) for i in (0, 1))
    return across > 1e-3 and down > 1e-3


def image_number(patch: Patch, images: Sequence[Array] | None) -> int:
    """The number of the image under a patch, 0 if there is one or none; the first of those that are the same."""
    if images is None or len(images) == 1:
        return 0
    return next(number for number, image in enumerate(images) if image is images[patch.index])
