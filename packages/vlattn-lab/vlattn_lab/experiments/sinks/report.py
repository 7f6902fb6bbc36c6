"""The records of the experiment as tables and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.records import grouped, having, markdown, spread
from vlattn_lab.experiments.experiment import Effect, Record, band, effects_of, less, paired_change
from vlattn_lab.experiments.sinks.measures import METHODS, NORMS, SINKS
from vlattn_lab.experiments.sinks.samples import TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = dict(zip(METHODS, ("#111111", "#0f766e", "#c2410c", "#4456b5"), strict=True))


def of(records: Sequence[Record], part: str, task: str, share: float, **names: Any) -> list[dict[str, Any]]:
    """The measurements of a part that have these names, one a seed."""
    return having((row for record in having(records, task=task, share=share) for row in record[part]), **names)


def _shares(records: Sequence[Record]) -> list[float]:
    return sorted({record["share"] for record in records if "share" in record})


def _tasks(records: Sequence[Record]) -> list[str]:
    return [task for task in TASKS if having(records, task=task)]


def tables(records: Sequence[Record]) -> Iterator[str]:
    yield _named(records)
    yield _thresholds(records)
    for task in _tasks(records):
        yield _maps(records, task)
    yield _agreement(records)
    yield _times(records)


def _named(records: Sequence[Record]) -> str:
    """The sinks of models as they are."""
    lines = []
    for task in _tasks(records):
        seeds = having(records, task=task, share=0.0)
        rows = [(record["seed"], row) for record in seeds for row in record["sinks"]]
        for (tower, reader, token), rows_of_token in grouped(
            rows, lambda row: (row[1]["tower"], row[1]["reader"], row[1]["token"])
        ).items():
            samples = [row["samples"] for _, row in rows_of_token] + [0.0] * (len(seeds) - len(rows_of_token))
            values = (spread([row[name] for _, row in rows_of_token]) for name in ("share", "norm"))
            lines.append([TASKS[task], f"{tower}, attended by {reader}", token, spread(samples), *values])
    return markdown(["model of", "tower", "token", "samples", "share of a layer", "norm of its values"], lines, words=(0, 1, 2))


def _thresholds(records: Sequence[Record]) -> str:
    shares = [share for share in _shares(records) if share <= 0.3]
    rows = [(share, row) for share in shares for task in _tasks(records) for row in of(records, "thresholds", task, share)]
    lines = []
    for times, norm in dict.fromkeys((row["times"], row["norm"]) for _, row in rows):
        mine = [(share, row) for share, row in rows if (row["times"], row["norm"]) == (times, norm)]
        plain, planted = ([row for share, row in mine if (share > 0) == kind] for kind in (False, True))
        hits = f"{sum(row['planted'] for row in planted) / sum(row['attentions'] for row in planted):.3f}" if planted else "–"
        counts = (f"{sum(row[name] for row in plain) / len(plain):.3f}" for name in ("digits", "others"))
        cells = (f"{sum(row['pointing'] for row in each) / len(each):.3f}" if each else "–" for each in (plain, planted))
        lines.append([f"{times:g}", "any" if norm == NORMS[-1] else f"{norm:g}", hits, *counts, *cells])
    head = [
        "attention from",
        "norm up to",
        "planted ones found",
        "digits' patches",
        "other patches",
        "pointing",
        "pointing, planted",
    ]
    return markdown(head, lines, words=())


def _maps(records: Sequence[Record], task: str) -> str:
    lines = []
    for share in _shares(records):
        for method in METHODS:
            kept, removed = (of(records, "maps", task, share, method=method, sinks=sinks) for sinks in SINKS)
            cells = []
            for test in ("pointing", "mass"):
                values = [[row[test] for row in rows] for rows in (kept, removed)]
                cells += [spread(values[0]), *paired_change(values[1], values[0])]
            taken = spread([row["planted"] for row in kept])
            lines.append([f"{share:.1f}", f"`{method}`", taken, *cells])
    tests = [name for test in ("pointing", "mass") for name in (test, f"{test}, change by remove", "p")]
    return markdown([f"{TASKS[task]}, planted share", "method", "map on the patch", *tests], lines, words=(1,))


def _agreement(records: Sequence[Record]) -> str:
    shares = _shares(records)
    lines = []
    for task in _tasks(records):
        by_share = (having(records, task=task, share=share) for share in shares)
        lines.append([TASKS[task], *(spread([record["agreement"] for record in seeds]) for seeds in by_share)])
    return markdown(["same answer as without a planted sink", *(f"{share:.1f}" for share in shares)], lines)


def _times(records: Sequence[Record]) -> str:
    lines = []
    for record in having(records, task="cost"):
        for method in METHODS:
            keep, remove = (record["times"][f"{method} {sinks}"] for sinks in ("keep", "remove"))
            lines.append([f"`{method}`", f"{keep:.3f} s", f"{remove / keep:.2f} ×"])
    return markdown(["method", "keep, processor time", "remove"], lines)


def effects(records: Sequence[Record]) -> list[Effect]:
    """How pointing changes if sinks are removed, the mean over the kinds of models."""
    found = []
    for share in _shares(records):
        for method in METHODS:
            changes = []
            for task in _tasks(records):
                kept, removed = (of(records, "maps", task, share, method=method, sinks=sinks) for sinks in SINKS)
                changes.append(less(*([row["pointing"] for row in rows] for rows in (removed, kept))))
            means = [sum(each) / len(each) for each in zip(*changes, strict=True)]
            found.append((f"planted share {share:.1f}", f"pointing of `{method}`", means))
    return effects_of(found)


def figure(records: Sequence[Record]) -> Figure:
    """Pointing over the share of the planted sink, as the methods are and without the sinks."""
    tasks, shares = _tasks(records), _shares(records)
    drawn, (axes,) = panels(1, len(tasks), (2.6 * len(tasks), 3.4), sharey=True)
    for task, axis in zip(tasks, axes, strict=True):
        for method, colour in COLOURS.items():
            for sinks, style in zip(SINKS, ("--", "-"), strict=True):
                values = [
                    [row["pointing"] for row in of(records, "maps", task, share, method=method, sinks=sinks)] for share in shares
                ]
                look = {"color": colour, "linestyle": style, "marker": "o", "markersize": 3}
                band(axis, shares, values, label=f"{method}, {sinks}", **look)
        axis.set(title=TASKS[task], xlabel="attention of the planted sink", ylim=(-0.03, 1.03), xticks=shares)
    axes[0].set_ylabel("pointing")
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return drawn
