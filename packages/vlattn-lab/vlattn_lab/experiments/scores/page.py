"""The records as tables and as a picture."""

from __future__ import annotations

import itertools
import math
import operator
import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.records import grouped, markdown, mean_and_deviation, number, spread
from vlattn_lab.experiments.experiment import Effect, Record, band, effects_of, holm, less, paired_change, paired_test, spearman
from vlattn_lab.experiments.scores import control
from vlattn_lab.experiments.scores.attend import GENERAL, PLAIN, UNIFORM
from vlattn_lab.experiments.scores.conditions import FACTORS, OPTIONS, arm_of
from vlattn_lab.scenes import CANVAS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASES = {"SCAN": "cosine"}  # the score that a task's arms are compared with, if not scaled_dot
FORMS = "accuracy", "pointing", "agreement"  # what two forms of general are compared in
INTERPRETABILITY = {"focus": "share / chance", "pointing": "pointing", "agreement": "agreement", "gap": "gap of areas"}
KINDS = "what", "is", "there", "many"
MATCHING = "recall_caption", "recall_image", "recall_chance", "digit", "relation", "order"
MORE = {
    "matching": MATCHING,
    "SCAN": MATCHING,
    "answering": (*KINDS, "share_step_1", "share_step_2", "share_step_3"),
    "reading": KINDS,
    "generation": ("own_encoders", "drawn", "chance", "ink"),
    "drawing": ("drawn", "error"),
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
    """Those in which scores are compared."""
    found = dict.fromkeys(record["task"] for record in records if "task" in record)
    return [task for task in found if task in MORE]


def arms(records: Sequence[Record], task: str) -> dict[str, str]:
    """The scores, the control and the references of a task, in this order, each with its title in a table."""
    names = dict.fromkeys(record["arm"] for record in records if record.get("task") == task)
    return {arm: CONTROLS.get(arm, f"`{arm}`") for arm in sorted(names, key=lambda arm: arm in CONTROLS)}


def scores_of(records: Sequence[Record], task: str) -> list[str]:
    return [arm for arm in arms(records, task) if arm not in CONTROLS]


def compared(records: Sequence[Record], task: str) -> list[str]:
    """The scores without the forms of `general`: in every task all of one commit."""
    return [arm for arm in arms(records, task) if arm in PLAIN]


def means_of(records: Sequence[Record], task: str, name: str) -> dict[str, float]:
    """The mean over seeds of each score that is compared."""
    return {arm: mean_and_deviation(values(records, task, arm, name))[0] for arm in compared(records, task)}


def effects(records: Sequence[Record]) -> list[Effect]:
    """Rank correlations over scores between accuracy and a measure of interpretability. p: of all orders of the scores. The
    interval and what is detectable: Fisher's z, whose error for ranks is 1.03 / sqrt(n - 3) (Fieller et al., 1957)."""
    normal = statistics.NormalDist().inv_cdf
    asked = [(task, name) for task in tasks(records) if len(compared(records, task)) > 4 for name in INTERPRETABILITY]
    asked = [(task, name) for task, name in asked if values(records, task, compared(records, task)[0], name)]
    found = []
    for task, name in asked:
        one, two = (torch.tensor([*means_of(records, task, key).values()], dtype=torch.float64) for key in ("accuracy", name))
        found.append((float(spearman(one, two)), chance_of(one, two), len(one)))
    corrected = holm([p for _, p, _ in found])
    shown = []
    for (task, name), (rho, p, count), after in zip(asked, found, corrected, strict=True):
        error = 1.03 / (count - 3) ** 0.5
        low, high = (math.tanh(math.atanh(max(min(rho, 0.999), -0.999)) + sign * 1.96 * error) for sign in (-1, 1))
        least = math.tanh((normal(1 - 0.025 / len(asked)) + normal(0.8)) * error)
        seeds = len(values(records, task, compared(records, task)[0], name))
        shown.append(Effect(task, f"accuracy and {INTERPRETABILITY[name]}", rho, low, high, seeds, p, after, least))
    return shown


def chance_of(one: Tensor, two: Tensor) -> float:
    """The share of all orders of `two` whose rank correlation with `one` is at least as far from 0."""
    orders = torch.tensor([*itertools.permutations(range(len(two)))])
    rho = spearman(one.expand(len(orders), -1), two[orders])
    return float((rho.abs() >= spearman(one, two).abs() - 1e-9).double().mean())


# --- tables ---


def tables(records: Sequence[Record]) -> Iterator[str]:
    for task in tasks(records):
        yield main_table(records, task)
        yield more_table(records, task)
    for task in ("matching", "answering"):
        yield forms_table(records, task)
    yield shares_table(records)
    yield conditions_table(records)
    yield control_table(records)
    yield choice_table(records)
    yield time_table(records)


def main_table(records: Sequence[Record], task: str) -> str:
    """The scores, then the control and the references."""
    names = ("accuracy", "share", "focus", "pointing", "agreement", "auc_most", "auc_least", "gap")
    head = [INTERPRETABILITY.get(name, name.replace("_", " ")) for name in (task, "accuracy", "p", *names[1:])]
    base_arm = BASES.get(task, "scaled_dot")
    base = values(records, task, base_arm, "accuracy")
    lines = []
    for arm, title in arms(records, task).items():
        figures = {name: values(records, task, arm, name) for name in names}
        compared = len(base) > 1 and arm not in CONTROLS and arm != base_arm
        p = paired_test([x - y for x, y in zip(figures["accuracy"], base, strict=True)])[1] if compared else None
        accuracy, *cells = (spread(figures[name]) for name in names)
        lines.append([title, accuracy, number(p, ".3f"), *cells])
    accuracy, *cells = (spread(_mean_of_scores(records, task, name)) for name in names)
    return markdown(head, [*lines, ["untrained, mean of the scores", accuracy, "", *cells]])


def _mean_of_scores(records: Sequence[Record], task: str, name: str) -> list[float]:
    """The mean over the scores of each seed's untrained models."""
    by_score = [values(records, task, score, name, "untrained") for score in scores_of(records, task)]
    return [sum(seed_values) / len(seed_values) for seed_values in zip(*by_score, strict=True)]


def more_table(records: Sequence[Record], task: str) -> str:
    names = MORE[task]
    lines = [[title, *(spread(values(records, task, arm, name)) for name in names)] for arm, title in arms(records, task).items()]
    return markdown([task, *(name.replace("_", " ") for name in names)], lines)


def forms_table(records: Sequence[Record], task: str) -> str:
    """Each measured form of general as q . (W k) and as k . (W q), and the paired difference in accuracy."""
    lines = []
    measured = arms(records, task)
    for form, pair in ((form, pair) for form, pair in GENERAL.items() if measured.keys() >= {*pair}):
        sides = [[values(records, task, arm, name) for arm in pair] for name in FORMS]
        change, p = paired_change(sides[0][1], sides[0][0])
        lines.append([form.replace("_", " "), *(spread(side) for both in sides for side in both), change, p])
    head = [f"{name} of {formula}" for name in FORMS for formula in ("q·(W k)", "k·(W q)")]
    return markdown([f"general, {task}", *head, "difference in accuracy", "p"], lines)


def shares_table(records: Sequence[Record]) -> str:
    """Rank correlations over scores between accuracy and the gap of areas as a share of it: a model of low accuracy has little
    to lose."""
    lines = []
    for task in tasks(records):
        accuracy, gap = (means_of(records, task, name) for name in ("accuracy", "gap"))
        each = {arm: [values(records, task, arm, name) for name in ("gap", "accuracy")] for arm in accuracy}
        ways = [
            {arm: gap[arm] / accuracy[arm] for arm in accuracy},
            {arm: statistics.fmean(map(operator.truediv, *both)) for arm, both in each.items()},
        ]
        one, *shares = (torch.tensor([*way.values()], dtype=torch.float64) for way in (accuracy, *ways))
        found = [(float(spearman(one, two)), chance_of(one, two)) for two in shares]
        lines.append([task, *itertools.chain(*([f"{rho:+.3f}", f"{p:.4f}"] for rho, p in found))])
    head = ["accuracy and gap / accuracy", "of the means over seeds", "p", "of each seed", "p"]
    return markdown(head, lines)


def conditions_table(records: Sequence[Record]) -> str:
    """Each condition, and the paired difference in accuracy from the same score without one."""
    names = ("accuracy", "share", "pointing", "pointing_head", "agreement", "gap")
    lines = []
    for arm, (score, options) in OPTIONS.items():
        accuracy, *cells = (values(records, "conditions", arm, name) for name in names)
        change = paired_change(accuracy, values(records, "conditions", score, "accuracy")) if options else ("", "")
        lines.append([arm, spread(accuracy), *change, *map(spread, cells)])
    head = ["condition", "accuracy", "difference", "p", *(INTERPRETABILITY.get(name, name) for name in names[1:])]
    return markdown([name.replace("_head", " of a head") for name in head], lines)


def control_table(records: Sequence[Record]) -> str:
    """Answering with MAC's control unit, and the paired difference in accuracy from the same score without it, with its 95 %
    interval."""
    names = ("accuracy", *KINDS, "pointing", "agreement", "gap")
    lines = []
    for arm, (score, _) in control.OPTIONS.items():
        accuracy, *cells = (values(records, "control", arm, name) for name in names)
        without = values(records, "control", score, "accuracy")
        change, p = paired_change(accuracy, without) if arm != score else ("", "")
        found = effects_of([(arm, "accuracy", less(accuracy, without))]) if arm != score else []
        interval = f"{found[0].low:+.3f} to {found[0].high:+.3f}" if found else ""
        lines.append([arm, spread(accuracy), change, interval, p, *map(spread, cells)])
    more = [INTERPRETABILITY.get(name, name) for name in names[1:]]
    head = ["answering", "accuracy", "difference", "95 % interval", "p", *more]
    return markdown(head, lines)


def choice_table(records: Sequence[Record]) -> str:
    """Accuracy on validation scenes."""
    tried = grouped((record for record in records if "validation" in record), lambda record: (record["task"], record["rate"]))
    accuracy = {
        (key, record["arm"]): f"{record['validation']['accuracy']:.3f}" for key, group in tried.items() for record in group
    }
    names = dict.fromkeys(arm for _, arm in accuracy)
    lines = [[f"`{arm}`", *(accuracy.get((key, arm), "") for key in tried)] for arm in names]
    return markdown(["learning rate", *(f"{task}: {rate:g}" for task, rate in tried)], lines)


def time_table(records: Sequence[Record]) -> str:
    timed = grouped((record for record in records if "what" in record), lambda record: record["what"])
    names = dict.fromkeys(record["arm"] for group in timed.values() for record in group)
    lines = []
    for what, group in timed.items():
        for key in (key for key in group[0] if key.endswith("_ms")):
            lines.append([f"{what}: {key.removesuffix('_ms')}", *(f"{record[key]:.3g}" for record in group)])
    return markdown(["ms, forward and backward", *(f"`{arm}`" for arm in names)], lines)


# --- pictures ---


def accuracy_and_gap(records: Sequence[Record]) -> Figure:
    """A point for each score, over which `effects` are; bars are standard deviations over seeds."""
    import matplotlib

    shown = [*dict.fromkeys(name for task in tasks(records) for name in compared(records, task)), UNIFORM]
    colours, markers = matplotlib.colormaps["tab10"], "osD^vP*h<"
    columns = min(3, len(tasks(records)))  # as many as a page can show
    lines = -(-len(tasks(records)) // columns)
    figure, grid = panels(lines, columns, (2.5 * columns, 2.6 * lines + 0.7))
    for axes, task in zip(grid.flat, tasks(records), strict=False):
        for name in [*compared(records, task), *({UNIFORM} & arms(records, task).keys())]:
            (x, dx), (y, dy) = (mean_and_deviation(values(records, task, name, key)) for key in ("accuracy", "gap"))
            place = shown.index(name)
            colour, marker = ("0.4", "x") if name == UNIFORM else (colours(place), markers[place])
            axes.errorbar(x, y, dy, dx, fmt=marker, color=colour, elinewidth=0.8, markersize=6, label=name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.axhline(0.0, color="0.8", linewidth=0.8, zorder=0)
        axes.set(title=task, xlabel={"generation": "R-precision"}.get(task, "accuracy"))
    for line in grid:
        line[0].set_ylabel("gap of areas")
    for axes in [*grid.flat][len(tasks(records)) :]:
        axes.set_axis_off()
    handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, frameon=False)
    return figure


def of_conditions(records: Sequence[Record]) -> Figure:
    """Accuracy, pointing and agreement for the values of each factor."""
    names = ("accuracy", "pointing", "agreement")
    figure, grid = panels(len(names), len(FACTORS), (2.1 * len(FACTORS), 6.2), sharex="col", sharey="row")
    for line, name in zip(grid, names, strict=True):
        for axes, ((score, factor), steps) in zip(line, FACTORS.items(), strict=True):
            measured = [values(records, "conditions", arm_of(score, factor, value), name) for value in steps]
            band(axes, steps, measured, color="C0", marker="o", label="mean over heads")
            if (name, factor) == ("pointing", "heads"):
                each = [values(records, "conditions", arm_of(score, factor, value), "pointing_head") for value in steps]
                band(axes, steps, each, color="C1", marker="s", label="each head")
                figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
            axes.set_xscale("log", base=2)
            axes.set_xticks(steps, [f"{value:g}" for value in steps])
            if name == names[0]:
                axes.set_title(score.replace("_", " "), fontsize=10)
            if name == names[-1]:
                axes.set_xlabel(factor)
        line[0].set_ylabel(name)
    return figure


def pictures(records: Sequence[Record], task: str) -> Figure:
    """Pictures of the first seed's models, and the scenes of their captions."""
    shown = [record for record in records if "pictures" in record and record["task"] == task]
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
