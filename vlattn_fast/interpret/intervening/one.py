"""One input of `vlattn intervene`: what a model says as it is, and with edits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vlattn_fast.interpret.explaining.answer import Alone
from vlattn_fast.interpret.explaining.loading import build_inputs, generate, on_device
from vlattn_fast.interpret.intervening.asking import Asked
from vlattn_fast.interpret.intervening.edits import EdgeEdit, HeadEdit, Knockout, ScaleHeads
from vlattn_fast.interpret.intervening.intervene import intervene
from vlattn_fast.interpret.intervening.plans import Plans
from vlattn_fast.interpret.intervening.token_sets import NAMES
from vlattn_fast.interpret.records.registry import find_family
from vlattn_fast.interpret.result.pictures.photos import open_image

_NUMBERS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*$")


def cut_of(text: str, tower: str | None) -> Knockout:
    """The knockout of "last:image", "last:image:10-15" or "last:image:10-15:0,3": queries, keys, layers and heads."""
    queries, _, rest = text.partition(":")
    keys, *numbers = rest.split(":")
    known = (*NAMES, "all")
    if queries not in known or keys not in known or len(numbers) > 2 or not all(map(_NUMBERS.match, numbers)):
        raise ValueError(
            f"cut must be QUERIES:KEYS[:LAYERS[:HEADS]], as last:image:10-15, with names among {', '.join(known)}; got {text!r}"
        )
    layers, heads = ([_numbers(each) for each in numbers] + [None, None])[:2]
    sides = (None if name == "all" else name for name in (queries, keys))
    return Knockout(**dict(zip(("queries", "keys"), sides, strict=True)), layers=layers, heads=heads, tower=tower)


def scale_of(text: str, tower: str | None) -> ScaleHeads:
    """The edit of "14:3,7:0", heads 3 and 7 of layer 14 times 0."""
    parts = text.split(":")
    try:
        layer, heads, factor = parts
        return ScaleHeads({int(layer): _numbers(heads)}, float(factor), tower=tower)
    except ValueError:
        raise ValueError(f"scale must be LAYER:HEADS:FACTOR, as 14:3,7:0; got {text!r}") from None


def _numbers(text: str) -> list[int]:
    """ "10-12,15" as 10, 11, 12 and 15."""
    spans = ([int(end) for end in part.split("-")] for part in text.split(","))
    return [number for span in spans for number in range(span[0], span[-1] + 1)]


def intervene_one(
    model: Any,
    processor: Any,
    edits: Sequence[EdgeEdit | HeadEdit],
    image: Path | None = None,
    texts: Sequence[str] = (),
    count: int = 20,
) -> Iterator[str]:
    """Lines that compare what a model says of a picture, of texts, or of both, as it is and with edits: a decoder's answer of at
    most `count` tokens, else its scores."""
    if image is None and not texts:
        raise ValueError("image or --text must be given, or both, as the model takes them")
    inputs = on_device(build_inputs(model, processor, None if image is None else open_image(image), texts), model)
    record, how = find_family(model), {"tokenizer": None, "processor": processor, "like": None, "tower": None}
    with torch.no_grad():
        if record is not None and record.scoring.predicts:
            answer = generate(model, inputs, count)
            with intervene(model, inputs, edits):
                edited = generated(model, inputs, count)
            asked = Asked.check(model, inputs, target=None, answer=answer, **how)
            chances = [float(asked.probabilities(asked.run(Plans(asked.seen, each)))[0]) for each in ((), edits)]
            yield f"as it is: {processor.decode(answer[0])!r}, probability {chances[0]:.4g}, with the edits {chances[1]:.4g}"
            yield f"edited:   {'nothing' if edited is None else repr(processor.decode(edited[0]))}"
            return
        asked = Asked.check(model, inputs, target=None, answer=None, **how)
        scores, target = asked.scores(asked.run(Plans(asked.seen)))
        again = asked.repeated(1, target)
        edited_scores, _ = again.scores(again.run(Plans(asked.seen, edits)))
        for number, (before, after) in enumerate(zip(scores.tolist(), edited_scores.tolist(), strict=True)):
            aim = f" (target {target[number]})" if isinstance(target, list) else ""
            yield f"score {number}: {before:.6g} as it is, {after:.6g} edited{aim}"


def generated(model: Any, inputs: Any, count: int) -> Alone | None:
    """A decoder's answers; None where one ends at once."""
    try:
        return generate(model, inputs, count)
    except ValueError as error:
        if "end of the text" not in str(error):
            raise
        return None
