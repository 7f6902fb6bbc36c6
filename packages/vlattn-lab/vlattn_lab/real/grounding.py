"""Which number of `va.token_grounding` tells digits that the captioner sees from digits that it makes up: python -m
vlattn_lab.real.grounding.

The shipped captioner names the digits of faint test scenes, where some of its words are absent digits. With --speech, Whisper
writes down spoken sentences: its right words beside the same words over noise, over the sound of another sentence, and beside one
wrong word in a right answer; and the words of its own answers, of which some are mistakes. Prints the areas under the ROC curve
with intervals over answers, and draws an answer with its words coloured.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import vlattn_fast as va
from vlattn_fast.measuring.records import markdown
from vlattn_lab.checkout import ROOT
from vlattn_lab.experiments.planted_circuits.grounding import all_cases
from vlattn_lab.experiments.planted_circuits.models import CIRCUITS
from vlattn_lab.mapper import LONGEST, load_captioner
from vlattn_lab.processor import DIGIT_WORDS
from vlattn_lab.questions import Questions, digit_prompts
from vlattn_lab.real.listening import Listener, Row, heard, plain
from vlattn_lab.real.symbols import ANOTHER, NOISE, OWN, RIGHT, WRONG
from vlattn_lab.real.voice import SENTENCES, Speech, spoken
from vlattn_lab.speech import NO_TIMESTAMPS, START, load_whisper
from vlattn_lab.texts import END

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERS = ("log_probability", "gain", "entropy", "attention_entropy", "attention share", "compactness", "near_peak")
WORDS, SURE = 4, 0.5  # of an answer; the least probability of a confident word
Case = tuple[list[va.TokenGrounding], list[list[bool]]]  # a table for each answer, and whether each of its tokens is grounded


def grounded(scenes: Questions, ink: float) -> Case:
    """The captioner's answers; a word is grounded if it names a digit of the scene."""
    model, processor = load_captioner()
    inputs = dict(processor(scenes.images * ink, scenes.questions))
    with torch.no_grad():
        said = model.generate(**inputs, max_new_tokens=LONGEST, stop_token=END)[:, :WORDS]
    table = va.token_grounding(model, inputs, answer=said.tolist(), processor=processor)
    tables, labels = [], []
    for n, (words, digits) in enumerate(zip(table.tokens, scenes.digits.tolist(), strict=True)):
        tables.append(part(table, n, range(len(words))))
        labels.append([word in DIGIT_WORDS and DIGIT_WORDS.index(str(word)) in digits for word in words])
    return tables, labels


def part(table: va.TokenGrounding, sample: int, tokens: Sequence[int]) -> va.TokenGrounding:
    """Some tokens of a sample."""
    parts = [{name: x[sample : sample + 1, list(tokens)] for name, x in each.items()} for each in (table.numbers, table.by_head)]
    return va.TokenGrounding([[table.tokens[sample][token] for token in tokens]], *parts)


def confident(tables: Sequence[va.TokenGrounding], labels: Sequence[Sequence[bool]]) -> Case:
    """The same with only the words of a probability of at least SURE, and answers that have one."""
    kept: Case = [], []
    for table, row in zip(tables, labels, strict=True):
        sure = [i for i, x in enumerate(table.column("log_probability").exp().tolist()) if x >= SURE]
        if sure:
            kept[0].append(part(table, 0, sure))
            kept[1].append([row[i] for i in sure])
    return kept


def heard_cases(count: int) -> dict[str, Case]:
    """Of `count` sentences that Whisper writes down right, and of as many that it does not."""
    listener = Listener(*load_whisper())
    right, wrong = list[Row](), list[Row]()
    for number in range(2 * len(SENTENCES)):
        row = heard(listener, number)
        (right if row["right"] else wrong).append(row)
        if min(len(right), len(wrong)) >= count:
            break
    cases: dict[str, Case] = {name: ([], []) for name in ("noise", "another sentence", "one wrong word", "its own answers")}

    def add(name: str, speech: Speech, ids: list[int], labels: list[bool]) -> None:
        """Of a case, or of all with the right words; only tokens of words count."""
        begin = {"decoder_input_ids": torch.tensor([[START, NO_TIMESTAMPS]])}  # as the answer was generated
        inputs: dict[str, Tensor] = {**listener.inputs(speech), **begin}
        words = [i for i, word in enumerate(listener.words(ids)) if word is not None]
        table = part(va.token_grounding(listener.model, inputs, answer=[ids]), 0, words)
        for case in [name] if name else cases:
            cases[case][0].append(table)
            cases[case][1].append([labels[i] for i in words])

    for row, other in zip(right[:count], [*right[1:count], right[0]], strict=True):
        speech, ids = spoken(row["number"]), row["ids"]
        power, generator = float(np.sqrt((speech.wave**2).mean())), np.random.default_rng(row["number"])
        noise = generator.normal(0, power, len(speech.wave)).astype(np.float32)
        add("", speech, ids, [True] * len(ids))
        add("noise", Speech(noise, speech.words), ids, [False] * len(ids))
        add("another sentence", spoken(other["number"]), ids, [False] * len(ids))
        words, others = ([i for i, word in enumerate(listener.words(x)) if word is not None] for x in (ids, other["ids"]))
        changed, place = [*ids], words[len(words) // 2]
        changed[place] = next(x for x in (other["ids"][i] for i in others[len(others) // 2 :]) if x not in ids)
        add("one wrong word", speech, changed, [i != place for i in range(len(ids))])
    for row in wrong[:count]:
        same = difflib.SequenceMatcher(None, plain(row["answer"]), plain(row["source"]), autojunk=False).get_matching_blocks()
        found = {place for block in same for place in range(block.a, block.a + block.size)}
        add("its own answers", spoken(row["number"]), row["ids"], [word in found for word in listener.words(row["ids"])])
    return cases


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


def symbol_cases(rows: Sequence[Row]) -> dict[str, Case]:
    """Of the stored rows of `vlattn_lab.real.symbols`: the right symbols beside those of each case, a table for each formula."""
    cases: dict[str, Case] = {}
    for case in (NOISE, ANOTHER, WRONG, OWN):
        answers: dict[int, list[Row]] = {}
        for row in rows:
            if row["case"] in (RIGHT, case):
                answers.setdefault(row["number"], []).append(row)
        labels = [[label for row in both for label in row["right"]] for both in answers.values()]
        cases[case] = [*map(table_of, answers.values())], labels
    return cases


def table_of(rows: Sequence[Row]) -> va.TokenGrounding:
    numbers = {name: torch.tensor([[x for row in rows for x in row[name]]]) for name in NUMBERS if name in rows[0]}
    return va.TokenGrounding([[one for row in rows for one in row["characters"]]], numbers, {})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlattn_lab.real.grounding", description=__doc__)
    parser.add_argument("of", choices=("captions", "speech", "formulas", *CIRCUITS), help="whose answers; formulas: stored rows")
    parser.add_argument("--count", type=int, default=300, help="scenes, sentences, or samples of each of five circuits")
    parser.add_argument("--ink", type=float, default=0.5, help="of the scenes; 1 = as in training")
    parser.add_argument("--out", type=Path, help="file of the picture of captions, .png; default: none")
    chosen = parser.parse_args(arguments)
    if chosen.of == "captions":
        scenes = digit_prompts(chosen.count, seed=0, kind="which")
        cases = {"all words": grounded(scenes, chosen.ink)}
        if chosen.out is not None:
            picture(scenes, *cases["all words"]).savefig(chosen.out, dpi=120, bbox_inches="tight")
    elif chosen.of == "speech":
        cases = heard_cases(chosen.count)
    elif chosen.of == "formulas":
        stored = json.loads((ROOT / "benchmarks" / "results" / "real.json").read_text(encoding="utf-8"))["rows"]
        cases = symbol_cases([row for row in stored if row["task"] == "formula grounding"])
    else:
        print_areas(all_cases(chosen.of, chosen.count))
        return
    name = [*cases][-1]
    print_areas({**cases, f"{name}, probability {SURE:g} and more": confident(*cases[name])})


def print_areas(cases: dict[str, Case]) -> None:
    for name, (tables, labels) in cases.items():
        chances = torch.cat([table.column("log_probability") for table in tables]).exp().tolist()
        flat = [label for row in labels for label in row]
        wrong = [chance for chance, label in zip(chances, flat, strict=True) if not label]
        sure = sum(chance >= SURE for chance in wrong)
        told = f"{len(wrong)} are not grounded, {sure} with p {SURE:g} and more"
        print(f"{name}: {len(flat)} in {len(labels)} answers, of which {told}")
    print(areas(cases))


def areas(cases: dict[str, Case]) -> str:
    """A table of the areas under the ROC curve, with intervals over answers."""
    lines = []
    for number in next(iter(cases.values()))[0][0].numbers:
        if number in NUMBERS:
            found = [tables[0].detector(number).auroc(tables, labels) for tables, labels in cases.values()]
            lines.append([f"`{number}`", *(f"{area.value:.2f} ({area.low:.2f}–{area.high:.2f})" for area in found)])
    return markdown(["number", *cases], lines)


if __name__ == "__main__":
    main()
