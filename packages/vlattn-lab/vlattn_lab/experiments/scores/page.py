"""The records as tables and as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.records import grouped, markdown, mean_and_deviation, number, spread
from vlattn_lab.experiments.experiment import Record, paired_test, spearman
from vlattn_lab.experiments.scores.attend import SCORES, UNIFORM
from vlattn_lab.scenes import CANVAS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASE = "scaled_dot"  # the score that every arm is compared with
INTERPRETABILITY = {"focus": "share / chance", "pointing": "pointing", "agreement": "agreement", "gap": "gap of areas"}
MORE = {
    "matching": ("recall_caption", "recall_image", "recall_chance", "digit", "relation", "order"),
    "answering": ("what", "is", "there", "many", "share_step_1", "share_step_2", "share_step_3"),
    "generation": ("own_encoders", "drawn", "chance", "ink"),
}
CONTROLS = {UNIFORM: "all words or regions alike", "frequent": "the most frequent answer", "real": "real images"}


def values(records: Sequence[Record], task: str, arm: str, name: str, when: str = "trained") -> list[float]:
    """A figure of each seed, in order; empty where the arm has none. focus: share / chance. gap: auc_least - auc_most."""
    figures, arm_records = [], (record for record in records if record.get("task") == task and record["arm"] == arm)
    for record in sorted(arm_records, key=lambda record: int(record["seed"])):
        part = record.get(when, {})  # a record of a choice has neither
        if name == "focus" and "share" in part:
            part = {"focus": part["share"] / part["chance"] if part["chance"] else 0.0}
        elif name == "gap" and "auc_most" in part:
            part = {"gap": part["auc_least"] - part["auc_most"]}
        if name in part:
            figures.append(float(part[name]))
    return figures


def tasks(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["task"] for record in records if "task" in record))


def arms(records: Sequence[Record], task: str) -> dict[str, str]:
    """The scores, then the control and the references of a task, each with its title in a table."""
    names = dict.fromkeys([*SCORES, *(record["arm"] for record in records if record.get("task") == task)])
    return {arm: f"`{arm}`" if arm in SCORES else CONTROLS[arm] for arm in names}


def correlation(records: Sequence[Record], task: str, name: str) -> dict[str, float]:
    """Rank correlation over SCORES between accuracy and a measure of interpretability: of the means over seeds (rho), its 2.5th
    and 97.5th percentile over all samples of seeds with replacement, and its mean and deviation over seeds."""
    accuracy, measure = (
        torch.tensor([values(records, task, score, key) for score in SCORES], dtype=torch.float64) for key in ("accuracy", name)
    )
    seeds = accuracy.shape[1]
    samples = torch.tensor(list(itertools.product(range(seeds), repeat=seeds)))

    def rho(index: Tensor) -> Tensor:
        return spearman(accuracy[:, index].mean(-1).T, measure[:, index].mean(-1).T)

    resampled = rho(samples)
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    mean, deviation = mean_and_deviation(rho(torch.arange(seeds)[:, None]).tolist())
    return {"rho": float(rho(torch.arange(seeds)[None])), "low": low, "high": high, "mean": mean, "deviation": deviation}


def best(records: Sequence[Record], task: str, name: str) -> str:
    return max(SCORES, key=lambda score: mean_and_deviation(values(records, task, score, name))[0])


# --- tables ---


def tables(records: Sequence[Record]) -> Iterator[str]:
    for task in tasks(records):
        yield main_table(records, task)
        yield more_table(records, task)
    yield correlation_table(records)
    yield choice_table(records)
    yield time_table(records)


def main_table(records: Sequence[Record], task: str) -> str:
    """The scores, then the control and the references."""
    names = ("accuracy", "share", "focus", "pointing", "agreement", "auc_most", "auc_least", "gap")
    head = [INTERPRETABILITY.get(name, name.replace("_", " ")) for name in (task, "accuracy", "p", *names[1:])]
    base = values(records, task, BASE, "accuracy")
    lines = []
    for arm, title in arms(records, task).items():
        figures = {name: values(records, task, arm, name) for name in names}
        compared = len(base) > 1 and arm in SCORES and arm != BASE
        p = paired_test([x - y for x, y in zip(figures["accuracy"], base, strict=True)])[1] if compared else None
        accuracy, *cells = (spread(figures[name]) for name in names)
        lines.append([title, accuracy, number(p, ".3f"), *cells])
    accuracy, *cells = (spread(_mean_of_scores(records, task, name)) for name in names)
    return markdown(head, [*lines, ["untrained, mean of the scores", accuracy, "", *cells]])


def _mean_of_scores(records: Sequence[Record], task: str, name: str) -> list[float]:
    """The mean over SCORES of each seed's untrained models."""
    by_score = [values(records, task, score, name, "untrained") for score in SCORES]
    return [sum(seed_values) / len(seed_values) for seed_values in zip(*by_score, strict=True)]


def more_table(records: Sequence[Record], task: str) -> str:
    names = MORE[task]
    lines = [[title, *(spread(values(records, task, arm, name)) for name in names)] for arm, title in arms(records, task).items()]
    return markdown([task, *(name.replace("_", " ") for name in names)], lines)


def correlation_table(records: Sequence[Record]) -> str:
    lines = []
    for task in tasks(records):
        for name, title in INTERPRETABILITY.items():
            x = correlation(records, task, name)
            rho, share = f"{x['rho']:+.2f}", f"{x['low']:+.2f} to {x['high']:+.2f}"
            bests = (f"`{best(records, task, measure)}`" for measure in ("accuracy", name))
            lines.append([f"{task}: {title}", rho, share, f"{x['mean']:+.2f} ± {x['deviation']:.2f}", *bests])
    head = ["accuracy and", "rank correlation", "95 % of samples", "within a seed", "most accurate", "most interpretable"]
    return markdown(head, lines)


def choice_table(records: Sequence[Record]) -> str:
    """Accuracy on validation scenes."""
    tried = grouped((record for record in records if "validation" in record), lambda record: (record["task"], record["rate"]))
    names = dict.fromkeys(record["arm"] for group in tried.values() for record in group)
    lines = []
    for (task, rate), group in tried.items():
        accuracy = {record["arm"]: record["validation"]["accuracy"] for record in group}
        lines.append([f"{task}: {rate:g}", *(f"{accuracy[arm]:.3f}" for arm in names)])
    return markdown(["learning rate", *(f"`{arm}`" for arm in names)], lines)


def time_table(records: Sequence[Record]) -> str:
    timed = grouped((record for record in records if "what" in record), lambda record: record["what"])
    names = dict.fromkeys(record["arm"] for group in timed.values() for record in group)
    lines = []
    for what, group in timed.items():
        for key in (key for key in group[0] if key.endswith("_ms")):
            lines.append([f"{what}: {key.removesuffix('_ms')}", *(f"{record[key]:.3g}" for record in group)])
    return markdown(["ms, forward and backward", *(f"`{arm}`" for arm in names)], lines)


# --- pictures ---


def accuracy_and_interpretability(records: Sequence[Record]) -> Figure:
    """A point for each score; bars are standard deviations over seeds."""
    shown = {"focus": "share on its region / chance", "gap": "least first − most first,\narea under the accuracy"}
    figure, grid = panels(len(shown), len(tasks(records)), (11, 6.4), sharex="col")
    for column, task in enumerate(tasks(records)):
        for line, (name, label) in enumerate(shown.items()):
            axes = grid[line][column]
            for place, arm in enumerate((*SCORES, UNIFORM)):
                (x, dx), (y, dy) = (mean_and_deviation(values(records, task, arm, key)) for key in ("accuracy", name))
                colour = "0.5" if arm == UNIFORM else f"C{place + (place > 6)}"  # C7 is grey, too
                marker = "x" if arm == UNIFORM else "osD^vP*h"[place]
                axes.errorbar(x, y, dy, dx, fmt=marker, color=colour, elinewidth=0.8, markersize=6, label=arm)
            axes.spines[["top", "right"]].set_visible(False)
            axes.axhline(1.0 if name == "focus" else 0.0, color="0.8", linewidth=0.8, zorder=0)
            if column == 0:
                axes.set_ylabel(label)
            if line == len(shown) - 1:
                axes.set_xlabel({"generation": "R-precision"}.get(task, "accuracy") + f" ({task})")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


def pictures(records: Sequence[Record]) -> Figure:
    """Pictures of the first seed's generators, and the scenes of their captions."""
    shown = [record for record in records if "pictures" in record]
    shown.sort(key=lambda record: record["arm"] != "real")
    columns = len(shown[0]["pictures"])
    figure, grid = panels(len(shown), columns, (1.15 * columns + 1.2, 1.15 * len(shown)))
    for record, line in zip(shown, grid, strict=True):
        for place, (axes, picture, caption) in enumerate(zip(line, record["pictures"], record["captions"], strict=True)):
            ink = torch.tensor(list(bytes.fromhex(picture))).view(CANVAS, CANVAS).tolist()
            axes.imshow(ink, cmap="gray_r", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color("0.8")
            if record is shown[0]:
                axes.set_title(caption.replace(" a ", "\na "), fontsize=8)
            if place == 0:
                axes.set_ylabel(record["arm"], rotation=0, ha="right", va="center", fontsize=9)
    return figure
