"""Does a symbol that a model reads from a formula rest on it? The numbers of `va.token_grounding` for right and wrong symbols.

The answers are those of `vlattn_lab.real.reading`; rows are plain numbers, names and lists.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import vlattn_fast as va
from vlattn_lab.real.formulas import LETTERS, Formula, draw, places, symbols
from vlattn_lab.real.reading import LONGEST, Kept, Reader

COUNT = 12  # formulas that the model reads right
NUMBERS = ("log_probability", "gain", "entropy", "attention_entropy", "compactness", "near_peak")
RIGHT, NOISE, ANOTHER, WRONG, OWN = "right", "noise", "another formula", "one wrong symbol", "its own answers"
Row = dict[str, Any]


class EncoderDecoder(nn.Module):
    """The model with the arguments of one of transformers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor, decoder_input_ids: Tensor) -> Any:
        return self.inner({"images": images, "decoder_input_ids": decoder_input_ids})


def misread(formula: Formula, row: Row) -> dict[int, bool] | None:
    """For each character of an answer that names a symbol, by its place, whether the formula has the symbol and no character
    before it names it. None if the answer has more or fewer symbols than the formula, or no end: then it is not known which
    glyph a wrong one stands for."""
    named, source = symbols(row["answer"]), formula.symbols
    if len(named) != len(source) or len(row["ids"]) >= LONGEST - 1:
        return None
    before = [symbol for symbol, _ in named]
    return {place: symbol in source and symbol not in before[:n] for n, (symbol, place) in enumerate(named)}


def instead_of(symbol: str, formula: Formula) -> str | None:
    """Another letter or digit that the formula lacks; None for other symbols."""
    pool = next((pool for pool in (LETTERS, "123456789") if symbol in pool), "")
    left = [one for one in pool if one not in formula.symbols]
    return random.Random(formula.number).choice(left) if left else None


def row_of(reader: Reader, formula: Formula, case: str, images: Tensor, ids: Sequence[int], labels: Mapping[int, bool]) -> Row:
    """The numbers of the characters at the places of `labels`, each after those before it."""
    columns: Row = {name: [] for name in NUMBERS}
    for place in labels:
        inputs = {"images": images, "decoder_input_ids": torch.tensor([[reader.begin, *ids[:place]]])}
        table = va.token_grounding(EncoderDecoder(reader.model), inputs, answer=[[ids[place]]])
        for name, column in columns.items():
            column.append(round(float(table.numbers[name]), 6))
    facts = {"task": "formula grounding", "number": formula.number, "case": case}
    return {**facts, "characters": [reader.names[ids[place]] for place in labels], "right": [*labels.values()], **columns}


def rows(reader: Reader, kept: Kept, listed: Sequence[Formula], answers: Sequence[Row]) -> Iterator[Row]:
    """Of the first COUNT formulas that are read right: the symbols over their formula, over noise of its mean and deviation and
    over the next formula, and one wrong symbol over it. Of the others, the model's own answers (see `misread`)."""
    ids_of = {name: number for number, name in reader.names.items()}
    right = [(listed[row["number"]], row) for row in answers if row["right"]][:COUNT]
    for n, (formula, row) in enumerate(right):
        picture, another = (torch.tensor(draw(one).picture)[None, None] for one in (formula, right[(n + 1) % len(right)][0]))
        noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(formula.number))
        noise = (picture.mean() + picture.std() * noise).clamp(0, 1)
        of_symbols = places(formula.source, row["answer"]) or {}
        for case, images in ((RIGHT, picture), (NOISE, noise), (ANOTHER, another)):
            labels = dict.fromkeys(of_symbols.values(), case == RIGHT)
            measured = partial(row_of, reader, formula, case, images, row["ids"], labels)
            yield from kept.get(f"grounding: {case}: formula {formula.number}", measured)
        changed = [(place, other) for symbol, place in of_symbols.items() if (other := instead_of(symbol, formula)) in ids_of]
        for place, other in changed[len(changed) // 2 :][:1]:
            ids = [*row["ids"][:place], ids_of[str(other)]]
            measured = partial(row_of, reader, formula, WRONG, picture, ids, {place: False})
            yield from kept.get(f"grounding: {WRONG}: formula {formula.number}", measured)
    for row in answers:
        formula = listed[row["number"]]
        if not row["right"] and (found := misread(formula, row)):
            measured = partial(row_of, reader, formula, OWN, torch.tensor(draw(formula).picture)[None, None], row["ids"], found)
            yield from kept.get(f"grounding: {OWN}: formula {formula.number}", measured)
