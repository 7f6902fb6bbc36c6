"""The rows as tables and as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlattn_fast._ground.extras import extra
from vlattn_fast.lab.experiments.experiment import Row, mean_and_deviation, paired_test
from vlattn_fast.lab.experiments.scores.attend import SCORES, UNIFORM, spearman
from vlattn_fast.lab.scenes import CANVAS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASE = "scaled_dot"  # the score that every arm is compared with
INTERPRETABILITY = {"focus": "share / chance", "pointing": "pointing", "agreement": "agreement", "gap": "gap of areas"}
MORE = {
    "matching": ("recall_caption", "recall_image", "recall_chance", "digit", "relation", "order"),
    "answering": ("what", "is", "there", "many", "share_step_1", "share_step_2", "share_step_3"),
    "generation": ("own_encoders", "drawn", "chance", "ink"),
}
CONTROLS = {UNIFORM: "all words or regions alike", "frequent": "the most frequent answer", "real": "real pictures"}


def values(rows: Sequence[Row], task: str, arm: str, name: str, when: str = "trained") -> list[float]:
    """A figure of each seed, in order; empty where the arm has none. focus: share / chance. gap: auc_least - auc_most."""
    figures = []
    for row in sorted((row for row in rows if row.get("task") == task and row["arm"] == arm), key=lambda row: int(row["seed"])):
        part = row.get(when, {})  # a row of a choice has neither
        if name == "focus" and "share" in part:
            part = {"focus": part["share"] / part["chance"] if part["chance"] else 0.0}
        elif name == "gap" and "auc_most" in part:
            part = {"gap": part["auc_least"] - part["auc_most"]}
        if name in part:
            figures.append(float(part[name]))
    return figures


def tasks(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in rows if "task" in row))


def correlation(rows: Sequence[Row], task: str, name: str) -> dict[str, float]:
    """Rank correlation over SCORES between accuracy and a measure of interpretability: of the means over seeds (rho), its 2.5th
    and 97.5th percentile over all samples of seeds with replacement, and its mean and deviation over seeds."""
    accuracy, measure = (
        torch.tensor([values(rows, task, score, key) for score in SCORES], dtype=torch.float64) for key in ("accuracy", name)
    )
    seeds = accuracy.shape[1]
    samples = torch.tensor(list(itertools.product(range(seeds), repeat=seeds)))

    def of_samples(index: Tensor) -> Tensor:
        return spearman(accuracy[:, index].mean(-1).T, measure[:, index].mean(-1).T)

    resampled = of_samples(samples)
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    mean, deviation = mean_and_deviation(of_samples(torch.arange(seeds)[:, None]).tolist())
    return {"rho": float(of_samples(torch.arange(seeds)[None])), "low": low, "high": high, "mean": mean, "deviation": deviation}


def best(rows: Sequence[Row], task: str, name: str) -> str:
    return max(SCORES, key=lambda score: mean_and_deviation(values(rows, task, score, name))[0])


# --- tables ---


def tables(rows: Sequence[Row]) -> Iterator[str]:
    for task in tasks(rows):
        yield main_table(rows, task)
        yield more_table(rows, task)
    yield correlation_table(rows)
    yield choice_table(rows)
    yield time_table(rows)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ruler, *lines))


def _cell(figures: Sequence[float], digits: int = 3) -> str:
    if not figures:
        return ""
    mean, deviation = mean_and_deviation(figures)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def main_table(rows: Sequence[Row], task: str) -> str:
    """The scores, then the control and the references."""
    names = ("accuracy", "share", "focus", "pointing", "agreement", "auc_most", "auc_least", "gap")
    head = [task, *names[:1], "p", *names[1:]]
    head = [INTERPRETABILITY.get(name, name.replace("_", " ")) for name in head]
    base = values(rows, task, BASE, "accuracy")
    lines = []
    for arm in dict.fromkeys([*SCORES, *(row["arm"] for row in rows if row.get("task") == task)]):
        figures = {name: values(rows, task, arm, name) for name in names}
        compared = len(base) > 1 and arm in SCORES and arm != BASE
        p = paired_test([x - y for x, y in zip(figures["accuracy"], base, strict=True)])[1] if compared else None
        title = f"`{arm}`" if arm in SCORES else CONTROLS[arm]
        cells = [_cell(figures[name]) for name in names]
        lines.append([title, cells[0], "" if p is None else f"{p:.3f}", *cells[1:]])
    untrained = {name: _mean_of_scores(rows, task, name) for name in names}
    cells = [_cell(untrained[name]) for name in names]
    lines.append(["untrained, mean of the scores", cells[0], "", *cells[1:]])
    return _table(head, lines)


def _mean_of_scores(rows: Sequence[Row], task: str, name: str) -> list[float]:
    """The mean over SCORES of each seed's untrained models."""
    by_score = [values(rows, task, score, name, "untrained") for score in SCORES]
    return [sum(of_seed) / len(of_seed) for of_seed in zip(*by_score, strict=True)]


def more_table(rows: Sequence[Row], task: str) -> str:
    arms = list(dict.fromkeys([*SCORES, *(row["arm"] for row in rows if row.get("task") == task)]))
    lines = [
        [f"`{arm}`" if arm in SCORES else CONTROLS[arm], *(_cell(values(rows, task, arm, name)) for name in MORE[task])]
        for arm in arms
    ]
    return _table([task, *(name.replace("_", " ") for name in MORE[task])], lines)


def correlation_table(rows: Sequence[Row]) -> str:
    lines = []
    for task in tasks(rows):
        for name, title in INTERPRETABILITY.items():
            figures = correlation(rows, task, name)
            lines.append(
                [
                    f"{task}: {title}",
                    f"{figures['rho']:+.2f}",
                    f"{figures['low']:+.2f} to {figures['high']:+.2f}",
                    f"{figures['mean']:+.2f} ± {figures['deviation']:.2f}",
                    f"`{best(rows, task, 'accuracy')}`",
                    f"`{best(rows, task, name)}`",
                ]
            )
    head = ["accuracy and", "rank correlation", "95 % of samples", "within a seed", "most accurate", "most interpretable"]
    return _table(head, lines)


def choice_table(rows: Sequence[Row]) -> str:
    """Accuracy on validation scenes."""
    tried = [row for row in rows if "validation" in row]
    arms = list(dict.fromkeys(row["arm"] for row in tried))
    lines = []
    for task, rate in dict.fromkeys((row["task"], row["rate"]) for row in tried):
        accuracy = {row["arm"]: row["validation"]["accuracy"] for row in tried if (row["task"], row["rate"]) == (task, rate)}
        lines.append([f"{task}: {rate:g}", *(f"{accuracy[arm]:.3f}" for arm in arms)])
    return _table(["learning rate", *(f"`{arm}`" for arm in arms)], lines)


def time_table(rows: Sequence[Row]) -> str:
    timed = [row for row in rows if "what" in row]
    head = ["ms, forward and backward", *(f"`{arm}`" for arm in dict.fromkeys(row["arm"] for row in timed))]
    lines = []
    for what in dict.fromkeys(row["what"] for row in timed):
        of_what = [row for row in timed if row["what"] == what]
        for key in (key for key in of_what[0] if key.endswith("_ms")):
            lines.append([f"{what}: {key.removesuffix('_ms')}", *(f"{row[key]:.3g}" for row in of_what)])
    return _table(head, lines)


# --- pictures ---


def accuracy_and_interpretability(rows: Sequence[Row]) -> Figure:
    """A point for each score; bars are standard deviations over seeds."""
    with extra("viz"):
        from matplotlib.figure import Figure

    shown = {"focus": "share on its region / chance", "gap": "least first − most first,\narea under the accuracy"}
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    panels = figure.subplots(len(shown), len(tasks(rows)), squeeze=False, sharex="col")
    for column, task in enumerate(tasks(rows)):
        for line, (name, label) in enumerate(shown.items()):
            axes = panels[line][column]
            for number, arm in enumerate((*SCORES, UNIFORM)):
                (x, dx), (y, dy) = (mean_and_deviation(values(rows, task, arm, key)) for key in ("accuracy", name))
                colour = "0.5" if arm == UNIFORM else f"C{number + (number > 6)}"  # C7 is grey, too
                marker = "x" if arm == UNIFORM else "osD^vP*h"[number]
                axes.errorbar(x, y, dy, dx, fmt=marker, color=colour, elinewidth=0.8, markersize=6, label=arm)
            axes.spines[["top", "right"]].set_visible(False)
            axes.axhline(1.0 if name == "focus" else 0.0, color="0.8", linewidth=0.8, zorder=0)
            if column == 0:
                axes.set_ylabel(label)
            if line == len(shown) - 1:
                axes.set_xlabel({"generation": "R-precision"}.get(task, "accuracy") + f" ({task})")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


def pictures(rows: Sequence[Row]) -> Figure:
    """Pictures of the first seed's generators, and the scenes of their captions."""
    with extra("viz"):
        from matplotlib.figure import Figure

    shown = [row for row in rows if "pictures" in row]
    shown.sort(key=lambda row: row["arm"] != "real")
    figure = Figure(figsize=(1.15 * len(shown[0]["pictures"]) + 1.2, 1.15 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), len(shown[0]["pictures"]), squeeze=False)
    for row, line in zip(shown, panels, strict=True):
        for place, (axes, picture, caption) in enumerate(zip(line, row["pictures"], row["captions"], strict=True)):
            ink = torch.tensor(list(bytes.fromhex(picture))).view(CANVAS, CANVAS).tolist()
            axes.imshow(ink, cmap="gray_r", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color("0.8")
            if row is shown[0]:
                axes.set_title(caption.replace(" a ", "\na "), fontsize=8)
            if place == 0:
                axes.set_ylabel(row["arm"], rotation=0, ha="right", va="center", fontsize=9)
    return figure
