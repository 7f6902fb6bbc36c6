"""Do predictions of cuts find heads whose work is known, and do these heads tell when words are spoken?

One head of RXNMapper maps atoms; some heads of Whisper tiny.en align words with sound; planted circuits have two known edges.
First-order and integrated effects of edges are compared with true cuts, of one edge and of sets of edges. Rows of attention give
word times, which are compared with those of the synthesiser.

In: options of the experiment.
Out: its records.
Imports: vlattn_lab, vlattn_lab.experiments, vlattn_lab.real.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.records import having, markdown, spread
from vlattn_lab.experiments.experiment import Cell, Effect, Experiment, Record, Settings, Stage, dots, effects_of, less
from vlattn_lab.experiments.known_heads.cuts import FIRST_ORDER, PREDICTIONS, TRUE, UNDONE, place_of
from vlattn_lab.experiments.known_heads.words import TOLERANCES
from vlattn_lab.experiments.planted_circuits.models import CIRCUITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REACTIONS, WORDS, SENTENCES = 2, 1, 2  # of a seed
SAMPLES = 4  # of a planted model
ATTENTION = 0.999  # of a planted head, to the token that it looks for
ONE = "integrated, n_steps=1"
SHOWN = "50 ms"  # of the tolerances, in the table of effects
WAYS = ("published alignment heads", "heads 1.5, 2.1 and 3.2", "all heads", "`gradient`")


def cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    """Every twelfth reaction, so that all kinds take part."""
    reactions = [{"part": part, "number": 12 * n} for part in ("reaction", "atoms") for n in range(REACTIONS * settings.seeds)]
    counts = {"word": WORDS, "times": SENTENCES}
    sentences = [{"part": part, "number": n} for part, count in counts.items() for n in range(count * settings.seeds)]
    circuits = [{"part": "planted", "circuit": c, "number": n} for n in range(settings.seeds) for c in CIRCUITS]
    probe = {"part": "probe", "numbers": [cell["number"] for cell in reactions if cell["part"] == "atoms"]}
    return [*reactions, *circuits, *sentences, probe]


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    from vlattn_lab.experiments.known_heads import models

    if cell["part"] == "planted":
        return models.of_planted(cell["circuit"], ATTENTION, cell["number"], SAMPLES)
    if cell["part"] == "probe":
        return models.probed(cell["numbers"])
    of = {
        "reaction": models.of_reaction,
        "atoms": models.maps_of_reaction,
        "word": models.of_word,
        "times": models.times_of_words,
    }
    return of[cell["part"]](cell["number"])


def kinds(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records with predictions, by the model."""
    named = {"reactions": having(records, part="reaction"), "speech": having(records, part="word")}
    named |= {f"{c}, {ATTENTION}": having(records, part="planted", circuit=c) for c in CIRCUITS}
    return {name: kept for name, rows in named.items() if (kept := [row for row in rows if row["all"] is not None])}


def values(rows: Sequence[Record], by: str, fact: str) -> list[float]:
    """A fact of a prediction in each record, [] if it was not made."""
    return [found[0][fact] for row in rows if (found := having(row["predictions"], by=by))]


def effects(records: Sequence[Record]) -> list[Effect]:
    found = []
    for name, rows in kinds(records).items():
        for fact, measured in (("single", "rank, single cuts"), ("sets", "rank, sets")):
            differences = less(values(rows, ONE, fact), values(rows, FIRST_ORDER, fact))
            found.append((f"{name}: integrated less first order", measured, differences))
    rows = kinds(records)["reactions"]
    for fact, measured in (("single", "rank, single cuts"), ("sets", "rank, sets")):
        differences = less(values(rows, UNDONE, fact), values(rows, FIRST_ORDER, fact))
        found.append(("reactions: softmax undone less first order", measured, differences))
    times = {way: [having(row["ways"], way=way)[0][SHOWN] for row in having(records, part="times")] for way in WAYS}
    for one, other in (("heads 1.5, 2.1 and 3.2", WAYS[0]), (WAYS[0], "all heads"), ("`gradient`", WAYS[0])):
        found.append((f"words: {one} less {other}", f"starts within {SHOWN}", less(times[one], times[other])))
    return effects_of(found)


def tables(records: Sequence[Record]) -> Iterator[str]:
    yield _of_ranks(records)
    yield _of_mapper(records)
    yield _of_cuts(records)
    yield _of_times(records)


def _of_ranks(records: Sequence[Record]) -> str:
    """The rank correlations with cuts; the share of all cuts' effect that the sum misses; the place of the known edge."""
    lines = []
    for name, rows in kinds(records).items():
        for by in PREDICTIONS:
            columns = [values(rows, by, fact) for fact in ("single", "sets", "gap", "place") if fact in rows[0]["predictions"][0]]
            if columns[0]:
                shown = [spread(column, ".2f") for column in columns[:3]]
                lines.append([name, by, *shown, _median(columns[3]) if len(columns) > 3 else "–"])
        if "place" in rows[0]:
            lines.append([name, TRUE, "1", "1", "–", _median([row["place"] for row in rows])])
    return markdown(["model", "by", "single cuts", "sets", "gap", "median place of the known edge"], lines, words=(0, 1))


def _median(places: Sequence[float]) -> str:
    return f"{statistics.median(places):g} ({min(places):g} to {max(places):g})"


def _of_mapper(records: Sequence[Record]) -> str:
    """The value and the place of RXNMapper's head 10.5 among 96 heads, and the best heads, by each measure."""
    atoms, (probe,) = having(records, part="atoms"), having(records, part="probe")
    count = sum(row["atoms"] for row in atoms)
    hits = zip(*(row["hits"] for row in atoms), strict=True)
    measures: dict[str, list[float]] = {
        f"attention: most attended atom is right, of {count}": [sum(of_head) / count for of_head in hits],
        "`va.probe`, coreference": probe["values"],
    }
    rows = kinds(records)["reactions"]
    for by in PREDICTIONS:
        measures[f"mean effect: {by}"] = _mean([having(row["predictions"], by=by)[0]["effects"] for row in rows])
    measures["mean effect: true cuts"] = _mean([row["true"] for row in rows])
    lines = []
    for name, numbers in measures.items():
        best = sorted(range(len(numbers)), key=numbers.__getitem__, reverse=True)[:4]
        shown = ", ".join(f"{n // 8}.{n % 8} {numbers[n]:.3g}" for n in best)
        lines.append([name, f"{numbers[85]:.3g}", str(place_of(numbers, 85)), shown])
    return markdown(["measure", "head 10.5", "place", "best"], lines, words=(0, 3))


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _of_cuts(records: Sequence[Record]) -> str:
    rows = kinds(records)["reactions"]
    means = _mean([row["columns"] for row in rows])
    lines = [["all heads", f"{_mean([[row['all']] for row in rows])[0]:.3f}"]]
    lines += [[f"head {head} in all layers", f"{mean:.3f}"] for head, mean in enumerate(means[:-1])]
    return markdown(
        ["cut from the atom to the reactants", "mean fall in nats"], [*lines, ["all heads but 5", f"{means[-1]:.3f}"]]
    )


def _of_times(records: Sequence[Record]) -> str:
    rows = having(records, part="times")
    facts = [*(f"{round(1000 * limit)} ms" for limit in TOLERANCES), "median"]
    by_way: Mapping[str, dict[str, list[float]]] = {
        way["way"]: {fact: [having(row["ways"], way=way["way"])[0][fact] for row in rows] for fact in facts}
        for way in rows[0]["ways"]
    }
    heads = sorted((way for way in by_way if way.startswith("head ")), key=lambda way: -sum(by_way[way][SHOWN]))
    lines = [[way, *(spread(by_way[way][fact], ".3f") for fact in facts)] for way in (*WAYS, *heads[:6])]
    return markdown(["word starts by", *facts[:-1], "median error, s"], lines)


def figure(records: Sequence[Record]) -> Figure:
    """Rank correlations with single cuts and with sets, a dot for each question."""
    drawn, axes = panels(1, 2, (8.4, 3.4), sharey=True)
    for axis, fact, title in zip(axes.flat, ("single", "sets"), ("cuts of one edge", "cuts of sets of edges"), strict=True):
        for shift, by, colour in ((-0.2, FIRST_ORDER, "#4c72b0"), (0.2, ONE, "#dd8452")):
            columns = {name: values(rows, by, fact) for name, rows in kinds(records).items()}
            dots(axis, columns, colour, shift, label=by)
        axis.set_title(title)
        axis.axhline(0, color="black", linewidth=0.5)
    axes.flat[0].set_ylabel("rank correlation with true cuts")
    axes.flat[0].legend(frameon=False, fontsize=8, loc="lower left")
    return drawn


EXPERIMENT = Experiment([Stage(cells, measure)], tables, {"known_heads": figure}, effects)
