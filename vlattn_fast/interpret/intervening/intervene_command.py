"""One input of `vlattn intervene`: a model's answer without and with edits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vlattn_fast.interpret.adapters.registry import find_adapter
from vlattn_fast.interpret.explaining.answer import EmptyAnswer, with_prompts
from vlattn_fast.interpret.explaining.loading import build_inputs, generate, on_device
from vlattn_fast.interpret.intervening.asking import Asked
from vlattn_fast.interpret.intervening.edits import EdgeEdit, HeadEdit, Knockout, ScaleHeads
from vlattn_fast.interpret.intervening.intervene import intervene
from vlattn_fast.interpret.intervening.plans import Plans
from vlattn_fast.interpret.intervening.token_sets import NAMES, is_name
from vlattn_fast.interpret.result.figures.photos import open_image

_CUT = re.compile(r"([^>]+)->([^:>]+)(?::([^:]+))?(?::([^:]+))?$")
_BOX = re.compile(r"(image(?::\d+)?)\[(.+)\]$")
_SPAN = re.compile(r"(-?\d+)(?:-(-?\d+))?$")


def cut_of(text: str, tower: str | None) -> Knockout:
    """The knockout of "image->last", "image[0,0,.5,1]->last:10-15" or "image->last:10-15:0,3": keys, queries, layers, heads."""
    names, match = (*NAMES, "all"), _CUT.match(text)
    try:
        if match is None:
            raise ValueError
        keys, queries, *numbers = match.groups()
        groups = {"keys": _group(keys), "queries": _group(queries)}
        layers, heads = (None if each is None else _numbers(each) for each in numbers)
    except ValueError:
        form = f'"KEYS->QUERIES[:LAYERS[:HEADS]]" in quotes, e.g. "image->last:10-15", with names among {", ".join(names)}, or '
        form += "a box image[x1,y1,x2,y2]"
        first, second, *rest = [*text.split(":"), ""]
        if first in names and second in names:  # the order in which one says "A attends to B"
            form += f'; information flows from keys to queries: "{":".join([f"{second}->{first}", *rest]).rstrip(":")}"'
        raise ValueError(f"cut must be {form}; got {text!r}") from None
    return Knockout(**groups, layers=layers, heads=heads, tower=tower)


def _group(text: str) -> Any:
    """The group of "image" or "image[x1,y1,x2,y2]"; None for all tokens. ValueError for other texts."""
    if (box := _BOX.match(text)) is not None:
        return box[1], tuple(float(number) for number in box[2].split(","))
    if text != "all" and not is_name(text):
        raise ValueError
    return None if text == "all" else text


def scale_of(text: str, tower: str | None) -> ScaleHeads:
    """The edit of "14:3,7:0", heads 3 and 7 of layer 14 times 0."""
    parts = text.split(":")
    try:
        layer, heads, factor = parts
        return ScaleHeads({int(layer): _numbers(heads)}, float(factor), tower=tower)
    except ValueError:
        raise ValueError(f"scale must be LAYER:HEADS:FACTOR, e.g. 14:3,7:0; got {text!r}") from None


def _numbers(text: str) -> list[int]:
    """ "10-12,15" as 10, 11, 12 and 15, "-2--1" as the last two. ValueError for other texts, and spans without a number."""
    numbers = list[int]()
    for part in text.split(","):
        if (span := _SPAN.match(part)) is None:
            raise ValueError(f"numbers must be like 10-12,15; got {text!r}")
        start, stop = int(span[1]), int(span[2] or span[1])
        if stop < start or start < 0 <= stop:
            raise ValueError(f"numbers must rise in a span; got {part!r}")
        numbers += range(start, stop + 1)
    return numbers


def intervene_one(
    model: Any,
    processor: Any,
    edits: Sequence[EdgeEdit | HeadEdit],
    image: Path | None = None,
    texts: Sequence[str] = (),
    count: int = 20,
) -> Iterator[str]:
    """Yields lines that compare a model's answer to an image, texts, or both, without and with edits: a decoder's answer of at
    most `count` tokens, else the scores."""
    if image is None and not texts:
        raise ValueError("image or --text must be given, or both, depending on the model; got neither")
    inputs = on_device(build_inputs(model, processor, None if image is None else open_image(image), texts), model)
    adapter, how = find_adapter(model), {"processor": processor, "tower": None}
    with torch.no_grad():
        if adapter is not None and adapter.scoring.predicts:
            answer = generate(model, inputs, count)
            with intervene(model, inputs, edits):
                edited = generated(model, inputs, count)
            asked = Asked.check(model, inputs, target=None, answer=with_prompts(answer, inputs, adapter), **how)
            chances = [float(asked.probabilities(asked.run(Plans(asked.traced, each)))[0]) for each in ((), edits)]
            yield f"unedited: {processor.decode(answer[0])!r}, probability {chances[0]:.4g}, with the edits {chances[1]:.4g}"
            yield f"edited:   {'nothing' if edited is None else repr(processor.decode(edited[0]))}"
            return
        asked = Asked.check(model, inputs, target=None, answer=None, **how)
        scores, target = asked.scores(asked.run(Plans(asked.traced)))
        again = asked.repeated(1, target)
        edited_scores, _ = again.scores(again.run(Plans(asked.traced, edits)))
        for number, (before, after) in enumerate(zip(scores.tolist(), edited_scores.tolist(), strict=True)):
            aim = f" (target {target[number]})" if isinstance(target, list) else ""
            yield f"score {number}: {before:.6g} unedited, {after:.6g} edited{aim}"


def generated(model: Any, inputs: Any, count: int) -> list[list[int]] | None:
    """A decoder's answers; None if one ends at once."""
    try:
        return generate(model, inputs, count)
    except EmptyAnswer:
        return None
