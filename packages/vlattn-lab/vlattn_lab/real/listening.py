"""A model that writes down what it hears: each token of its answer explained, and the maps compared with the time of its word.

`vlattn_lab.speech` loads the model, `voice` speaks: a sentence counts if the model writes all of its words, and no other. Rows
are plain numbers, names and lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vlattn_fast as va
from vlattn_lab.real.reading import Kept
from vlattn_lab.real.voice import RATE, SENTENCES, Speech, spoken, spoken_by
from vlattn_lab.speech import NO_TIMESTAMPS, START

COUNT = 12  # right sentences of each voice
STEP, MARGIN = 0.02, 0.1  # seconds of a position of the encoder, and around a word
FEW = 6  # sentences of a rule that takes minutes for each
RULES = [  # by what a run that is stopped should have; and the number of sentences
    *((method, 2 * COUNT) for method in (va.methods.Gradient(), va.methods.Attention(), va.methods.Rollout())),
    (va.methods.Rollout(one_hot=True), 2 * COUNT),
    *((va.methods.Weighted(sinks=mode), FEW) for mode in ("keep", "remove")),
    *((method, 2 * COUNT) for method in (va.methods.GradCam(), va.methods.Attention(sinks="remove"))),
    (va.methods.Rollout(sinks="remove"), 2 * COUNT),
    (va.methods.InputGradient(), FEW),
    *((va.methods.Gradient(**options), FEW) for options in ({"freeze": ()}, {"of": "logit"}, {"sinks": "remove"})),
]
Row = dict[str, Any]


@dataclass(frozen=True)
class Listener:
    model: Any
    processor: Any

    def inputs(self, speech: Speech) -> dict[str, Tensor]:
        return dict(self.processor(speech.wave, sampling_rate=RATE, return_tensors="pt"))

    @torch.no_grad()
    def answer(self, speech: Speech) -> list[int]:
        """The ids of what the model writes, without those that begin and end."""
        (ids,) = self.model.generate(**self.inputs(speech)).tolist()
        return [one for one in ids if one < self.model.config.eos_token_id]

    def words(self, ids: Sequence[int]) -> list[int | None]:
        """For each token the number of its word; None = punctuation."""
        numbers, word = list[int | None](), -1
        for text in self.processor.tokenizer.convert_ids_to_tokens(ids):
            word += text.startswith("Ġ")
            numbers.append(word if re.search(r"\w", text.removeprefix("Ġ")) else None)
        return numbers


def plain(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def heard(listener: Listener, number: int) -> Row:
    """The model's answer to a sentence, and the seconds between which each word is spoken."""
    speech, (source, voice) = spoken(number), spoken_by(number)
    ids = listener.answer(speech)
    answer = listener.processor.tokenizer.decode(ids)
    return {
        **{"task": "sentence", "number": number, "voice": voice, "source": source},
        **{"answer": answer, "ids": ids, "right": plain(answer) == plain(source), "end": round(speech.end, 3)},
        "words": [[word, round(begin, 3), round(end, 3)] for word, begin, end in speech.words],
    }


def map_row(listener: Listener, sentence: Row, method: va.methods.Method) -> Row:
    """Of the map of each token of a word: whether its largest entry lies in the word, with MARGIN around it; the share of its
    positive part there; and the second of the largest entry."""
    begin = {"decoder_input_ids": torch.tensor([[START, NO_TIMESTAMPS]])}  # as the answer was generated
    inputs = {**listener.inputs(spoken(sentence["number"])), **begin}
    explained = va.explain(listener.model, inputs, answer=[sentence["ids"]], method=method)
    maps = next(maps for name, maps in explained.relevancy.items() if name in ("sound", "tower0", "input_features"))[0]
    step = STEP if maps.shape[-1] == listener.model.config.max_source_positions else STEP / 2  # frames of 10 ms, two a position
    at = (torch.arange(maps.shape[-1]) + 0.5) * step
    columns: Row = {"pointing": [], "mass": [], "peak": []}
    for values, word in zip(maps.double().clamp(min=0), listener.words(sentence["ids"]), strict=True):
        if word is not None:
            _, begin, end = sentence["words"][word]
            inside = (begin - MARGIN <= at) & (at <= end + MARGIN)
            columns["pointing"].append(int(bool(values.max() > 0) and bool(inside[values.argmax()])))
            columns["mass"].append(round(float(values[inside].sum() / values.sum()), 4) if values.sum() > 0 else 0.0)
            columns["peak"].append(round(float(at[values.argmax()]), 3))
    return {"task": "sentence maps", "number": sentence["number"], "method": method.label, **columns}


def rows(listener: Listener, kept: Kept) -> Iterator[Row]:
    """All rows that are kept or measured before the time is over, rule by rule; progress goes to stderr."""
    right = list[Row]()
    for number in range(2 * len(SENTENCES)):
        if sum(row["voice"] == spoken_by(number)[1] for row in right) < COUNT:
            for row in kept.get(f"sentence {number}", partial(heard, listener, number)):
                yield row
                right += [row] if row["right"] else []
    for method, count in RULES:
        for sentence in right[:count]:
            yield from kept.get(f"{method.label}: sentence {sentence['number']}", partial(map_row, listener, sentence, method))
    yield {"task": "sentence time", "seconds": round(kept.seconds, 1)}
