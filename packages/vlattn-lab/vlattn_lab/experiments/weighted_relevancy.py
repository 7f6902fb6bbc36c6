"""Does weighted relevancy (Huang et al., 2023) give better maps than the plain rule?

Every weighting explains models of four tasks, with and without the division of rows, in the published form and with norms held
fixed, and is compared with the plain rule of the same form on the same model and scenes. A seed stands for a trained model of
each task and its test scenes; without trained models the shipped ones are explained. How much the weights differ between tokens
is measured on these models and on the same ones with matrices drawn anew.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlattn_fast.backends.reference.relevancy_residual import WEIGHTINGS
from vlattn_fast.interpret.relevancy.methods.registry import with_options
from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.provenance import fingerprint
from vlattn_fast.measuring.records import having, markdown, mean_and_deviation, spread
from vlattn_lab.clip import caption_accuracy
from vlattn_lab.evaluation import residual_shares, run
from vlattn_lab.experiments.experiment import (
    Cell,
    Effect,
    Experiment,
    Record,
    Settings,
    Stage,
    effects_of,
    holm,
    paired_change,
    paired_test,
)
from vlattn_lab.mapper import prompt_accuracy, question_accuracy
from vlattn_lab.tasks import TASKS
from vlattn_lab.train.fit import seeded
from vlattn_lab.train.run import TRAININGS
from vlattn_lab.uniter import matching_accuracy
from vlattn_lab.weights import DATA

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
RIVAL = "gradient x input"  # through fixed norms and attention
MARGIN = "margin"  # the area under the curve of negative perturbation less that of positive perturbation
COUNT = 200  # test samples of each kind that tell the accuracy
TRAINED = {"matching": "uniter", "clip": "clip", "vqa": "vqa", "captions": "captions"}  # the training of a task's model
ACCURACY: dict[str, Callable[..., dict[str, float]]] = {
    "matching": matching_accuracy,
    "clip": caption_accuracy,
    "vqa": question_accuracy,
    "captions": lambda model, **drawn: prompt_accuracy(model, **drawn)["true"],
}
CLAIMED = [("contribution", "divided"), ("magnitude", "not divided")]  # our reading of the paper, and our best alternative
LEVEL = 0.05

Values = dict[str, dict[str, float | None]]  # by method, then by test and part


def methods(rules: Iterable[tuple[str, str]] = RULES) -> dict[str, Any]:
    """Rules of both forms, by their names in the records: the plain rule first, then `rules`; and the rival of all."""
    made = {RIVAL: with_options("input_gradient", freeze=("norms", "attention"))}
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


# --- what is measured ---


def cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    return [{"task": task, "seed": seed} for task in MODELS for seed in range(settings.seeds)]


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    name, seed = cell["task"], cell["seed"]
    samples, count = (2, 4) if settings.smoke else (SAMPLES[name], COUNT)
    folder = DATA if settings.models is None else settings.models / str(seed)
    model = TASKS[name].load(folder)
    return {
        "weights": fingerprint(model),
        "steps": steps_of(name, folder),
        "accuracy": ACCURACY[name](model, count=count, seed=seed),
        "shares": shares(name, model, samples),
        "values": _measured(name, model, samples, seed),
    }


def steps_of(task: str, folder: Path) -> int:
    """Of the training of a task's model."""
    return int(json.loads((folder / TRAININGS[TRAINED[task]].weights).with_suffix(".json").read_text())["steps"])


def shares(task: str, model: nn.Module, samples: int) -> list[dict[str, Any]]:
    """The shares of a model, and of the same model with weights drawn anew, on the scenes and with the answers and captions of
    the first."""
    states = {"trained": model, "untrained": seeded(0, lambda: redrawn(model))}
    return [
        {"form": form, "state": state, **record}
        for form, freeze in FORMS.items()
        for state, one in states.items()
        for record in residual_shares(TASKS[task], one, samples, freeze, asked=model)
    ]


def redrawn(model: nn.Module) -> nn.Module:
    """A copy of a model in which each matrix has other numbers of the same mean and deviation; vectors stay."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.mean() + parameter.std() * torch.randn_like(parameter))
    return copied


# --- what is shown ---


def of_sets(sets: Sequence[Values], name: str, test: str) -> list[float | None]:
    return [values[name].get(test) for values in sets]


def compared(sets: Sequence[Values], form: str, rule: tuple[str, str], test: str) -> tuple[float, float, float] | None:
    """By how much a rule is better than the plain rule of its form in the same sets: mean, deviation, and p of a paired t-test.
    None if a test has no value."""
    better = _better(sets, _name(form, *rule), _name(form, PLAIN), test)
    return (*mean_and_deviation(better), paired_test(better)[1]) if len(better) > 1 else None


def _better(sets: Sequence[Values], rule: str, plain: str, test: str) -> list[float]:
    """By how much a rule is better than another one in the same sets; those without a value are left out."""
    sign = -1 if test.startswith("positive") else 1
    pairs = zip(of_sets(sets, rule, test), of_sets(sets, plain, test), strict=True)
    return [sign * (one - two) for one, two in pairs if one is not None and two is not None]


def _shown(found: tuple[float, float, float] | None, corrected: float) -> str:
    if found is None:
        return "–"
    return f"**{found[0]:+.3f}**" if corrected < LEVEL else f"{found[0]:+.3f}"


def _mean(sets: Sequence[Values], name: str, test: str, form: str = ".3f") -> str:
    values = [value for value in of_sets(sets, name, test) if value is not None]
    return f"{mean_and_deviation(values)[0]:{form}}" if values else "–"


def _sets(records: Sequence[Record], task: str) -> list[Values]:
    return [record["values"] for record in having(records, task=task)]


def tables(records: Sequence[Record]) -> Iterator[str]:
    """How well the models do; the weights; the margin of every rule; pointing and mass."""
    yield _of_models(records)
    yield _of_shares(records)
    yield _of_widths(records)
    yield _of_rules(records, [(task, f"{MARGIN} {part}", f"{name}, {part}") for task, name in MODELS.items() for part in PARTS])
    boxes = ("pointing", "mass")
    yield _of_rules(records, [(task, f"{test} image", f"{name}, {test}") for task, name in MODELS.items() for test in boxes])


def _of_models(records: Sequence[Record]) -> str:
    lines = []
    for task, name in MODELS.items():
        of_task = having(records, task=task)
        for kind in of_task[0]["accuracy"]:
            right = [record["accuracy"][kind] for record in of_task]
            lines.append([name, str(of_task[0]["steps"]), kind, spread(right), f"{min(right):.3f}"])
    return markdown(["model", "steps", "kind", "accuracy", "of the worst model"], lines, words=(0, 2))


def _of_shares(records: Sequence[Record]) -> str:
    """The share of the residual stream: means of a layer, and how much its tokens differ; each is a mean over the models."""
    lines = []
    places = [(one["task"], share["tower"], share["form"], share["state"]) for one in records for share in one["shares"]]
    for task, tower, form, state in dict.fromkeys(places):
        of_models = [having(record["shares"], tower=tower, form=form, state=state) for record in having(records, task=task)]
        means = [[one["mean"] for one in layers] for layers in of_models]
        widths = [max(one["p95"] - one["p5"] for one in layers) for layers in of_models]
        shown = [[min(one) for one in means], [max(one) for one in means], widths]
        lines.append(
            [MODELS[task], tower, form, state, str(len(means[0])), *(f"{mean_and_deviation(one)[0]:.3f}" for one in shown)]
        )
    head = ["model", "tower", "form", "weights", "attentions", "smallest mean", "largest mean", "widest 5 % to 95 % of tokens"]
    return markdown(head, lines, words=(0, 1, 2, 3))


def widths(records: Sequence[Record], state: str) -> list[float]:
    """How much the shares of one attention's tokens differ, 5 % to 95 %, with norms held fixed: for each seed the mean over
    models, of the mean over attentions."""
    found = []
    for seed in sorted({record["seed"] for record in records}):
        of_models = [having(one["shares"], form="norms held fixed", state=state) for one in having(records, seed=seed)]
        means = [sum(one["p95"] - one["p5"] for one in shares) / len(shares) for shares in of_models]
        found.append(sum(means) / len(means))
    return found


def _of_widths(records: Sequence[Record]) -> str:
    trained, redrawn = (widths(records, state) for state in ("trained", "untrained"))
    line = [spread(trained), spread(redrawn), *paired_change(redrawn, trained)]
    return markdown(["5 % to 95 % of tokens, norms held fixed: trained", "matrices drawn anew", "anew less trained", "p"], [line])


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


def effects(records: Sequence[Record]) -> list[Effect]:
    """Of two rules on the margin of the plain rule of their form, and of gradient x input on that of the plain rule with norms
    held fixed, in the same models and scenes."""
    ways = [
        (f"`{name}`, rows {rows}, {form}", _name(form, name, rows), _name(form, PLAIN))
        for (name, rows), form in itertools.product(CLAIMED, FORMS)
    ]
    ways.append(("gradient × input, norms and attention held fixed", RIVAL, _name("norms held fixed", PLAIN)))
    found: list[tuple[str, str, list[float]]] = []
    for claim, rule, plain in ways:
        gains = {
            (task, part): _better(_sets(records, task), rule, plain, f"{MARGIN} {part}")
            for task, part in itertools.product(MODELS, PARTS)
        }
        asked = [(task, part) for task in ("vqa", "captions") for part in PARTS]
        found += [(claim, f"{MODELS[task]}, {part}", gains[task, part]) for task, part in asked]
        found.append((claim, "all models, mean", [sum(one) / len(one) for one in zip(*gains.values(), strict=True)]))
    return effects_of(found)


def figure(records: Sequence[Record]) -> Figure:
    """The difference of the margin from the plain rule with its deviation over the models."""
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


EXPERIMENT = Experiment((Stage(cells, measure),), tables, {"weighted_relevancy": figure}, effects)
