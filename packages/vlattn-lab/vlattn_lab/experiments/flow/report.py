"""The records of the experiment as tables and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.records import grouped, having, markdown, spread
from vlattn_lab.experiments.experiment import Effect, Record, band, effects_of, less
from vlattn_lab.experiments.flow.edges import CUT, FLOWS, LISTS
from vlattn_lab.experiments.flow.failures import EFFECTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASKS = {"vqa": "questions", "captions": "captions"}
SIZES = ("size, first order", "size, first order after the cut", "size, true")  # of EFFECTS
COLOURS = ("#111111", "#0f766e", "#7ec8be", "#c2410c", "#e8a33d", "#4456b5", "#9a9a9a")
DRAWN = (
    "answer's digit to the last token",
    "other digits to the last token",
    "answer's digit to the words",
    "words to the last token",
    "answer's digit to empty patches",
)


def of(records: Sequence[Record], task: str, part: str, **names: Any) -> list[dict[str, Any]]:
    """The measurement of a part that has these names, one a seed."""
    return having((row for record in having(records, task=task) for row in record[part]), **names)


def _tasks(records: Sequence[Record]) -> list[str]:
    return [task for task in TASKS if having(records, task=task)]


def tables(records: Sequence[Record]) -> Iterator[str]:
    tasks = _tasks(records)
    lines = []
    for task in tasks:
        seeds = having(records, task=task)
        lines.append([TASKS[task], *(spread([record[name] for record in seeds]) for name in ("accuracy", "probability"))])
    yield markdown(["model of", "right answers", "probability of the answers that are measured"], lines)
    for task in tasks:
        yield _flows(records, task)
    for task in tasks:
        lines = [
            [name, *(spread([row["fall"] for row in of(records, task, "cuts", list=name, edges=count)]) for count in CUT)]
            for name in LISTS
        ]
        yield markdown([f"{TASKS[task]}, by", *(f"{count} edge{'s' * (count > 1)}" for count in CUT)], lines)
    yield _correlations(records, tasks)
    for task in tasks:
        yield _masses(records, task)
    for task in tasks:
        yield _sources(records, task)


def effects(records: Sequence[Record]) -> list[Effect]:
    """What the cut of an edge costs, and how much more the first edges of one list cost than those of another."""
    found = []
    for edge in ("answer's digit to the last token", "other digits to the last token", "image to the words"):
        for task in _tasks(records):
            lost = [row["all"] for row in of(records, task, "flow", edge=edge)]
            found.append((f"{TASKS[task]}: {edge}", "probability lost", lost))
    compared = (
        ("relevancy", "first order", 4),
        ("first order after the cut", "first order", 4),
        ("first order, by size", "first order", 16),
        ("attention", "random", 8),
    )
    for one, other, count in compared:
        for task in _tasks(records):
            falls = ([row["fall"] for row in of(records, task, "cuts", list=name, edges=count)] for name in (one, other))
            found.append((f"{TASKS[task]}: {one} less {other}", f"lost by {count} edges", less(*falls)))
    return effects_of(found)


def _flows(records: Sequence[Record], task: str) -> str:
    columns = [str(layer) for layer in range(5)] + ["all"]
    lines = []
    for name in FLOWS:
        rows = of(records, task, "flow", edge=name)
        lines.append([name, *(spread([row[c] for row in rows if c in row], none="–") for c in columns)])
    return markdown([f"{TASKS[task]}, edge", *(f"layer {c}" for c in columns[:-1]), "all layers"], lines)


def _correlations(records: Sequence[Record], tasks: Sequence[str]) -> str:
    lines = []
    for kind, by in dict.fromkeys((row["of"], row["by"]) for row in records[0]["correlations"]):
        cells = []
        for task in tasks:
            rows = of(records, task, "correlations", of=kind, by=by)
            cells += [spread([row[name] for row in rows], ".2f") for name in ("means", "samples")]
        lines.append([kind, by, *cells])
    named = [f"{TASKS[task]}, {what}" for task in tasks for what in ("means", "single samples")]
    return markdown(["true effects of", "by", *named], lines, words=(0, 1))


def _masses(records: Sequence[Record], task: str) -> str:
    lines = []
    for (low, high), rows in grouped(of(records, task, "by mass"), lambda row: (row["from"], row["to"])).items():
        large, wrong = (sum(row[name] for row in rows) for name in ("large", "wrong"))
        sizes = (spread([row[name] for row in rows if row[name] is not None], ".3f", none="–") for name in EFFECTS)
        ranks = spread([row["rank"] for row in rows if row["rank"] is not None], ".2f", none="–")
        share = f"{wrong / large:.2f}" if large else "–"
        lines.append([f"{low:g} to {high:g}", f"{sum(row['count'] for row in rows):,}", *sizes, ranks, share])
    head = ["edges of samples", *SIZES, "rank correlation", "wrong sign"]
    return markdown([f"{TASKS[task]}, attention", *head], lines)


def _sources(records: Sequence[Record], task: str) -> str:
    lines = []
    for (pair, from_), rows in grouped(of(records, task, "by source"), lambda row: (row["pair"], row["from"])).items():
        lines.append([pair, from_, *(spread([row[name] for row in rows]) for name in ("mass", *EFFECTS))])
    head = [f"{TASKS[task]}, attention in", "attended tokens", "mean attention", *SIZES]
    return markdown(head, lines, words=(0, 1))


def flow_figure(records: Sequence[Record]) -> Figure:
    """The share of the answer's probability that is lost, by the layer where an edge is cut, and by the edges of a list."""
    tasks = _tasks(records)
    drawn, lines = panels(len(tasks), 2, (7.8, 3.1 * len(tasks)))
    for task, (left, right) in zip(tasks, lines, strict=True):
        for name, colour in zip(DRAWN, COLOURS, strict=False):
            rows = of(records, task, "flow", edge=name)
            layers = [layer for layer in rows[0] if layer.isdigit()]
            values = [[row[layer] for row in rows] for layer in layers]
            band(left, [int(layer) for layer in layers], values, color=colour, label=name, marker="o", markersize=3)
        for name, colour in zip(LISTS, COLOURS, strict=True):
            values = [[row["fall"] for row in of(records, task, "cuts", list=name, edges=count)] for count in CUT]
            band(right, CUT, values, color=colour, label=name, marker="o", markersize=3)
        left.set(xlabel="layer that is cut", ylabel="share of the probability lost", title=TASKS[task], xticks=range(5))
        right.set(xlabel="edges that are cut together", xscale="log", title=TASKS[task])
        right.set_xticks(CUT, [str(count) for count in CUT])
        right.minorticks_off()
    for axis in lines[-1]:
        axis.legend(frameon=False, fontsize=8, ncols=1, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return drawn
