"""The records of the experiment as tables and a figure, its outcome, and the weights that the search's records choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.records import having, markdown, number, spread
from vlattn_lab.experiments.evidence.training import TERMS
from vlattn_lab.experiments.experiment import Record, paired_change, paired_test

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
COLOURS = ("#999999", "#555555", "#1b7f79", "#2f6db0", "#6a4fa3", "#c8702a", "#b03a5b")
LEVEL = 0.05  # of the test of accuracy without the prior, divided by the number of terms


def best(records: Sequence[Record], term: str) -> Record:
    """The search's record with the largest accuracy without the prior."""
    return max(having(records, what="search", term=term), key=lambda record: record["natural"])


def outcome(records: Sequence[Record]) -> str:
    """Which terms change the accuracy without the prior, in one bold sentence."""
    plain = _values(records, "none", "natural")
    if len(plain) < 2:
        return "**One seed allows no test.**"
    found: dict[str, list[str]] = {"More accurate": [], "Less accurate": [], "No difference": []}
    for term in TERMS:
        differences = [a - b for a, b in zip(_values(records, term, "natural"), plain, strict=True)]
        clear = paired_test(differences)[1] < LEVEL / len(TERMS)
        kind = "No difference" if not clear else "More accurate" if sum(differences) > 0 else "Less accurate"
        found[kind].append(f"{LABELS[term]} ({spread(differences, sign='+')})")
    parts = [f"{kind} with {', '.join(terms)}." for kind, terms in found.items() if terms]
    return f"**{' '.join(parts)}**"


def tables(records: Sequence[Record]) -> Iterator[str]:
    for make in (_search_table, _score_table, _difference_table, outcome, _cost_table):
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
    figure, (line,) = panels(1, len(CHANCE), (8.6, 3.4), sharey=True)
    arms = list(LABELS)
    for panel, (score, chance) in zip(line, CHANCE.items(), strict=True):
        values = [_values(records, arm, score) for arm in arms]
        for seed in zip(*values, strict=True):
            panel.plot(range(len(arms)), seed, color="#cccccc", linewidth=0.8, zorder=1)
        for place, (members, colour) in enumerate(zip(values, COLOURS, strict=True)):
            panel.scatter([place] * len(members), members, color=colour, s=16, zorder=2)
            panel.hlines(sum(members) / len(members), place - 0.3, place + 0.3, color=colour, linewidth=2.0)
        panel.axhline(chance, color="#999999", linewidth=0.6, linestyle=":")
        panel.set_title(SCORES[score], fontsize=9)
        panel.set_xticks(range(len(arms)), [LABELS[arm] for arm in arms], rotation=35, ha="right", fontsize=8)
        panel.set_ylim(0.0, 1.0)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


FIGURES: dict[str, Callable[[Sequence[Record]], Figure]] = {"evidence": seeds}
