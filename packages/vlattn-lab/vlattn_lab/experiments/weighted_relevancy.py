"""Does weighted relevancy (Huang et al., 2023) give better maps than the plain method? Read from the stored evaluations.

`python -m vlattn_lab.evaluation TASK` measures; this experiment compares the two methods on the same scenes, test by test,
and with chance. The seeds are sets of test scenes; the package ships the models.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlattn_fast.interpret.relevancy.methods.registry import published
from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.records import markdown, mean_and_deviation
from vlattn_lab.experiments.experiment import Cell, Experiment, Record, Settings, Stage, paired_test
from vlattn_lab.tasks import PLAIN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path("benchmarks/results")
TASKS = {"matching": "UNITER", "clip": "CLIP", "vqa": "CLIPMapper, answers", "captions": "CLIPMapper, captions"}
METHODS = {  # by the names of the stored evaluations
    **{
        published(name, weighting=weighting).label: what
        for name, weighting, what in (
            ("weighted", "contribution", "its weights from gradients"),
            ("weighted", "norm", "its weights from norms"),
            ("weighted", "equal", "weights 1/2"),
            ("weighted:no_normalization", "contribution", "from gradients, rows not divided"),
            ("weighted:no_normalization", "norm", "from norms, rows not divided"),
        )
    },
    "weighted": "from gradients, norms and attention held fixed",
}
COLOURS = dict(zip(METHODS, ("#1d4ed8", "#c2410c", "#111111", "#93c5fd", "#fdba74", "#15803d"), strict=True))
LOW_IS_GOOD = ("positive", "deletion")
# Not the control, which does not tell which map is better, and none of the tests that the evaluations gained later.
COMPARED = ("positive", "negative", "insertion", "deletion", "pointing", "iou", "mass")
LEVEL = 0.05


def path_of(task: str) -> Path:
    return RESULTS / f"evaluation-{task}.json"


def cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    tasks: list[Cell] = [{"task": task} for task in TASKS if path_of(task).is_file()]
    if not tasks:
        raise ValueError(f"{RESULTS} must hold a stored evaluation (python -m vlattn_lab.evaluation); got none")
    return tasks


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    report = json.loads(path_of(cell["task"]).read_text())
    stored = {(record["method"], record["test"], record["part"]): record["values"] for record in report["rows"]}
    compared = []
    for (method, test, part), values in stored.items():
        plain = stored["gradient" if method == "weighted" else PLAIN, test, part]  # the plain rule that holds the same fixed
        pairs = [(one, two) for one, two in zip(values, plain, strict=True) if one is not None and two is not None]
        if method not in METHODS or test not in COMPARED or len(pairs) < 2:
            continue
        sign = -1 if test in LOW_IS_GOOD else 1
        better = [sign * (one - two) for one, two in pairs]
        mean, deviation = mean_and_deviation(better)
        compared.append(
            {"method": method, "test": test, "part": part, "better_by": mean, "sd": deviation, "sets": len(pairs)}
            | {"p": paired_test(better)[1]}
        )
    return {"measured_at": report["commit"], "weights": report["weights"], "compared": compared}


def verdict(one: dict[str, Any]) -> str:
    return "open" if one["p"] >= LEVEL else "better" if one["better_by"] > 0 else "worse"


def tables(records: Sequence[Record]) -> Iterator[str]:
    lines = []
    for record, part, (method, what) in itertools.product(records, ("image", "text"), METHODS.items()):
        compared = [one for one in record["compared"] if (one["method"], one["part"]) == (method, part)]
        if compared:
            verdicts = [verdict(one) for one in compared]
            extremes = (extreme(compared, key=lambda one: one["better_by"]) for extreme in (max, min))
            ends = (f"{one['better_by']:+.3f} ({one['test']})" for one in extremes)
            counts = (str(verdicts.count(name)) for name in ("better", "worse", "open"))
            lines.append([TASKS[record["task"]], part, what, *counts, *ends])
    head = ["model", "map of the", "weights", "better", "worse", "open", "most in favour", "most against"]
    yield markdown(head, lines, words=(0, 1, 2, 6, 7))


def figure(records: Sequence[Record]) -> Figure:
    """The difference in each test with its spread over the sets of scenes."""
    drawn, (axes,) = panels(1, len(records), (3.4 * len(records), 5))
    for axis, record in zip(axes, records, strict=True):
        places = sorted(dict.fromkeys((one["part"], one["test"]) for one in record["compared"]), key=lambda place: place[0])
        for number, (method, colour) in enumerate(COLOURS.items()):
            compared = [one for one in record["compared"] if one["method"] == method]
            shift = 0.14 * (number - (len(COLOURS) - 1) / 2)
            heights = [places.index((one["part"], one["test"])) + shift for one in compared]
            axis.errorbar(
                [one["better_by"] for one in compared], heights, xerr=[one["sd"] for one in compared],
                fmt="o", markersize=3.5, linewidth=1, color=colour, label=METHODS[method],
            )  # fmt: skip
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=TASKS[record["task"]], xlabel="better than the plain rule by")
        axis.set_yticks(range(len(places)), [f"{test}, {part}" for part, test in places], fontsize=8)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return drawn


EXPERIMENT = Experiment((Stage(cells, measure),), tables, {"weighted_relevancy": figure})
