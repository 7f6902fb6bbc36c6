"""Does weighted relevancy (Huang et al., 2023) give better maps than the plain rule?

First the weights themselves: how far are they from one half? Then every weighting explains the shipped models of four tasks,
with and without the division of rows, in the published form and with norms held fixed, and is compared with the plain rule of the
same form on the same scenes. Last, a CLIPMapper of each kind of layers is trained, and both rules explain it. The seeds are sets
of test scenes.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlattn_fast.backends.reference.relevancy_residual import WEIGHTINGS
from vlattn_fast.interpret.relevancy.methods.registry import with_options
from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.provenance import fingerprint
from vlattn_fast.measuring.records import grouped, having, markdown, mean_and_deviation
from vlattn_lab.checkout import ROOT
from vlattn_lab.evaluation import residual_shares, run
from vlattn_lab.experiments.experiment import Cell, Effect, Experiment, Record, Settings, Stage, effects_of, holm, paired_test
from vlattn_lab.mapper import prompt_accuracy, question_accuracy
from vlattn_lab.tasks import TASKS
from vlattn_lab.train.fit import seeded
from vlattn_lab.train.mapper import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS = {"matching": "UNITER", "clip": "CLIP", "vqa": "answers", "captions": "captions"}
SAMPLES = {"matching": 200, "clip": 100, "vqa": 100, "captions": 100}  # those of the stored evaluations
PARTS = ("image", "text")
TESTS = ("positive", "negative", "pointing", "iou", "mass")
FORMS = {"published": (), "norms held fixed": ("norms",)}
DIVIDED = {"divided": "weighted", "not divided": "weighted:no_normalization"}  # the rows of Abar
# Equal weights without the division are the plain rule.
RULES = [(name, rows) for name in WEIGHTINGS for rows in DIVIDED if (name, rows) != ("equal", "not divided")]
STATES = ("trained", "untrained")
PLAIN = "plain"
MARGIN = "margin"  # the area under the curve of negative perturbation less that of positive perturbation

LAYERS: dict[str, dict[str, Any]] = {
    "text to itself, then to the image": {},
    "the same, image tokens to themselves": {"image_self_attention": True},
    "the same, text to the image first": {"image_self_attention": True, "cross_first": True},
}
STEPS = {"vqa": 1200, "captions": 800}  # a quarter of the shipped models' training
OF_LAYERS = [("contribution", "divided"), ("norm", "not divided")]  # the rules that explain them
COUNT, FEW = 200, 50  # scenes of each kind that tell the accuracy, and those of a set that are explained
CLAIMED = [("contribution", "divided"), ("magnitude", "not divided")]  # our reading of the paper, and our best alternative
LEVEL = 0.05

Values = dict[str, dict[str, float | None]]  # by method, then by test and part


def methods(rules: Iterable[tuple[str, str]] = RULES) -> dict[str, Any]:
    """Rules of both forms, by their names in the records: the plain rule first, then `rules`."""
    made = {}
    for form, freeze in FORMS.items():
        made[_name(form, PLAIN)] = with_options("gradient", freeze=freeze)
        for weighting, rows in rules:
            made[_name(form, weighting, rows)] = with_options(DIVIDED[rows], weighting=weighting, freeze=freeze)
    return made


def _name(*parts: str) -> str:
    return ", ".join(parts)


def _measured(task: str, model: Any, samples: int, seed: int, rules: Iterable[tuple[str, str]] = RULES) -> Values:
    """The tests of `rules` on one set of scenes, and the margin of both perturbation tests."""
    chosen = methods(rules)
    by_label = {method.label: name for name, method in chosen.items()}
    found = run(TASKS[task], model, samples, seed, {method.label: method for method in chosen.values()}, TESTS)
    values: Values = {name: {} for name in chosen}
    for row in found.table:
        values[by_label[row["method"]]][f"{row['test']} {row['part']}"] = row["value"]
    for of_method, part in itertools.product(values.values(), PARTS):
        above, below = (of_method.get(f"{test} {part}") for test in ("negative", "positive"))
        of_method[f"{MARGIN} {part}"] = None if above is None or below is None else above - below
    return values


# --- the shipped models ---


def cells_of_shares(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    return [{"task": task, "form": form, "state": state} for task in MODELS for form in FORMS for state in STATES]


def measure_shares(cell: Cell, settings: Settings) -> dict[str, Any]:
    """The shares of the shipped model, or of the same model with weights drawn anew, on the scenes and with the answers and
    captions of the shipped one."""
    task = TASKS[cell["task"]]
    model = shipped = task.load()
    if cell["state"] == "untrained":
        model = seeded(0, lambda: redrawn(shipped))
    samples = 2 if settings.smoke else 100
    return {"shares": residual_shares(task, model, samples, FORMS[cell["form"]], asked=shipped)}


def redrawn(model: nn.Module) -> nn.Module:
    """A copy of a model in which each matrix has other numbers of the same mean and deviation; vectors stay."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.mean() + parameter.std() * torch.randn_like(parameter))
    return copied


def cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    return [{"task": task, "seed": seed} for task in MODELS for seed in range(settings.seeds)]


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    model = TASKS[cell["task"]].load()
    samples = 2 if settings.smoke else SAMPLES[cell["task"]]
    return {"weights": fingerprint(model), "values": _measured(cell["task"], model, samples, cell["seed"])}


# --- trained layers ---


def cells_of_layers(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    tasks = [*STEPS][: 1 if settings.smoke else None]  # a captioner that has learned nothing names no digits
    return [{"task": task, "layers": layers} for task in tasks for layers in LAYERS]


def measure_layers(cell: Cell, settings: Settings) -> dict[str, Any]:
    task = cell["task"]
    steps, count, samples = (2, 4, 2) if settings.smoke else (STEPS[task], COUNT, FEW)
    model = train(task, steps, log_every=0, **LAYERS[cell["layers"]])
    accuracy = question_accuracy(model, count=count) if task == "vqa" else prompt_accuracy(model, count=count)["true"]
    sets = [_measured(task, model, samples, seed, OF_LAYERS) for seed in range(settings.seeds)]
    return {"weights": fingerprint(model), "steps": steps, "accuracy": accuracy, "sets": sets}


# --- what is shown ---


def of_sets(sets: Sequence[Values], name: str, test: str) -> list[float | None]:
    return [values[name].get(test) for values in sets]


def compared(sets: Sequence[Values], form: str, rule: tuple[str, str], test: str) -> tuple[float, float, float] | None:
    """By how much a rule is better than the plain rule of its form in the same sets: mean, deviation, and p of a paired t-test.
    None if a test has no value."""
    pairs = zip(of_sets(sets, _name(form, *rule), test), of_sets(sets, _name(form, PLAIN), test), strict=True)
    sign = -1 if test.startswith("positive") else 1
    better = [sign * (one - two) for one, two in pairs if one is not None and two is not None]
    return (*mean_and_deviation(better), paired_test(better)[1]) if len(better) > 1 else None


def _shown(found: tuple[float, float, float] | None, corrected: float) -> str:
    if found is None:
        return "–"
    return f"**{found[0]:+.3f}**" if corrected < LEVEL else f"{found[0]:+.3f}"


def _mean(sets: Sequence[Values], name: str, test: str, form: str = ".3f") -> str:
    values = [value for value in of_sets(sets, name, test) if value is not None]
    return f"{mean_and_deviation(values)[0]:{form}}" if values else "–"


def _sets(records: Sequence[Record], task: str) -> list[Values]:
    return [record["values"] for record in having(records, stage=1, task=task)]


def tables(records: Sequence[Record]) -> Iterator[str]:
    """The weights; the margin of every rule; pointing and mass; the trained layers."""
    yield _of_shares(having(records, stage=0))
    yield _of_rules(records, [(task, f"{MARGIN} {part}", f"{name}, {part}") for task, name in MODELS.items() for part in PARTS])
    boxes = ("pointing", "mass")
    yield _of_rules(records, [(task, f"{test} image", f"{name}, {test}") for task, name in MODELS.items() for test in boxes])
    yield _of_layers(having(records, stage=2))


def _of_shares(records: Sequence[Record]) -> str:
    """The share of the residual stream: means of a layer, and how much tokens of a layer differ."""
    lines = []
    for record in records:
        for tower, layers in grouped(record["shares"], lambda share: share["tower"]).items():
            means, widths = [one["mean"] for one in layers], [one["p95"] - one["p5"] for one in layers]
            ends = [f"{end(means):.3f}" for end in (min, max)]
            place = MODELS[record["task"]], tower, record["form"], record["state"]
            lines.append([*place, str(len(layers)), *ends, f"{max(widths):.3f}"])
    head = ["model", "tower", "form", "weights", "attentions", "smallest mean", "largest mean", "widest 5 % to 95 % of tokens"]
    return markdown(head, lines, words=(0, 1, 2, 3))


def _of_rules(records: Sequence[Record], columns: Sequence[tuple[str, str, str]]) -> str:
    """A line for each rule: for the plain rule the value, for others the difference from it; bold if p, after Holm's correction
    for all differences of the table, is below LEVEL."""
    lines = []
    places = [(form, rule, task, test) for form in FORMS for rule in RULES for task, test, _ in columns]
    found = {place: value for place in places if (value := compared(_sets(records, place[2]), *place[:2], place[3]))}
    corrected = dict(zip(found, holm([p for *_, p in found.values()]), strict=True))
    for form in FORMS:
        plain = [_mean(_sets(records, task), _name(form, PLAIN), test) for task, test, _ in columns]
        lines.append([form, "plain rule", "", *plain])
        for rule in RULES:
            at = [(form, rule, task, test) for task, test, _ in columns]
            differences = [_shown(found.get(place), corrected.get(place, 1.0)) for place in at]
            lines.append([form, *rule, *differences])
    return markdown(["form", "weights", "rows", *(shown for *_, shown in columns)], lines, words=(0, 1, 2))


def _of_layers(records: Sequence[Record]) -> str:
    """Bold as in `_of_rules`."""
    tests = f"{MARGIN} image", "pointing image"
    places = [
        (number, form, test, rule) for number in range(len(records)) for form in FORMS for test in tests for rule in OF_LAYERS
    ]
    found = {place: value for place in places if (value := compared(records[place[0]]["sets"], place[1], place[3], place[2]))}
    corrected = dict(zip(found, holm([p for *_, p in found.values()]), strict=True))
    lines = []
    for (number, record), form in itertools.product(enumerate(records), FORMS):
        right = record["accuracy"].values()
        line = [MODELS[record["task"]], record["layers"], f"{sum(right) / len(right):.1%}".replace("%", " %"), form]
        for test in tests:
            at = [(number, form, test, rule) for rule in OF_LAYERS]
            line += [_mean(record["sets"], _name(form, PLAIN), test)]
            line += [_shown(found.get(place), corrected.get(place, 1.0)) for place in at]
        lines.append(line)
    rules = [f"{PLAIN} rule", *(_name(*rule) for rule in OF_LAYERS)]
    head = ["model", "layers", "right", "form", *(f"{test}, {rule}" for test in (MARGIN, "pointing") for rule in rules)]
    return markdown(head, lines, words=(0, 1, 3))


def effects(records: Sequence[Record]) -> list[Effect]:
    """Of two rules, and of gradient x input through fixed norms and attention, on the plain rule's margin in the same scenes.
    The third is of the stored rows of `vlattn_lab.evaluation`, whose scenes are the same."""
    asked = [(task, part) for task in ("vqa", "captions") for part in PARTS]
    by_rule: dict[str, dict[tuple[str, str], list[float]]] = {}
    for (name, rows), form in itertools.product(CLAIMED, FORMS):
        of_rule = by_rule.setdefault(f"`{name}`, rows {rows}, {form}", {})
        for task, part in itertools.product(MODELS, PARTS):
            one, two = (of_sets(_sets(records, task), _name(form, *way), f"{MARGIN} {part}") for way in ((name, rows), (PLAIN,)))
            of_rule[task, part] = [a - b for a, b in zip(one, two, strict=True) if a is not None and b is not None]
    by_rule["gradient × input, norms and attention held fixed"] = {
        (task, part): _gradient_times_input(task, part) for task, part in itertools.product(MODELS, PARTS)
    }
    found: list[tuple[str, str, list[float]]] = []
    for rule, of_rule in by_rule.items():
        found += [(rule, f"{MODELS[task]}, {part}", of_rule[task, part]) for task, part in asked]
        sets = zip(*of_rule.values(), strict=False)
        found.append((rule, "all models, mean", [sum(one) / len(one) for one in sets]))
    return effects_of(found)


def _gradient_times_input(task: str, part: str) -> list[float]:
    """By how much its margin is above that of the plain rule with norms held fixed, for each set of scenes."""
    rows = json.loads((ROOT / "benchmarks" / "results" / f"evaluation-{task}.json").read_text(encoding="utf-8"))["rows"]
    values = {(row["method"], row["test"]): row["values"] for row in rows if row["part"] == part}
    margins = {
        method: [a - b for a, b in zip(values[method, "negative"], values[method, "positive"], strict=True)]
        for method in ("input_gradient", "gradient(freeze=norms)")
    }
    return [a - b for a, b in zip(*margins.values(), strict=True)]


def figure(records: Sequence[Record]) -> Figure:
    """The difference of the margin from the plain rule with its deviation over the sets of scenes."""
    drawn, axes = panels(len(MODELS), len(FORMS), (7.4, 2.0 * len(MODELS) + 0.6), sharex="row", sharey=True)
    for (row, task), (column, form) in itertools.product(enumerate(MODELS), enumerate(FORMS)):
        axis, sets = axes[row][column], _sets(records, task)
        for part, colour, shift in (("image", "#1d4ed8", -0.12), ("text", "#c2410c", 0.12)):
            found = [compared(sets, form, rule, f"{MARGIN} {part}") or (0.0, 0.0, 1.0) for rule in RULES]
            axis.errorbar(
                [mean for mean, *_ in found], [place + shift for place in range(len(RULES))],
                xerr=[deviation for _, deviation, _ in found],
                fmt="o", markersize=4, linewidth=1, color=colour, label=f"map of the {part}",
            )  # fmt: skip
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"{MODELS[task]}, {form}", fontsize=10)
        axis.set_yticks(range(len(RULES)), [_name(*rule) for rule in RULES])
        axis.tick_params(labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        if row == len(MODELS) - 1:
            axis.set_xlabel("margin less that of the plain rule")
    axes[0][0].invert_yaxis()
    drawn.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return drawn


EXPERIMENT = Experiment(
    (Stage(cells_of_shares, measure_shares), Stage(cells, measure), Stage(cells_of_layers, measure_layers)),
    tables,
    {"weighted_relevancy": figure},
    effects,
)
