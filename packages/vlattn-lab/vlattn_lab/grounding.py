"""Which number of `va.token_grounding` tells digits that the captioner sees from digits that it makes up: python -m
vlattn_lab.grounding.

The shipped captioner names the digits of faint test scenes, where some of its words are absent digits. Prints the areas under the
ROC curve with intervals over answers, and draws an answer with its words coloured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import vlattn_fast as va
from vlattn_lab.mapper import LONGEST, load_captioner
from vlattn_lab.processor import DIGIT_WORDS
from vlattn_lab.questions import Questions, digit_prompts
from vlattn_lab.texts import END

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERS = ("log_probability", "gain", "entropy", "attention_entropy", "compactness", "near_peak", "components")
WORDS, SURE = 4, 0.5  # of an answer; the least probability of a confident word


def grounded(scenes: Questions, ink: float) -> tuple[list[va.TokenGrounding], list[list[bool]]]:
    """A table for each answer, and whether its words name digits of the scene."""
    model, processor = load_captioner()
    inputs = dict(processor(scenes.images * ink, scenes.questions))
    with torch.no_grad():
        said = model.generate(**inputs, max_new_tokens=LONGEST, stop_token=END)[:, :WORDS]
    table = va.token_grounding(model, inputs, answer=said.tolist(), processor=processor)
    tables, labels = [], []
    for n, (words, digits) in enumerate(zip(table.tokens, scenes.digits.tolist(), strict=True)):
        parts = [{name: x[n : n + 1] for name, x in numbers.items()} for numbers in (table.numbers, table.by_head)]
        tables.append(va.TokenGrounding([words], *parts))
        labels.append([word in DIGIT_WORDS and DIGIT_WORDS.index(str(word)) in digits for word in words])
    return tables, labels


def confident(
    tables: Sequence[va.TokenGrounding], labels: Sequence[Sequence[bool]]
) -> tuple[list[va.TokenGrounding], list[list[bool]]]:
    """The same with only the words of a probability of at least SURE, and answers that have one."""
    kept: list[tuple[va.TokenGrounding, list[bool]]] = []
    for table, row in zip(tables, labels, strict=True):
        sure = [i for i, x in enumerate(table.column("log_probability").exp().tolist()) if x >= SURE]
        parts = [{name: x[:, sure] for name, x in numbers.items()} for numbers in (table.numbers, table.by_head)]
        if sure:
            kept.append((va.TokenGrounding([[table.tokens[0][i] for i in sure]], *parts), [row[i] for i in sure]))
    return [table for table, _ in kept], [row for _, row in kept]


def picture(scenes: Questions, tables: Sequence[va.TokenGrounding], labels: Sequence[Sequence[bool]]) -> Figure:
    """The first answer with one absent digit whose word is confident: its scene, and its words coloured by each of three
    numbers, from the least (red) to the largest (green) of all words."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    shown = ("log_probability", "gain", "compactness")
    sure = [[float(x) >= SURE for x in table.column("log_probability").exp()] for table in tables]
    chosen = next(n for n, row in enumerate(labels) if sum(row) == WORDS - 1 and sure[n][[*row].index(False)])
    drawn = Figure(figsize=(7, 1.9), layout="constrained")
    photo, text = drawn.subplots(1, 2, width_ratios=(1, 4))
    photo.imshow(-scenes.images[chosen], cmap="gray", vmin=-2, vmax=0)
    photo.axis("off")
    text.set(xlim=(0, 6.4), ylim=(-0.5, 2.5))
    text.axis("off")
    for row, name in enumerate(reversed(shown)):
        every = torch.cat([table.column(name) for table in tables])
        text.text(0, row, name, va="center", fontsize=9)
        for place, value in enumerate(tables[chosen].column(name)):
            colour = colormaps["RdYlGn"](float((every < value).double().mean()))
            word = str(tables[chosen].tokens[0][place]) + ("" if labels[chosen][place] else " (absent)")
            text.text(2.1 + place, row, word, va="center", fontsize=9, bbox={"facecolor": colour, "edgecolor": "none"})
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlattn_lab.grounding", description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="scenes")
    parser.add_argument("--ink", type=float, default=0.5, help="of the scenes; 1 = as in training")
    parser.add_argument("--out", type=Path, help="file of the picture, .png; default: none")
    chosen = parser.parse_args(arguments)
    scenes = digit_prompts(chosen.count, seed=0, kind="which")
    every = grounded(scenes, chosen.ink)
    cases = {"all words": every, f"words of probability {SURE:g} and more": confident(*every)}
    for name, (_, labels) in cases.items():
        flat = [label for row in labels for label in row]
        print(f"{name}: {len(flat)}, of which {len(flat) - sum(flat)} are absent digits, in {len(labels)} answers")
    print(f"\n| number | {' | '.join(cases)} |\n| --- | {' | '.join(['---:'] * len(cases))} |")
    for number in NUMBERS:
        areas = [tables[0].detector(number).auroc(tables, labels) for tables, labels in cases.values()]
        print(f"| `{number}` | {' | '.join(f'{x.value:.2f} ({x.low:.2f} to {x.high:.2f})' for x in areas)} |")
    if chosen.out is not None:
        picture(scenes, *every).savefig(chosen.out, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
