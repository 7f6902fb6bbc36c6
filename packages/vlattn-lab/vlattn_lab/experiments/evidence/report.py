"""The records of the experiment as tables and a figure, its effects, and the weights that the search's records choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.records import having, markdown, number, spread
from vlattn_lab.experiments.evidence.training import TERMS
from vlattn_lab.experiments.experiment import Effect, Record, dots, effects_of, less, paired_change

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {
    "first": "before the policy gradient",
    "none": "policy gradient alone",
    "reward": "evidence as reward",
    "evidence": "evidence as loss",
    "divergence": "divergence times advantage",
    "cacr": "CACR",
    "relevancy": "relevancy",
}
SCORES = {
    "natural": "accuracy without the prior",
    "favourite": "says the favourite",
    "guessable": "accuracy with the prior",
    "pointing": "pointing",
    "evidence": "attention on evidence",
}
CHANCE = {"natural": 1 / 10, "pointing": 1 / 4}


def best(records: Sequence[Record], term: str) -> Record:
    """The search's record with the largest accuracy without the prior."""
    return max(having(records, what="search", term=term), key=lambda record: record["natural"])


def effects(records: Sequence[Record]) -> list[Effect]:
    """What each term changes of the accuracy without the prior."""
    plain = _values(records, "none", "natural")
    return effects_of([(LABELS[term], SCORES["natural"], less(_values(records, term, "natural"), plain)) for term in TERMS])


def tables(records: Sequence[Record]) -> Iterator[str]:
    for make in (_search_table, _score_table, _difference_table, _cost_table):
        yield make(records)


def _values(records: Sequence[Record], term: str, score: str) -> list[float]:
    return [record[score] for record in having(records, what="training", term=term)]


def _name(record: Record) -> str:
    return LABELS[record["term"]] + (f", weight {record['weight']:g}" if record["term"] in TERMS else "")


def _search_table(records: Sequence[Record]) -> str:
    lines = []
    for record in having(records, what="search"):
        chosen = record["term"] in TERMS and record == best(records, record["term"])
        lines.append([_name(record) + " (chosen)" * chosen, *(f"{record[score]:.3f}" for score in SCORES)])
    return markdown(["validation, one seed", *SCORES.values()], lines)


def _score_table(records: Sequence[Record]) -> str:
    lines = []
    for term in LABELS:
        members = having(records, what="training", term=term)
        lines.append([_name(members[0]), *(spread(_values(records, term, score)) for score in SCORES)])
    return markdown(["test", *SCORES.values()], lines)


def _difference_table(records: Sequence[Record]) -> str:
    lines = []
    for term in TERMS:
        changes = (paired_change(_values(records, term, score), _values(records, "none", score)) for score in SCORES)
        lines.append([LABELS[term], *(f"{mean} (p {p})" for mean, p in changes)])
    return markdown(["less policy gradient alone", *SCORES.values()], lines)


def _cost_table(records: Sequence[Record]) -> str:
    (record,) = having(records, what="cost")
    lines = [
        [LABELS[term], f"{record[f'{term} ms']:.1f}", number(record[f"{term} MiB"], ".1f") or "not measured"]
        for term in ("none", *TERMS)
    ]
    return markdown(["an update with", "ms", "MiB"], lines)


def seeds(records: Sequence[Record]) -> Figure:
    """Accuracy without the prior and pointing of each seed, a line a seed from arm to arm."""
    figure, (line,) = panels(1, len(CHANCE), (7.6, 4.0), sharey=True)
    for panel, (score, chance) in zip(line, CHANCE.items(), strict=True):
        columns = {label: _values(records, term, score) for term, label in LABELS.items()}
        for seed in zip(*columns.values(), strict=True):
            panel.plot(range(len(columns)), seed, color="#cccccc", linewidth=0.8, zorder=1)
        dots(panel, columns, "#0f766e")
        panel.axhline(chance, color="#999999", linewidth=0.8, linestyle=":")
        panel.set(title=SCORES[score], ylim=(0.0, 1.0))
    return figure


FIGURES: dict[str, Callable[[Sequence[Record]], Figure]] = {"evidence": seeds}
